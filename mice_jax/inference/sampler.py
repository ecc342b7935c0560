"""Generates answers to prompts with a decoder: in batches (continuous batching), or as a stream of tokens.

A batch has a fixed number of rows, each with room for a prompt and its answer. Prompts enter rows a few at a time,
right-padded to one of few widths, so that few functions are compiled. All rows are decoded together, a few tokens at a
time, and a row whose answer has ended takes the next prompt. Cache entries of padding or of an earlier prompt have
no influence: a row continues at its own position, and each slot is overwritten before a query can attend to it. The
draws of a row depend only on the seed, the number of its prompt and the position, so the rest of the batch changes an
answer by rounding at most. Call this inside `jax.set_mesh` if the parameters are sharded over a mesh.
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

from mice_jax.cli.flag_checks import check_sampling
from mice_jax.cli.flags import DEFAULT_MAX_NEW_TOKENS
from mice_jax.errors import UserError
from mice_jax.models.parameters import FLOAT32_PARAMS
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Cache, Decoder, Params, empty_cache, place_cache
from mice_jax.sharding import constrain

# Shapes: B rows of the batch, R rows that are refilled at once, T prompt slots, C new tokens, D d_model, V vocabulary.

T = TypeVar("T")

# The minimum number of slots of a padded prompt, and of a row.
MIN_WIDTH = 32
# Prompts enter the cache in pieces of this many tokens, which bounds the attention scores of a long prompt.
PREFILL_CHUNK = 256
# The number of tokens that one call decodes in each row, before finished rows are refilled.
DECODE_CHUNK = 16
# 1/4 of a batch's rows is refilled with new prompts at once.
REFILL_FRACTION = 4
# Prompts of 8 batches are sorted by length together, so that the longest prompts do not come last.
SORT_WINDOW = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else a draw from those that top_k and top_p keep.

    Attributes:
      max_new_tokens: The longest answer, in tokens.
      temperature: Divides the logits of a draw; 0 takes the likeliest token.
      top_p: Draws from the smallest set of likeliest tokens whose probabilities sum to at least this; 1 takes all.
      top_k: Draws from this number of likeliest tokens; 0 takes all.
      seed: The seed of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
      ids: The token ids, without the stop id.
      stopped: Whether a stop id or the caller ended the answer; otherwise it was cut at max_new_tokens.
    """

    ids: list[int]
    stopped: bool


class _DecodeParams(NamedTuple):
    """Parameters in the compute dtype: a list with those of each layer, and the others."""

    rest: Params
    layers: list[Params]


class _Rows(NamedTuple):
    """The state of a batch between two tokens.

    Attributes:
      token: The last token of each row [B].
      position: The position of that token [B].
      total: The maximum number of tokens of the row, prompt and answer together [B].
      done: Whether the row's answer has ended [B].
      keys: The random key of each row's prompt [B].
      cache: The keys and values, or the states, of all layers.
    """

    token: jax.Array
    position: jax.Array
    total: jax.Array
    done: jax.Array
    keys: jax.Array
    cache: Cache


class _PrefillBatch(NamedTuple):
    """Right-padded prompts that enter rows.

    Attributes:
      tokens: The token ids [R T].
      lengths: The number of tokens of each prompt, 0 for an unused row [R].
      totals: The maximum number of tokens of each prompt and its answer together [R].
      keys: The random key of each prompt [R].
    """

    tokens: jax.Array
    lengths: jax.Array
    totals: jax.Array
    keys: jax.Array


class _SamplingParams(NamedTuple):
    """The parts of `Sampling` that compiled functions take as arguments."""

    temperature: jax.Array
    top_p: jax.Array


def check_fits(prompt: Sequence[int], sampling: Sampling, spec: ModelSpec, where: str) -> None:
    """Checks that a prompt and its answer fit into the model's positions.

    Args:
      prompt: The prompt's token ids.
      sampling: How the prompt is answered.
      spec: The model's architecture.
      where: What the error message calls the prompt.

    Raises:
      UserError: The prompt is empty, or too long.
    """
    if not prompt:
        raise UserError(f"{where} is empty. A prompt needs at least one token.")
    if len(prompt) + sampling.max_new_tokens > spec.max_positions:
        raise UserError(
            f"{where} has {len(prompt)} tokens, which with max_new_tokens={sampling.max_new_tokens} make "
            f"{len(prompt) + sampling.max_new_tokens}; the model has {spec.max_positions} positions. Shorten the "
            "prompt or lower max_new_tokens."
        )


