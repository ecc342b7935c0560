"""One optimizer step: `accumulate` adds up microbatches, `apply` divides once and updates.

Both are jitted pure functions over plain pytrees with their inputs donated. A step has as many microbatches as
its samples need; only their few shapes are compiled. The loss, and the gradient, of a step is the sum over all
its tokens divided by the sum of their weights, and `apply` is the only place where that division is made.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mice_jax.loss import cross_entropy_sums, logit_tokens
from mice_jax.models.transformer import Compute, Decoder, Params
from mice_jax.sharding import BATCH_AXES, constrain, param_shardings

LEAST_REST = 1e-3  # of a step's pairs of microbatches: below it there is one microbatch, and rounding

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions, loss_weights: each [B T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # updates done, int32
    params: Params  # float32
    opt_state: optax.OptState


class Sums(NamedTuple):
    """What a step's microbatches add up to, float32."""

    grads: Params  # or in bfloat16, where that is asked for
    loss_sum: jax.Array
    weight_sum: jax.Array
    # Over microbatches, of their own gradient sums' squared norms and of their squared weights:
    grad_sq_sum: jax.Array
    weight_sq_sum: jax.Array


class Jitted:
    """A function as it is compiled for a mesh."""

    def __init__(self, f: Callable, mesh: Mesh, **jit_args: Any):
        self.jitted, self._mesh = jax.jit(f, **jit_args), mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self.jitted(*args)

    def compile(self, *args: Any) -> Any:
        """Compiles for arguments of such shapes, without running: a call with them finds the program there."""
        with jax.set_mesh(self._mesh):
            return self.jitted.lower(*args).compile()


class StepFunctions(NamedTuple):
    """The compiled functions of a run; `batch` is one microbatch."""

    init: Jitted  # (key) -> TrainState
    start: Jitted  # (params), donated -> TrainState
    zero_sums: Jitted  # () -> Sums
    accumulate: Jitted  # (params, sums, batch) -> Sums; the sums are donated
    # (state, sums), both donated -> (TrainState, Sums, dict[str, jax.Array]). A third argument is the gradient norm
    # above which no update is made.
    apply: Jitted
    evaluate: Jitted  # (params, batch) -> loss_sum, weight_sum
    abstract_state: TrainState  # shapes with shardings, for restoring and for compiling without arrays
    abstract_sums: Sums


def batch_loss(
    decoder: Decoder, params: Params, batch: Batch, compute: Compute, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """loss_sum and weight_sum of one microbatch."""
    model = decoder.bind(params)
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], compute)
    return cross_entropy_sums(
        hidden,
        constrain(model.output_weight(), "vocab", "hidden"),
        batch["targets"],
        batch["loss_weights"],
        vocab_size=decoder.spec.vocab_size,
        logit_scale=decoder.spec.logit_scale,
        softcap=decoder.spec.logit_softcap,
        chunk=chunk or logit_tokens(decoder.vocab_rows),
        batch_axes=BATCH_AXES,
    )


def make_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    compute: Compute,
    trained: Any = None,
    accumulate_dtype: str = "float32",
) -> StepFunctions:
    """Jits the functions of a run for one mesh; parameters and moments lie as `sharding.RULES` says.

    Args:
      trained: a tree like the parameters' of bool arrays that broadcast to them; None = all of them.
      accumulate_dtype: of the sum of a step's gradients.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = lay_out(decoder, optimizer, mesh)
    # Trees of shardings in the places of the arrays that they are for.
    state_shardings = jax.tree.map(lambda a: a.sharding, abstract)
    sums_shardings = Sums(state_shardings.params, *[cast(Any, whole)] * 4)
    abstract_sums = Sums(
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, accumulate_dtype, sharding=p.sharding), abstract.params),
        *[cast(Any, jax.ShapeDtypeStruct((), jnp.float32, sharding=whole))] * 4,
    )

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch_loss(decoder, params, batch, compute)

    def start(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def zero_sums() -> Sums:
        zero = jnp.zeros((), jnp.float32)
        return Sums(jax.tree.map(lambda p: jnp.zeros(p.shape, accumulate_dtype), decoder.abstract), *[zero] * 4)

    def accumulate(params: Params, sums: Sums, batch: Batch) -> Sums:
        (loss_sum, weight_sum), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        grad_sq = optax.tree.norm(_only(trained, grads), squared=True)
        own = Sums(grads, loss_sum, weight_sum, grad_sq, weight_sum**2)
        return jax.tree.map(lambda s, x: (s + x).astype(s.dtype), sums, own)

    def apply(state: TrainState, sums: Sums, limit: float = math.inf) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
        state, metrics = apply_sums(state, sums, optimizer, schedule, limit, trained)
        return state, jax.tree.map(jnp.zeros_like, sums), metrics  # zeroed in place for the next step

    return StepFunctions(
        init=Jitted(lambda key: start(decoder.init(key)), mesh, out_shardings=state_shardings),
        start=Jitted(start, mesh, donate_argnums=0, out_shardings=state_shardings),
        zero_sums=Jitted(zero_sums, mesh, out_shardings=sums_shardings),
        accumulate=Jitted(accumulate, mesh, donate_argnums=1, out_shardings=sums_shardings),
        apply=Jitted(apply, mesh, donate_argnums=(0, 1), out_shardings=(state_shardings, sums_shardings, whole)),
        evaluate=Jitted(loss, mesh, out_shardings=(whole, whole)),
        abstract_state=abstract,
        abstract_sums=abstract_sums,
    )


def lay_out(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> TrainState:
    """A run's state as shapes with shardings; parameters and moments lie as `sharding.RULES` says."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    opt_state = jax.eval_shape(optimizer.init, decoder.abstract)
    lie = TrainState(cast(Any, whole), shardings, _moment_shardings(opt_state, decoder.abstract, shardings, whole))
    state = TrainState(cast(Any, jax.ShapeDtypeStruct((), jnp.int32)), decoder.abstract, opt_state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, lie)


