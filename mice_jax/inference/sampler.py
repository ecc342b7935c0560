"""Answers prompts with a decoder: in batches on the device, or token by token for someone who reads along.

A batch is so many rows, each with room for a prompt and its answer. Prompts enter rows a few at a time, right-padded to
one of few widths, so that few programs are compiled; all rows go on together, a few tokens at a time; and a row whose
answer has ended is given to the next prompt. What padding, or the prompt before, leaves in the cache does no harm: a
row goes on at its own position, and each slot is overwritten before a query comes far enough to see it. A row's
randomness is drawn from its prompt's number and its position alone, so that an answer depends on its batch by rounding
at most. Call inside `jax.set_mesh` where parameters lie on a mesh.
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.errors import UserError
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Cache, Decoder, Params, empty_cache
from mice_jax.sharding import constrain

# B rows, R rows that prompts enter, T prompt slots, C new tokens, D d_model, V vocabulary

T = TypeVar("T")

MIN_WIDTH = 32  # of a padded prompt, and of a row
CHUNK = 256  # prompt tokens that enter the cache at once: bounds the attention scores of a long prompt
TOKENS = 16  # that rows go on by before it is looked which have ended
PARTS = 4  # of a batch; so many rows as one has are filled with new prompts at once
WINDOW = 8  # batches whose prompts are sorted together, so that the longest do not come last


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


class _Ready(NamedTuple):
    """Parameters as programs take them, in the dtype they are computed in."""

    rest: Params  # all but the layers'
    layers: list[Params]


class _Rows(NamedTuple):
    """A batch between two tokens."""

    token: jax.Array  # [B], the last of each row
    position: jax.Array  # [B], of that token
    total: jax.Array  # [B], tokens that the row has in the end, unless its answer is ended before
    done: jax.Array  # [B]
    keys: jax.Array  # [B], what draws are made of, one a prompt
    cache: Cache


class _Entering(NamedTuple):
    """Prompts that enter rows, right-padded; one that is none has length 0."""

    tokens: jax.Array  # [R T]
    lengths: jax.Array  # [R]
    totals: jax.Array  # [R]
    keys: jax.Array  # [R]


class _Chance(NamedTuple):
    """How a draw is made."""

    temperature: jax.Array
    top_p: jax.Array


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

    Each call makes a copy of them, cast and layer by layer, which lives as long as the call.
    """

    def __init__(self, decoder: Decoder, dtype: Any):
        self.spec = decoder.spec
        static = ("num_ranked", "nucleus")
        self._ready = jax.jit(functools.partial(_ready, decoder, dtype))
        self._empty = jax.jit(functools.partial(_empty, decoder, dtype), static_argnames=("rows", "slots"))
        self._enter = jax.jit(functools.partial(_enter, decoder), static_argnames=static, donate_argnames="rows")
        self._go_on = jax.jit(functools.partial(_go_on, decoder), static_argnames=static, donate_argnames="rows")

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: Iterable[int],
        *,
        batch_size: int = 16,
        numbers: Sequence[int] | None = None,
        ended: Callable[[list[int]], bool] = lambda ids: False,
    ) -> Iterator[Answer]:
        """Each prompt's answer, in the prompts' order, as soon as it and all before it are there.

        `numbers` are the prompts', on which draws depend; by default they count from 0, and who goes on with a list
        gives those that are left. `ended` says whether an answer's ids so far hold what ends it, a text for example; by
        then a few more may be there.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        for number, prompt in zip(numbers, prompts, strict=True):
            check_fits(prompt, sampling, self.spec, f"prompt {number}")
        if not prompts:
            return
        size = min(batch_size, _power_of_two(len(prompts)))
        slots = _padded_length(max(map(len, prompts)) + sampling.max_new_tokens)
        batch = _Batch(self, self._ready(params), size, slots, sampling, stop_ids, ended)
        waiting = deque(_entry_order([len(p) for p in prompts], size))
        answers: dict[int, Answer] = {}
        given = 0
        while given < len(prompts):
            answers |= batch.advance(prompts, waiting, numbers)
            while given in answers:
                yield answers.pop(given)
                given += 1

    def stream(
        self, params: Params, prompt: Sequence[int], sampling: Sampling, stop_ids: Iterable[int]
    ) -> Iterator[int]:
        """The answer of prompt 0, token by token; it was cut where there are max_new_tokens of them."""
        check_fits(prompt, sampling, self.spec, "the prompt")
        stops, one, ready = set(stop_ids), np.int32(1), self._ready(params)
        how = (_stop_array(stops), _chance(sampling))
        static = self._static(sampling)
        rows = self._empty(rows=1, slots=_padded_length(len(prompt) + sampling.max_new_tokens))
        zero = np.zeros(1, np.int32)
        rows, new = self._enter(ready, _entering([prompt], 1, sampling, zero), zero, *how, rows=rows, **static)
        for step in range(sampling.max_new_tokens):
            token = int(new[0] if step == 0 else new[0, 0])
            if token in stops:
                return
            yield token
            if step + 1 < sampling.max_new_tokens:
                rows, new = self._go_on(ready, np.zeros(1, bool), one, one, *how, rows=rows, **static)

    def _static(self, sampling: Sampling) -> dict[str, Any]:
        """What a program is compiled for; a change of the rest of `Sampling` compiles nothing."""
        size = self.spec.vocab_size
        return {
            "num_ranked": min(sampling.top_k or size, size) if sampling.temperature else 1,
            "nucleus": sampling.top_p < 1,
        }


# ---------------------------------------------------------------------------------------- on the host
class _Batch:
    """Rows on the device, and whose answers they are writing."""

    def __init__(
        self,
        sampler: Sampler,
        ready: _Ready,
        size: int,
        slots: int,
        sampling: Sampling,
        stop_ids: Iterable[int],
        ended: Callable[[list[int]], bool],
    ):
        self._sampler, self._ready, self._sampling, self._ended = sampler, ready, sampling, ended
        self._stops = set(stop_ids)
        self._how = (_stop_array(self._stops), _chance(sampling))
        self._static = sampler._static(sampling)
        self._rows = sampler._empty(rows=size, slots=slots)
        self._part = max(1, size // PARTS)
        self._prompt: list[int | None] = [None] * size  # that each row answers
        self._ids: list[list[int]] = [[] for _ in range(size)]

    def advance(
        self, prompts: Sequence[Sequence[int]], waiting: deque[int], numbers: Sequence[int]
    ) -> dict[int, Answer]:
        """Lets waiting prompts enter rows that are free, goes on with all, and returns the answers that have ended."""
        ended: dict[int, Answer] = {}
        while waiting and self._prompt.count(None) >= min(self._part, len(waiting)):
            ended |= self._fill(prompts, waiting, numbers)
        size, free = len(self._prompt), self._prompt.count(None)
        if free == size:
            return ended
        enough = np.int32(free + self._part if waiting else size)
        empty = np.array([i is None for i in self._prompt])
        self._rows, new = self._sampler._go_on(
            self._ready, empty, np.int32(TOKENS), enough, *self._how, rows=self._rows, **self._static
        )
        for row, tokens in enumerate(np.asarray(new).tolist()):
            if self._prompt[row] is not None:
                ended |= self._take(row, tokens)
        return ended

    def _fill(self, prompts: Sequence[Sequence[int]], waiting: deque[int], numbers: Sequence[int]) -> dict[int, Answer]:
        """Lets a part of a batch enter; returns the answers that have ended with their first token."""
        free = [row for row, i in enumerate(self._prompt) if i is None][: self._part]
        which = [waiting.popleft() for _ in free[: len(waiting)]]
        where = np.full(self._part, len(self._prompt), np.int32)  # of those that are none, no row's
        where[: len(which)] = free[: len(which)]
        own = np.zeros(self._part, np.int32)
        own[: len(which)] = [numbers[i] for i in which]
        entering = _entering([prompts[i] for i in which], self._part, self._sampling, own)
        self._rows, new = self._sampler._enter(
            self._ready, entering, where, *self._how, rows=self._rows, **self._static
        )
        ended: dict[int, Answer] = {}
        for row, i, token in zip(free, which, np.asarray(new).tolist(), strict=False):
            self._prompt[row], self._ids[row] = i, []
            ended |= self._take(row, [token])
        return ended

    def _take(self, row: int, tokens: list[int]) -> dict[int, Answer]:
        """Adds a row's new tokens to its answer; where that ends it, the row is free and the answer returned."""
        i, ids = self._prompt[row], self._ids[row]
        assert i is not None
        answer = None
        for token in tokens:
            if token < 0:  # none was chosen any more
                break
            if token in self._stops:
                answer = Answer(ids, True)
                break
            ids.append(token)
            if len(ids) == self._sampling.max_new_tokens:
                answer = Answer(ids, self._ended(ids))
                break
        if answer is None and self._ended(ids):
            answer = Answer(ids, True)
        if answer is None:
            return {}
        self._prompt[row] = None
        return {i: answer}


