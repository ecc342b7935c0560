"""Answers prompts with a decoder: in batches on the device, or token by token for someone who reads along.

The prompts of a batch are right-padded to one of few widths, so that few programs are compiled. What the padding
leaves in the cache does no harm: a row goes on at its own position, and each slot is overwritten before a query
comes far enough to see it. A row's randomness is drawn from its prompt's number and its position alone, so that
an answer depends on its batch by rounding at most. Call inside `jax.set_mesh` where parameters lie on a mesh.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.errors import UserError
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params
from mice_jax.sharding import constrain

# B rows, T prompt slots, D d_model, V vocabulary, E stop ids, A answer slots

MIN_WIDTH = 32  # of a padded prompt; widths are powers of two from here
CHUNK = 256  # prompt tokens that enter the cache at once: bounds the attention scores of a long prompt
WINDOW = 8  # batches whose prompts are sorted together, so that those of a length go together

Cache = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is chosen: the likeliest at temperature 0, else drawn from what top_k and top_p leave."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0  # of the likeliest, as many as are needed to hold this much probability
    top_k: int = 0  # 0 = all
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature} must be a number from 0 up (0 = no chance)")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p={self.top_p} must be above 0 and at most 1 (1 = off)")
        if self.top_k < 0:
            wrong.append(f"top_k={self.top_k} must not be negative (0 = off)")
        if not 0 <= self.seed < 2**31:
            wrong.append(f"seed={self.seed} must be from 0 to {2**31 - 1}")
        if wrong:
            raise UserError("; ".join(wrong) + ".")


@dataclasses.dataclass(frozen=True)
class Answer:
    ids: list[int]  # without the stop id
    stopped: bool  # by a stop id; else cut at max_new_tokens


class _Chance(NamedTuple):
    """What a row's draws are made of."""

    keys: jax.Array  # [B], one a prompt
    temperature: jax.Array
    top_p: jax.Array


class _State(NamedTuple):
    """A batch between two tokens."""

    step: jax.Array  # tokens chosen so far
    token: jax.Array  # [B], the last of them
    answers: jax.Array  # [B A]
    counts: jax.Array  # [B], of answer tokens
    done: jax.Array  # [B]
    cache: Cache


def check_fits(prompt: Sequence[int], sampling: Sampling, spec: ModelSpec, where: str) -> None:
    """UserError where a prompt and its answer are more than the model's positions."""
    if not prompt:
        raise UserError(f"{where} is empty: there is no token to go on from.")
    if len(prompt) + sampling.max_new_tokens > spec.max_positions:
        raise UserError(
            f"{where} has {len(prompt)} tokens, which with max_new_tokens={sampling.max_new_tokens} make "
            f"{len(prompt) + sampling.max_new_tokens}; the model has {spec.max_positions} positions. Shorten the "
            "prompt or lower max_new_tokens."
        )


def cast_params(params: Params, dtype: Any) -> Params:
    """The parameters in the dtype they are computed in: what a forward pass makes of them, made once.

    Norms stay in float32, in which they are applied.
    """

    def cast(path: tuple, p: jax.Array) -> jax.Array:
        return p if path[-1].key == "scale" else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