def default_max_new_tokens(spec: ModelSpec) -> int:
    """Returns the default length of an answer: 256 tokens, or half of the model's positions if that is less."""
    return min(DEFAULT_MAX_NEW_TOKENS, spec.max_positions // 2)


def cast_params(params: Params, dtype: Any) -> Params:
    """Casts parameters to the compute dtype once, which gives the same values as casting them in each forward pass.

    Args:
      params: The parameters.
      dtype: The compute dtype; parameters that are applied in float32, such as the scales of norms, stay so.

    Returns:
      The parameters, in the same structure.
    """

    def cast(path: tuple, p: jax.Array) -> jax.Array:
        return p if path[-1].key in FLOAT32_PARAMS else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


class Sampler:
    """Generates answers with a decoder. Functions are compiled once for each shape.

    The parameters may differ between calls. Each call makes a copy of them, cast and split into layers, which is freed
    when the call ends.
    """

    def __init__(self, decoder: Decoder, dtype: Any):
        """Makes a sampler for a decoder that computes in `dtype`."""
        self.spec = decoder.spec
        self._decode_params, self._empty, self._enter, self._decode_loop = shared_functions(decoder, jnp.dtype(dtype))

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
        """Yields the answer of each prompt, in the prompts' order, as soon as it and all before it are complete.

        Args:
          params: The parameters.
          prompts: The token ids of each prompt.
          sampling: How tokens are chosen.
          stop_ids: The token ids that end an answer.
          batch_size: The number of prompts that are answered at once.
          numbers: The number of each prompt, on which its draws depend; by default they count from 0. To continue a
            list of prompts, give the numbers of the remaining ones.
          ended: Returns whether an answer ends, for example with a stop string, given its ids so far. It is called
            every few tokens, so the ids may continue after the end.

        Yields:
          The answers.

        Raises:
          UserError: A prompt is empty or too long.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        for number, prompt in zip(numbers, prompts, strict=True):
            check_fits(prompt, sampling, self.spec, f"prompt {number}")
        if not prompts:
            return
        size = min(batch_size, _power_of_two(len(prompts)))
        slots = _padded_length(max(map(len, prompts)) + sampling.max_new_tokens)
        batch = _Batch(self, self._decode_params(params), size, slots, sampling, stop_ids, ended)
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
        """Yields the answer of one prompt token by token, as `generate` would answer prompt 0.

        Args:
          params: The parameters.
          prompt: The prompt's token ids.
          sampling: How tokens are chosen.
          stop_ids: The token ids that end an answer.

        Yields:
          The token ids, without the stop id.

        Raises:
          UserError: The prompt is empty or too long.
        """
        check_fits(prompt, sampling, self.spec, "the prompt")
        stops, one, decode_params = set(stop_ids), np.int32(1), self._decode_params(params)
        how = (_stop_array(stops), _sampling_params(sampling))
        static = self._static(sampling)
        rows = self._empty(rows=1, slots=_padded_length(len(prompt) + sampling.max_new_tokens))
        zero = np.zeros(1, np.int32)
        rows, new = self._enter(
            decode_params, _prefill_batch([prompt], 1, sampling, zero), zero, *how, rows=rows, **static
        )
        for step in range(sampling.max_new_tokens):
            token = int(new[0] if step == 0 else new[0, 0])
            if token in stops:
                return
            yield token
            if step + 1 < sampling.max_new_tokens:
                rows, new = self._decode_loop(decode_params, np.zeros(1, bool), one, one, *how, rows=rows, **static)

    def _static(self, sampling: Sampling) -> dict[str, Any]:
        """Returns the static arguments that follow from `Sampling`. Only a change of these compiles functions again."""
        size = self.spec.vocab_size
        return {
            "num_ranked": min(sampling.top_k or size, size) if sampling.temperature else 1,
            "nucleus": sampling.top_p < 1,
        }


class SamplerFunctions(NamedTuple):
    """The jitted functions of a sampler; see the functions of these names."""

    decode_params: Callable
    empty: Callable
    enter: Callable
    decode_loop: Callable


@functools.lru_cache(maxsize=4)
def shared_functions(decoder: Decoder, dtype: Any) -> SamplerFunctions:
    """Jits the functions of a sampler, once for all samplers of a decoder."""
    static = ("num_ranked", "nucleus")
    return SamplerFunctions(
        jax.jit(functools.partial(_decode_params, decoder, dtype)),
        jax.jit(functools.partial(_empty, decoder, dtype), static_argnames=("rows", "slots")),
        jax.jit(functools.partial(_enter, decoder), static_argnames=static, donate_argnames="rows"),
        jax.jit(functools.partial(_decode_loop, decoder), static_argnames=static, donate_argnames="rows"),
    )


# ---------------------------------------------------------------------------------------- on the host
class _Batch:
    """The rows on the device, and the prompt that each of them answers."""

    def __init__(
        self,
        sampler: Sampler,
        decode_params: _DecodeParams,
        size: int,
        slots: int,
        sampling: Sampling,
        stop_ids: Iterable[int],
        ended: Callable[[list[int]], bool],
    ):
        self._sampler, self._decode_params, self._sampling, self._ended = sampler, decode_params, sampling, ended
        self._stops = set(stop_ids)
        self._how = (_stop_array(self._stops), _sampling_params(sampling))
        self._static = sampler._static(sampling)
        self._rows = sampler._empty(rows=size, slots=slots)
        self._part = max(1, size // REFILL_FRACTION)
        self._prompt: list[int | None] = [None] * size  # The prompt that each row answers.
        self._ids: list[list[int]] = [[] for _ in range(size)]

    def advance(
        self, prompts: Sequence[Sequence[int]], waiting: deque[int], numbers: Sequence[int]
    ) -> dict[int, Answer]:
        """Fills free rows with waiting prompts, decodes all rows by a few tokens, and returns the finished answers."""
        ended: dict[int, Answer] = {}
        while waiting and self._prompt.count(None) >= min(self._part, len(waiting)):
            ended |= self._fill(prompts, waiting, numbers)
        size, free = len(self._prompt), self._prompt.count(None)
        if free == size:
            return ended
        enough = np.int32(free + self._part if waiting else size)
        empty = np.array([i is None for i in self._prompt])
        self._rows, new = self._sampler._decode_loop(
            self._decode_params, empty, np.int32(DECODE_CHUNK), enough, *self._how, rows=self._rows, **self._static
        )
        for row, tokens in enumerate(np.asarray(new).tolist()):
            if self._prompt[row] is not None:
                ended |= self._take(row, tokens)
        return ended

    def _fill(self, prompts: Sequence[Sequence[int]], waiting: deque[int], numbers: Sequence[int]) -> dict[int, Answer]:
        """Fills free rows with waiting prompts; returns the answers that ended with their first token."""
        free = [row for row, i in enumerate(self._prompt) if i is None][: self._part]
        which = [waiting.popleft() for _ in free[: len(waiting)]]
        where = np.full(self._part, len(self._prompt), np.int32)  # Unused entries are out of bounds.
        where[: len(which)] = free[: len(which)]
        own = np.zeros(self._part, np.int32)
        own[: len(which)] = [numbers[i] for i in which]
        prefill = _prefill_batch([prompts[i] for i in which], self._part, self._sampling, own)
        self._rows, new = self._sampler._enter(
            self._decode_params, prefill, where, *self._how, rows=self._rows, **self._static
        )
        ended: dict[int, Answer] = {}
        for row, i, token in zip(free, which, np.asarray(new).tolist(), strict=False):
            self._prompt[row], self._ids[row] = i, []
            ended |= self._take(row, [token])
        return ended

    def _take(self, row: int, tokens: list[int]) -> dict[int, Answer]:
        """Adds new tokens to a row's answer; if the answer has ended, frees the row and returns the answer."""
        i, ids = self._prompt[row], self._ids[row]
        assert i is not None
        answer = None
        for token in tokens:
            if token < 0:  # The row was done before this token.
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
    """Yields the prompts' indices in the order in which they enter: within a window the longest come first."""
    for start in range(0, len(lengths), SORT_WINDOW * batch_size):
        window = range(start, min(start + SORT_WINDOW * batch_size, len(lengths)))
        yield from sorted(window, key=lambda i: -lengths[i])


def _prefill_batch(
    prompts: Sequence[Sequence[int]], rows: int, sampling: Sampling, numbers: np.ndarray
) -> _PrefillBatch:
    """Pads prompts to the right, and to `rows` rows; their draws depend on `numbers` [R]."""
    width = _padded_length(max(map(len, prompts)))
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), numbers)
    return _PrefillBatch(tokens, lengths, lengths + np.int32(sampling.max_new_tokens), keys)  # type: ignore[arg-type]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _padded_length(n: int) -> int:
    """Rounds up to a power of two, or from 384 on also to 3/4 of one, so that few functions are compiled."""
    whole = max(MIN_WIDTH, _power_of_two(n))
    return whole * 3 // 4 if whole >= 2 * PREFILL_CHUNK and n <= whole * 3 // 4 else whole


