"""Attention with an explicit mask, which every other backend must equal."""

import jax
import jax.numpy as jnp

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.split_rows import WHOLE_ROW, RowSplit, query_segments

# B rows, T query slots, S key slots, N query heads, K key heads, G = N/K, H head_dim


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scoring: Scoring,
    split: RowSplit = WHOLE_ROW,
) -> jax.Array:
    """Computes attention as `attention.attend` describes it, with float32 scores [B K G T S].

    Args:
      q: [B T N H].
      k: [B S K H].
      v: [B S K H].
      segment_ids: [B S] int32.
      scoring: scale, window and soft cap.
      split: the parts of the row that the queries are.

    Returns:
      [B T N H].
    """
    own = query_segments(split, q.shape[1], segment_ids)
    same = own[:, :, None] == segment_ids[:, None, :]
    visible = scoring.position_mask(split.slots(q.shape[1]), jnp.arange(k.shape[1], dtype=jnp.int32))
    mask = visible & same & (own > 0)[:, :, None]  # [B T S]
    return masked(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, scoring)


def masked(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scoring: Scoring) -> jax.Array:
    """Computes attention under a mask given by the caller.

    The layouts of keys and values make the smaller operand of each product the left one. With the values on the left,
    a decoding step on a CPU took twice the time.

    Args:
      q: [B T N H].
      keys: [B K H S].
      values: [B K S H].
      mask: [B T S] bool, which includes the window.
      scoring: scale and soft cap; its window is ignored.

    Returns:
      [B T N H], zero where the mask allows no key.
    """
    b, t, n, h = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    products = jnp.einsum("bkgth,bkhs->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    allowed = mask[:, None, None]
    scores = jnp.where(allowed, scoring.scores(products), jnp.finfo(jnp.float32).min)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights, values)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
