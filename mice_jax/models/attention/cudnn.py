"""Attention on NVIDIA GPUs from Hopper on: cuDNN's packed kernels, which take the first slot and length of each sample.

The cost grows with the squared lengths of the samples. JAX's public function (`jax.nn.dot_product_attention`) takes no
segments, so this module calls the private function behind it, as it is in JAX 0.10.2 to 0.11.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from mice_jax.errors import UserError, install_command, one_line
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import zero_padding
from mice_jax.packing_limits import max_segments

HEAD_DIM_MULTIPLE = 8
MAX_ENTRIES = 2**31 - 1  # entries of the queries of one device, which the kernels count in int32
# The first JAX that computes the offsets of keys with the number of key heads. Older versions use the number of query
# heads, and so read wrong keys, without an error, where there are fewer key heads.
COUNTS_KEY_HEADS = (0, 11, 1)

# B rows, T slots, N query heads, K key heads, H head_dim, M samples of a row at most


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring) -> jax.Array:
    """Computes attention as `attention.attend` describes it, on one device, for contiguous segments.

    A row of more than `max_segments` samples gives NaN, which stops a run; the kernels would ignore the other samples.

    Args:
      q: [B T N H].
      k: [B T K H].
      v: [B T K H].
      segment_ids: [B T] int32.
      scoring: scale and window; a soft cap is not supported.

    Returns:
      [B T N H].

    Raises:
      UserError: if cuDNN is missing or too old, or the queries have more entries than it can count.
    """
    assert scoring.softcap is None
    b, t, n, h = q.shape
    q, k, v = zero_padding(segment_ids, q, k, v)
    if k.shape[2] != n and jax.__version_info__ < COUNTS_KEY_HEADS:
        k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    pad = -h % HEAD_DIM_MULTIPLE
    if pad:  # dims of zeros do not change products
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    if q.size > MAX_ENTRIES:
        raise UserError(
            f"model.attention='cudnn' counts a device's query entries in 32 bits, and {b} rows of {t:,} slots by {n} "
            f"heads of {q.shape[3]} dims are {q.size:,}, more than {MAX_ENTRIES:,}. Lower train.rows_per_device."
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
    except RuntimeError as e:  # cuDNN is missing or too old
        raise UserError(
            f"model.attention='cudnn' is not available on this machine: {one_line(e)}. Install the CUDA libraries of "
            f"JAX ({install_command('cuda')}), or set model.attention='pallas'."
        ) from e
    out = jnp.where((found <= lengths.shape[1])[:, None, None, None], out, jnp.nan)
    return zero_padding(segment_ids, out[..., :h])[0]


def softmax_bytes(slots: int, heads: int) -> int:
    """Returns the bytes of the softmax sums of one row in one layer: a float32 per head, slot and sample of a row."""
    return 4 * max_segments(slots) * heads * slots


def spans(segment_ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the samples of each row.

    Args:
      segment_ids: [B T] int32.
      count: the largest number of samples per row, M.

    Returns:
      The lengths [B M] and first slots [B M+1] of the first M samples of each row, with -1 where there are fewer, and
      the number of samples [B], which may be larger than M.
    """
    rows = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    real = segment_ids > 0
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    begins = real & (segment_ids != before)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(real, number, count)  # writes to index `count` are dropped
    lengths = jnp.zeros((rows.size, count), jnp.int32).at[rows, place].add(1, mode="drop")
    starts = jnp.full((rows.size, count + 1), -1, jnp.int32)
    first = jnp.where(begins & (number < count), number, count + 1)
    starts = starts.at[rows, first].set(slots, mode="drop")
    return jnp.where(lengths > 0, lengths, -1), starts, number[:, -1] + 1
