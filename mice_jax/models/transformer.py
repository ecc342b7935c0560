"""The decoder: its layers, stacked and scanned, and the plain pytree of parameters into which it is split.

Flax NNX modules (models/layers.py) exist only while a function is traced; between functions there are nested dicts of
arrays. Layers are stacked along a leading dim, so that compile time does not grow with depth.
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
from mice_jax.models.layers import AttentionFn, Block, Embed, Head, RMSNorm, scaled
from mice_jax.models.matmul import matmul
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import constrain, constrain_param

# B rows, T slots, S cache slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values -> result
# Keys [B K H S] and values [B K S H] of one layer, in the layouts that the matrix products of attention take.
LayerCache = tuple[jax.Array, jax.Array]
Cache = list[LayerCache]

T = TypeVar("T")

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
    reduce_dtype: Any = jnp.float32  # of the sums of weights' gradients over devices, and no part of a forward pass


class LayerKind(NamedTuple):
    """The properties that differ between layers besides parameters, [L] int32, scanned with them."""

    rope: jax.Array  # index into the spec's distinct ropes
    window: jax.Array  # index into its distinct windows


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
        # There is one branch per window, because a kernel's mask, which includes the window, is fixed at compile time.
        branches = [attend_within(self._scoring(window)) for window in _distinct(self.spec.windows)]
        query_factors = self._query_factors(positions)
        graph, layers = nnx.split(self.layers)

        def layer(x: jax.Array, scanned: tuple[nnx.State, LayerKind]) -> tuple[jax.Array, None]:
            params, kind = scanned

            def attention_fn(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                q = _scaled_queries(q, query_factors)
                if len(branches) == 1:
                    return branches[0](q, k, v), None
                return jax.lax.switch(kind.window, branches, q, k, v), None

            if stacked_tables:
                own_tables = jax.tree.map(lambda x: x[kind.rope], stacked_tables)
            else:
                [own_tables] = tables.values()
            return nnx.merge(graph, params)(x, own_tables, attention_fn, compute.reduce_dtype)

        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        x = self._embed_tokens(tokens, compute.dtype, compute.reduce_dtype)
        x, _ = jax.lax.scan(layer, x, (layers, self._layer_kinds()))
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
        """Returns attention that first writes a layer's new keys and values into its cache."""
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        query_factors = self._query_factors(positions)

        def attention_fn(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
            keys = cache[0].at[rows, :, :, positions].set(k)
            values = cache[1].at[rows, :, positions].set(v)
            q = _scaled_queries(q, query_factors)
            return masked(q, keys, values, mask, self._scoring(None)), (keys, values)

        return attention_fn

    def output_weight(self) -> jax.Array:
        """Returns the weight [V D] of the output projection, which is the embedding if the two are tied."""
        return (self.embed.table if self.spec.tie_embeddings else self.head.weight)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Computes float32 logits [B T vocab_size] from hidden states [B T D]."""
        logits = matmul(hidden, self.output_weight(), out_dtype=jnp.float32)
        # The padding is removed from the logits, because removing it from the weight would copy the weight.
        logits = logits[..., : self.spec.vocab_size]
        return softcapped(logits * self.spec.logit_scale, self.spec.logit_softcap)

    def _embed_tokens(self, tokens: jax.Array, dtype: Any, reduce_dtype: Any = jnp.float32) -> jax.Array:
        x = scaled(self.embed(tokens, dtype, reduce_dtype), self.spec.embedding_multiplier)
        return constrain(x, "batch", "length", "hidden")

    def _scoring(self, window: int | None) -> Scoring:
        return Scoring(self.spec.attention_scale, window, self.spec.attention_softcap)

    def _query_factors(self, positions: jax.Array) -> jax.Array | None:
        """Computes the factors of the queries at positions [B T], float32; None if they have none."""
        scale = self.spec.query_scale
        if scale is None:
            return None
        return 1 + scale.beta * jnp.log1p((positions // scale.original_positions).astype(jnp.float32))

    def _layer_kinds(self) -> LayerKind:
        ropes, windows = _distinct(self.spec.ropes), _distinct(self.spec.windows)
        return LayerKind(
            rope=jnp.array([ropes.index(r) for r in self.spec.ropes], jnp.int32),
            window=jnp.array([windows.index(w) for w in self.spec.windows], jnp.int32),
        )

    def _rope_tables(self, positions: jax.Array, lengths: jax.Array | None) -> dict[rope.Rope | None, rope.RopeTables]:
        """Computes the cosines and sines of each distinct RoPE of the layers."""
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
        """Draws random parameters, the same on every mesh; the padding of the vocabulary is zero."""
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
        """Returns the module with these parameters, for use inside a traced function."""
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
    """Returns the decoder of a spec, with a vocabulary padded so that a tensor axis of size `tensor` divides it."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    rows = -(-spec.vocab_size // multiple) * multiple
    module = nnx.eval_shape(lambda: Transformer(spec, rows, nnx.Rngs(0)))
    graph, state = nnx.split(module, nnx.Param)
    axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return Decoder(spec, rows, nnx.to_pure_dict(state), jax.tree.map(tuple, axes), graph, state)


def _scaled_queries(q: jax.Array, factors: jax.Array | None) -> jax.Array:
    """Multiplies queries [B T N H] by factors [B T], in the queries' dtype."""
    return q if factors is None else q * factors.astype(q.dtype)[:, :, None, None]


def _distinct(values: tuple[T, ...]) -> list[T]:
    return list(dict.fromkeys(values))
