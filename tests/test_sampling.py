"""Answers against transformers' own, in batches of ragged prompts; draws against the softmax they come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mice_jax import sharding
from mice_jax.errors import UserError
from mice_jax.evals import sampling
from mice_jax.evals.sampling import Answer, Sampler, Sampling, cast_params
from mice_jax.models import hf
from mice_jax.models.transformer import Decoder, Params, Transformer, make_decoder

VOCAB = 150  # no multiple of what it is padded to


def write_model(folder: Path, vocab_size: int = VOCAB, **more: Any) -> LlamaForCausalLM:
    """A random Llama in a folder, with weights so large that its answers wander."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    rest = {"max_position_embeddings": 640, "initializer_range": 0.3, "eos_token_id": None} | more
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def torch_model(folder: Path) -> LlamaForCausalLM:
    return write_model(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path, torch_model: LlamaForCausalLM) -> tuple[Decoder, Params]:
    return load(folder, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))


@pytest.fixture(scope="module")
def sampler(loaded: tuple[Decoder, Params]) -> Sampler:
    return Sampler(loaded[0], jnp.float32)


def load(folder: Path, mesh: jax.sharding.Mesh) -> tuple[Decoder, Params]:
    config = hf.read_config(folder / "config.json")
    decoder = make_decoder(hf.spec_from_config(config, folder / "config.json"), mesh.shape["tensor"])
    shardings = sharding.param_shardings(decoder.abstract, decoder.axes, mesh)
    return decoder, hf.load_params(folder, decoder, config["architectures"][0], shardings)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def reference(model: LlamaForCausalLM, prompt: list[int], n: int, stop: int | None = None) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=stop, pad_token_id=0)
    tokens = torch.tensor([prompt])
    # Without a mask it takes token 0, which stands in the prompts, for padding.
    with torch.no_grad():
        ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    return ids[0, len(prompt) :].tolist()


def ids_of(answers: Any) -> list[list[int]]:
    return [a.ids for a in answers]


RAGGED = prompts_of([5, 1, 17, 32, 33, 3, 8])
DRAWN = Sampling(24, temperature=0.7, top_p=0.9, top_k=40, seed=3)


# ---------------------------------------------------------------------------------------- greedy
def test_greedy_answers_to_ragged_prompts_in_one_batch_are_those_of_transformers(
    sampler: Sampler, loaded: tuple[Decoder, Params], torch_model: LlamaForCausalLM
) -> None:
    answers = list(sampler.generate(loaded[1], RAGGED, Sampling(48), []))
    expected = [reference(torch_model, p, 48) for p in RAGGED]
    assert ids_of(answers) == expected
    assert len({tuple(e) for e in expected}) == len(RAGGED), "the model answers all alike: the test shows nothing"
    assert all(len(set(e)) > 5 for e in expected), "the model repeats itself: the test shows nothing"
    assert not any(a.stopped for a in answers)


def test_a_prompt_that_enters_in_chunks_is_answered_as_by_transformers(
    sampler: Sampler, loaded: tuple[Decoder, Params], torch_model: LlamaForCausalLM
) -> None:
    # The widest is padded to 512 slots, two chunks; the others end in the first, and at its edge.
    prompts = prompts_of([300, sampling.CHUNK, sampling.CHUNK + 1, 2], seed=1)
    expected = [reference(torch_model, p, 16) for p in prompts]
    assert ids_of(sampler.generate(loaded[1], prompts, Sampling(16), [])) == expected