def _entry_order(lengths: list[int], batch_size: int) -> Iterator[int]:
    """The prompts' indices as they enter: the longest of a window first, and early windows early."""
    for start in range(0, len(lengths), WINDOW * batch_size):
        window = range(start, min(start + WINDOW * batch_size, len(lengths)))
        yield from sorted(window, key=lambda i: -lengths[i])


def _entering(prompts: Sequence[Sequence[int]], rows: int, sampling: Sampling, numbers: np.ndarray) -> _Entering:
    """Prompts of these numbers, right-padded, as the first of so many rows."""
    width = _padded_length(max(map(len, prompts)))
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), numbers)
    return _Entering(tokens, lengths, lengths + np.int32(sampling.max_new_tokens), keys)  # type: ignore[arg-type]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _padded_length(n: int) -> int:
    """A power of two, or from 3/4 of 512 on what lies half-way: few of them, few programs."""
    whole = max(MIN_WIDTH, _power_of_two(n))
    return whole * 3 // 4 if whole >= 2 * CHUNK and n <= whole * 3 // 4 else whole


def _stop_array(stop_ids: Iterable[int]) -> np.ndarray:
    """Padded with -1, which is no token, so that few stop ids more or less compile nothing."""
    stops = sorted(set(stop_ids))
    return np.array(stops + [-1] * (max(8, _power_of_two(len(stops))) - len(stops)), np.int32)


