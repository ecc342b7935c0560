"""The parts of a decoder layer as Flax NNX modules, each of which declares its parameters once.

A declaration has the shape, the logical axes and the initialisation of a parameter. Parameters are float32 and are cast
to the compute dtype where they are used. The dims of a weight are its outputs, then its inputs, as in checkpoints.
`reduce_dtype` is everywhere the dtype in which the gradients of weights and biases are summed over devices. Those of
norms are always summed in float32, in which norms compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models import rope
from mice_jax.models.matmul import add_bias, look_up, matmul
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import constrain

# B rows, T slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary

# The attention of one layer: queries, keys, values -> result, and the layer's new cache (None without a cache).
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> nnx.Param:
    """A parameter drawn from a normal distribution; ones if `std` is None, zeros if it is 0."""
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif std == 0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _axes(param: nnx.Param) -> tuple[str | None, ...]:
    """The logical axes of a parameter of one layer; the stacked parameter, whose metadata it has, has one more."""
    return tuple(param.out_sharding)[-param[...].ndim :]


def _product(x: jax.Array, param: nnx.Param, reduce_dtype: Any, in_dims: int = 1) -> jax.Array:
    """Multiplies activations by a parameter, as `matmul` does."""
    return matmul(x, param[...], in_dims, axes=_axes(param), reduce_dtype=reduce_dtype)


def _plus(x: jax.Array, param: nnx.Param, reduce_dtype: Any) -> jax.Array:
    """Adds a bias to activations, as `add_bias` does."""
    return add_bias(x, param[...], axes=_axes(param), reduce_dtype=reduce_dtype)


class RMSNorm(nnx.Module):
    """RMS norm over all dims of `shape` together; its factor is the stored scale plus the spec's `norm_offset`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], spec: ModelSpec, rngs: nnx.Rngs):
        self.scale = _param(rngs, shape, axes, 0 if spec.norm_offset else None)
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, whose last dims are `shape`, in float32; returns the same shape and dtype."""
        scale = self.scale[...] + self.offset
        wide = x.astype(jnp.float32)
        dims = tuple(range(-scale.ndim, 0))
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=dims, keepdims=True) + self.eps)
        return (scale * wide).astype(x.dtype)


class Attention(nnx.Module):
    """The projections of grouped-query attention with rotary positions; the caller computes attention itself."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, n, k, h, std = spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.init_std
        self.q = _param(rngs, (n, h, d), ("heads", "head_dim", "embed"), std)
        self.k = _param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
        self.v = _param(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), std)
        self.o = _param(rngs, (d, n, h), ("embed", "heads", "head_dim"), std)
        self.qkv_bias, self.out_bias, self.qk_norm = spec.qkv_bias, spec.out_bias, spec.qk_norm
        if spec.qkv_bias:
            self.q_bias = _param(rngs, (n, h), ("heads", "head_dim"), 0)
            self.k_bias = _param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
            self.v_bias = _param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
        if spec.out_bias:
            self.o_bias = _param(rngs, (d,), ("embed",), 0)
        if spec.qk_norm in ("head", "head_after_rope"):
            self.q_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
            self.k_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
        elif spec.qk_norm == "all":
            self.q_norm = RMSNorm((n, h), ("heads", "head_dim"), spec, rngs)
            self.k_norm = RMSNorm((k, h), ("kv_heads", "head_dim"), spec, rngs)

    def project(
        self, x: jax.Array, tables: rope.RopeTables, reduce_dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Projects [B T D] to rotated queries [B T N H], rotated keys [B T K H] and values [B T K H]."""
        q, k, v = (_product(x, param, reduce_dtype) for param in (self.q, self.k, self.v))
        if self.qkv_bias:
            q = _plus(q, self.q_bias, reduce_dtype)
            k = _plus(k, self.k_bias, reduce_dtype)
            v = _plus(v, self.v_bias, reduce_dtype)
        if self.qk_norm in ("head", "all"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.apply_rope(q, tables), rope.apply_rope(k, tables)
        if self.qk_norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def output(self, attended: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Projects the result of attention, [B T N H], to [B T D]."""
        y = _product(attended, self.o, reduce_dtype, in_dims=2)
        return _plus(y, self.o_bias, reduce_dtype) if self.out_bias else y


class MLP(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, f, std = spec.d_model, spec.d_ff, spec.init_std
        self.gate = _param(rngs, (f, d), ("mlp", "embed"), std)
        self.up = _param(rngs, (f, d), ("mlp", "embed"), std)
        self.down = _param(rngs, (d, f), ("embed", "mlp"), std)
        self.activation, self.bias = ACTIVATIONS[spec.activation], spec.mlp_bias
        if self.bias:
            self.gate_bias = _param(rngs, (f,), ("mlp",), 0)
            self.up_bias = _param(rngs, (f,), ("mlp",), 0)
            self.down_bias = _param(rngs, (d,), ("embed",), 0)

    def __call__(self, x: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Computes the MLP: [B T D] -> [B T D]."""
        gate, up = _product(x, self.gate, reduce_dtype), _product(x, self.up, reduce_dtype)
        if self.bias:
            gate, up = _plus(gate, self.gate_bias, reduce_dtype), _plus(up, self.up_bias, reduce_dtype)
        inner = constrain(self.activation(gate) * up, "batch", "length", "mlp")
        y = _product(inner, self.down, reduce_dtype)
        return _plus(y, self.down_bias, reduce_dtype) if self.bias else y


class Block(nnx.Module):
    """Attention and MLP, each with a norm before it, after it, or both, and added to its input."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        width = ((spec.d_model,), ("embed",), spec, rngs)
        self.pre, self.post, self.multiplier = spec.pre_norm, spec.post_norm, spec.residual_multiplier
        if spec.pre_norm:
            self.attention_norm, self.mlp_norm = RMSNorm(*width), RMSNorm(*width)
        if spec.post_norm:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(*width), RMSNorm(*width)
        self.attention = Attention(spec, rngs)
        self.mlp = MLP(spec, rngs)

    def __call__(
        self, x: jax.Array, tables: rope.RopeTables, attention_fn: AttentionFn, reduce_dtype: Any = jnp.float32
    ) -> tuple[jax.Array, Any]:
        """Computes the layer.

        Args:
          x: [B T D].
          tables: cosines and sines of the rotary positions.
          attention_fn: the attention of this layer.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T D], and the second result of `attention_fn`.
        """
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.attention_norm(x) if self.pre else x, tables, reduce_dtype)
            attended, cache = attention_fn(q, k, v)
            y = self.attention.output(attended, reduce_dtype)
            x = self._add(x, self.attention_post_norm(y) if self.post else y)
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x) if self.pre else x, reduce_dtype)
            x = self._add(x, self.mlp_post_norm(y) if self.post else y)
        return x, cache

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return constrain(x + scaled(y, self.multiplier), "batch", "length", "hidden")


class Embed(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.table = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)

    def __call__(self, tokens: jax.Array, dtype: Any, reduce_dtype: Any) -> jax.Array:
        """Looks up the embeddings of tokens [B T] in `dtype`: [B T D]."""
        return look_up(self.table[...], tokens, dtype, axes=_axes(self.table), reduce_dtype=reduce_dtype)


class Head(nnx.Module):
    """The output projection of a model that does not tie it to the embedding."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.weight = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor for x of any shape, in its own dtype; x itself if the factor is 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
