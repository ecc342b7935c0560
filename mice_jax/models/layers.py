"""The parts of a decoder layer as Flax NNX modules, each of which declares its parameters once (parameters.py).

The mixers of layers without attention are in mixers/.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models import rope
from mice_jax.models.matmul import look_up
from mice_jax.models.mixers import MIXERS
from mice_jax.models.parameters import RMSNorm, axes_of, param, plus, product
from mice_jax.models.spec import Mixer, ModelSpec
from mice_jax.sharding import constrain

# B rows, T slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary

# The attention of one layer: queries, keys, values -> result, and the layer's new cache (None without a cache).
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Applies a mixer to the normalised input of its layer: [B T D], and the layer's new cache (None without a cache).
ApplyMixer = Callable[[Any, jax.Array], tuple[jax.Array, Any]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Attention(nnx.Module):
    """The projections of grouped-query attention with rotary positions; the caller computes attention itself."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, n, k, h, std = spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.init_std
        q_dims = 2 * h if spec.attention_gate else h
        self.q = param(rngs, (n, q_dims, d), ("heads", "head_dim", "embed"), std)
        self.k = param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
        self.v = param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
        self.o = param(rngs, (d, n, h), ("embed", "heads", "head_dim"), std)
        self.qkv_bias, self.out_bias, self.qk_norm = spec.qkv_bias, spec.out_bias, spec.qk_norm
        self.gated = spec.attention_gate
        if spec.qkv_bias:
            self.q_bias = param(rngs, (n, q_dims), ("heads", "head_dim"), 0)
            self.k_bias = param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
            self.v_bias = param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
        if spec.out_bias:
            self.o_bias = param(rngs, (d,), ("embed",), 0)
        if spec.qk_norm in ("head", "head_after_rope"):
            self.q_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
            self.k_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
        elif spec.qk_norm == "all":
            self.q_norm = RMSNorm((n, h), ("heads", "head_dim"), spec, rngs)
            self.k_norm = RMSNorm((k, h), ("kv_heads", "head_dim"), spec, rngs)

    def __call__(
        self, x: jax.Array, tables: rope.RopeTables, attention_fn: AttentionFn, reduce_dtype: Any = jnp.float32
    ) -> tuple[jax.Array, Any]:
        """Computes the mixer: [B T D] -> [B T D], and the second result of `attention_fn`."""
        q, k, v, gate = self.project(x, tables, reduce_dtype)
        attended, cache = attention_fn(q, k, v)
        if gate is not None:
            attended *= jax.nn.sigmoid(gate)
        return self.output(attended, reduce_dtype), cache

    def project(
        self, x: jax.Array, tables: rope.RopeTables, reduce_dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Projects [B T D].

        Returns:
          Rotated queries [B T N H], rotated keys [B T K H], values [B T K H], and gates [B T N H] or None.
        """
        q, k, v = (product(x, weight, reduce_dtype) for weight in (self.q, self.k, self.v))
        if self.qkv_bias:
            q = plus(q, self.q_bias, reduce_dtype)
            k = plus(k, self.k_bias, reduce_dtype)
            v = plus(v, self.v_bias, reduce_dtype)
        q, gate = jnp.split(q, 2, axis=-1) if self.gated else (q, None)
        if self.qk_norm in ("head", "all"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.apply_rope(q, tables), rope.apply_rope(k, tables)
        if self.qk_norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, gate

    def output(self, attended: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Projects the result of attention, [B T N H], to [B T D]."""
        y = product(attended, self.o, reduce_dtype, in_dims=2)
        return plus(y, self.o_bias, reduce_dtype) if self.out_bias else y


class MLP(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, f, std = spec.d_model, spec.d_ff, spec.init_std
        self.gate = param(rngs, (f, d), ("mlp", "embed"), std)
        self.up = param(rngs, (f, d), ("mlp", "embed"), std)
        self.down = param(rngs, (d, f), ("embed", "mlp"), std)
        self.activation, self.bias = ACTIVATIONS[spec.activation], spec.mlp_bias
        if self.bias:
            self.gate_bias = param(rngs, (f,), ("mlp",), 0)
            self.up_bias = param(rngs, (f,), ("mlp",), 0)
            self.down_bias = param(rngs, (d,), ("embed",), 0)

    def __call__(self, x: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Computes the MLP: [B T D] -> [B T D]."""
        gate, up = product(x, self.gate, reduce_dtype), product(x, self.up, reduce_dtype)
        if self.bias:
            gate, up = plus(gate, self.gate_bias, reduce_dtype), plus(up, self.up_bias, reduce_dtype)
        inner = constrain(self.activation(gate) * up, "batch", "length", "mlp")
        y = product(inner, self.down, reduce_dtype)
        return plus(y, self.down_bias, reduce_dtype) if self.bias else y


class Block(nnx.Module):
    """A mixer, which is attention in most models, and an MLP: each with a norm before it, after it, or both.

    Each is added to its input.

    Args:
      spec: the model.
      kind: the mixer; None for attention.
      rngs: the source of random parameters.
      has_mixer: whether the block has the mixer's parameters, which may be stacked apart from those of the rest.
    """

    def __init__(self, spec: ModelSpec, kind: Mixer | None, rngs: nnx.Rngs, *, has_mixer: bool = True):
        width = ((spec.d_model,), ("embed",), spec, rngs)
        self.pre, self.post, self.multiplier = spec.pre_norm, spec.post_norm, spec.residual_multiplier
        self.mixer_name = mixer_name(kind)
        if spec.pre_norm:
            self.attention_norm, self.mlp_norm = RMSNorm(*width), RMSNorm(*width)
        if spec.post_norm:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(*width), RMSNorm(*width)
        if has_mixer:
            setattr(self, self.mixer_name, make_mixer(spec, kind, rngs))
        self.mlp = MLP(spec, rngs)

    def __call__(self, x: jax.Array, apply_mixer: ApplyMixer, reduce_dtype: Any = jnp.float32) -> tuple[jax.Array, Any]:
        """Computes the layer.

        Args:
          x: [B T D].
          apply_mixer: applies the mixer of this layer.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T D], and the second result of `apply_mixer`.
        """
        with jax.named_scope(self.mixer_name):
            y, cache = apply_mixer(getattr(self, self.mixer_name), self.attention_norm(x) if self.pre else x)
            x = self._add(x, self.attention_post_norm(y) if self.post else y)
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x) if self.pre else x, reduce_dtype)
            x = self._add(x, self.mlp_post_norm(y) if self.post else y)
        return x, cache

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return constrain(x + scaled(y, self.multiplier), "batch", "length", "hidden")


def make_mixer(spec: ModelSpec, kind: Mixer | None, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the mixer of a layer; `kind` is None for attention."""
    return Attention(spec, rngs) if kind is None else MIXERS[type(kind)](spec, kind, rngs)


def mixer_name(kind: Mixer | None) -> str:
    """Returns the name of a mixer's parameters among those of a layer; `kind` is None for attention."""
    return "attention" if kind is None else MIXERS[type(kind)].NAME


class Embed(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.table = param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)

    def __call__(self, tokens: jax.Array, dtype: Any, reduce_dtype: Any) -> jax.Array:
        """Looks up the embeddings of tokens [B T] in `dtype`: [B T D]."""
        return look_up(self.table[...], tokens, dtype, axes=axes_of(self.table), reduce_dtype=reduce_dtype)


class Head(nnx.Module):
    """The output projection of a model that does not tie it to the embedding."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.weight = param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor for x of any shape, in its own dtype; x itself if the factor is 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
