"""Helpers of the backends for segments: padding to whole blocks, bounds of visibility, and zeros at padding."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

SAVED_NAME = "attention"  # the name under which a rematerialisation policy can save the results of mixers

# B rows, T slots, N heads, H head_dim


def pad_to_multiple(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Pads arrays [B T ...] with zeros to a multiple of slots; zero is also the segment of padding."""
    pad = -arrays[0].shape[1] % multiple
    if not pad:
        return arrays
    return tuple(jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))) for x in arrays)


def zero_padding(segment_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sets arrays [B T N H] and their gradients to zero at padding, where external kernels may leave any value."""
    real = (segment_ids > 0)[:, :, None, None]
    return tuple(jnp.where(real, x, jnp.zeros((), x.dtype)) for x in arrays)


def mark_saveable(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Names the residuals of the forward pass, so that a rematerialisation policy can save them."""
    return tuple(checkpoint_name(x, SAVED_NAME) for x in arrays)


def first_visible_key(segments: jax.Array, window: int | None) -> jax.Array:
    """Computes the first slot that each slot attends to: the start of its segment, or of its window.

    Args:
      segments: [... T] int32; adjacent slots of segment 0 count as one segment.
      window: the number of slots that a query sees, itself included; None for all.

    Returns:
      [... T] int32.
    """
    slots = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    starts = _differs(segments, jnp.roll(segments, 1, axis=-1), at=0)
    first = lax.cummax(jnp.where(starts, slots, 0), axis=segments.ndim - 1)
    return first if window is None else jnp.maximum(first, slots - (window - 1))


def last_visible_query(segments: jax.Array, window: int | None) -> jax.Array:
    """Computes the last slot that attends to each slot, with arguments and result as in `first_visible_key`."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    ends = _differs(segments, jnp.roll(segments, -1, axis=-1), at=-1)
    last = lax.cummin(jnp.where(ends, slots, slots.shape[-1] - 1), axis=segments.ndim - 1, reverse=True)
    return last if window is None else jnp.minimum(last, slots + (window - 1))


def _differs(segments: jax.Array, neighbours: jax.Array, at: int) -> jax.Array:
    """Whether the neighbour of each slot is in another segment; True at index `at`, an end of the row."""
    return (segments != neighbours).at[..., at].set(True)
