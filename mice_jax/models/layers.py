"""The parts of a decoder layer as Flax NNX modules, each of which declares its parameters once (parameters.py).

The mixers of layers without attention are in mixers/.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models import rope
from mice_jax.models.matmul import look_up
from mice_jax.models.mixers import MIXERS
from mice_jax.models.parameters import RMSNorm, axes_of, normalized, param, plus, product
from mice_jax.models.spec import ATTENTION_NAMES, AttentionKind, Kind, ModelSpec, is_recurrent
from mice_jax.sharding import constrain

# B rows, T slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers
# P the width of the embeddings that each layer has of its own

# The attention of one layer: queries, keys, values -> result, and what the layer keeps: its new cache while decoding,
# otherwise the keys and values that it lends, or None. Keys and values are None in a layer that borrows them.
AttentionFn = Callable[[jax.Array, jax.Array | None, jax.Array | None], tuple[jax.Array, Any]]
# Applies a mixer to the normalised input of its layer: [B T D], and what the layer keeps.
ApplyMixer = Callable[[Any, jax.Array], tuple[jax.Array, Any]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Attention(nnx.Module):
    """The projections of grouped-query attention with rotary positions; the caller computes attention itself.

    Args:
      spec: the model.
      kind: the attention of this layer; None for that of the spec.
      rngs: the source of random parameters.
    """

    def __init__(self, spec: ModelSpec, kind: Kind, rngs: nnx.Rngs):
        full = spec.attention_of(kind)
        d, n, k, h, std = spec.d_model, spec.num_heads, full.num_kv_heads, full.head_dim, spec.init_std
        q_dims = 2 * h if spec.attention_gate else h
        self.borrows, self.values_are_keys = full.keys == "borrowed", full.values_are_keys
        self.value_eps = spec.norm_eps if spec.value_norm else None
        self.q = param(rngs, (n, q_dims, d), ("heads", "head_dim", "embed"), std)
        if not self.borrows:
            self.k = param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
            if not self.values_are_keys:
                self.v = param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
        self.o = param(rngs, (d, n, h), ("embed", "heads", "head_dim"), std)
        self.qkv_bias, self.out_bias, self.qk_norm = spec.qkv_bias, spec.out_bias, spec.qk_norm
        self.gated = spec.attention_gate
        if spec.qkv_bias:
            self.q_bias = param(rngs, (n, q_dims), ("heads", "head_dim"), 0)
            if not self.borrows:
                self.k_bias = param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
                if not self.values_are_keys:
                    self.v_bias = param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
        if spec.out_bias:
            self.o_bias = param(rngs, (d,), ("embed",), 0)
        if spec.qk_norm in ("head", "head_after_rope"):
            self.q_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
            if not self.borrows:
                self.k_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
        elif spec.qk_norm == "all":
            self.q_norm = RMSNorm((n, h), ("heads", "head_dim"), spec, rngs)
            self.k_norm = RMSNorm((k, h), ("kv_heads", "head_dim"), spec, rngs)

    def __call__(
        self, x: jax.Array, tables: rope.RopeTables, attention_fn: AttentionFn, reduce_dtype: Any = jnp.float32
    ) -> tuple[jax.Array, Any]:
        """Computes the mixer: [B T D] -> [B T D], and the second result of `attention_fn`."""
        q, gate = self.queries(x, tables, reduce_dtype)
        k, v = (None, None) if self.borrows else self.keys_and_values(x, tables, reduce_dtype)
        attended, cache = attention_fn(q, k, v)
        if gate is not None:
            attended *= jax.nn.sigmoid(gate)
        return self.output(attended, reduce_dtype), cache

    def queries(self, x: jax.Array, tables: rope.RopeTables, reduce_dtype: Any) -> tuple[jax.Array, jax.Array | None]:
        """Projects [B T D] to rotated queries [B T N H], and gates [B T N H] or None."""
        q = product(x, self.q, reduce_dtype)
        if self.qkv_bias:
            q = plus(q, self.q_bias, reduce_dtype)
        q, gate = jnp.split(q, 2, axis=-1) if self.gated else (q, None)
        return self._rotated(q, self.q_norm if self.qk_norm != "none" else None, tables), gate

    def keys_and_values(self, x: jax.Array, tables: rope.RopeTables, reduce_dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Projects [B T D] to rotated keys and values, [B T K H] both."""
        k = product(x, self.k, reduce_dtype)
        k = plus(k, self.k_bias, reduce_dtype) if self.qkv_bias else k
        v = k if self.values_are_keys else product(x, self.v, reduce_dtype)
        if self.qkv_bias and not self.values_are_keys:
            v = plus(v, self.v_bias, reduce_dtype)
        if self.value_eps is not None:
            v = normalized(v, self.value_eps).astype(v.dtype)
        return self._rotated(k, self.k_norm if self.qk_norm != "none" else None, tables), v

    def _rotated(self, x: jax.Array, norm: RMSNorm | None, tables: rope.RopeTables) -> jax.Array:
        """Rotates heads, and normalises them before or after."""
        if norm is None:
            return rope.apply_rope(x, tables)
        if self.qk_norm == "head_after_rope":
            return norm(rope.apply_rope(x, tables))
        return rope.apply_rope(norm(x), tables)

    def output(self, attended: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Projects the result of attention, [B T N H], to [B T D]."""
        y = product(attended, self.o, reduce_dtype, in_dims=2)
        return plus(y, self.o_bias, reduce_dtype) if self.out_bias else y


class MLP(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, kind: Kind, rngs: nnx.Rngs):
        d, f, std = spec.d_model, spec.d_ff_of(kind), spec.init_std
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

    Each is added to its input. In some models, a projection of a layer's own embeddings follows.

    Args:
      spec: the model.
      kind: the mixer; None for the attention of the spec.
      rngs: the source of random parameters.
      without: the names of parts whose parameters are stacked apart from those of the rest.
    """

    def __init__(self, spec: ModelSpec, kind: Kind, rngs: nnx.Rngs, *, without: Collection[str] = ()):
        width = ((spec.d_model,), ("embed",), spec, rngs)
        self.pre, self.post, self.multiplier = spec.pre_norm, spec.post_norm, spec.residual_multiplier
        self.mixer_name, self.mlp_name = mixer_name(kind), mlp_name(kind)
        if spec.pre_norm:
            self.attention_norm, self.mlp_norm = RMSNorm(*width), RMSNorm(*width)
        if spec.post_norm:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(*width), RMSNorm(*width)
        for name in (self.mixer_name, self.mlp_name):
            if name not in without:
                setattr(self, name, make_part(spec, kind, name, rngs))
        if spec.per_layer_dim:
            self.own_embedding = OwnEmbedding(spec, rngs)
        self.has_own_embedding, self.has_scale = bool(spec.per_layer_dim), spec.layer_scales
        if spec.layer_scales:
            self.layer_scale = param(rngs, (1,), (None,), None)

    def __call__(
        self,
        x: jax.Array,
        apply_mixer: ApplyMixer,
        reduce_dtype: Any = jnp.float32,
        own_inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Computes the layer.

        Args:
          x: [B T D].
          apply_mixer: applies the mixer of this layer.
          reduce_dtype: the dtype in which gradients are summed over devices.
          own_inputs: [B T P], what the layer's own embeddings are of each token, in models that have them.

        Returns:
          [B T D], and the second result of `apply_mixer`.
        """
        with jax.named_scope(self.mixer_name):
            y, cache = apply_mixer(getattr(self, self.mixer_name), self.attention_norm(x) if self.pre else x)
            x = self._add(x, self.attention_post_norm(y) if self.post else y)
        with jax.named_scope("mlp"):
            y = getattr(self, self.mlp_name)(self.mlp_norm(x) if self.pre else x, reduce_dtype)
            x = self._add(x, self.mlp_post_norm(y) if self.post else y)
        if self.has_own_embedding:
            assert own_inputs is not None
            with jax.named_scope("own_embedding"):
                x = constrain(x + self.own_embedding(x, own_inputs, reduce_dtype), "batch", "length", "hidden")
        if self.has_scale:
            x *= jax.lax.stop_gradient(self.layer_scale[...]).astype(x.dtype)
        return x, cache

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return constrain(x + scaled(y, self.multiplier), "batch", "length", "hidden")


class OwnEmbedding(nnx.Module):
    """How a layer adds its own embeddings of tokens to its hidden states, which gate them."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, p, std = spec.d_model, spec.per_layer_dim, spec.init_std
        self.gate = param(rngs, (p, d), (None, "embed"), std)
        self.out = param(rngs, (d, p), ("embed", None), std)
        self.norm = RMSNorm((d,), ("embed",), spec, rngs)
        self.activation = ACTIVATIONS[spec.activation]

    def __call__(self, x: jax.Array, own_inputs: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Computes what is added: [B T D] and [B T P] -> [B T D]."""
        inner = self.activation(product(x, self.gate, reduce_dtype)) * own_inputs
        return self.norm(product(inner, self.out, reduce_dtype))


def make_part(spec: ModelSpec, kind: Kind, name: str, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the mixer or the MLP of a layer, whichever has this name."""
    if name == mlp_name(kind):
        return MLP(spec, kind, rngs)
    return MIXERS[type(kind)](spec, kind, rngs) if is_recurrent(kind) else Attention(spec, kind, rngs)


def mixer_name(kind: Kind) -> str:
    """Returns the name of a mixer's parameters among those of a layer; `kind` is None for the spec's attention."""
    if kind is None:
        return "attention"
    if not isinstance(kind, AttentionKind):
        return MIXERS[type(kind)].NAME
    name = f"borrowing_{kind.name}" if kind.keys == "borrowed" else kind.name
    assert name in ATTENTION_NAMES, f"{kind} has a name that families cannot list"
    return name


def mlp_name(kind: Kind) -> str:
    """Returns the name of the MLP's parameters among those of a layer."""
    return "wide_mlp" if isinstance(kind, AttentionKind) and kind.wide_mlp else "mlp"


class OwnEmbeddings(nnx.Module):
    """The tables of the embeddings that each layer has of its own, side by side, and what all layers share of them."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        layers, d, p, std = spec.num_layers, spec.d_model, spec.per_layer_dim, spec.init_std
        self.table = param(rngs, (rows, layers * p), ("vocab", "embed"), std)
        self.projection = param(rngs, (layers * p, d), (None, "embed"), std)
        self.norm = RMSNorm((p,), (None,), spec, rngs)
        self.sizes = (layers, p)

    def __call__(self, tokens: jax.Array, x: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Computes the own inputs of all layers.

        Args:
          tokens: [B T] int32.
          x: [B T D], their embeddings.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [L B T P].
        """
        layers, p = self.sizes
        axes = axes_of(self.table)
        own = scaled(look_up(self.table[...], tokens, x.dtype, axes=axes, reduce_dtype=reduce_dtype), p**0.5)
        shared = scaled(product(x, self.projection, reduce_dtype), x.shape[-1] ** -0.5)
        own, shared = (y.reshape(*tokens.shape, layers, p) for y in (own, shared))
        both = scaled(self.norm(shared) + own, 0.5**0.5)
        return constrain(jnp.moveaxis(both, 2, 0), None, "batch", "length", None)


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
