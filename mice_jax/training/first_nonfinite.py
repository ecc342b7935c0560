"""Finds the operation that makes the first value that is not finite in a step, for `mice train --debug_nans`.

The functions of a step are compiled as a whole, so they cannot say which of their operations failed. Here the forward
and backward pass of a microbatch is computed once more, by a program that also returns, for each operation, whether its
inputs and outputs are finite. The loops through layers return this for each of their iterations. Nothing is slower
before a step has failed.
"""

import functools
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mice_jax.models.checkpoint_layout import dotted_path
from mice_jax.models.layer_stacks import is_loop_of_layers, layer_of_scopes, layers_of_stack
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Params
from mice_jax.step import Batch, Jitted, StepFunctions

PACKAGE = Path(__file__).parents[1]
# Words in the names of scopes that JAX adds.
OF_JAX = ("jvp", "transpose", "rematted_computation", "checkpoint", "vmap")
FINITE, INFINITE, NAN = 0, 1, 2
# Operations that compute no value.
MOVES = (
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "concatenate", "rev",
    "sharding_constraint", "name", "neg", "stop_gradient", "optimization_barrier",
)  # fmt: skip
# Operations that stand for the program in their parameters.
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


class Operation(NamedTuple):
    """An operation of a program: its name, the scopes that it is in, and the place in the code that it comes from."""

    name: str
    scopes: str
    place: str


class Loop(NamedTuple):
    """A loop of a program, and what is in its body."""

    scopes: str
    length: int
    reverse: bool
    body: list["Operation | Loop"]


class Worst(NamedTuple):
    """The worst value among the inputs of an operation, and among its results: FINITE, INFINITE or NAN."""

    inputs: Any
    outputs: Any


class Found(NamedTuple):
    """An operation that made a value which is not finite.

    Attributes:
      operation: The operation.
      loops: The scopes and the iteration of each loop that it is in, from the outside in.
      worst: What it was given, and what it made.
    """

    operation: Operation
    loops: tuple[tuple[str, int], ...]
    worst: Worst


# ---------------------------------------------------------------------------------------- in the traced program
class _Value:
    """An array of the traced program, whose worst value is computed when it is first asked for."""

    def __init__(self, array: Any, worst: Any = None):
        self.array, self._worst = array, worst

    @property
    def worst(self) -> Any:
        if self._worst is None:
            x, self._worst = jnp.asarray(self.array), jnp.int8(FINITE)
            if jnp.issubdtype(x.dtype, jnp.floating):
                kinds = jnp.where(jnp.isnan(x), jnp.int8(NAN), jnp.where(jnp.isinf(x), jnp.int8(INFINITE), self._worst))
                self._worst = jnp.max(kinds, initial=jnp.int8(FINITE))
        return self._worst


def _worst(values: Sequence[_Value]) -> Any:
    return functools.reduce(jnp.maximum, (value.worst for value in values), jnp.int8(FINITE))


