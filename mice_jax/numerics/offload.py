"""Optimizer state in the host memory of the devices, and updates that bring a part of it at a time to the devices.

The parts are the layers, one after another, and all other parameters together. Layers are stacked along a leading dim
(models/layer_stacks.py), so a loop over that dim has the moments of one layer on the devices at a time. What a part
computes does not depend on the others, so the result is that of an update of all parts at once. Compiled, it may differ
from that in the last bit of an update, since XLA fuses and simplifies the two programs in different ways.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mice_jax.errors import UserError
from mice_jax.numerics.blockwise import Quantized

HOST_KIND = "pinned_host"  # JAX's name of host memory that devices read and write by themselves
LAYERS = "layers"  # the key of the parameters that are stacked over layers

T = TypeVar("T")


class Part(NamedTuple):
    """The stacks of a number of layers, of which one is updated at a time, or the other parameters, all at once.

    Attributes:
      rows: The number of layers; 0 for the other parameters, to which stacks of one layer belong.
    """

    rows: int


# ---------------------------------------------------------------------------------------- memory kinds
def on_host(sharding: NamedSharding) -> NamedSharding:
    """Returns the same sharding in host memory."""
    return sharding.with_memory_kind(HOST_KIND)


def is_on_host(leaf: Any) -> bool:
    """Whether an array, or a shape with a sharding, is in host memory."""
    return getattr(leaf.sharding, "memory_kind", None) == HOST_KIND


def check_host_memory_kind(devices: Sequence[Any], setting: str) -> None:
    """Raises UserError if programs on these devices cannot keep arrays in host memory, as a setting asks for."""
    for device in devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_KIND not in kinds:
            raise UserError(
                f"{setting} keeps arrays in the memory kind {HOST_KIND!r}, which JAX does not offer on "
                f"{device.device_kind}: it has {', '.join(map(repr, kinds))} there. Leave it at its default."
            )


def compute_on_device(function: Callable[[T], T], tree: T) -> T:
    """Applies a function on the devices to a tree, whose arrays are deleted; results are in the memory of the old."""

    def traced(tree: T) -> T:
        return jax.tree.map(_like, function(jax.tree.map(_to_device, tree)), tree)

    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.jit(traced, donate_argnums=0, out_shardings=shardings)(tree)


def _traced_on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device) if _traced_on_host(x) else x


def _like(x: jax.Array, other: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host) if _traced_on_host(other) else x


# ---------------------------------------------------------------------------------------- parts
def dict_keys(path: tuple) -> tuple[str, ...]:
    """Returns the dict keys at the end of a path: they name a parameter, even inside the tuples of an optimizer.

    Codes and scales of a quantised array have the keys of the array.
    """
    if path and getattr(path[-1], "name", None) in Quantized._fields:
        path = path[:-1]
    reversed_keys = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return tuple(key.key for key in reversed_keys)[::-1]


def can_be_on_host(path: tuple, leaf: Any) -> bool:
    """Whether an array of an optimizer's state can be kept in host memory: one of a parameter, but for 8-bit tables.

    libtpu 0.0.42 does not compile the transfer of a whole array of 8 bits an entry, only that of a slice of it. So such
    an array is on the devices if it is no stack of layers.
    """
    part = _part_of(path, leaf)
    return part is not None and (part.rows > 0 or jnp.dtype(leaf.dtype).itemsize > 1)


def _part_of(path: tuple, leaf: Any) -> Part | None:
    """Returns the part of the parameters to which a leaf belongs; None for counts and other numbers."""
    keys = dict_keys(path)
    if not keys:
        return None
    return Part(leaf.shape[0] if keys[0] == LAYERS and leaf.shape[0] > 1 else 0)


def _parts_of(params: Any) -> list[Part]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return list(dict.fromkeys(part for path, leaf in leaves if (part := _part_of(path, leaf))))


def _take(part: Part, layer: Any, tree: T) -> T:
    """Returns the tree with the rows of one part on the devices, and no rows of all other parts.

    Args:
      part: The part.
      layer: The layer of stacks.
      tree: A tree like the parameters, or of several such trees and of numbers, which stay as they are.
    """

    def taken(path: tuple, x: jax.Array) -> jax.Array:
        own = _part_of(path, x)
        if own is None:
            return x
        if own != part:
            return jnp.zeros((0, *x.shape[1:]), x.dtype)
        return _to_device(jax.lax.dynamic_slice_in_dim(x, layer, 1) if part.rows else x)

    return jax.tree_util.tree_map_with_path(taken, tree)


def take_mask(part: Part, layer: Any, mask: Any) -> Any:
    """Returns a mask of the parameters, whose bool arrays broadcast to them, for what `update_by_parts` updates.

    Args:
      part: The part that is updated.
      layer: The layer of stacks.
      mask: A tree like the parameters; None stays None.
    """

    def taken(path: tuple, x: Any) -> Any:
        if not x.ndim or x.shape[0] == 1:
            return x  # it broadcasts to any number of rows
        own = _part_of(path, x)
        if own != part:
            return x[:0]
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), layer, 1) if part.rows else x

    return jax.tree_util.tree_map_with_path(taken, mask)


def update_by_parts(
    update: Callable[[Part, Any, T, Any], tuple[T, jax.Array]], params: Any, state: T, inputs: Any
) -> tuple[T, jax.Array]:
    """Updates a state part by part, inside a traced function.

    Args:
      update: Returns the new state of one part and a number that is added up over parts, given the part, the layer of
        stacks, and the state and the inputs, which have no rows of other parts.
      params: The parameters, or their shapes, which define the parts.
      state: Trees like the parameters, some of whose arrays are in host memory, and numbers, which every part is given
        as they are here.
      inputs: Trees like the parameters, on the devices.

    Returns:
      The new state, each array in the memory where it was, and the sum of the numbers.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    old, structure = jax.tree.flatten(state)
    parts = [_part_of(path, x) for path, x in zip(paths, old, strict=True)]
    result, total = list(old), jnp.float32(0)

    for part in _parts_of(params):
        own = [i for i, of_leaf in enumerate(parts) if of_leaf in (part, None)]

        def updated(layer: Any, carry: tuple, part: Part = part, own: list[int] = own) -> tuple:
            arrays, total = carry
            leaves = list(old)
            for i, x in zip(own, arrays, strict=True):
                leaves[i] = x if parts[i] else old[i]
            new, number = update(part, layer, *_take(part, layer, (structure.unflatten(leaves), inputs)))
            rows = jax.tree.leaves(new)
            put = [_put(arrays[n], rows[i], part, layer) if parts[i] else rows[i] for n, i in enumerate(own)]
            return put, total + number

        carry = [result[i] for i in own], total
        new, total = jax.lax.fori_loop(0, part.rows, updated, carry) if part.rows else updated(0, carry)
        for i, x in zip(own, new, strict=True):
            result[i] = x
    return structure.unflatten(result), total


