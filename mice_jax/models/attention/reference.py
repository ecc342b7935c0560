"""Attention written out plainly, with the whole mask: what every other backend must equal."""

import jax
import jax.numpy as jnp

# B rows, T query slots, S key slots, N query heads, K key heads, G = N/K, H head_dim


def reference(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scale: float) -> jax.Array:
    """As `attention.attend`, through scores [B K G T S] in float32."""
    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = causal & same & (segment_ids > 0)[:, :, None]  # [B T S]
    return masked(q, k, v, mask, scale)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """[B T N H] queries over [B S K H] keys and values under a mask [B T S]; zeros where it allows nothing."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    allowed = mask[:, None, None]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