class Sampler:
    """A decoder's programs, compiled when first needed for a shape and kept; parameters come with each call.

    Parameters may be float32; whoever answers much, or one token at a time, does well to `cast_params` before.
    """

    def __init__(self, decoder: Decoder, dtype: Any):
        self.spec = decoder.spec
        static = ("num_ranked", "nucleus")
        self._answer = jax.jit(functools.partial(_answer, decoder, dtype), static_argnames=("max_new_tokens", *static))
        self._first = jax.jit(functools.partial(_first, decoder, dtype), static_argnames=("max_new_tokens", *static))
        self._next = jax.jit(functools.partial(_next, decoder, dtype), static_argnames=static, donate_argnames="cache")

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: Iterable[int],
        *,
        batch_size: int = 16,
        first: int = 0,
    ) -> Iterator[Answer]:
        """Each prompt's answer, in the prompts' order, as soon as it and all before it are there.

        `first` is the first prompt's number, for who goes on with a list: draws depend on a prompt's number.
        """
        for i, prompt in enumerate(prompts):
            check_fits(prompt, sampling, self.spec, f"prompt {first + i}")
        stops = _stop_array(stop_ids)
        answers: dict[int, Answer] = {}
        given = 0
        for batch in _batches([len(p) for p in prompts], batch_size):
            rows = _padded([prompts[i] for i in batch], batch_size)
            numbers = np.zeros(len(rows[1]), np.int32)
            numbers[: len(batch)] = first + np.array(batch)
            chance = _chance(sampling, numbers)
            new, counts, stopped = self._answer(params, *rows, stops, chance, **self._static(sampling))
            new, counts, stopped = np.asarray(new), np.asarray(counts), np.asarray(stopped)
            for row, i in enumerate(batch):
                answers[i] = Answer(new[row, : counts[row]].tolist(), bool(stopped[row]))
            while given in answers:
                yield answers.pop(given)
                given += 1

    def stream(
        self, params: Params, prompt: Sequence[int], sampling: Sampling, stop_ids: Iterable[int]
    ) -> Iterator[int]:
        """The answer of prompt 0, token by token; it was cut where there are max_new_tokens of them."""
        check_fits(prompt, sampling, self.spec, "the prompt")
        stops = set(stop_ids)
        static = self._static(sampling)
        max_new_tokens = static.pop("max_new_tokens")
        tokens, lengths = _padded([prompt], 1)
        chance, totals = _chance(sampling, np.zeros(1, np.int32)), lengths + max_new_tokens
        token, cache = self._first(params, tokens, lengths, chance, max_new_tokens=max_new_tokens, **static)
        for step in range(max_new_tokens):
            if int(token[0]) in stops:
                return
            yield int(token[0])
            if step + 1 < max_new_tokens:
                token, cache = self._next(params, token, lengths + step, totals, cache=cache, chance=chance, **static)

    def _static(self, sampling: Sampling) -> dict[str, Any]:
        """What a program is compiled for; a change of the rest of `Sampling` compiles nothing."""
        size = self.spec.vocab_size
        return {
            "max_new_tokens": sampling.max_new_tokens,
            "num_ranked": min(sampling.top_k or size, size) if sampling.temperature else 1,
            "nucleus": sampling.top_p < 1,
        }


# ---------------------------------------------------------------------------------------- on the host
def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """The prompts' indices in batches of like length; sorted in windows, so that early answers come early."""
    for start in range(0, len(lengths), WINDOW * batch_size):
        window = range(start, min(start + WINDOW * batch_size, len(lengths)))
        by_length = sorted(window, key=lambda i: lengths[i])
        for at in range(0, len(by_length), batch_size):
            yield by_length[at : at + batch_size]


def _padded(prompts: Sequence[Sequence[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B T] and lengths [B], both dims padded to powers of two; a row that is none has length 0."""
    width = max(MIN_WIDTH, _power_of_two(max(map(len, prompts))))
    rows = min(batch_size, _power_of_two(len(prompts)))
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _stop_array(stop_ids: Iterable[int]) -> np.ndarray:
    """Padded with -1, which is no token, so that few stop ids more or less compile nothing."""
    stops = sorted(set(stop_ids))
    return np.array(stops + [-1] * (max(8, _power_of_two(len(stops))) - len(stops)), np.int32)


def _chance(sampling: Sampling, numbers: np.ndarray) -> _Chance:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), numbers)
    # Python's own floats would make weakly typed arrays, and other programs.
    return _Chance(keys, np.float32(sampling.temperature), np.float32(sampling.top_p))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- on the device
def _answer(
    decoder: Decoder,
    dtype: Any,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    stops: jax.Array,
    chance: _Chance,
    *,
    max_new_tokens: int,
    num_ranked: int,
    nucleus: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Answers to a batch of prompts: ids [B A], how many of them, and which ended by a stop id."""
    params = cast_params(params, dtype)
    rows, totals = tokens.shape[0], lengths + max_new_tokens

    def choose(state: _State, hidden: jax.Array) -> _State:
        logits = decoder.bind(params).logits(hidden[:, None])[:, 0]
        token = _pick(logits, lengths + state.step, chance, num_ranked, nucleus)
        done = state.done | jnp.isin(token, stops)
        answers = state.answers.at[:, state.step].set(token)
        return _State(state.step + 1, token, answers, state.counts + ~done, done, state.cache)

    def advance(state: _State) -> _State:
        positions = lengths + state.step - 1  # of the token that was chosen last
        model = decoder.bind(params)
        hidden, cache = model.decode(state.token[:, None], positions[:, None], totals, state.cache)
        return choose(state._replace(cache=cache), hidden[:, 0])

    hidden, cache = _prefill(decoder, params, tokens, lengths, max_new_tokens, dtype)
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(rows, jnp.int32)
    answers = jnp.zeros((rows, max_new_tokens), jnp.int32)
    state = choose(_State(zero, none, answers, none, lengths == 0, cache), hidden)
    state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.done), advance, state)
    # Whole on every device, so that every process of several can read them.
    return constrain(state.answers, None, None), constrain(state.counts, None), constrain(state.done, None)


