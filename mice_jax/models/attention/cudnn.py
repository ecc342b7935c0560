"""Attention on NVIDIA GPUs from Hopper on: cuDNN's packed kernels, told where each sample of a row begins and ends.

The cost follows the samples' lengths squared. JAX's own front (`jax.nn.dot_product_attention`) takes no segments, so
the function behind it is called; it is private to JAX, and what it expects was read in 0.10.2 and 0.11.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from mice_jax.errors import UserError, one_line
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import cleared
from mice_jax.packing_limits import max_segments

HEAD_DIMS = 8  # a head's dims are a multiple of it
MOST_ENTRIES = 2**31 - 1  # of a device's queries: the kernels count them in int32
# Before, the offsets of keys were counted by the queries' heads: wrong, and silently so, where there are fewer of keys.
COUNTS_KEY_HEADS = (0, 11, 1)

# B rows, T slots, N query heads, K key heads, H head_dim, M samples of a row at most


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring) -> jax.Array:
    """As `attention.attend`, of segments that are contiguous.

    A row of more than `max_segments` comes out as NaN, which ends a run: the kernels would leave the rest out.
    """
    assert scoring.softcap is None
    b, t, n, h = q.shape
    q, k, v = cleared(segment_ids, q, k, v)
    if k.shape[2] != n and jax.__version_info__ < COUNTS_KEY_HEADS:
        k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    if pad := -h % HEAD_DIMS:  # dims of zeros add nothing to a product
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    if q.size > MOST_ENTRIES:
        raise UserError(
            f"model.attention='cudnn' counts a device's query entries in 32 bits, and {b} rows of {t:,} slots by {n} "
            f"heads of {q.shape[3]} dims are {q.size:,}, more than {MOST_ENTRIES:,}. Lower train.rows_per_device."
        )
    lengths, starts, found = spans(segment_ids, max_segments(t))
    try:
        out: Any = dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=scoring.scale,
            mask_type=MaskType.PADDING_CAUSAL,
            sliding_window_length=scoring.window if scoring.window is not None and scoring.window < t else None,
        )
    except RuntimeError as e:  # what of it is missing or too old
        raise UserError(
            f"model.attention='cudnn' cannot be had here: {one_line(e)}. Install what JAX wants for CUDA (pip install "
            "'mice_jax[cuda]'), or set model.attention='pallas'."
        ) from e
    out = jnp.where((found <= lengths.shape[1])[:, None, None, None], out, jnp.nan)
    return cleared(segment_ids, out[..., :h])[0]


def softmax_bytes(slots: int, heads: int) -> int:
    """Of a row's softmax sums in one layer: float32 for each head and slot, and for each sample that a row may hold."""
    return 4 * max_segments(slots) * heads * slots


def spans(segment_ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments [B T] -> the lengths [B M] and first slots [B M+1] of the first M = `count`, and how many there are [B].

    -1 stands where there is none.
    """
    rows = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    real = segment_ids > 0
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    begins = real & (segment_ids != before)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(real, number, count)  # what has no place is dropped
    lengths = jnp.zeros((rows.size, count), jnp.int32).at[rows, place].add(1, mode="drop")
    starts = jnp.full((rows.size, count + 1), -1, jnp.int32)
    first = jnp.where(begins & (number < count), number, count + 1)
    starts = starts.at[rows, first].set(slots, mode="drop")
    return jnp.where(lengths > 0, lengths, -1), starts, number[:, -1] + 1
