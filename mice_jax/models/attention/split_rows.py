"""Rows whose slots are split over the devices of the mesh axis `sequence`: their order, and what devices exchange.

Each device attends with two parts of the queries of a row to all its keys and values, in the order that balances the
work of causal attention (`packing_limits.balanced_parts`). Where a model needs slots in the order of the row, devices
have two neighbouring parts outside of attention, and queries and results are moved.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mice_jax.models import rope
from mice_jax.models.attention.segments import pad_to_multiple
from mice_jax.packing_limits import balanced_parts
from mice_jax.sharding import LENGTH_AXIS

# B rows, T slots of a row, P parts of a row whose queries one device has


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """Which queries of a row a device has; an attention kernel gets its queries only, and all keys and values."""

    devices: int  # that share a row
    device: Any  # index of this device among them, int32

    @property
    def parts(self) -> int:
        """The number of parts of a row whose queries each device has, in balanced order."""
        return 1 if self.devices == 1 else 2

    def starts(self, queries: int) -> jax.Array:
        """Returns the slots of the row at which the parts of a device's queries start, [P] int32."""
        first = jnp.asarray(self.device, jnp.int32)
        of_parts = [first, 2 * self.devices - 1 - first][: self.parts]
        return jnp.stack(of_parts) * (queries // self.parts)

    def slots(self, queries: int) -> jax.Array:
        """Returns the slots of the row at which a device's queries are, [T/devices] int32."""
        within = jnp.arange(queries // self.parts, dtype=jnp.int32)
        return (self.starts(queries)[:, None] + within).reshape(-1)


WHOLE_ROW = RowSplit(devices=1, device=0)


def query_segments(split: RowSplit, queries: int, segment_ids: jax.Array) -> jax.Array:
    """Returns the segments of a device's queries, of those of whole rows [B T]."""
    return segment_ids if split is WHOLE_ROW else segment_ids[:, split.slots(queries)]


def pad_parts(multiple: int, split: RowSplit, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Pads each part of rows [B T/devices ...] with zeros to a multiple of slots."""

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] * split.parts, -1, *x.shape[2:])

    padded = pad_to_multiple(multiple, *map(apart, arrays))
    return tuple(y.reshape(x.shape[0], -1, *x.shape[2:]) for x, y in zip(arrays, padded, strict=True))


def cut_parts(queries: int, split: RowSplit, x: jax.Array) -> jax.Array:
    """Removes the padding of `pad_parts`, after which rows have `queries` slots again."""
    apart = x.reshape(x.shape[0], split.parts, -1, *x.shape[2:])
    return apart[:, :, : queries // split.parts].reshape(x.shape[0], queries, *x.shape[2:])


def block_starts(queries: int, padded: int, size: int, split: RowSplit) -> jax.Array:
    """Returns the slots of the row at which the blocks of padded queries start.

    Args:
      queries: the slots of a device's queries.
      padded: their slots after `pad_parts`.
      size: the slots of a block, which divide those of a padded part.
      split: the parts of the row that the queries are.

    Returns:
      [padded / size] int32.
    """
    within = jnp.arange(0, padded // split.parts, size, dtype=jnp.int32)
    return (split.starts(queries)[:, None] + within).reshape(-1)


def in_row_order(x: jax.Array, devices: int) -> jax.Array:
    """Brings slots [B T ...] in the balanced order of devices into their order in the row."""
    parts = x.reshape(x.shape[0], devices, 2, -1, *x.shape[2:])
    return jnp.concatenate([parts[:, :, 0], parts[:, ::-1, 1]], axis=1).reshape(x.shape)


def in_balanced_order(x: jax.Array, devices: int) -> jax.Array:
    """Brings slots [B T ...] of rows into the balanced order of devices."""
    parts = x.reshape(x.shape[0], 2, devices, -1, *x.shape[2:])
    return jnp.stack([parts[:, 0], parts[:, 1, ::-1]], axis=2).reshape(x.shape)


def sample_lengths(segment_ids: jax.Array, parts: int) -> jax.Array:
    """Computes the number of slots of each slot's segment, as `rope.sample_lengths` does for slots in row order.

    Args:
      segment_ids: [B T] int32.
      parts: the number of parts of a row on each device; 0 if devices have whole rows.

    Returns:
      [B T] int32.
    """
    if parts < 2:
        return rope.sample_lengths(segment_ids)
    devices = jax.sharding.get_abstract_mesh().shape[LENGTH_AXIS]
    return in_balanced_order(rope.sample_lengths(in_row_order(segment_ids, devices)), devices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_row(x: jax.Array, parts: int) -> jax.Array:
    """Gathers what each device has of the rows, inside of a function that is manual over the axis.

    The gradient is a sum over devices, which is taken in float32.

    Args:
      x: [B T/devices ...].
      parts: the number of parts of a row on each device.

    Returns:
      [B T ...], in the order of the row.
    """
    whole = jax.lax.all_gather(x, LENGTH_AXIS, axis=1, tiled=True)
    return whole if parts == 1 else in_row_order(whole, jax.lax.axis_size(LENGTH_AXIS))


def _gather_forward(x: jax.Array, parts: int) -> tuple[jax.Array, None]:
    return gather_row(x, parts), None


def _gather_backward(parts: int, _: None, d_whole: jax.Array) -> tuple[jax.Array]:
    wide = d_whole.astype(jnp.float32)
    wide = wide if parts == 1 else in_balanced_order(wide, jax.lax.axis_size(LENGTH_AXIS))
    return (jax.lax.psum_scatter(wide, LENGTH_AXIS, scatter_dimension=1, tiled=True).astype(d_whole.dtype),)


gather_row.defvjp(_gather_forward, _gather_backward)


def moved_parts(devices: int) -> list[tuple[int, int]]:
    """Returns the devices that have each part of a row in row order and in balanced order."""
    order = balanced_parts(devices)
    return [(part // 2, order.index(part) // 2) for part in range(2 * devices)]


def move_to_balanced_order(x: jax.Array) -> jax.Array:
    """Moves slots to the devices that have them in balanced order, inside of a function that is manual over the axis.

    Of its two neighbouring parts, each device sends the one with an even index in a first exchange, and the other in a
    second. In either, each device receives one.

    Args:
      x: [B T/devices ...], in row order.

    Returns:
      [B T/devices ...], in balanced order.
    """
    moves = moved_parts(jax.lax.axis_size(LENGTH_AXIS))
    even, odd = jnp.split(x, 2, axis=1)
    even, odd = (jax.lax.ppermute(y, LENGTH_AXIS, moves[i::2]) for i, y in enumerate((even, odd)))
    return jnp.concatenate(_swap_on_odd_devices(even, odd), axis=1)


def move_to_row_order(x: jax.Array) -> jax.Array:
    """Moves slots [B T/devices ...] back to where they were before `move_to_balanced_order`."""
    moves = [(there, here) for here, there in moved_parts(jax.lax.axis_size(LENGTH_AXIS))]
    halves = _swap_on_odd_devices(*jnp.split(x, 2, axis=1))
    return jnp.concatenate([jax.lax.ppermute(y, LENGTH_AXIS, moves[i::2]) for i, y in enumerate(halves)], axis=1)


def _swap_on_odd_devices(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Swaps the parts of odd devices, whose part from the start of the row is the one with an odd index."""
    odd = jax.lax.axis_index(LENGTH_AXIS) % 2 == 1
    return jnp.where(odd, second, first), jnp.where(odd, first, second)
