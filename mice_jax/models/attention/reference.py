"""Attention written out plainly, with the whole mask: what every other backend must equal."""

import jax
import jax.numpy as jnp

from mice_jax.models.attention.scoring import Scoring

# B rows, T query slots, S key slots, N query heads, K key heads, G = N/K, H head_dim


def reference(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring) -> jax.Array:
    """As `attention.attend`, through scores [B K G T S] in float32."""
    slots = jnp.arange(q.shape[1], dtype=jnp.int32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = scoring.in_reach(slots, slots) & same & (segment_ids > 0)[:, :, None]  # [B T S]
    return masked(q, k, v, mask, scoring)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scoring: Scoring) -> jax.Array:
    """[B T N H] queries over [B S K H] keys and values under a mask [B T S]; zeros where it allows nothing.

    The mask is the caller's, window included: of `scoring` only the scale and the soft cap matter here.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    scores = scoring.scores(jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32))
    allowed = mask[:, None, None]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
