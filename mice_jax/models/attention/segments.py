"""What the backends share about the slots of rows: whole blocks of them, who can see whom, nothing of padding."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

RESULT = "attention"  # under this name a rematerialised layer may keep what `kept` is given


def padded(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B T ...], queries, keys, values and segments alike, with padding up to a multiple of slots."""
    pad = -arrays[0].shape[1] % multiple
    return tuple(jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))) for x in arrays) if pad else arrays


def cleared(segment_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B T N H] with zeros at padding, and so are their gradients: no foreign kernel is trusted with either."""
    real = (segment_ids > 0)[:, :, None, None]
    return tuple(jnp.where(real, x, jnp.zeros((), x.dtype)) for x in arrays)


def kept(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """What a forward pass leaves for the backward, so that a policy can keep it: else it is computed twice."""
    return tuple(checkpoint_name(x, RESULT) for x in arrays)


def first_seen(segments: jax.Array, window: int | None) -> jax.Array:
    """[... T] -> [... T]: the first slot that each slot sees: its segment's, a run of 0 being one, or its window's."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    starts = _differs(segments, jnp.roll(segments, 1, axis=-1), at=0)
    first = lax.cummax(jnp.where(starts, slots, 0), axis=segments.ndim - 1)
    return first if window is None else jnp.maximum(first, slots - (window - 1))


def last_seeing(segments: jax.Array, window: int | None) -> jax.Array:
    """[... T] -> [... T]: the last slot that sees each slot, likewise."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    ends = _differs(segments, jnp.roll(segments, -1, axis=-1), at=-1)
    last = lax.cummin(jnp.where(ends, slots, slots.shape[-1] - 1), axis=segments.ndim - 1, reverse=True)
    return last if window is None else jnp.minimum(last, slots + (window - 1))


def _differs(segments: jax.Array, neighbours: jax.Array, at: int) -> jax.Array:
    """Where a slot's neighbour is of another segment; at one end of the row there is none."""
    return (segments != neighbours).at[..., at].set(True)
