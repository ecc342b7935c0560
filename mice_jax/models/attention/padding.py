"""What the kernels share about padding: whole blocks of slots, and nothing of it in what comes out."""

import jax
import jax.numpy as jnp


def padded(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B T ...], queries, keys, values and segments alike, with padding up to a multiple of slots."""
    pad = -arrays[0].shape[1] % multiple
    return tuple(jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))) for x in arrays) if pad else arrays


def cleared(segment_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B T N H] with zeros at padding, and so are their gradients: no kernel is trusted with either."""
    real = (segment_ids > 0)[:, :, None, None]
    return tuple(jnp.where(real, x, jnp.zeros((), x.dtype)) for x in arrays)
