"""The decoder: its layers, stacked and scanned, and the plain pytree of parameters into which it is split.

Flax NNX modules (models/layers.py) exist only while a function is traced; between functions there are nested dicts of
arrays. Layers are stacked along a leading dim and scanned, so that compile time does not grow with depth
(models/layer_stacks.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models import lora as lora_trees
from mice_jax.models import rope
from mice_jax.models.attention import attend
from mice_jax.models.attention.reference import masked
from mice_jax.models.attention.score_function import Scoring, softcapped
from mice_jax.models.attention.split_rows import sample_lengths
from mice_jax.models.attention.tree import Trees, attend_branched
from mice_jax.models.layer_stacks import (
    LayerProperties,
    Lent,
    MixerOf,
    StackedLayers,
    layers_of_stack,
    stack_layers,
)
from mice_jax.models.layers import (
    ApplyMixer,
    Attention,
    AttentionFn,
    Embed,
    Head,
    OwnEmbeddings,
    scaled,
)
from mice_jax.models.lora import LoRA
from mice_jax.models.matmul import matmul
from mice_jax.models.mixers import MIXERS
from mice_jax.models.parameters import RMSNorm
from mice_jax.models.spec import AttentionKind, Kind, ModelSpec, is_recurrent
from mice_jax.sharding import constrain, constrain_param

# B rows, T slots, S cache slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values -> result
# Of a layer with attention: keys [B K H S] and values [B K S H], in the layouts that its matrix products take, or
# nothing if it borrows them. Of a layer with a recurrent mixer: its state, an array or a tuple of arrays.
AttentionCache = tuple[jax.Array, jax.Array]
Cache = list[Any]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is computed: affects rounding, speed and memory, but not the function."""

    dtype: Any
    attention: str  # a key of attention.BACKENDS
    remat: str  # "none" or a key of layer_stacks.REMAT_POLICIES
    reduce_dtype: Any = jnp.float32  # of the sums of weights' gradients over devices, and no part of a forward pass
    # Parts of a row on each device of the sequence axis (`split_rows.RowSplit`); 0 if devices have whole rows.
    row_parts: int = 0