def _place(eqn: Any) -> str:
    """Returns the innermost place of this package in the traceback of an equation, as file:line."""
    if eqn.source_info.traceback is None:
        return ""
    for frame in reversed(traceback.extract_tb(eqn.source_info.traceback.as_python_traceback())):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE) and path != Path(__file__):
            return f"{path.relative_to(PACKAGE.parent)}:{frame.lineno}"
    return ""


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value], scopes: str, items: list[Operation | Loop]
) -> tuple[list[_Value], list[Any]]:
    """Evaluates a jaxpr, and observes its operations.

    Args:
      jaxpr: an open jaxpr.
      consts: its constants.
      args: its arguments.
      scopes: the scopes in which it is called.
      items: its operations and loops are appended to this list, in their order.

    Returns:
      Its results; and for each of the appended items its `Worst` or, for a loop, the list of those of its body, with a
      leading dim of its iterations.
    """
    values: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    observed: list[Any] = []

    def read(var: Any) -> _Value:
        return _Value(var.val) if isinstance(var, jax_core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [read(var) for var in eqn.invars]
        own = "/".join(filter(None, (scopes, str(eqn.source_info.name_stack))))
        inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
        if name in INLINED and inner is not None:
            is_closed = isinstance(inner, jax_core.ClosedJaxpr)
            opened, inner_consts = (inner.jaxpr, inner.consts) if is_closed else (inner, ())
            outputs, inside = _evaluate(opened, inner_consts, inputs, own, items)
            observed += inside
        elif name == "scan" and is_loop_of_layers(own):
            outputs, inside, loop = _scan(eqn, inputs, own)
            items.append(loop)
            observed.append(inside)
        else:
            variables = list(dict.fromkeys(var for var in eqn.invars if not isinstance(var, jax_core.Literal)))
            alone = jaxpr.replace(constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn])
            arrays = jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(alone, []))(*(values[var].array for var in variables))
            # What only moves or copies values has the worst value of its inputs.
            outputs = [_Value(x, _worst(inputs) if name in MOVES else None) for x in arrays]
            if name not in MOVES:
                items.append(Operation(name, own, _place(eqn)))
                observed.append(Worst(_worst(inputs), _worst(outputs)))
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars], observed


def _scan(eqn: Any, inputs: Sequence[_Value], scopes: str) -> tuple[list[_Value], list[Any], Loop]:
    """Evaluates a scan whose body is observed; returns its results, what is observed, and the loop."""
    p, body, items = eqn.params, eqn.params["jaxpr"], []
    consts, init, xs = (
        inputs[: p["num_consts"]],
        inputs[p["num_consts"] : p["num_consts"] + p["num_carry"]],
        inputs[p["num_consts"] + p["num_carry"] :],
    )
    worst_of_consts = [value.worst for value in consts]

    def step(carry: Any, x: Any) -> Any:
        items.clear()
        args = [_Value(c.array, worst) for c, worst in zip(consts, worst_of_consts, strict=True)]
        outputs, inside = _evaluate(body.jaxpr, body.consts, [*args, *map(_Value, [*carry, *x])], "", items)
        arrays = [value.array for value in outputs]
        return arrays[: p["num_carry"]], (arrays[p["num_carry"] :], inside)

    carry, (stacked, inside) = jax.lax.scan(
        step, [v.array for v in init], [v.array for v in xs], length=p["length"], reverse=p["reverse"]
    )
    return list(map(_Value, [*carry, *stacked])), inside, Loop(scopes, p["length"], p["reverse"], items)


# ---------------------------------------------------------------------------------------- on the host
def _search(
    items: Sequence[Operation | Loop],
    observed: Sequence[Any],
    is_made: Callable[[Worst], bool],
    loops: tuple[tuple[str, int], ...] = (),
) -> Found | None:
    """Returns the first operation, in the order of computation, that `is_made` accepts."""
    for item, own in zip(items, observed, strict=True):
        if isinstance(item, Operation):
            if is_made(own):
                return Found(item, loops, own)
            continue
        for i in reversed(range(item.length)) if item.reverse else range(item.length):
            of_iteration = jax.tree.map(lambda x, i=i: x[i], own)
            found = _search(item.body, of_iteration, is_made, (*loops, (item.scopes, i)))
            if found:
                return found
    return None