def _put(x: jax.Array, rows: jax.Array, part: Part, layer: Any) -> jax.Array:
    """Replaces the rows that `_take` took."""
    rows = _like(rows, x)
    return jax.lax.dynamic_update_slice_in_dim(x, rows, layer, 0) if part.rows else rows


def init_on_host(init: Callable[[Any], T], params: Any) -> T:
    """Makes the state of an optimizer in host memory, inside a traced function; one part at a time is on the devices.

    Args:
      init: Makes the state of parameters.
      params: The parameters.

    Returns:
      The state, with what `can_be_on_host` in host memory and the rest on the devices.
    """
    abstract = jax.eval_shape(init, params)
    structure = jax.tree.structure(abstract)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    parts = [_part_of(path, x) for path, x in leaves]
    spaces = [jax.memory.Space.Host if can_be_on_host(path, x) else jax.memory.Space.Device for path, x in leaves]
    result: list[Any] = [None] * len(parts)
    for part in _parts_of(params):
        own = [i for i, of_leaf in enumerate(parts) if of_leaf == part]

        def made(layer: Any, part: Part = part) -> list[jax.Array]:
            return jax.tree.leaves(init(_take(part, layer, params)))

        def made_layer(_: None, layer: Any, own: list[int] = own, made: Callable = made) -> tuple[None, list]:
            rows = made(layer)
            return None, [jax.device_put(rows[i][0], spaces[i]) for i in own]

        if part.rows:
            _, arrays = jax.lax.scan(made_layer, None, jnp.arange(part.rows))
        else:
            rows = made(0)
            arrays = [jax.device_put(rows[i], spaces[i]) for i in own]
        for i, x in zip(own, arrays, strict=True):
            result[i] = x
    numbers = jax.tree.leaves(init(jax.tree.map(lambda x: x[:0], params)))
    return structure.unflatten(numbers[i] if x is None else x for i, x in enumerate(result))
