"""Attention on TPUs: JAX's splash kernels, which skip blocks that causality or the window masks completely.

The kernels' list of blocks is made when they are compiled, so segments are masked inside the remaining blocks. The
cost therefore grows with the length of the row, not with the lengths of its samples.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import SAVED_NAME, pad_to_multiple, zero_padding

LANES = 128  # the kernels need a multiple of this many slots
BLOCK = 512  # slots of a query or key block, if they divide the row

# B rows, T slots, N query heads, K key heads, H head_dim


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring, *, interpret: bool = False
) -> jax.Array:
    """Computes attention as `attention.attend` describes it, on one device.

    Args:
      q: [B T N H].
      k: [B T K H].
      v: [B T K H].
      segment_ids: [B T] int32.
      scoring: scale, window and soft cap.
      interpret: runs the kernels' code on any device, slowly.

    Returns:
      [B T N H].
    """
    t, n = q.shape[1:3]
    q = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)  # the kernels do not scale
    q, k, v = zero_padding(segment_ids, q, k, v)
    q, k, v, segments = pad_to_multiple(LANES, q, k, v, segment_ids)
    kernel = _kernel(q.shape[1], n, scoring, interpret)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(kernel)(*heads_first, jax_splash.SegmentIds(segments, segments))  # [B N T H]
    return zero_padding(segment_ids, out.transpose(0, 2, 1, 3)[:, :t])[0]


def _kernel(slots: int, heads: int, scoring: Scoring, interpret: bool) -> Callable[..., Any]:
    """Makes the kernel for one row: queries [N T H], keys and values [K T H], segments [T] -> [N T H]."""
    block = math.gcd(slots, BLOCK)
    if scoring.window is None:
        mask = jax_splash.CausalMask((slots, slots))
    else:
        behind, ahead = scoring.window - 1, 0
        mask = jax_splash.LocalMask((slots, slots), (behind, ahead), 0)
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return jax_splash.make_splash_mha(
        jax_splash.MultiHeadMask([mask] * heads),
        block_sizes=jax_splash.BlockSizes(**dict.fromkeys(sizes, block)),
        attn_logits_soft_cap=scoring.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
