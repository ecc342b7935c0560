"""The decoder: Flax NNX modules that declare each parameter once, and the plain pytree they are split into.

Modules exist while a function is traced; between functions there are only nested dicts of arrays. Layers are
stacked along a leading axis and scanned, so that compile time does not grow with depth. Parameters are float32
and are cast to the compute dtype where they are used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mice_jax.models.attention import attend
from mice_jax.models.attention.reference import masked
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import constrain

# B rows, T slots, S cache slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers

Params = dict[str, Any]
# What a block does with its queries, keys and values; the second result is kept (a cache), or None.
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

REMAT_POLICIES = {
    "full": None,  # keep a layer's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep what matrix products with weights give
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is computed; changes rounding, speed and memory, not the function."""

    dtype: Any
    attention: str
    remat: str  # none | a key of REMAT_POLICIES


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> nnx.Param:
    """Normal with `std`; ones where it is None, zeros where it is 0."""
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif std == 0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float, rngs: nnx.Rngs):
        self.scale = _param(rngs, (dim,), ("embed",), None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (self.scale[...] * wide).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, n, k, h, std = spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.init_std
        self.q = _param(rngs, (d, n, h), ("embed", "heads", "head_dim"), std)
        self.k = _param(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), std)
        self.v = _param(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), std)
        self.o = _param(rngs, (n, h, d), ("heads", "head_dim", "embed"), std)
        self.bias = spec.attention_bias
        if self.bias:
            self.q_bias = _param(rngs, (n, h), ("heads", "head_dim"), 0)
            self.k_bias = _param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
            self.v_bias = _param(rngs, (k, h), ("kv_heads", "head_dim"), 0)
            self.o_bias = _param(rngs, (d,), ("embed",), 0)
        self.rope_theta = spec.rope_theta

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B T D] -> rotated queries [B T N H], rotated keys and values [B T K H]."""
        q, k, v = (_product(x, w) for w in (self.q, self.k, self.v))
        if self.bias:
            q, k, v = (y + b[...].astype(x.dtype) for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        return _rotate(q, positions, self.rope_theta), _rotate(k, positions, self.rope_theta), v

    def output(self, mixed: jax.Array) -> jax.Array:
        """[B T N H] -> [B T D]."""
        y = _product(mixed, self.o, in_dims=2)
        return y + self.o_bias[...].astype(y.dtype) if self.bias else y


class MLP(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        d, f, std = spec.d_model, spec.d_ff, spec.init_std
        self.gate = _param(rngs, (d, f), ("embed", "mlp"), std)
        self.up = _param(rngs, (d, f), ("embed", "mlp"), std)
        self.down = _param(rngs, (f, d), ("mlp", "embed"), std)
        self.bias = spec.mlp_bias
        if self.bias:
            self.gate_bias = _param(rngs, (f,), ("mlp",), 0)
            self.up_bias = _param(rngs, (f,), ("mlp",), 0)
            self.down_bias = _param(rngs, (d,), ("embed",), 0)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = _product(x, self.gate), _product(x, self.up)
        if self.bias:
            gate, up = gate + self.gate_bias[...].astype(x.dtype), up + self.up_bias[...].astype(x.dtype)
        inner = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
        y = _product(inner, self.down)
        return y + self.down_bias[...].astype(x.dtype) if self.bias else y


class Block(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(spec.d_model, spec.norm_eps, rngs)
        self.attention = Attention(spec, rngs)
        self.mlp_norm = RMSNorm(spec.d_model, spec.norm_eps, rngs)
        self.mlp = MLP(spec, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mix: Mix) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            mixed, kept = mix(*self.attention.project(self.attention_norm(x), positions))
            x = constrain(x + self.attention.output(mixed), "batch", "length", "hidden")
        with jax.named_scope("mlp"):
            x = constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", "hidden")
        return x, kept


class Embed(nnx.Module):
    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.table = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


class Head(nnx.Module):
    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.weight = _param(rngs, (spec.d_model, rows), ("embed", "vocab"), spec.init_std)


class Transformer(nnx.Module):
    """`vocab_rows` is the vocabulary padded to what the mesh divides; the padding is never predicted."""

    def __init__(self, spec: ModelSpec, vocab_rows: int, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=spec.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(spec, rngs)

        self.embed = Embed(vocab_rows, spec, rngs)
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(spec.d_model, spec.norm_eps, rngs)
        if not spec.tie_embeddings:
            self.head = Head(vocab_rows, spec, rngs)
        self.spec = spec

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, compute: Compute) -> jax.Array:
        """Packed rows, each [B T] int32 -> the normalised last hidden state [B T D]."""

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            scale = self.spec.head_dim**-0.5
            return attend(q, k, v, segment_ids, scale=scale, backend=compute.attention), None

        graph, stack = nnx.split(self.layers)

        def layer(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(x, positions, mix)

        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        x, _ = jax.lax.scan(layer, self._embedded(tokens, compute.dtype), stack)
        return self.final_norm(x)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Continues rows from a cache of keys and values, each [L B S K H]: -> hidden [B T D], the new cache.

        Row b's tokens [B T] go to the cache slots `positions[b]`, and attend to every slot up to their own.
        """
        graph, stack = nnx.split(self.layers)
        slots = jnp.arange(cache[0].shape[2], dtype=jnp.int32)
        mask = slots[None, None, :] <= positions[:, :, None]
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]

        def layer(x: jax.Array, scanned: tuple[nnx.State, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            params, keys, values = scanned

            def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
                new = keys.at[rows, positions].set(k), values.at[rows, positions].set(v)
                return masked(q, *new, mask, self.spec.head_dim**-0.5), new

            return nnx.merge(graph, params)(x, positions, mix)

        x, cache = jax.lax.scan(layer, self._embedded(tokens, cache[0].dtype), (stack, *cache))
        return self.final_norm(x), cache

    def output_weight(self) -> jax.Array:
        """[D V], the embedding turned where it is tied."""
        return self.embed.table[...].T if self.spec.tie_embeddings else self.head.weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B T D] -> float32 [B T vocab_size]."""
        weight = self.output_weight()[:, : self.spec.vocab_size].astype(hidden.dtype)
        return jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32)

    def _embedded(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        table = constrain(self.embed.table[...].astype(dtype), "vocab", "hidden")
        return constrain(jnp.take(table, tokens, axis=0), "batch", "length", "hidden")


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A transformer split once into its structure and a pytree of parameters, by shape and by logical axes."""

    spec: ModelSpec
    vocab_rows: int
    abstract: Params  # of jax.ShapeDtypeStruct
    axes: Params  # of tuples of logical axes
    _graph: Any
    _state: Any

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, the same on every mesh; the vocabulary's padding is zero."""
        module = Transformer(self.spec, self.spec.vocab_size, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))

        def padded(fresh: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.pad(fresh, [(0, w - f) for f, w in zip(fresh.shape, wanted.shape, strict=True)])

        return jax.tree.map(padded, params, self.abstract)

    def bind(self, params: Params) -> Transformer:
        """The module over these parameters, for use inside a traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


VOCAB_MULTIPLE = 128  # one padding for every mesh, so that checkpoints fit all of them; and whole tiles


@functools.cache
def make_decoder(spec: ModelSpec, tensor: int = 1) -> Decoder:
    """The decoder of a spec, its vocabulary padded to what the mesh's tensor axis divides."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    rows = -(-spec.vocab_size // multiple) * multiple
    module = nnx.eval_shape(lambda: Transformer(spec, rows, nnx.Rngs(0)))
    graph, state = nnx.split(module, nnx.Param)
    axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return Decoder(spec, rows, nnx.to_pure_dict(state), jax.tree.map(tuple, axes), graph, state)


def _product(x: jax.Array, weight: nnx.Param, in_dims: int = 1) -> jax.Array:
    """The last `in_dims` dims of x [B T ...] against the first of the weight, as one product of two matrices.

    An einsum says the same, but on CPU its gradient by the weight takes twice the time.
    """
    w = weight[...].astype(x.dtype)
    inputs = math.prod(w.shape[:in_dims])
    y = x.reshape(-1, inputs) @ w.reshape(inputs, -1)
    return y.reshape(*x.shape[:2], *w.shape[in_dims:])


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding in the half-split form of Hugging Face checkpoints; angles in float32."""
    half = x.shape[-1] // 2
    # Rounded to float32 after the division, the power and the reciprocal, as the checkpoints' own code rounds
    # them: a difference in the last place is multiplied by the position. XLA's pow is not exact to that place.
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B T 1 H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