class Transformer(nnx.Module):
    """The whole decoder.

    Args:
      spec: what is computed.
      vocab_rows: the vocabulary size, padded so that the mesh divides it; the padding is never predicted.
      rngs: the source of random parameters.
      lora: the adapters of the layers' weights, if any.
    """

    def __init__(self, spec: ModelSpec, vocab_rows: int, rngs: nnx.Rngs, lora: LoRA | None = None):
        self.embed = Embed(vocab_rows, spec, rngs)
        if spec.per_layer_dim:
            self.own_embeddings = OwnEmbeddings(vocab_rows, spec, rngs)
        self.layers = stack_layers(spec, rngs, lora)
        self.final_norm = RMSNorm((spec.d_model,), ("embed",), spec, rngs)
        if not spec.tie_embeddings:
            self.head = Head(vocab_rows, spec, rngs)
        self.spec = spec

    def hidden(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, compute: Compute) -> jax.Array:
        """Runs packed rows through all layers.

        Args:
          tokens: [B T] int32, in balanced order if devices have two parts of a row each.
          positions: [B T] int32, which restart with each sample.
          segment_ids: [B T] int32, 0 for padding.
          compute: dtype, attention backend, rematerialisation, and how rows are split.

        Returns:
          The hidden state after the final norm, [B T D].
        """
        parts = compute.row_parts
        lengths = sample_lengths(segment_ids, parts) if rope.needs_lengths(self.spec.ropes) else None

        def attend_within(scoring: Scoring) -> Attend:
            return lambda q, k, v: attend(q, k, v, segment_ids, scoring, backend=compute.attention, row_parts=parts)

        def recur(mixer: Any, x: jax.Array) -> tuple[jax.Array, None]:
            return mixer(x, segment_ids, compute.reduce_dtype), None

        return self._through_layers(tokens, positions, lengths, attend_within, recur, compute)

    def hidden_of_trees(self, tokens: jax.Array, lengths: jax.Array, trees: Trees, compute: Compute) -> jax.Array:
        """Runs rows of token trees through all layers, which must all have attention: a state cannot branch.

        Args:
          tokens: [B T] int32.
          lengths: [B T] int32, the lengths of the texts to which a slot belongs. Where LongRoPE rotates long texts
            differently, no tree may have texts of both kinds.
          trees: the place of each slot in its tree.
          compute: dtype, attention backend of the trunks, and rematerialisation.

        Returns:
          The hidden state after the final norm, [B T D].

        Raises:
          ValueError: a layer has a recurrent mixer.
        """

        def attend_within(scoring: Scoring) -> Attend:
            return lambda q, k, v: attend_branched(q, k, v, trees, scoring, backend=compute.attention)

        def recur(mixer: Any, x: jax.Array) -> tuple[jax.Array, None]:
            raise ValueError(f"{type(mixer).__name__} cannot continue one state along several branches of a tree.")

        return self._through_layers(tokens, trees.positions, lengths, attend_within, recur, compute)

    def _through_layers(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        attend_within: Callable[[Scoring], Attend],
        recur: ApplyMixer,
        compute: Compute,
    ) -> jax.Array:
        tables, query_factors = self._rope_tables(positions, lengths), self._query_factors(positions)

        def mixer_of(kind: Kind) -> MixerOf:
            return (lambda *_: recur) if is_recurrent(kind) else attention[kind]

        attention = {
            kind: self._attention_of_layers(kind, tables, query_factors, attend_within, compute)
            for kind in _distinct(self.spec.mixers)
            if not is_recurrent(kind)
        }
        with jax.named_scope("embed"):
            x = self._embed_tokens(tokens, compute.dtype, compute.reduce_dtype)
            properties = self._layer_properties(self._own_inputs(tokens, x, compute.reduce_dtype))
        layers = StackedLayers(self.spec, self.layers)
        x = layers.scan(x, properties, mixer_of, compute.remat, compute.reduce_dtype)
        with jax.named_scope("final_norm"):
            return self.final_norm(x)

    def _attention_of_layers(
        self,
        kind: Kind,
        all_tables: dict[rope.Rope | None, rope.RopeTables],
        query_factors: jax.Array | None,
        attend_within: Callable[[Scoring], Attend],
        compute: Compute,
    ) -> MixerOf:
        """Makes the attention of every layer of a kind, by its rotary positions and its window."""
        tables = [all_tables[rope_] for rope_ in self._distinct_of_kind(kind, self.spec.ropes)]
        stacked_tables = jax.tree.map(lambda *x: jnp.stack(x), *tables) if len(tables) > 1 else None
        # There is one branch per window, because a kernel's mask, which includes the window, is fixed at compile time.
        branches = [attend_within(self._scoring(window)) for window in self._distinct_of_kind(kind, self.spec.windows)]
        keys, name = self.spec.attention_of(kind).keys, self.spec.attention_of(kind).name

        def of_layer(layer: LayerProperties, lent: Lent) -> ApplyMixer:
            if stacked_tables:
                own_tables = jax.tree.map(lambda x: x[layer.rope], stacked_tables)
            else:
                [own_tables] = tables

            def attention_fn(q: jax.Array, k: Any, v: Any) -> tuple[jax.Array, Any]:
                q = _scaled_queries(q, query_factors)
                if keys == "borrowed":
                    k, v = lent[name]
                kept = (k, v) if keys == "lent" else None
                if len(branches) == 1:
                    return branches[0](q, k, v), kept
                return jax.lax.switch(layer.window, branches, q, k, v), kept

            def apply(attention: Attention, x: jax.Array) -> tuple[jax.Array, None]:
                return attention(x, own_tables, attention_fn, compute.reduce_dtype)

            return apply

        return of_layer

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        cache: Cache,
        layers: list[Params],
        num_tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Continues rows from a cache.

        The tokens of row b go to the cache slots `positions[b]`. They attend to every slot up to their own that is in
        the layer's window, and enter the states of recurrent mixers in their order. Layers are not scanned here: on CPU
        a scan copies each layer's parameters and its part of the cache for every token, which takes as long as
        everything else.

        Args:
          tokens: [B T] int32.
          positions: [B T] int32.
          lengths: [B] int32, the lengths of the rows at their end. LongRoPE rotates the tokens of long samples
            differently, from the first token on.
          cache: the cache so far, as from `empty_cache`.
          layers: the parameters of each layer, from `Decoder.unstack`.
          num_tokens: [B] int32, how many of each row's slots are tokens; the rest, at its end, is padding, which does
            not enter the states of recurrent mixers. None if there is no padding.

        Returns:
          The hidden state after the final norm [B T D], and the new cache.
        """
        tables = self._rope_tables(positions, lengths[:, None])
        if num_tokens is None:
            num_tokens = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        x = self._embed_tokens(tokens, self.embed.table.dtype)
        own_inputs = self._own_inputs(tokens, x)
        new_cache, stacked, lent = [], StackedLayers(self.spec, self.layers), {}
        of_layers = zip(layers, cache, self.spec.mixers, self.spec.ropes, self.spec.windows, strict=True)
        for i, (params, layer_cache, kind, rope_, window) in enumerate(of_layers):
            if is_recurrent(kind):
                apply_mixer: ApplyMixer = functools.partial(_decode_recurrent, layer_cache, num_tokens)
            else:
                borrows = self.spec.attention_of(kind).keys == "borrowed"
                seen = lent[self.spec.attention_of(kind).name] if borrows else layer_cache
                attention_fn = self._cached_attention(seen, positions, window, borrows=borrows)
                apply_mixer = functools.partial(_decode_attention, tables[rope_], attention_fn)
            own = None if own_inputs is None else own_inputs[i]
            x, layer_cache = stacked.layer(kind, params)(x, apply_mixer, own_inputs=own)
            if isinstance(kind, AttentionKind) and kind.keys == "lent":
                lent[kind.name] = layer_cache
            new_cache.append(layer_cache)
        return self.final_norm(x), new_cache

    def _cached_attention(
        self, cache: AttentionCache, positions: jax.Array, window: int | None, *, borrows: bool
    ) -> AttentionFn:
        """Returns attention that first writes a layer's new keys and values into its cache, unless it borrows them."""
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        query_factors = self._query_factors(positions)
        distance = positions[:, :, None] - jnp.arange(cache[1].shape[2], dtype=jnp.int32)  # [B T S]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)

        def attention_fn(q: jax.Array, k: Any, v: Any) -> tuple[jax.Array, AttentionCache | tuple[()]]:
            q, (keys, values) = _scaled_queries(q, query_factors), cache
            if borrows:
                return masked(q, keys, values, mask, self._scoring(None)), ()
            keys = keys.at[rows, :, :, positions].set(k)
            values = values.at[rows, :, positions].set(v)
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

    def _own_inputs(self, tokens: jax.Array, x: jax.Array, reduce_dtype: Any = jnp.float32) -> jax.Array | None:
        """Computes what the embeddings of each layer are of tokens [B T] embedded as x [B T D]: [L B T P], or None."""
        return self.own_embeddings(tokens, x, reduce_dtype) if self.spec.per_layer_dim else None

    def _scoring(self, window: int | None) -> Scoring:
        return Scoring(self.spec.attention_scale, window, self.spec.attention_softcap)

    def _query_factors(self, positions: jax.Array) -> jax.Array | None:
        """Computes the factors of the queries at positions [B T], float32; None if they have none."""
        scale = self.spec.query_scale
        if scale is None:
            return None
        return 1 + scale.beta * jnp.log1p((positions // scale.original_positions).astype(jnp.float32))

    def _layer_properties(self, own_inputs: jax.Array | None) -> LayerProperties:
        def indices(values: Sequence[Any]) -> jax.Array:
            of_layers = zip(self.spec.mixers, values, strict=True)  # 0 for recurrent mixers, which do not use them
            places = [
                0 if is_recurrent(k) else self._distinct_of_kind(k, values).index(value) for k, value in of_layers
            ]
            return jnp.array(places, jnp.int32)

        return LayerProperties(indices(self.spec.ropes), indices(self.spec.windows), own_inputs)

    def _distinct_of_kind(self, kind: Kind, values: Sequence[T]) -> list[T]:
        """Returns the distinct values, of which each layer has one, of the layers of a kind."""
        return _distinct([value for k, value in zip(self.spec.mixers, values, strict=True) if k == kind])

    def _rope_tables(self, positions: jax.Array, lengths: jax.Array | None) -> dict[rope.Rope | None, rope.RopeTables]:
        """Computes the cosines and sines of each distinct RoPE of the layers with attention."""
        of_layers = zip(self.spec.mixers, self.spec.ropes, strict=True)
        ropes = _distinct([rope_ for kind, rope_ in of_layers if not is_recurrent(kind)])
        dims = next((rope_.dims for rope_ in ropes if rope_), 2)
        return {rope_: rope.rope_tables(rope_, dims, positions, lengths) for rope_ in ropes}


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """A transformer, split once into its structure and the shapes and logical axes of its parameters."""

    spec: ModelSpec
    vocab_rows: int  # the vocabulary size with padding
    abstract: Params  # leaves are jax.ShapeDtypeStruct
    axes: Params  # leaves are tuples of logical axes
    lora: LoRA | None  # the adapters, which alone are trained
    _base: "Decoder | None"
    _graph: Any
    _state: Any

    @property
    def base(self) -> "Decoder":
        """The same model without adapters."""
        return self._base or self

    def split(self, params: Params) -> tuple[Params, Params | None]:
        """Splits parameters into those that are trained and, if these are adapters, the base; copies nothing."""
        return (params, None) if self.lora is None else lora_trees.split(params)

    def join(self, trained: Params, base: Params | None) -> Params:
        """Returns the parameters that `split` splits into these parts; copies nothing."""
        return trained if base is None else lora_trees.join(trained, base)

    def init(self, key: jax.Array) -> Params:
        """Draws random parameters, the same on every mesh; the padding of the vocabulary is zero."""
        module = Transformer(self.spec, self.spec.vocab_size, nnx.Rngs(key), self.lora)
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))

        def pad(x: jax.Array, padded: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.pad(x, [(0, after - before) for before, after in zip(x.shape, padded.shape, strict=True)])

        return jax.tree.map(pad, params, self.abstract)

    def unstack(self, params: Params) -> list[Params]:
        """Splits the stacked parameters of the layers into one tree per layer, for `Transformer.decode`."""
        layers: list[Params] = [{} for _ in range(self.spec.num_layers)]
        for name, stack in params["layers"].items():
            axes = self.axes["layers"][name]
            for row, layer in enumerate(layers_of_stack(self.spec, name)):
                layers[layer][name] = jax.tree.map(lambda x, a, i=row: constrain_param(x[i], *a[1:]), stack, axes)
        return layers

    def bind(self, params: Params) -> Transformer:
        """Returns the module with these parameters, for use inside a traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def empty_cache(spec: ModelSpec, rows: int, slots: int, dtype: Any) -> Cache:
    """Makes the cache from which decoding starts.

    Args:
      spec: the model.
      rows: the number of rows, B.
      slots: the number of tokens that a row can hold, S.
      dtype: the dtype of keys and values.

    Returns:
      Zeros for the keys [B K H S] and values [B K S H] of each layer with attention, and nothing if it borrows them;
      the first state of the others.
    """

    def empty(kind: Kind) -> Any:
        if is_recurrent(kind):
            return MIXERS[type(kind)].empty_state(spec, kind, rows, dtype)
        attention = spec.attention_of(kind)
        if attention.keys == "borrowed":
            return ()
        keys = jnp.zeros((rows, attention.num_kv_heads, attention.head_dim, slots), dtype)
        return keys, keys.swapaxes(2, 3)

    of_kinds = {kind: empty(kind) for kind in _distinct(spec.mixers)}
    return [of_kinds[kind] for kind in spec.mixers]


def place_cache(spec: ModelSpec, cache: Cache) -> Cache:
    """Constrains the sharding of a cache: by rows, and by heads or channels.

    Args:
      spec: the model.
      cache: as from `empty_cache`.

    Returns:
      The same cache.
    """

    def place(kind: Kind, layer_cache: Any) -> Any:
        if not is_recurrent(kind):
            return jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", None, None), layer_cache)
        arrays, structure = jax.tree.flatten(layer_cache)
        axes = MIXERS[type(kind)].STATE_AXES
        return structure.unflatten(constrain(x, *a) for x, a in zip(arrays, axes, strict=True))

    return [place(kind, layer_cache) for kind, layer_cache in zip(spec.mixers, cache, strict=True)]


# The vocabulary is padded to a multiple of this on every mesh, so that checkpoints fit all meshes and fill TPU tiles.
VOCAB_MULTIPLE = 128


def vocab_multiple(tensor: int) -> int:
    """Returns the number of which the padded vocabulary is a multiple, for a tensor axis of this size."""
    return math.lcm(VOCAB_MULTIPLE, tensor)


@functools.cache
def make_decoder(spec: ModelSpec, tensor: int = 1, lora: LoRA | None = None) -> Decoder:
    """Returns the decoder of a spec, with a vocabulary padded so that a tensor axis of size `tensor` divides it."""
    multiple = vocab_multiple(tensor)
    rows = -(-spec.vocab_size // multiple) * multiple
    module = nnx.eval_shape(lambda: Transformer(spec, rows, nnx.Rngs(0), lora))
    graph, state = nnx.split(module, nnx.Param)
    axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
    base = None if lora is None else make_decoder(spec, tensor)
    return Decoder(spec, rows, nnx.to_pure_dict(state), jax.tree.map(tuple, axes), lora, base, graph, state)


def _scaled_queries(q: jax.Array, factors: jax.Array | None) -> jax.Array:
    """Multiplies queries [B T N H] by factors [B T], in the queries' dtype."""
    return q if factors is None else q * factors.astype(q.dtype)[:, :, None, None]


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _decode_attention(
    tables: rope.RopeTables, attention_fn: AttentionFn, attention: Attention, x: jax.Array
) -> tuple[jax.Array, Any]:
    return attention(x, tables, attention_fn)


def _decode_recurrent(state: Any, num_tokens: jax.Array, mixer: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return mixer.decode(x, state, num_tokens)