def test_a_cache_whose_position_is_off_by_one_gives_other_answers(
    loaded: tuple[Decoder, Params], torch_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Transformer.decode

    def wrong(self: Transformer, tokens: jax.Array, positions: jax.Array, cache: Any) -> Any:
        return right(self, tokens, positions + (tokens.shape[1] == 1), cache)

    monkeypatch.setattr(Transformer, "decode", wrong)
    answers = ids_of(Sampler(loaded[0], jnp.float32).generate(loaded[1], RAGGED[:3], Sampling(16), []))
    for prompt, answer in zip(RAGGED, answers, strict=False):
        assert answer != reference(torch_model, prompt, 16)


def test_the_streamed_answer_is_the_batch_s(sampler: Sampler, loaded: tuple[Decoder, Params]) -> None:
    for how in (Sampling(24), DRAWN):
        [answer] = sampler.generate(loaded[1], RAGGED[2:3], how, [])
        assert list(sampler.stream(loaded[1], RAGGED[2], how, [])) == answer.ids
        stop = answer.ids[7]
        assert list(sampler.stream(loaded[1], RAGGED[2], how, [stop])) == answer.ids[: answer.ids.index(stop)]


def test_parameters_sharded_over_a_mesh_give_the_same_answers(
    folder: Path, sampler: Sampler, loaded: tuple[Decoder, Params]
) -> None:
    if len(jax.devices()) < 4:
        pytest.skip("one device is no mesh")
    mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
    decoder, params = load(folder, mesh)
    with jax.set_mesh(mesh):
        answers = ids_of(Sampler(decoder, jnp.float32).generate(params, RAGGED, Sampling(12), []))
    assert answers == ids_of(sampler.generate(loaded[1], RAGGED, Sampling(12), []))


def test_parameters_cast_beforehand_give_the_same_bfloat16_answers(loaded: tuple[Decoder, Params]) -> None:
    decoder, params = loaded
    half = Sampler(decoder, jnp.bfloat16)
    cast = cast_params(decoder, params, jnp.bfloat16)
    assert cast["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == jnp.float32
    once = ids_of(half.generate(cast, RAGGED[:2], Sampling(12), []))
    assert once == ids_of(half.generate(params, RAGGED[:2], Sampling(12), []))


# ---------------------------------------------------------------------------------------- stopping
def test_a_stop_id_ends_an_answer_and_is_not_in_it(
    sampler: Sampler, loaded: tuple[Decoder, Params], torch_model: LlamaForCausalLM
) -> None:
    whole = ids_of(sampler.generate(loaded[1], RAGGED, Sampling(20), []))
    stops = [whole[0][4], whole[3][0]]  # one inside an answer, one that begins another
    answers = list(sampler.generate(loaded[1], RAGGED, Sampling(20), stops))
    for ids, answer in zip(whole, answers, strict=True):
        ends = [i for i, token in enumerate(ids) if token in stops]
        assert answer == Answer(ids[: ends[0]], True) if ends else answer == Answer(ids, False)
    assert answers[3] == Answer([], True)
    assert answers[0].ids == reference(torch_model, RAGGED[0], 20, stops[0])[:-1][: len(answers[0].ids)]
    assert {a.stopped for a in answers} == {True, False}


def test_a_prompt_too_long_for_the_model_is_refused_with_both_numbers(
    sampler: Sampler, loaded: tuple[Decoder, Params]
) -> None:
    prompts = prompts_of([4, 630])
    with pytest.raises(UserError, match=r"prompt 1 has 630 tokens.*max_new_tokens=11 make 641.*has 640 positions"):
        list(sampler.generate(loaded[1], prompts, Sampling(11), []))
    assert len(list(sampler.generate(loaded[1], prompts, Sampling(10), []))) == 2
    with pytest.raises(UserError, match="prompt 0 is empty"):
        list(sampler.generate(loaded[1], [[]], Sampling(10), []))


def test_numbers_that_make_no_sense_are_refused_all_at_once() -> None:
    with pytest.raises(UserError, match=r"max_new_tokens=0.*temperature=-1.*top_p=0.*top_k=-1.*seed=-1"):
        Sampling(0, temperature=-1, top_p=0, top_k=-1, seed=-1)
    with pytest.raises(UserError, match="temperature=nan"):
        Sampling(1, temperature=float("nan"))


# ---------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("how", [Sampling(24), DRAWN], ids=["greedy", "drawn"])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(
    sampler: Sampler, loaded: tuple[Decoder, Params], how: Sampling
) -> None:
    together = ids_of(sampler.generate(loaded[1], RAGGED, how, []))
    assert ids_of(sampler.generate(loaded[1], RAGGED, how, [], batch_size=2)) == together
    rest = sampler.generate(loaded[1], RAGGED[4:], how, [], first=4)
    assert ids_of(rest) == together[4:]
    others = prompts_of([9, 2, 3, 4], seed=7)
    assert ids_of(sampler.generate(loaded[1], RAGGED[:3] + others, how, []))[:3] == together[:3]


def test_answers_come_in_the_order_of_the_prompts_as_soon_as_they_are_there(
    sampler: Sampler, loaded: tuple[Decoder, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "WINDOW", 2)
    lengths = [20, 1, 19, 2, 18, 3, 17, 4, 16, 5]
    assert list(sampling._batches(lengths, 2)) == [[1, 3], [2, 0], [5, 7], [6, 4], [9, 8]]
    prompts = prompts_of(lengths, seed=2)
    singly = [ids_of(sampler.generate(loaded[1], [p], Sampling(4), []))[0] for p in prompts]
    assert ids_of(sampler.generate(loaded[1], prompts, Sampling(4), [], batch_size=2)) == singly


# ---------------------------------------------------------------------------------------- chance
def test_the_best_token_alone_is_greedy(sampler: Sampler, loaded: tuple[Decoder, Params]) -> None:
    greedy = ids_of(sampler.generate(loaded[1], RAGGED, Sampling(24), []))
    for only in (Sampling(24, temperature=2.0, top_k=1), Sampling(24, temperature=2.0, top_p=1e-6)):
        assert ids_of(sampler.generate(loaded[1], RAGGED, only, [])) == greedy


def test_a_seed_and_a_prompt_s_number_decide_what_is_drawn(sampler: Sampler, loaded: tuple[Decoder, Params]) -> None:
    hot = Sampling(16, temperature=1.5, seed=1)
    twins = [RAGGED[0], RAGGED[0]]
    first = ids_of(sampler.generate(loaded[1], twins, hot, []))
    assert first[0] != first[1]
    assert first == ids_of(sampler.generate(loaded[1], twins, hot, []))
    other = Sampling(16, temperature=1.5, seed=2)
    assert first != ids_of(sampler.generate(loaded[1], twins, other, []))


LOGITS = np.array([2.0, -1.0, 0.5, 1.0, 0.0, -30.0], np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def draw(how: Sampling, n: int) -> np.ndarray:
    chance = sampling._chance(how, np.arange(n, dtype=np.int32))
    ranked = min(how.top_k or len(LOGITS), len(LOGITS))
    logits, positions = jnp.tile(LOGITS, (n, 1)), jnp.full(n, 7)
    tokens = sampling._pick(logits, positions, chance, ranked, how.top_p < 1)
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS))


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (Sampling(1, temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(1, temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (Sampling(1, temperature=1.0, top_k=3), [0, 3, 2]),
        # Softmax, sorted: 0.541, 0.199, 0.121, 0.073, ...: half is held by one, 0.8 needs three.
        (Sampling(1, temperature=1.0, top_p=0.5), [0]),
        (Sampling(1, temperature=1.0, top_p=0.8), [0, 3, 2]),
        (Sampling(1, temperature=2.0, top_k=3, top_p=0.7), [0, 3]),  # of the three: 0.481, 0.292, 0.227
    ],
)
def test_draws_come_as_often_as_the_softmax_of_what_is_left_says(how: Sampling, kept: list[int]) -> None:
    n = 40_000
    probs = np.zeros(len(LOGITS))
    probs[kept] = softmax(LOGITS[kept] / how.temperature)
    counts = draw(how, n)
    # Five sigma of a binomial count. What is cut away, or too rare to come at all, must not come once.
    assert np.all(np.abs(counts - n * probs) <= 5 * np.sqrt(n * probs * (1 - probs)) + 1e-3)