class Finder:
    """Computes a function again, and finds the operation that made the first value which is not finite.

    Args:
      function: a function of arrays, not jitted.
      mesh: the devices.
    """

    def __init__(self, function: Callable, mesh: Mesh):
        self._items: list[Operation | Loop] = []

        def observe(*args: Any) -> list[Any]:
            closed = jax.make_jaxpr(function)(*args)
            self._items.clear()
            return _evaluate(closed.jaxpr, closed.consts, list(map(_Value, jax.tree.leaves(args))), "", self._items)[1]

        self._observe = Jitted(observe, mesh, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, *args: Any) -> Found | None:
        """Computes the function once.

        Args:
          *args: its arguments, which are finite.

        Returns:
          The first operation with a NaN from finite inputs; the first with an infinite value from finite inputs, where
          NaNs come from infinite values or there are none; None if all is finite.
        """
        observed = jax.device_get(self._observe(*args))
        first_nan = _search(self._items, observed, lambda worst: worst.outputs == NAN and worst.inputs < NAN)
        if first_nan and first_nan.worst.inputs == FINITE:
            return first_nan
        # Infinite values become NaN where they are subtracted or multiplied by 0: what made them is to blame.
        return _search(self._items, observed, lambda worst: worst.outputs > FINITE == worst.inputs) or first_nan


def nonfinite_params(spec: ModelSpec, params: Params) -> list[str]:
    """Returns the parameters that have values which are not finite.

    Args:
      spec: the model.
      params: its parameters.

    Returns:
      Their names, with the layer where they are stacked over layers: "layers.mlp.down of layer 3".
    """

    def bad(path: tuple, x: jax.Array) -> jax.Array:
        own_axes = tuple(range(1 if path[0].key == "layers" else 0, x.ndim))
        return ~jnp.all(jnp.isfinite(x), axis=own_axes)

    found = []
    flags = jax.device_get(jax.jit(lambda tree: jax.tree_util.tree_map_with_path(bad, tree))(params))
    for path, flag in jax.tree_util.tree_leaves_with_path(flags):
        name = dotted_path(path)
        if np.ndim(flag):
            layers = layers_of_stack(spec, path[1].key)
            found += [f"{name} of layer {layers[row]}" for row in np.flatnonzero(flag)]
        elif flag:
            found.append(name)
    return found


def describe(found: Found) -> str:
    """Describes an operation: the pass, the layer, the part of the model, its name and its place in the code."""
    scopes = (*found.loops, (found.operation.scopes, 0))
    backward = any("transpose(" in names for names, _ in scopes)
    layer = layer_of_scopes(scopes)
    words = re.findall(r"\w+", "/".join(names for names, _ in scopes))
    parts = [word for word in words if word not in OF_JAX and not word.startswith("layers_")]
    place = [
        f"the {'backward' if backward else 'forward'} pass",
        *([f"layer {layer}"] if layer is not None else []),
        *(["/".join(parts)] if parts else []),
    ]
    at = f" at {found.operation.place}" if found.operation.place else ""
    value = "NaN" if found.worst.outputs == NAN else "infinite value"
    return f"{', '.join(place)}: {found.operation.name}{at} makes the first {value} from finite inputs"


def explain_step(spec: ModelSpec, fns: StepFunctions, mesh: Mesh, params: Params, microbatches: Sequence[Batch]) -> str:
    """Explains why the loss or the gradient of a step is not finite, as `explain` does, with the step functions."""
    return explain(spec, Finder(fns.gradients, mesh), params, microbatches)


def explain(spec: ModelSpec, find: Finder, params: Params, microbatches: Sequence[Batch]) -> str:
    """Explains why the loss or the gradient of a step is not finite.

    Every process of the run calls this function.

    Args:
      spec: the model.
      find: finds the operation in `StepFunctions.gradients`.
      params: the parameters before the step, joined with frozen ones.
      microbatches: the microbatches of the step.

    Returns:
      Sentences for the user.
    """
    if broken := nonfinite_params(spec, params):
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return f"The parameters were not finite before the step: {', '.join(broken[:3])}{more}."
    for number, batch in enumerate(microbatches, 1):
        found = find(params, batch)
        if found:
            return f"In microbatch {number} of {len(microbatches)}, {describe(found)}."
    return (
        f"Computed again, all values of the step's {len(microbatches)} microbatches are finite: the sum of their "
        "gradients, or the square of its norm, is too large for its dtype."
    )
