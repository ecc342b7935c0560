"""The decoder: Flax NNX modules that declare each parameter once, and the plain pytree they are split into.

Modules exist only while a function is traced; between functions there are nested dicts of arrays. Layers are stacked
along a leading dim and scanned, so that compile time does not grow with depth. Parameters are float32 and are cast to
the compute dtype where they are used. The dims of a weight are its outputs, then its inputs, as in checkpoints, so
that a parameter has the bytes of a checkpoint's tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models import rope
from mice_jax.models.attention import attend
from mice_jax.models.attention.reference import masked
from mice_jax.models.attention.score_function import Scoring, softcapped
from mice_jax.models.attention.segments import SAVED_NAME
from mice_jax.models.attention.tree import Trees, attend_branched
from mice_jax.models.matmul import matmul
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import constrain, constrain_param, gather_split_heads

# B rows, T slots, S cache slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values -> result
# The attention of one layer: queries, keys, values -> result, and the layer's new cache (None without a cache).
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Keys [B K H S] and values [B K S H] of one layer, in the layouts that the matrix products of attention take.
LayerCache = tuple[jax.Array, jax.Array]
Cache = list[LayerCache]

T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

REMAT_POLICIES = {
    "full": None,  # saves the input of a layer only
    # Saves the results of products with weights, and of our own attention kernels: recomputing the rest is cheap.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    ),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is computed: affects rounding, speed and memory, but not the function."""

    dtype: Any
    attention: str  # a key of attention.BACKENDS
    remat: str  # "none" or a key of REMAT_POLICIES


class LayerKind(NamedTuple):
    """What differs between layers besides parameters: [L] int32, scanned with them."""

    rope: jax.Array  # index into the spec's distinct ropes
    window: jax.Array  # index into its distinct windows


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> nnx.Param:
    """A parameter drawn from a normal distribution; ones if `std` is None, zeros if it is 0."""
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif std == 0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class RMSNorm(nnx.Module):
    """RMS norm over all dims of `shape` together; the factor is the stored scale plus the spec's `norm_offset`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], spec: ModelSpec, rngs: nnx.Rngs):
        self.scale = _param(rngs, shape, axes, 0 if spec.norm_offset else None)
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
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
        if spec.qk_norm == "head":
            self.q_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
            self.k_norm = RMSNorm((h,), ("head_dim",), spec, rngs)
        elif spec.qk_norm == "all":
            self.q_norm = RMSNorm((n, h), ("heads", "head_dim"), spec, rngs)
            self.k_norm = RMSNorm((k, h), ("kv_heads", "head_dim"), spec, rngs)

    def project(self, x: jax.Array, tables: rope.RopeTables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B T D] -> rotated queries [B T N H], rotated keys and values [B T K H]."""
        q = matmul(x, gather_split_heads(self.q[...], "heads", "head_dim", "embed"))
        k = matmul(x, self.k[...])
        v = matmul(x, self.v[...])
        if self.qkv_bias:
            q = q + self.q_bias[...].astype(x.dtype)
            k = k + self.k_bias[...].astype(x.dtype)
            v = v + self.v_bias[...].astype(x.dtype)
        if self.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.apply_rope(q, tables), rope.apply_rope(k, tables), v

    def output(self, attended: jax.Array) -> jax.Array:
        """[B T N H] -> [B T D]."""
        y = matmul(attended, gather_split_heads(self.o[...], "embed", "heads", "head_dim"), in_dims=2)
        return y + self.o_bias[...].astype(y.dtype) if self.out_bias else y


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

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = matmul(x, self.gate[...]), matmul(x, self.up[...])
        if self.bias:
            gate, up = gate + self.gate_bias[...].astype(x.dtype), up + self.up_bias[...].astype(x.dtype)
        inner = constrain(self.activation(gate) * up, "batch", "length", "mlp")
        y = matmul(inner, self.down[...])
        return y + self.down_bias[...].astype(x.dtype) if self.bias else y


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

    def __call__(self, x: jax.Array, tables: rope.RopeTables, attention_fn: AttentionFn) -> tuple[jax.Array, Any]:
        """[B T D] -> [B T D], and the second result of `attention_fn`."""
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.attention_norm(x) if self.pre else x, tables)
            attended, cache = attention_fn(q, k, v)
            y = self.attention.output(attended)
            x = self._add(x, self.attention_post_norm(y) if self.post else y)
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x) if self.pre else x)
            x = self._add(x, self.mlp_post_norm(y) if self.post else y)
        return x, cache

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return constrain(x + _scaled(y, self.multiplier), "batch", "length", "hidden")


