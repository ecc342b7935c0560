"""Forms of the attention backends that run on a CPU: interpreted kernels, and a model of cuDNN's attention."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.pallas import Blocks, pallas
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.splash import splash

# Rows of 43 slots have several blocks of these sizes.
SMALL = Blocks(keep=32, visit=16, keep_backward=16, visit_backward=32)

KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "blockwise": blockwise,
    "pallas": functools.partial(pallas, blocks=SMALL, interpret=True),
    "splash": functools.partial(splash, interpret=True),
}

# The modules are imported by name, because functions of the same names hide them.
CUDNN = importlib.import_module("mice_jax.models.attention.cudnn")
PALLAS = importlib.import_module("mice_jax.models.attention.pallas")


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, **arguments: Any) -> jax.Array:
    """Computes cuDNN's packed attention as its documentation describes it.

    It replaces `fused_attention_stablehlo.dot_product_attention`. JAX converts the lengths and offsets of each row to
    lengths and first entries over the whole batch, where cuDNN reads and writes. Nothing is written between segments,
    so the output keeps its previous values there, which are NaN here.
    """
    (b, t, n, h), heads = q.shape, k.shape[2]
    assert arguments.pop("mask_type") is fused_attention_stablehlo.MaskType.PADDING_CAUSAL
    spans = [arguments.pop(name) for name in ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")]
    q_lengths, k_lengths, q_firsts, k_firsts = fused_attention_stablehlo._fix_seqlen_offsets(*spans, q, k)
    scale, window = arguments.pop("scale"), arguments.pop("sliding_window_length")
    assert not arguments
    slots = jnp.arange(t, dtype=jnp.int32)
    behind = slots[:, None] - slots[None, :]
    causal = (behind >= 0) if window is None else (behind >= 0) & (behind < window)

    def read(x: jax.Array, first: jax.Array) -> jax.Array:
        size = x.shape[2] * h
        entries = first + slots[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        return x.reshape(-1)[entries].reshape(t, x.shape[2], h)

    def segment(q_length: jax.Array, k_length: jax.Array, q_first: jax.Array, k_first: jax.Array) -> jax.Array:
        mask = (causal & (slots < q_length)[:, None] & (slots < k_length)[None, :])[:, None, None, :]
        of_keys, of_values = read(k, k_first), read(v, k_first)
        of_queries = read(q, q_first).reshape(t, heads, n // heads, h)
        scores = jnp.where(mask, jnp.einsum("tkgh,skh->tkgs", of_queries, of_keys) * scale, -1e30)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)
        return jnp.einsum("tkgs,skh->tkgh", weights, of_values).reshape(t, n, h)

    flat = [x.reshape(-1) for x in (q_lengths, k_lengths)]
    firsts = [x.reshape(-1)[: flat[0].size] for x in (q_firsts, k_firsts)]
    outs = jax.vmap(segment)(*flat, *firsts)  # [B*M T N H]
    places = firsts[0][:, None] // (n * h) + slots
    places = jnp.where(slots < flat[0][:, None], places, b * t)
    out = jnp.full((b * t, n, h), jnp.nan, q.dtype).at[places].set(outs, mode="drop")
    return out.reshape(b, t, n, h)