def _stop_array(stop_ids: Iterable[int]) -> np.ndarray:
    """Pads the stop ids with -1, which is not a token, so that functions are rarely compiled for another number."""
    stops = sorted(set(stop_ids))
    return np.array(stops + [-1] * (max(8, _power_of_two(len(stops))) - len(stops)), np.int32)


def _sampling_params(sampling: Sampling) -> _SamplingParams:
    # Python floats would be weakly typed, so that the functions would be compiled again.
    return _SamplingParams(np.float32(sampling.temperature), np.float32(sampling.top_p))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- on the device
def _decode_params(decoder: Decoder, dtype: Any, params: Params) -> _DecodeParams:
    """Casts parameters to the compute dtype and splits them into layers."""
    params = cast_params(params, dtype)
    return _DecodeParams({k: v for k, v in params.items() if k != "layers"}, decoder.unstack(params))


def _empty(decoder: Decoder, dtype: Any, *, rows: int, slots: int) -> _Rows:
    """Returns free rows."""
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.vmap(jax.random.key)(zeros)
    cache = empty_cache(decoder.spec, rows, slots, dtype)
    return _placed(decoder.spec, _Rows(zeros, zeros, zeros, zeros == 0, keys, cache))


def _placed(spec: ModelSpec, rows: _Rows) -> _Rows:
    """Constrains the sharding of the state of a batch."""
    token, position, total, done, keys = (constrain(x, "batch") for x in rows[:-1])
    return _Rows(token, position, total, done, keys, place_cache(spec, rows.cache))


