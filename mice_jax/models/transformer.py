"""The decoder: Flax NNX modules that declare each parameter once, and the plain pytree they are split into.

Modules exist while a function is traced; between functions there are only nested dicts of arrays. Layers are
stacked along a leading axis and scanned, so that compile time does not grow with depth. Parameters are float32
and are cast to the compute dtype where they are used. A weight's outputs come first, then its inputs, as checkpoints
hold them: a parameter is then a checkpoint's tensor, byte for byte.
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
from mice_jax.models.attention.segments import RESULT
from mice_jax.models.attention.tree import Trees, attend_branched
from mice_jax.models.matmul import product
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import constrain, constrain_param, gather_split_heads

# B rows, T slots, S cache slots, D d_model, N query heads, K key heads, H head_dim, F d_ff, V vocabulary, L layers

Params = dict[str, Any]
# What a block does with its queries, keys and values; the second result is kept (a cache), or None.
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
KeysValues = tuple[jax.Array, jax.Array]  # [B K H S] and [B K S H]: as attention's products take them
Cache = list[KeysValues]  # one a layer

T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

REMAT_POLICIES = {
    "full": None,  # keep a layer's input only
    # Keep what matrix products with weights give, and of our own attention the result: what is left is cheap.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESULT),
    ),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is computed; changes rounding, speed and memory, not the function."""

    dtype: Any
    attention: str
    remat: str  # none | a key of REMAT_POLICIES


class Layer(NamedTuple):
    """What differs from layer to layer besides parameters: [L] int32, scanned."""

    rope: jax.Array  # among the spec's distinct ropes
    window: jax.Array  # among its distinct windows


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
    """Over all the dims of `shape` together; the stored scale is off by the spec's `norm_offset`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], spec: ModelSpec, rngs: nnx.Rngs):
        self.scale = _param(rngs, shape, axes, 0 if spec.norm_offset else None)
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] + self.offset
        wide = x.astype(jnp.float32)
        over = tuple(range(-scale.ndim, 0))
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + self.eps)
        return (scale * wide).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions."""

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

    def project(self, x: jax.Array, turns: rope.Turns) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B T D] -> turned queries [B T N H], turned keys and values [B T K H]."""
        q = product(x, gather_split_heads(self.q[...], "heads", "head_dim", "embed"))
        k, v = (product(x, w[...]) for w in (self.k, self.v))
        if self.qkv_bias:
            q, k, v = (y + b[...].astype(x.dtype) for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if self.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, turns), rope.rotate(k, turns), v

    def output(self, mixed: jax.Array) -> jax.Array:
        """[B T N H] -> [B T D]."""
        y = product(mixed, gather_split_heads(self.o[...], "embed", "heads", "head_dim"), in_dims=2)
        return y + self.o_bias[...].astype(y.dtype) if self.out_bias else y


class MLP(nnx.Module):
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
        gate, up = product(x, self.gate[...]), product(x, self.up[...])
        if self.bias:
            gate, up = gate + self.gate_bias[...].astype(x.dtype), up + self.up_bias[...].astype(x.dtype)
        inner = constrain(self.activation(gate) * up, "batch", "length", "mlp")
        y = product(inner, self.down[...])
        return y + self.down_bias[...].astype(x.dtype) if self.bias else y


class Block(nnx.Module):
    """Attention and MLP, each with a norm before it, after it, or both, added to what went in."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        width = ((spec.d_model,), ("embed",), spec, rngs)
        self.pre, self.post, self.multiplier = spec.pre_norm, spec.post_norm, spec.residual_multiplier
        if spec.pre_norm:
            self.attention_norm, self.mlp_norm = RMSNorm(*width), RMSNorm(*width)
        if spec.post_norm:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(*width), RMSNorm(*width)
        self.attention = Attention(spec, rngs)
        self.mlp = MLP(spec, rngs)

    def __call__(self, x: jax.Array, turns: rope.Turns, mix: Mix) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            mixed, kept = mix(*self.attention.project(self.attention_norm(x) if self.pre else x, turns))
            y = self.attention.output(mixed)
            x = self._add(x, self.attention_post_norm(y) if self.post else y)
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x) if self.pre else x)
            x = self._add(x, self.mlp_post_norm(y) if self.post else y)
        return x, kept

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return constrain(x + _times(y, self.multiplier), "batch", "length", "hidden")


class Embed(nnx.Module):
    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.table = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


class Head(nnx.Module):
    def __init__(self, rows: int, spec: ModelSpec, rngs: nnx.Rngs):
        self.weight = _param(rngs, (rows, spec.d_model), ("vocab", "embed"), spec.init_std)