def _moment_shardings(opt_state: Any, params: Params, shardings: Params, whole: NamedSharding) -> Any:
    """Where an optimizer's state lies: what has a parameter's name and shape, as the parameter does.

    The rest, such as counts and Adafactor's sums over rows and columns, is whole on every device.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    lie = jax.tree.leaves(shardings)
    of_param = {_names(path): (leaf.shape, s) for (path, leaf), s in zip(flat, lie, strict=True)}

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shape, sharding = of_param.get(_names(path), (None, whole))
        return sharding if leaf.shape == shape else whole

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _names(path: tuple) -> tuple[str, ...]:
    """The names at a path's end: a state holds its moments in trees like the parameters', inside tuples of its own."""
    own = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return tuple(key.key for key in own)[::-1]


def apply_sums(
    state: TrainState,
    sums: Sums,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    limit: jax.typing.ArrayLike = jnp.inf,
    trained: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The update from a step's sums, and what it measured.

    Where the loss or the gradient norm is not finite the state is returned as it was, and `finite` is false. Where
    the norm is above `limit` the step is done without an update, and `skipped` is true. What is not `trained` has no
    gradient, so the norm is that of the rest, and stays as it is.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight_sum, sums.grads)
    grads = _only(trained, grads)
    loss = sums.loss_sum / sums.weight_sum
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skipped = finite & (grad_norm > limit)
    rate = schedule(state.step)
    directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = _only(trained, jax.tree.map(lambda d: -rate * d, directions))
    params = cast(Params, optax.apply_updates(state.params, updates))
    made = finite & ~skipped
    new_state = TrainState(
        jnp.where(finite, state.step + 1, state.step),
        *jax.tree.map(lambda new, old: jnp.where(made, new, old), (params, opt_state), (state.params, state.opt_state)),
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "grad_sq_corrected": corrected_square(grad_norm, sums),
        "param_norm": optax.tree.norm(new_state.params),
        "update_norm": jnp.where(skipped, 0.0, optax.tree.norm(updates)),
        "learning_rate": rate,
        "finite": finite,
        "skipped": skipped,
    }
    return new_state, metrics


def corrected_square(grad_norm: jax.Array, sums: Sums) -> jax.Array:
    """An unbiased estimate of the true gradient's squared norm; NaN from one microbatch, negative where noise rules.

    A step's own |g|^2 is |G|^2 and the variance of g, which the batch size divides. Microbatch i has the gradient sum
    s_i and the weight w_i, with s_i of mean w_i G, whatever its variance, and independent of the others. So
    s_i . s_j has the mean w_i w_j |G|^2 for i != j, and over all such pairs, g being sum s_i / W and W = sum w_i,

      |G|^2 ~ (|sum s_i|^2 - sum |s_i|^2) / (W^2 - sum w_i^2) = (|g|^2 - q) / (1 - r)

    with q = sum |s_i|^2 / W^2 and r = sum w_i^2 / W^2. Unequal and empty microbatches need nothing more.
    """
    q = sums.grad_sq_sum / sums.weight_sum**2
    r = sums.weight_sq_sum / sums.weight_sum**2
    few = 1 - r < LEAST_REST
    return jnp.where(few, jnp.nan, (grad_norm**2 - q) / jnp.where(few, 1.0, 1 - r))


def _only(trained: Any, tree: Params) -> Params:
    """Zero wherever `trained` is false."""
    return tree if trained is None else jax.tree.map(lambda t, x: jnp.where(t, x, 0.0), trained, tree)