def _enter(
    decoder: Decoder,
    decode_params: _DecodeParams,
    prefill: _PrefillBatch,
    where: jax.Array,
    stops: jax.Array,
    sampling_params: _SamplingParams,
    *,
    rows: _Rows,
    num_ranked: int,
    nucleus: bool,
) -> tuple[_Rows, jax.Array]:
    """Prefills prompts into the rows at `where` [R]; also returns the first token of each answer [R]."""
    hidden, cache = _prefill(decoder, decode_params, prefill)
    logits = decoder.bind(decode_params.rest).logits(hidden[:, None])[:, 0]
    token = _pick(logits, prefill.lengths, prefill.keys, sampling_params, num_ranked, nucleus)
    done = jnp.isin(token, stops) | (prefill.lengths + 1 >= prefill.totals)
    new = _Rows(token, prefill.lengths, prefill.totals, done, prefill.keys, cache)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # The cache of the batch may have more slots than that of the prompts.
        return old.at[where, *map(slice, new.shape[1:])].set(new, mode="drop")

    return _placed(decoder.spec, jax.tree.map(put, rows, new)), constrain(token, None)


def _decode_loop(
    decoder: Decoder,
    decode_params: _DecodeParams,
    free: jax.Array,
    steps: jax.Array,
    enough: jax.Array,
    stops: jax.Array,
    sampling_params: _SamplingParams,
    *,
    rows: _Rows,
    num_ranked: int,
    nucleus: bool,
) -> tuple[_Rows, jax.Array]:
    """Decodes `steps` tokens in all rows except the `free` [B] ones, but stops when `enough` rows are done.

    Returns:
      The rows, and the new tokens [B C], which are -1 where the row was done before.
    """
    model = decoder.bind(decode_params.rest)

    def more(state: tuple[jax.Array, _Rows, jax.Array]) -> jax.Array:
        step, rows, _ = state
        return (step < steps) & (jnp.sum(rows.done) < enough)

    def advance(state: tuple[jax.Array, _Rows, jax.Array]) -> tuple[jax.Array, _Rows, jax.Array]:
        step, rows, new = state
        token, position = rows.token[:, None], rows.position[:, None]
        hidden, cache = model.decode(token, position, rows.total, rows.cache, decode_params.layers)
        position = rows.position + 1
        token = _pick(model.logits(hidden)[:, 0], position, rows.keys, sampling_params, num_ranked, nucleus)
        done = rows.done | jnp.isin(token, stops) | (position + 1 >= rows.total)
        new = new.at[:, step].set(jnp.where(rows.done, -1, token))
        # A row that is done keeps its position, so that it stays within its slots.
        token, position = (jnp.where(rows.done, *x) for x in ((rows.token, token), (rows.position, position)))
        return step + 1, rows._replace(token=token, position=position, done=done, cache=cache), new

    new = jnp.full((rows.token.shape[0], DECODE_CHUNK), -1, jnp.int32)
    start = (jnp.zeros((), jnp.int32), rows._replace(done=rows.done | free), new)
    _, rows, new = jax.lax.while_loop(more, advance, start)
    # The tokens are replicated, so that every process can read them.
    return _placed(decoder.spec, rows), constrain(new, None, None)


