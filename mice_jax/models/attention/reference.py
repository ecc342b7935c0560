"""Attention written out plainly, with the whole mask: what every other backend must equal."""

import jax
import jax.numpy as jnp

from mice_jax.models.attention.score_function import Scoring

# B rows, T query slots, S key slots, N query heads, K key heads, G = N/K, H head_dim


def reference(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring) -> jax.Array:
    """As `attention.attend`, through scores [B K G T S] in float32."""
    slots = jnp.arange(q.shape[1], dtype=jnp.int32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = scoring.in_reach(slots, slots) & same & (segment_ids > 0)[:, :, None]  # [B T S]
    return masked(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, scoring)


def masked(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scoring: Scoring) -> jax.Array:
    """[B T N H] queries over [B K H S] keys and [B K S H] values under a mask [B T S]; zeros where it allows nothing.

    The mask is the caller's, window included: of `scoring` only the scale and the soft cap matter here. Keys and values
    lie as the products take them, and each product's left side is the smaller: a decoding step on a CPU spent half its
    time where the values were the left side of theirs.
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
