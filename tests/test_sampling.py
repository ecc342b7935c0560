"""The sampler's answers equal transformers' own, in ragged batches; draws follow the softmax they come from."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from helpers.models import QUICK, VOCAB, llama, load, mesh_of
from mice_jax.errors import UserError
from mice_jax.inference import sampler as sampler_module
from mice_jax.inference.sampler import Answer, Sampler, Sampling, cast_params, check_fits
from mice_jax.models.transformer import Decoder, Params, Transformer

Loaded = tuple[Decoder, Params]

# Each shape compiles a program, so there are few: rows have 64 slots for a prompt and its answer, and the longest
# prompt alone is padded to as many, the others to 32. There are 8 rows or, with batch_size=4, 4.
LENGTHS = [5, 1, 17, 32, 33, 3, 8]
WITHIN_32 = [5, 1, 17, 32, 3, 8]
GREEDY = Sampling(31)
DRAWN = Sampling(24, temperature=0.7, top_p=0.9, top_k=40, seed=3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def torch_model(folder: Path) -> LlamaForCausalLM:
    return llama(
        folder, hidden_size=64, initializer_range=0.3
    )  # large weights, so that answers do not repeat themselves


@pytest.fixture(scope="module")
def loaded(folder: Path, torch_model: LlamaForCausalLM) -> Loaded:
    return load(folder, mesh_of(1, 1, 1))


@pytest.fixture(scope="module")
def sampler(loaded: Loaded) -> Sampler:
    return Sampler(loaded[0], jnp.float32)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def expected(model: LlamaForCausalLM, prompt: list[int], n: int) -> list[int]:
    """What transformers answers, token by token from the likeliest."""
    config = GenerationConfig(do_sample=False, max_new_tokens=n, pad_token_id=0)
    tokens = torch.tensor([prompt])
    # Without a mask it takes token 0, which stands in the prompts, for padding.
    with torch.no_grad():
        ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    return ids[0, len(prompt) :].tolist()


def ids_of(answers: Iterable[Answer]) -> list[list[int]]:
    return [a.ids for a in answers]


# ---------------------------------------------------------------------------------------- greedy
def test_greedy_answers_of_a_ragged_batch_equal_transformers(
    sampler: Sampler, loaded: Loaded, torch_model: LlamaForCausalLM
) -> None:
    prompts = prompts_of(LENGTHS)
    answers = list(sampler.generate(loaded[1], prompts, GREEDY, []))
    wanted = [expected(torch_model, p, 31) for p in prompts]
    assert ids_of(answers) == wanted
    assert not any(a.stopped for a in answers)
    # The comparison means something only if the answers differ and do not repeat themselves.
    assert len({tuple(w) for w in wanted}) == len(prompts)
    assert all(len(set(w)) > 12 for w in wanted)


def test_prompts_prefilled_in_chunks_are_answered_as_by_transformers(
    sampler: Sampler, loaded: Loaded, torch_model: LlamaForCausalLM
) -> None:
    # All are padded to 512 slots, which is two chunks. One prompt ends in the second chunk, one at each edge of the
    # first, and one inside it.
    prompts = prompts_of([300, sampler_module.PREFILL_CHUNK, sampler_module.PREFILL_CHUNK + 1, 2], seed=1)
    answers = sampler.generate(loaded[1], prompts, Sampling(16), [])
    assert ids_of(answers) == [expected(torch_model, p, 16) for p in prompts]


def test_cache_position_off_by_one_changes_answers(
    sampler: Sampler, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Transformer.decode

    def shifted(self: Transformer, tokens: jax.Array, positions: jax.Array, *rest: Any) -> Any:
        return decode(self, tokens, positions + (tokens.shape[1] == 1), *rest)

    right = ids_of(sampler.generate(loaded[1], prompts_of(WITHIN_32), GREEDY, []))
    monkeypatch.setattr(Transformer, "decode", shifted)
    monkeypatch.setattr(sampler_module, "shared_functions", sampler_module.shared_functions.__wrapped__)
    wrong = ids_of(Sampler(loaded[0], jnp.float32).generate(loaded[1], prompts_of(WITHIN_32), GREEDY, []))
    for a, b in zip(right, wrong, strict=True):
        assert a[0] == b[0]  # the first token depends on the prompt alone
        assert a != b


def test_sharded_params_give_the_same_answers(folder: Path, sampler: Sampler, loaded: Loaded) -> None:
    mesh = mesh_of(1, 2, 2, sequence=2)
    decoder, params = load(folder, mesh)
    with jax.set_mesh(mesh):
        answers = ids_of(Sampler(decoder, jnp.float32).generate(params, prompts_of(WITHIN_32), GREEDY, []))
    assert answers == ids_of(sampler.generate(loaded[1], prompts_of(WITHIN_32), GREEDY, []))


def test_params_cast_beforehand_compute_the_same_bits(loaded: Loaded) -> None:
    decoder, params = loaded
    cast = cast_params(params, jnp.bfloat16)
    assert cast["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == jnp.float32
    entering = sampler_module._prefill_batch(prompts_of(LENGTHS), 8, GREEDY, np.zeros(8, np.int32))

    @jax.jit
    def last(params: Params) -> jax.Array:
        ready = sampler_module._decode_params(decoder, jnp.bfloat16, params)
        hidden, _ = sampler_module._prefill(decoder, ready, sampler_module._PrefillBatch(*map(jnp.asarray, entering)))
        return decoder.bind(ready.rest).logits(hidden[:, None])

    assert np.array_equal(last(cast), last(params))


# ---------------------------------------------------------------------------------------- ends
def test_stop_id_ends_an_answer_and_is_not_part_of_it(sampler: Sampler, loaded: Loaded) -> None:
    whole = ids_of(sampler.generate(loaded[1], prompts_of(LENGTHS), GREEDY, []))
    stops = [whole[0][20], whole[3][0]]  # one inside an answer, one that begins another
    answers = list(sampler.generate(loaded[1], prompts_of(LENGTHS), GREEDY, stops))
    for ids, answer in zip(whole, answers, strict=True):
        at = next((i for i, token in enumerate(ids) if token in stops), None)
        assert answer == Answer(ids[:at], at is not None)
    assert answers[3] == Answer([], True)
    assert answers[0].ids
    assert {a.stopped for a in answers} == {True, False}


def test_too_long_prompt_raises_with_both_numbers(sampler: Sampler, loaded: Loaded) -> None:
    text = r"prompt 1 has 630 tokens, which with max_new_tokens=11 make 641; the model has 640 positions"
    with pytest.raises(UserError, match=text):
        next(sampler.generate(loaded[1], prompts_of([4, 630]), Sampling(11), []))
    check_fits([1] * 630, Sampling(10), loaded[0].spec, "it")
    with pytest.raises(UserError, match="prompt 0 is empty"):
        next(sampler.generate(loaded[1], [[]], Sampling(10), []))


def test_invalid_sampling_numbers_are_reported_together() -> None:
    with pytest.raises(UserError, match=r"max_new_tokens=0.*temperature=-1.*top_p=0.*top_k=-1.*seed=-1"):
        Sampling(0, temperature=-1, top_p=0, top_k=-1, seed=-1)
    with pytest.raises(UserError, match="temperature=nan"):
        Sampling(1, temperature=float("nan"))


# ---------------------------------------------------------------------------------------- batches
def test_answer_does_not_depend_on_the_rest_of_the_batch(sampler: Sampler, loaded: Loaded) -> None:
    prompts = prompts_of(LENGTHS)
    together = ids_of(sampler.generate(loaded[1], prompts, DRAWN, []))
    assert ids_of(sampler.generate(loaded[1], prompts, DRAWN, [], batch_size=4)) == together
    assert (
        ids_of(sampler.generate(loaded[1], prompts[4:], DRAWN, [], numbers=range(4, 7), batch_size=4)) == together[4:]
    )
    others = prompts_of([9, 2, 33, 4], seed=7)
    assert ids_of(sampler.generate(loaded[1], prompts[:3] + others, DRAWN, []))[:3] == together[:3]


def test_finished_row_takes_the_next_prompt_and_order_is_kept(
    sampler: Sampler, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([15, 1, 14, 2, 13, 3, 12, 4], seed=2)
    whole = ids_of(sampler.generate(loaded[1], prompts, GREEDY, [], batch_size=4))
    # Answers end at very different times. More than eight ids that end one would be another shape.
    stops = [ids[(28, 2, 3)[i % 3]] for i, ids in enumerate(whole)]
    wanted = [a[: next(i for i, t in enumerate(a) if t in stops)] for a in whole]
    steps: list[int] = []
    go_on = sampler._decode_loop

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows, new = go_on(*args, **kwargs)
        steps.append(int((np.asarray(new) >= 0).any(axis=0).sum()))
        return rows, new

    monkeypatch.setattr(sampler, "_decode_loop", counted)
    answers = list(sampler.generate(loaded[1], prompts, GREEDY, stops, batch_size=4))
    assert ids_of(answers) == wanted and all(a.stopped for a in answers)
    # Without refilling, each batch of four would run until its longest answer ends.
    order = list(sampler_module._entry_order([len(p) for p in prompts], 4))
    assert 0 < sum(steps) < sum(max(len(wanted[i]) for i in order[at : at + 4]) for at in range(0, 8, 4))
    monkeypatch.setattr(sampler_module, "SORT_WINDOW", 1)
    assert ids_of(sampler.generate(loaded[1], prompts, GREEDY, stops, batch_size=4)) == wanted
    assert list(sampler_module._entry_order([5, 9, 1, 7, 2, 3], 2)) == [1, 0, 3, 2, 5, 4]


def test_caller_can_end_an_answer_and_one_token_is_an_answer(sampler: Sampler, loaded: Loaded) -> None:
    prompts = prompts_of(LENGTHS)
    whole = ids_of(sampler.generate(loaded[1], prompts, GREEDY, []))
    pair = whole[2][4:6]

    def ended(ids: list[int]) -> bool:
        return any(ids[i : i + 2] == pair for i in range(len(ids)))

    answers = list(sampler.generate(loaded[1], prompts, GREEDY, [], ended=ended, batch_size=4))
    for answer, ids in zip(answers, whole, strict=True):
        assert answer.ids == ids[: len(answer.ids)]
        assert answer.stopped == ended(answer.ids) == ended(ids)
    assert 6 <= len(answers[2].ids) <= 6 + sampler_module.DECODE_CHUNK < 31
    one = list(sampler.generate(loaded[1], prompts, Sampling(1), []))
    assert [a.ids for a in one] == [ids[:1] for ids in whole]
    assert list(sampler.generate(loaded[1], [], GREEDY, [])) == []


def test_streamed_answer_equals_the_batch_answer(sampler: Sampler, loaded: Loaded) -> None:
    prompts = prompts_of(LENGTHS)
    answer = ids_of(sampler.generate(loaded[1], prompts, DRAWN, []))[0]
    assert list(sampler.stream(loaded[1], prompts[0], DRAWN, [])) == answer
    stop = answer[7]
    assert list(sampler.stream(loaded[1], prompts[0], DRAWN, [stop])) == answer[: answer.index(stop)]


# ---------------------------------------------------------------------------------------- chance
@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_draw_from_the_best_token_alone_is_greedy(only: dict[str, Any]) -> None:
    logits = jax.random.normal(jax.random.key(1), (50, VOCAB))
    drawn = pick(logits, Sampling(1, temperature=2.0, **only))
    assert np.array_equal(drawn, np.argmax(logits, axis=-1))
    assert not np.array_equal(pick(logits, Sampling(1, temperature=2.0)), drawn)


def test_seed_and_prompt_number_decide_what_is_drawn(sampler: Sampler, loaded: Loaded) -> None:
    def answers(seed: int) -> list[list[int]]:
        prompts = [prompts_of([33])[0]] * 5
        how = Sampling(24, temperature=1.5, top_p=0.95, top_k=40, seed=seed)
        return ids_of(sampler.generate(loaded[1], prompts, how, []))

    assert len({tuple(a) for a in answers(1)}) == 5
    assert answers(1) == answers(1)
    assert all(a != b for a, b in zip(answers(1), answers(2), strict=True))


def pick(logits: Any, sampling: Sampling) -> np.ndarray:
    """A token for each row of `logits` [B V], each drawn with a key of its own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(len(logits), dtype=np.int32))
    num_ranked, nucleus = sampling.top_k or logits.shape[-1], sampling.top_p < 1
    choose = functools.partial(sampler_module._pick, num_ranked=num_ranked, nucleus=nucleus)
    positions = jnp.full(len(logits), 7)
    return np.asarray(
        jax.jit(choose, compiler_options=QUICK)(logits, positions, keys, sampler_module._sampling_params(sampling))
    )


LOGITS = np.array([2.0, -1.0, 0.5, 1.0, 0.0, -30.0], np.float32)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 1.0, "top_k": 3}, [0, 3, 2]),
        # The sorted softmax is 0.56, 0.21, 0.13, 0.08, 0.03: one token holds half of it, three hold 0.8.
        ({"temperature": 1.0, "top_p": 0.5}, [0]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 3, 2]),
        # At temperature 2 the best three tokens have 0.48, 0.29 and 0.23 of their own sum.
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.7}, [0, 3]),
    ],
    ids=str,
)
def test_draw_frequencies_follow_the_truncated_softmax(how: dict[str, float], kept: list[int]) -> None:
    drawn, n = Sampling(1, **how), 40_000
    probs = np.zeros(len(LOGITS))
    weights = np.exp(LOGITS[kept] / drawn.temperature)
    probs[kept] = weights / weights.sum()
    tokens = pick(jnp.tile(LOGITS, (n, 1)), drawn)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    # The bound is five sigma of a binomial count. A token that is cut away, or too rare, must not come at all.
    assert np.all(np.abs(counts - n * probs) <= 5 * np.sqrt(n * probs * (1 - probs)) + 1e-3)
