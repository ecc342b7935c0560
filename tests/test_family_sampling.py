"""Decoding with a cache: greedy answers equal transformers', hidden states those of the whole sequence.

The cases are in helpers/families.py. Prompts are short, past the window, and past the length that RoPE was made for.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from helpers.families import CASES, ORIGINAL, VOCAB, WINDOW, torch_model
from helpers.models import QUICK, gap, load, mesh_of
from mice_jax.inference.sampler import Sampler, Sampling
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder, Params, empty_cache, make_decoder

# The last answer starts past the window, past ORIGINAL, and comes past phi3's window of 200. A LongRoPE turns by the
# length that a row has in the end: transformers gives the same where each answer ends on the side of ORIGINAL on
# which its prompt does.
LENGTHS = [3, 31, 185]
NEW = 64
EARLY = 24  # of a short prompt's answer, within the window
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in LENGTHS]

Loaded = tuple[Decoder, Params]

# A case for each family, and for each kind of layer that a cache has to treat differently.
ANSWERED = [case for case in CASES if case not in ("llama-linear", "mistral-full", "phi3-mini")]
# With a window and frequencies that hang on the length, and with other mixers. The rest is slow; test_sampling has a
# plain one.
OF_EACH_KIND = ("phi3", "lfm2", "granite4-hybrid")
CACHED = ["mistral", "phi3", "lfm2"]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def made(case: str) -> PreTrainedModel:
    """The case with weights so large, and a head so unlike its embedding, that its answers wander."""
    return torch_model(case, initializer_range=0.5, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case's decoder and parameters, made when they are first asked for."""

    @functools.cache
    def of(case: str) -> Loaded:
        folder = tmp_path_factory.mktemp(case)
        made(case).save_pretrained(folder)
        return load(folder, mesh_of(1, 1, 1))

    return of


@functools.cache
def their_answers(case: str) -> list[list[int]]:
    """What transformers answers with its own cache, each prompt for itself."""
    config = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            ids = made(case).generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def our_answers(decoder: Decoder, params: Params) -> list[list[int]]:
    """What we answer, all prompts in one batch."""
    return [a.ids for a in Sampler(decoder, jnp.float32).generate(params, PROMPTS, Sampling(NEW), [])]


# ---------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in OF_EACH_KIND else pytest.mark.slow) for case in ANSWERED]
)
def test_greedy_answers_to_ragged_prompts_equal_transformers(case: str, loaded: Any) -> None:
    wanted = their_answers(case)
    # Else the test would show little: whole answers, which do not repeat themselves.
    assert [len(a) for a in wanted] == [NEW] * len(LENGTHS)
    assert all(len(set(a)) > 4 for a in wanted)
    assert our_answers(*loaded(case)) == wanted


def odd_scaling(spec: ModelSpec, **changes: Any) -> ModelSpec:
    (one,) = set(spec.ropes)
    scaling = dataclasses.replace(one.scaling, **changes)
    return dataclasses.replace(spec, ropes=(dataclasses.replace(one, scaling=scaling),) * spec.num_layers)


@pytest.mark.slow
def test_a_wrong_window_or_rope_factor_changes_the_answers_it_reaches(loaded: Any) -> None:
    """Negative controls: which of the three prompts is answered otherwise early on."""

    def changed(case: str, spec: ModelSpec) -> list[bool]:
        answers = our_answers(make_decoder(spec), loaded(case)[1])
        return [a[:EARLY] != b[:EARLY] for a, b in zip(answers, their_answers(case), strict=True)]

    spec = loaded("gemma3")[0].spec
    assert set(spec.windows) == {WINDOW, None}
    full = dataclasses.replace(spec, windows=(None,) * spec.num_layers)
    assert changed("gemma3", full) == [False, True, True]
    spec = loaded("phi3")[0].spec
    scaling = spec.ropes[0].scaling
    assert changed("phi3", odd_scaling(spec, long_factors=scaling.short_factors)) == [False, False, True]


# ---------------------------------------------------------------------------------------- hidden states
# Two rows, of which one ends early, and is short for a LongRoPE. Each size of a piece compiles a program: 60 tokens
# pass the window at once, single tokens pass ORIGINAL and, at the end, phi3's window.
ROWS = np.array([210, 100], np.int32)
PIECES = [1, 60, 1, 1, 60, *[1] * 10, 60, *[1] * 17]
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, sum(PIECES))).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(sum(PIECES), dtype=np.int32), TOKENS.shape)
# Normalised, of order 4: some hundred float32 roundings (2e-7 there) of attention scores in the hundreds, which these
# weights give, summed over other widths. 4e-5 was seen.
HIDDEN = 2e-4


@functools.cache
def step_of(decoder: Decoder) -> Any:
    return jax.jit(lambda p, *x: decoder.bind(p).decode(*x, decoder.unstack(p)), compiler_options=QUICK)


def decoded(decoder: Decoder, params: Params, lengths: np.ndarray) -> np.ndarray:
    step = step_of(decoder)
    cache, found, start = empty_cache(decoder.spec, 2, sum(PIECES) + 5, jnp.float32), [], 0
    for size in PIECES:
        piece = (slice(None), slice(start, start + size))
        hidden, cache = step(params, TOKENS[piece], POSITIONS[piece], lengths, cache)
        found.append(np.asarray(hidden))
        start += size
    return np.concatenate(found, axis=1)


def gaps(found: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Of each row, without what comes after its end."""
    return [gap(f[:n], w[:n]) for f, w, n in zip(found, wanted, ROWS, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CACHED)
def test_decoding_in_uneven_pieces_gives_the_whole_sequence_s_states(
    case: str, loaded: Any, strict_dtypes: None
) -> None:
    assert ROWS[0] == sum(PIECES) > max(ORIGINAL, 200) and max(PIECES) > WINDOW
    decoder, params = loaded(case)
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    segments = (ROWS[:, None] > POSITIONS).astype(np.int32)
    hidden = jax.jit(lambda p, *x: decoder.bind(p).hidden(*x, compute), compiler_options=QUICK)
    whole = hidden(params, TOKENS, POSITIONS, segments)
    found = decoded(decoder, params, ROWS)
    assert found.dtype == np.float32
    assert max(gaps(found, np.asarray(whole))) < HIDDEN


@pytest.mark.slow
def test_a_wrong_window_or_length_moves_states_ten_tolerances(loaded: Any) -> None:
    """Negative controls of the comparison of hidden states."""
    decoder, params = loaded("mistral")
    wide = dataclasses.replace(decoder.spec, windows=(WINDOW + 1,) * decoder.spec.num_layers)
    right, wrong = (decoded(d, params, ROWS) for d in (decoder, make_decoder(wide)))
    assert min(gaps(wrong, right)) > 10 * HIDDEN
    assert gap(wrong[:, :WINDOW], right[:, :WINDOW]) < HIDDEN
    decoder, params = loaded("phi3")
    right, wrong = (decoded(decoder, params, n) for n in (ROWS, np.full(2, ROWS[0], np.int32)))
    long, short = gaps(wrong, right)
    assert long < HIDDEN and short > 10 * HIDDEN