def _prefill(decoder: Decoder, decode_params: _DecodeParams, prefill: _PrefillBatch) -> tuple[jax.Array, Cache]:
    """Returns the hidden state of each prompt's last token [R D], and the cache of the prompts, with T slots."""
    tokens, lengths = prefill.tokens, prefill.lengths
    rows, width = tokens.shape
    size = math.gcd(PREFILL_CHUNK, width)
    model, dtype = decoder.bind(decode_params.rest), decode_params.rest["embed"]["table"].dtype

    def enter(carry: tuple[jax.Array, Cache], start: jax.Array) -> tuple[tuple[jax.Array, Cache], None]:
        last, cache = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32), piece.shape)
        num_tokens = jnp.clip(lengths - start, 0, size)
        hidden, cache = model.decode(piece, positions, prefill.totals, cache, decode_params.layers, num_tokens)
        at = lengths - 1 - start
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return (jnp.where(((at >= 0) & (at < size))[:, None], found, last), cache), None

    nothing = jnp.zeros((rows, decoder.spec.d_model), dtype)
    starts = jnp.arange(0, width, size, dtype=jnp.int32)
    cache = place_cache(decoder.spec, empty_cache(decoder.spec, rows, width, dtype))
    carry, _ = jax.lax.scan(enter, (nothing, cache), starts)
    return carry


def _pick(
    logits: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    sampling_params: _SamplingParams,
    num_ranked: int,
    nucleus: bool,
) -> jax.Array:
    """Chooses a token [B] for each row of logits [B V]; `positions` [B] are those of the chosen tokens."""
    if num_ranked == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    logits = logits / sampling_params.temperature
    if num_ranked == logits.shape[-1] and not nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # Tokens are chosen by rank, so that ties never let more than top_k of them through.
    ranked, ids = jax.lax.top_k(logits, num_ranked)
    if nucleus:
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # This is 0 for the likeliest token, so it always stays.
        ranked = jnp.where(before < sampling_params.top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)