class Transformer(nnx.Module):
    """`vocab_rows` is the vocabulary padded to what the mesh divides; the padding is never predicted."""

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
        """Packed rows, each [B T] int32 -> the normalised last hidden state [B T D]."""
        lengths = rope.sample_lengths(segment_ids) if rope.needs_lengths(self.spec.ropes) else None

        def attend_within(scoring: Scoring) -> Attend:
            return lambda q, k, v: attend(q, k, v, segment_ids, scoring, backend=compute.attention)

        return self._through_layers(tokens, positions, lengths, attend_within, compute)

    def branched(self, tokens: jax.Array, lengths: jax.Array, trees: Trees, compute: Compute) -> jax.Array:
        """Rows of trees, tokens [B T] -> the normalised last hidden state [B T D].

        `lengths` [B T] are those of the texts that a slot belongs to: where a LongRoPE turns long ones differently, no
        tree may hold some of each kind.
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
        turns = self._turns(positions, lengths)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *turns.values()) if len(turns) > 1 else None
        # One branch a window: a window is part of a kernel's mask, so it has to be known when it is compiled.
        branches = [attend_within(self._scoring(window)) for window in _distinct(self.spec.windows)]
        graph, stack = nnx.split(self.layers)

        def layer(x: jax.Array, scanned: tuple[nnx.State, Layer]) -> tuple[jax.Array, None]:
            params, which = scanned

            def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                if len(branches) == 1:
                    return branches[0](q, k, v), None
                return jax.lax.switch(which.window, branches, q, k, v), None

            own = jax.tree.map(lambda x: x[which.rope], stacked) if stacked else next(iter(turns.values()))
            return nnx.merge(graph, params)(x, own, mix)

        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        x, _ = jax.lax.scan(layer, self._embedded(tokens, compute.dtype), (stack, self._which()))
        return self.final_norm(x)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, lengths: jax.Array, cache: Cache, layers: list[Params]
    ) -> tuple[jax.Array, Cache]:
        """Continues rows from a cache: -> hidden [B T D], the new cache. `layers` are of `Decoder.unstack`.

        Row b's tokens [B T] go to the cache slots `positions[b]`, and attend to every slot up to their own that
        the layer's window reaches. `lengths` [B] are those that the rows will have in the end: a LongRoPE turns
        the tokens of long samples differently, from the first on.

        Layers are not scanned here: on CPU a scan copies each layer's parameters and its part of the cache at every
        token, which takes as long as the rest.
        """
        turns = self._turns(positions, lengths[:, None])
        graph, stack = nnx.split(self.layers)
        behind = positions[:, :, None] - jnp.arange(cache[0][1].shape[2], dtype=jnp.int32)  # [B T S]
        x, continued = self._embedded(tokens, cache[0][0].dtype), []
        for params, kept, rope_, window in zip(layers, cache, self.spec.ropes, self.spec.windows, strict=True):
            state = jax.tree.map(lambda x: x, stack)
            nnx.replace_by_pure_dict(state, params)
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            x, kept = nnx.merge(graph, state)(x, turns[rope_], self._going_on(kept, positions, mask))
            continued.append(kept)
        return self.final_norm(x), continued

    def _going_on(self, kept: KeysValues, positions: jax.Array, mask: jax.Array) -> Mix:
        """Puts a layer's new keys and values into what is kept of it, and attends over that."""
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeysValues]:
            keys = kept[0].at[rows, :, :, positions].set(k)
            values = kept[1].at[rows, :, positions].set(v)
            return masked(q, keys, values, mask, self._scoring(None)), (keys, values)

        return mix

    def output_weight(self) -> jax.Array:
        """[V D], the embedding where it is tied."""
        return (self.embed.table if self.spec.tie_embeddings else self.head.weight)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B T D] -> float32 [B T vocab_size]."""
        logits = product(hidden, self.output_weight(), out_dtype=jnp.float32)
        logits = logits[..., : self.spec.vocab_size]  # of the weight, it would copy all of it
        return softcapped(logits * self.spec.logit_scale, self.spec.logit_softcap)

    def _embedded(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        table = constrain(self.embed.table[...].astype(dtype), "vocab", "hidden")
        x = _times(jnp.take(table, tokens, axis=0), self.spec.embedding_multiplier)
        return constrain(x, "batch", "length", "hidden")

    def _scoring(self, window: int | None) -> Scoring:
        return Scoring(self.spec.attention_scale, window, self.spec.attention_softcap)

    def _which(self) -> Layer:
        ropes, windows = _distinct(self.spec.ropes), _distinct(self.spec.windows)
        return Layer(
            jnp.array([ropes.index(r) for r in self.spec.ropes], jnp.int32),
            jnp.array([windows.index(w) for w in self.spec.windows], jnp.int32),
        )

    def _turns(self, positions: jax.Array, lengths: jax.Array | None) -> dict[rope.Rope | None, rope.Turns]:
        """Cosines and sines of every kind of RoPE that the layers have, made once."""
        kinds = _distinct(self.spec.ropes)
        dims = next((kind.dims for kind in kinds if kind), 2)
        return {kind: rope.turns(kind, dims, positions, lengths) for kind in kinds}


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

    def unstack(self, params: Params) -> list[Params]:
        """The layers' parameters one by one, for `Transformer.decode`."""
        axes = self.axes["layers"]

        def layer(i: int) -> Params:
            return jax.tree.map(lambda x, axes: constrain_param(x[i], *axes[1:]), params["layers"], axes)

        return [layer(i) for i in range(self.spec.num_layers)]

    def bind(self, params: Params) -> Transformer:
        """The module over these parameters, for use inside a traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def empty_cache(spec: ModelSpec, rows: int, slots: int, dtype: Any) -> Cache:
    keys = jnp.zeros((rows, spec.num_kv_heads, spec.head_dim, slots), dtype)
    return [(keys, keys.swapaxes(2, 3))] * spec.num_layers


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


def _times(x: jax.Array, by: float) -> jax.Array:
    return x if by == 1 else x * jnp.asarray(by, x.dtype)


def _distinct(values: tuple[T, ...]) -> list[T]:
    return list(dict.fromkeys(values))