def _chance(sampling: Sampling) -> _Chance:
    # Python's own floats would make weakly typed arrays, and other programs.
    return _Chance(np.float32(sampling.temperature), np.float32(sampling.top_p))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- on the device
def _ready(decoder: Decoder, dtype: Any, params: Params) -> _Ready:
    params = cast_params(params, dtype)
    return _Ready({k: v for k, v in params.items() if k != "layers"}, decoder.unstack(params))


def _empty(decoder: Decoder, dtype: Any, *, rows: int, slots: int) -> _Rows:
    """Rows that are nobody's."""
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.vmap(jax.random.key)(zeros)
    return _placed(_Rows(zeros, zeros, zeros, zeros == 0, keys, empty_cache(decoder.spec, rows, slots, dtype)))


def _placed(rows: T) -> T:
    """Arrays whose first dim is that of rows, where such arrays lie: caches split by heads too."""

    def put(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", "kv_heads", None, None) if x.ndim == 4 else constrain(x, "batch")

    return jax.tree.map(put, rows)


def _enter(
    decoder: Decoder,
    ready: _Ready,
    entering: _Entering,
    where: jax.Array,
    stops: jax.Array,
    chance: _Chance,
    *,
    rows: _Rows,
    num_ranked: int,
    nucleus: bool,
) -> tuple[_Rows, jax.Array]:
    """The rows with prompts in those at `where` [R], and the first token of each answer [R]."""
    hidden, cache = _prefill(decoder, ready, entering)
    logits = decoder.bind(ready.rest).logits(hidden[:, None])[:, 0]
    token = _pick(logits, entering.lengths, entering.keys, chance, num_ranked, nucleus)
    done = jnp.isin(token, stops) | (entering.lengths + 1 >= entering.totals)
    new = _Rows(token, entering.lengths, entering.totals, done, entering.keys, cache)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[where, *map(slice, new.shape[1:])].set(new, mode="drop")  # a cache may have more slots

    return _placed(jax.tree.map(put, rows, new)), constrain(token, None)


def _go_on(
    decoder: Decoder,
    ready: _Ready,
    free: jax.Array,
    steps: jax.Array,
    enough: jax.Array,
    stops: jax.Array,
    chance: _Chance,
    *,
    rows: _Rows,
    num_ranked: int,
    nucleus: bool,
) -> tuple[_Rows, jax.Array]:
    """Goes on with all rows but the `free` [B] ones, by so many `steps` or until `enough` rows are done.

    Also returns the new tokens [B C], -1 where a row was done before.
    """
    model = decoder.bind(ready.rest)

    def more(state: tuple[jax.Array, _Rows, jax.Array]) -> jax.Array:
        step, rows, _ = state
        return (step < steps) & (jnp.sum(rows.done) < enough)

    def advance(state: tuple[jax.Array, _Rows, jax.Array]) -> tuple[jax.Array, _Rows, jax.Array]:
        step, rows, new = state
        token, position = rows.token[:, None], rows.position[:, None]
        hidden, cache = model.decode(token, position, rows.total, rows.cache, ready.layers)
        position = rows.position + 1
        token = _pick(model.logits(hidden)[:, 0], position, rows.keys, chance, num_ranked, nucleus)
        done = rows.done | jnp.isin(token, stops) | (position + 1 >= rows.total)
        new = new.at[:, step].set(jnp.where(rows.done, -1, token))
        # A row that is done stands still, and so stays within its slots.
        token, position = (jnp.where(rows.done, *x) for x in ((rows.token, token), (rows.position, position)))
        return step + 1, rows._replace(token=token, position=position, done=done, cache=cache), new

    new = jnp.full((rows.token.shape[0], TOKENS), -1, jnp.int32)
    start = (jnp.zeros((), jnp.int32), rows._replace(done=rows.done | free), new)
    _, rows, new = jax.lax.while_loop(more, advance, start)
    # Whole on every device, so that every process of several can read it.
    return _placed(rows), constrain(new, None, None)


def _prefill(decoder: Decoder, ready: _Ready, entering: _Entering) -> tuple[jax.Array, Cache]:
    """The hidden state of each prompt's last token [R D], and a cache of T slots that holds the prompts."""
    tokens, lengths = entering.tokens, entering.lengths
    rows, width = tokens.shape
    size = math.gcd(CHUNK, width)
    model, dtype = decoder.bind(ready.rest), ready.rest["embed"]["table"].dtype

    def enter(carry: tuple[jax.Array, Cache], start: jax.Array) -> tuple[tuple[jax.Array, Cache], None]:
        last, cache = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32), piece.shape)
        hidden, cache = model.decode(piece, positions, entering.totals, cache, ready.layers)
        at = lengths - 1 - start
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return (jnp.where(((at >= 0) & (at < size))[:, None], found, last), cache), None

    nothing = jnp.zeros((rows, decoder.spec.d_model), dtype)
    starts = jnp.arange(0, width, size, dtype=jnp.int32)
    carry, _ = jax.lax.scan(enter, (nothing, _placed(empty_cache(decoder.spec, rows, width, dtype))), starts)
    return carry


def _pick(
    logits: jax.Array, positions: jax.Array, keys: jax.Array, chance: _Chance, num_ranked: int, nucleus: bool
) -> jax.Array:
    """A token [B] for each row of logits [B V], to stand at `positions` [B]."""
    if num_ranked == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
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
