"""Recurrent mixers on rows whose slots are split over the devices of the mesh axis `sequence`, one part after another.

Every device computes its part at the same time. What a convolution needs of the part before comes from the device
before. A state is passed on in three steps: each device computes what its part makes of a state of zeros, and how it
changes the state that enters; from these, each device finds the state that enters its own part; and it computes its
part from there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mice_jax.sharding import LENGTH_AXIS

# B rows, T slots of a row, S slots of a part, P parts


def num_parts(slots: int) -> int:
    """Returns the number of devices that share rows of this many slots."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape[LENGTH_AXIS]
    return devices if slots % devices == 0 else 1


def map_parts(function: Callable[..., jax.Array], of_slots: Sequence[jax.Array], whole: Sequence[Any]) -> jax.Array:
    """Computes each device's part of rows.

    Args:
      function: is called with the index of the part and the arrays, and returns [B S ...].
      of_slots: arrays [B T ...], of which a device gets its part [B S ...].
      whole: arrays that each device gets whole, or None.

    Returns:
      [B T ...].
    """
    slots = PartitionSpec(None, LENGTH_AXIS)
    parts = jnp.arange(num_parts(of_slots[0].shape[1]), dtype=jnp.int32)
    return jax.shard_map(
        lambda index, *arrays: function(index[0], *arrays),
        in_specs=(PartitionSpec(LENGTH_AXIS), *[slots] * len(of_slots), *[PartitionSpec()] * len(whole)),
        out_specs=slots,
        axis_names={LENGTH_AXIS},
        check_vma=False,
    )(parts, *of_slots, *whole)


def last_of_previous(x: jax.Array, count: int) -> jax.Array:
    """Returns the last slots [B count ...] of the part before; zeros for the first part."""
    parts = jax.lax.axis_size(LENGTH_AXIS)
    return jax.lax.ppermute(x[:, -count:], LENGTH_AXIS, [(i, i + 1) for i in range(parts - 1)])


def entering_state(
    index: jax.Array, segment_ids: jax.Array, of_part: Any, pass_on: Callable[[jax.Array, Any], jax.Array]
) -> jax.Array:
    """Computes the state that enters a device's part.

    Args:
      index: the index of the part.
      segment_ids: [B S] int32.
      of_part: a tree of arrays, what `pass_on` needs of a part; the last is the state that the part makes of zeros.
      pass_on: returns the state after a part, given the state that enters it and the arrays of the part.

    Returns:
      The state [B ...]; zeros where a sample begins with the part.
    """
    continues = segment_ids[:, 0] == last_of_previous(segment_ids, 1)[:, 0]
    of_parts = jax.tree.map(lambda x: jax.lax.all_gather(x, LENGTH_AXIS), (continues, of_part))

    def part(state: jax.Array, arrays: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        continues, own = arrays
        entering = jnp.where(continues.reshape(-1, *[1] * (state.ndim - 1)), state, 0)
        return pass_on(entering, own), entering

    _, entering = jax.lax.scan(part, jnp.zeros_like(jax.tree.leaves(of_part)[-1]), of_parts)
    return jax.lax.dynamic_index_in_dim(entering, index, keepdims=False)