class Embed(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.table = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


class Head(nnx.Module):
    """The output projection, where it is not the embedding."""

    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.weight = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


class Transformer(nnx.Module):
    """The whole decoder.

    Args:
      spec: what is computed.
      vocab_rows: the vocabulary size, padded so that the mesh divides it; the padding is never predicted.
      rngs: the source of random parameters.
    """

    def __init__(self, spec: ModelSpec, vocab_rows: int, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=spec.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(spec, rngs)

        self.embed = Embed(vocab_rows, spec, rngs)
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm((spec.d_model,), ("embed",), spec, rngs)
        if not spec.tie_embeddings:
            self.head = Head(vocab_rows, spec, rngs)
        self.spec = spec

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, compute: Compute) -> jax.Array:
        """Runs packed rows through all layers.

        Args:
          tokens: [B T] int32.
          positions: [B T] int32, which restart with each sample.
          segment_ids: [B T] int32, 0 for padding.
          compute: dtype, attention backend and rematerialisation.

        Returns:
          The hidden state after the final norm, [B T D].
        """
        lengths = rope.sample_lengths(segment_ids) if rope.needs_lengths(self.spec.ropes) else None

        def attend_within(scoring: Scoring) -> Attend:
            return lambda q, k, v: attend(q, k, v, segment_ids, scoring, backend=compute.attention)

        return self._through_layers(tokens, positions, lengths, attend_within, compute)

    def hidden_of_trees(self, tokens: jax.Array, lengths: jax.Array, trees: Trees, compute: Compute) -> jax.Array:
        """Runs rows of token trees through all layers.

        Args:
          tokens: [B T] int32.
          lengths: [B T] int32, the lengths of the texts to which a slot belongs. Where LongRoPE rotates long texts
            differently, no tree may have texts of both kinds.
          trees: the place of each slot in its tree.
          compute: dtype, attention backend of the trunks, and rematerialisation.

        Returns:
          The hidden state after the final norm, [B T D].
        """

        def attend_within(scoring: Scoring) -> Attend:
            return lambda q, k, v: attend_branched(q, k, v, trees, scoring, backend=compute.attention)

        return self._through_layers(tokens, trees.positions, lengths, attend_within, compute)

    def _through_layers(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        attend_within: Callable[[Scoring], Attend],
        compute: Compute,
    ) -> jax.Array:
        tables = self._rope_tables(positions, lengths)
        stacked_tables = jax.tree.map(lambda *x: jnp.stack(x), *tables.values()) if len(tables) > 1 else None
        # One branch per window: it is part of a kernel's mask, so it has to be known when the kernel is compiled.
        branches = [attend_within(self._scoring(window)) for window in _distinct(self.spec.windows)]
        graph, layers = nnx.split(self.layers)

        def layer(x: jax.Array, scanned: tuple[nnx.State, LayerKind]) -> tuple[jax.Array, None]:
            params, kind = scanned

            def attention_fn(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                if len(branches) == 1:
                    return branches[0](q, k, v), None
                return jax.lax.switch(kind.window, branches, q, k, v), None

            if stacked_tables:
                own_tables = jax.tree.map(lambda x: x[kind.rope], stacked_tables)
            else:
                [own_tables] = tables.values()
            return nnx.merge(graph, params)(x, own_tables, attention_fn)

        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        x, _ = jax.lax.scan(layer, self._embed_tokens(tokens, compute.dtype), (layers, self._layer_kinds()))
        return self.final_norm(x)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, lengths: jax.Array, cache: Cache, layers: list[Params]
    ) -> tuple[jax.Array, Cache]:
        """Continues rows from a cache.

        The tokens of row b go to the cache slots `positions[b]`. They attend to every slot up to their own that is in
        the layer's window. Layers are not scanned here: on CPU a scan copies each layer's parameters and its part of
        the cache for every token, which takes as long as everything else.

        Args:
          tokens: [B T] int32.
          positions: [B T] int32.
          lengths: [B] int32, the lengths of the rows at their end. LongRoPE rotates the tokens of long samples
            differently, from the first token on.
          cache: the keys and values so far, as from `empty_cache`.
          layers: the parameters of each layer, from `Decoder.unstack`.

        Returns:
          The hidden state after the final norm [B T D], and the new cache.
        """
        tables = self._rope_tables(positions, lengths[:, None])
        graph, stack = nnx.split(self.layers)
        distance = positions[:, :, None] - jnp.arange(cache[0][1].shape[2], dtype=jnp.int32)  # [B T S]
        x = self._embed_tokens(tokens, cache[0][0].dtype)
        new_cache = []
        for params, layer_cache, rope_, window in zip(layers, cache, self.spec.ropes, self.spec.windows, strict=True):
            state = jax.tree.map(lambda x: x, stack)
            nnx.replace_by_pure_dict(state, params)
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            attention_fn = self._cached_attention(layer_cache, positions, mask)
            x, layer_cache = nnx.merge(graph, state)(x, tables[rope_], attention_fn)
            new_cache.append(layer_cache)
        return self.final_norm(x), new_cache

    def _cached_attention(self, cache: LayerCache, positions: jax.Array, mask: jax.Array) -> AttentionFn:
        """Attention that first writes a layer's new keys and values into its cache."""
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

        def attention_fn(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
            keys = cache[0].at[rows, :, :, positions].set(k)
            values = cache[1].at[rows, :, positions].set(v)
            return masked(q, keys, values, mask, self._scoring(None)), (keys, values)

        return attention_fn

    def output_weight(self) -> jax.Array:
        """The weight [V D] of the output projection: the embedding where the two are tied."""
        return (self.embed.table if self.spec.tie_embeddings else self.head.weight)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B T D] -> float32 logits [B T vocab_size]."""
        logits = matmul(hidden, self.output_weight(), out_dtype=jnp.float32)
        # The padding is cut from the logits and not from the weight, which would copy the weight.
        logits = logits[..., : self.spec.vocab_size]
        return softcapped(logits * self.spec.logit_scale, self.spec.logit_softcap)

    def _embed_tokens(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        table = constrain(self.embed.table[...].astype(dtype), "vocab", "hidden")
        x = _scaled(jnp.take(table, tokens, axis=0), self.spec.embedding_multiplier)
        return constrain(x, "batch", "length", "hidden")

    def _scoring(self, window: int | None) -> Scoring:
        return Scoring(self.spec.attention_scale, window, self.spec.attention_softcap)

    def _layer_kinds(self) -> LayerKind:
        ropes, windows = _distinct(self.spec.ropes), _distinct(self.spec.windows)
        return LayerKind(
            rope=jnp.array([ropes.index(r) for r in self.spec.ropes], jnp.int32),
            window=jnp.array([windows.index(w) for w in self.spec.windows], jnp.int32),
        )

    def _rope_tables(self, positions: jax.Array, lengths: jax.Array | None) -> dict[rope.Rope | None, rope.RopeTables]:
        """Cosines and sines of each distinct RoPE of the layers."""
        kinds = _distinct(self.spec.ropes)
        dims = next((kind.dims for kind in kinds if kind), 2)
        return {kind: rope.rope_tables(kind, dims, positions, lengths) for kind in kinds}


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A transformer, split once into its structure and the shapes and logical axes of its parameters."""

    spec: ModelSpec
    vocab_rows: int  # the vocabulary size with padding
    abstract: Params  # leaves are jax.ShapeDtypeStruct
    axes: Params  # leaves are tuples of logical axes
    _graph: Any
    _state: Any

    def init(self, key: jax.Array) -> Params:
        """Random parameters, the same on every mesh; the padding of the vocabulary is zero."""
        module = Transformer(self.spec, self.spec.vocab_size, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))

        def pad(x: jax.Array, padded: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.pad(x, [(0, after - before) for before, after in zip(x.shape, padded.shape, strict=True)])

        return jax.tree.map(pad, params, self.abstract)

    def unstack(self, params: Params) -> list[Params]:
        """Splits the stacked parameters of the layers into one tree per layer, for `Transformer.decode`."""
        axes = self.axes["layers"]

        def layer(i: int) -> Params:
            return jax.tree.map(lambda x, axes: constrain_param(x[i], *axes[1:]), params["layers"], axes)

        return [layer(i) for i in range(self.spec.num_layers)]

    def bind(self, params: Params) -> Transformer:
        """The module with these parameters, for use inside a traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def empty_cache(spec: ModelSpec, rows: int, slots: int, dtype: Any) -> Cache:
    """Makes the cache of zeros from which decoding starts.

    Args:
      spec: the model.
      rows: the number of rows, B.
      slots: the number of tokens that a row can hold, S.
      dtype: the dtype of keys and values.

    Returns:
      Keys [B K H S] and values [B K S H] of each layer.
    """
    keys = jnp.zeros((rows, spec.num_kv_heads, spec.head_dim, slots), dtype)
    return [(keys, keys.swapaxes(2, 3))] * spec.num_layers


# The vocabulary is padded to a multiple of this on every mesh, so that checkpoints fit all meshes and fill TPU tiles.
VOCAB_MULTIPLE = 128


@functools.cache
def make_decoder(spec: ModelSpec, tensor: int = 1) -> Decoder:
    """The decoder of a spec, with a vocabulary padded so that a tensor axis of size `tensor` divides it."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    rows = -(-spec.vocab_size // multiple) * multiple
    module = nnx.eval_shape(lambda: Transformer(spec, rows, nnx.Rngs(0)))
    graph, state = nnx.split(module, nnx.Param)
    axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return Decoder(spec, rows, nnx.to_pure_dict(state), jax.tree.map(tuple, axes), graph, state)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _distinct(values: tuple[T, ...]) -> list[T]:
    return list(dict.fromkeys(values))
