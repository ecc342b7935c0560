"""Attention on TPUs: JAX's splash kernels, which skip what causality and the window mask.

Segments are masked inside the blocks that are left, since the kernels' list of blocks is made when they are compiled:
the cost follows the row, not its samples.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import RESULT, cleared, padded

LANES = 128  # the kernels want whole tiles of slots
BLOCK = 512  # slots of a query or key block, where the row has so many

# B rows, T slots, N query heads, K key heads, H head_dim


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring, *, interpret: bool = False
) -> jax.Array:
    """As `attention.attend`; `interpret` runs the kernels' code on any device, slowly."""
    t, n = q.shape[1:3]
    real = segment_ids
    q = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)  # the kernels have no scale of their own
    q, k, v = cleared(real, q, k, v)
    q, k, v, segments = padded(LANES, q, k, v, segment_ids)
    kernel = _kernel(q.shape[1], n, scoring, interpret)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(kernel)(*heads_first, jax_splash.SegmentIds(segments, segments))  # [B N T H]
    return cleared(real, out.transpose(0, 2, 1, 3)[:, :t])[0]


def _kernel(slots: int, heads: int, scoring: Scoring, interpret: bool) -> Callable[..., Any]:
    """Of one row: queries [N T H], keys and values [K T H], segments -> [N T H]."""
    block = math.gcd(slots, BLOCK)
    if scoring.window is None:
        mask = jax_splash.CausalMask((slots, slots))
    else:
        mask = jax_splash.LocalMask((slots, slots), (scoring.window - 1, 0), 0)  # so many behind a slot, none ahead
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return jax_splash.make_splash_mha(
        jax_splash.MultiHeadMask([mask] * heads),
        block_sizes=jax_splash.BlockSizes(**dict.fromkeys(sizes, block)),
        attn_logits_soft_cap=scoring.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESULT,
        interpret=interpret,
    )