def _first(
    decoder: Decoder,
    dtype: Any,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    chance: _Chance,
    *,
    max_new_tokens: int,
    num_ranked: int,
    nucleus: bool,
) -> tuple[jax.Array, Cache]:
    """The first token of each answer [B], and the cache to go on with."""
    params = cast_params(params, dtype)
    hidden, cache = _prefill(decoder, params, tokens, lengths, max_new_tokens, dtype)
    logits = decoder.bind(params).logits(hidden[:, None])[:, 0]
    return constrain(_pick(logits, lengths, chance, num_ranked, nucleus), None), cache


def _next(
    decoder: Decoder,
    dtype: Any,
    params: Params,
    token: jax.Array,
    positions: jax.Array,
    totals: jax.Array,
    *,
    cache: Cache,
    chance: _Chance,
    num_ranked: int,
    nucleus: bool,
) -> tuple[jax.Array, Cache]:
    """The token [B] after the one at `positions` [B], in rows that will have `totals` [B] tokens in the end."""
    model = decoder.bind(cast_params(params, dtype))
    hidden, cache = model.decode(token[:, None], positions[:, None], totals, cache)
    logits = model.logits(hidden)[:, 0]
    return constrain(_pick(logits, positions + 1, chance, num_ranked, nucleus), None), cache


def _prefill(
    decoder: Decoder, params: Params, tokens: jax.Array, lengths: jax.Array, max_new_tokens: int, dtype: Any
) -> tuple[jax.Array, Cache]:
    """The hidden state of each prompt's last token [B D], and a cache that holds the prompts, with room for answers."""
    spec, (rows, width) = decoder.spec, tokens.shape
    slots, totals = width + max_new_tokens, lengths + max_new_tokens
    size = min(CHUNK, width)
    shape = (spec.num_layers, rows, slots, spec.num_kv_heads, spec.head_dim)
    empty = constrain(jnp.zeros(shape, dtype), "layers", "batch", "length", "kv_heads", "head_dim")

    def enter(carry: tuple[jax.Array, Cache], start: jax.Array) -> tuple[tuple[jax.Array, Cache], None]:
        last, cache = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32), piece.shape)
        hidden, cache = decoder.bind(params).decode(piece, positions, totals, cache)
        at = lengths - 1 - start
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return (jnp.where(((at >= 0) & (at < size))[:, None], found, last), cache), None

    nothing = jnp.zeros((rows, spec.d_model), dtype)
    starts = jnp.arange(0, width, size, dtype=jnp.int32)
    carry, _ = jax.lax.scan(enter, (nothing, (empty, empty)), starts)
    return carry


def _pick(logits: jax.Array, positions: jax.Array, chance: _Chance, num_ranked: int, nucleus: bool) -> jax.Array:
    """A token [B] for each row of logits [B V], to stand at `positions` [B]."""
    if num_ranked == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(chance.keys, positions)
    logits = logits / chance.temperature
    if num_ranked == logits.shape[-1] and not nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # By rank, so that ties at the edge never let more than top_k through.
    ranked, ids = jax.lax.top_k(logits, num_ranked)
    if nucleus:
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # 0 for the likeliest, which always stays
        ranked = jnp.where(before < chance.top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)
