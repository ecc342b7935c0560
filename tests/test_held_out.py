"""The loss over what is held out: that the devices are kept busy, and that every microbatch counts once."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import VOCAB, llama, load, mesh_of, packed
from helpers.runs import make_chats, read_all_metrics, run_export, run_train, setting, write_jsonl
from mice_jax.data.dataset import HeldOut
from mice_jax.errors import UserError
from mice_jax.models.transformer import Compute
from mice_jax.sharding import put_rows
from mice_jax.step import make_step
from mice_jax.storage import jsonl
from mice_jax.storage.workdir import ANSWERS
from mice_jax.training import held_out, sample_answers
from mice_jax.training.cadence import HELD_OUT_ALONE
from mice_jax.training.evaluator import Evaluator
from mice_jax.training.progress import Progress

SLOTS = 40
HELD = [("a", ("one",)), ("a", ("two",)), ("b", ("two",))]


@pytest.mark.slow
def test_next_rows_are_sent_before_a_microbatch_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", make_chats(60, seed=5))
    body = f"c.data.validation = [Source(path='{held}')]\nc.optim.max_steps = 1\nc.optim.learning_rate = 0.0"
    body += "\nc.eval.exact_match = True\nc.eval.answers = 3"
    config = setting(tmp_path, body)
    happened: list[str] = []
    evaluate, put_rows, device_get = held_out.evaluate, held_out.put_rows, jax.device_get

    def get(x: Any) -> Any:
        happened.append("await")
        return device_get(x)

    def watched(*args: Any) -> Any:
        with monkeypatch.context() as within:
            within.setattr(held_out, "put_rows", lambda *a: happened.append("put") or put_rows(*a))
            within.setattr(jax, "device_get", get)
            return evaluate(*args)

    monkeypatch.setattr(held_out, "evaluate", watched)
    monkeypatch.setattr(sample_answers, "MAX_NEW_TOKENS", 20)
    assert run_train(config, tmp_path / "run") == 0
    microbatches = happened.count("put") // 2
    assert microbatches > 2
    assert happened == ["put", *["put", "await"] * (microbatches - 1), "await"] * 2, "before the first step, and after"
    first, last = read_all_metrics(tmp_path / "run")
    assert first == {"step": 0, "samples": 0} | {k: v for k, v in last.items() if k.startswith("eval/")}
    assert first["eval/loss"] > 0, "equal, because the learning rate is 0"
    assert first["eval/exact_match"] == first["eval/macro_exact_match"] == 0.0, "an untrained model"
    assert_answered_as_transformers(tmp_path, make_chats(60, seed=5)[:3])


def assert_answered_as_transformers(folder: Path, chats: Sequence[Any]) -> None:
    """The answers of a run that has not changed its weights, held to what transformers' greedy decoding writes."""
    assert run_export(folder / "run", folder / "hf") == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    lines = jsonl.read(folder / "run" / ANSWERS)
    assert [line["step"] for line in lines] == [0] * 3 + [1] * 3 and {line["source"] for line in lines} == {"held"}
    for chat, before, after in zip(chats, lines[:3], lines[3:], strict=True):
        question, answer = chat["messages"][:2]
        ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        written = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=tokenizer.eos_token_id)[0]
        assert before | {"step": 1} == after and after["expected"] == answer["content"].strip()
        assert after["answer"] == tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True).strip()
        assert question["content"] in after["prompt"] and after["expected"] not in after["prompt"]


def test_questions_are_the_first_turns_of_each_source_in_turn() -> None:
    samples = {
        0: ([5, 6, 7, 8, 9], [0, 0, 1, 1, 0]),  # a turn ends before its sample does
        1: ([1, 2, 3], [1, 1, 1]),  # a document has no prompt
        2: ([1, 2, 3], [0, 0, 1]),
        3: ([4, 4, 4, 4], [0, 0, 0, 1]),  # a prompt that is too long
        4: ([7, 8], [0, 1]),
        5: ([3, 2, 1], [0, 0, 0]),  # a sample cut before its answer
    }

    class Samples:
        def sample(self, i: int) -> Any:
            return tuple(map(np.array, samples[i]))

    held = [HeldOut("a", np.array([1, 0, 4]), ()), HeldOut("b", np.array([3, 5, 2]), ())]
    found = sample_answers.questions(held, Samples(), 9, longest=2)  # type: ignore[arg-type]
    assert found == [("a", [5, 6], [7, 8]), ("b", [1, 2], [3]), ("a", [7], [8])]
    assert sample_answers.questions(held, Samples(), 2, longest=2) == found[:2]  # type: ignore[arg-type]


def test_loss_and_accuracy_by_source_and_phase_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a microbatch are its sums of loss, weight and correct tokens; b has the fewest tokens."""
    sums = {0: [(8.0, 4.0, 1.0), (4.0, 2.0, 2.0)], 1: [(30.0, 10.0, 1.0)], 2: [(1.0, 2.0, 1.0)]}
    held = [HeldOut(name, np.array([i]), phases) for i, (name, phases) in enumerate(HELD)]
    monkeypatch.setattr(held_out, "put_rows", lambda rows, mesh: rows)

    def steps(mixture: Any) -> Any:
        return [{"microbatches": sums[int(mixture.phases[0].pools[0].ids[0])]}]

    def measured(by_phase: bool) -> dict[str, float]:
        return held_out.evaluate(lambda rows: rows, held, steps, None, by_phase)  # type: ignore[arg-type]

    found = measured(by_phase=True)
    by_group = {"eval": (43, 18, 5), "eval/a": (42, 16, 4), "eval/b": (1, 2, 1), "eval/phase/one": (12, 6, 3)}
    by_group["eval/phase/two"] = (31, 12, 2)
    expected = {"eval/macro_loss": (42 / 16 + 1 / 2) / 2}
    for group, (loss, weight, correct) in by_group.items():
        expected |= {f"{group}/loss": loss / weight, f"{group}/token_accuracy": correct / weight}
    assert found == expected and list(found) == held_out.metric_names(held, True)
    assert measured(by_phase=False) == {k: v for k, v in expected.items() if "phase" not in k}


def test_exact_matches_are_counted_by_source_and_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the four samples of a match, and none of the two of b."""
    sums = {0: [(8.0, 4.0, 1.0, 2.0, 2.0)], 1: [(30.0, 10.0, 1.0, 1.0, 2.0)], 2: [(1.0, 2.0, 1.0, 0.0, 2.0)]}
    held = [HeldOut(name, np.array([i]), phases) for i, (name, phases) in enumerate(HELD)]
    monkeypatch.setattr(held_out, "put_rows", lambda rows, mesh: rows)

    def steps(mixture: Any) -> Any:
        return [{"microbatches": sums[int(mixture.phases[0].pools[0].ids[0])]}]

    found = held_out.evaluate(lambda rows: rows, held, steps, None, True, True)  # type: ignore[arg-type]
    assert list(found) == held_out.metric_names(held, True, True)
    shares = {"eval": 3 / 6, "eval/a": 3 / 4, "eval/b": 0.0, "eval/phase/one": 1.0, "eval/phase/two": 1 / 4}
    retained = held_out.evaluate(lambda rows: rows, held, steps, None, False, True, ["b"])  # type: ignore[arg-type]
    assert retained["eval/macro_loss"] == retained["eval/a/loss"] and retained["eval/b/loss"] == found["eval/b/loss"]
    assert retained["eval/macro_exact_match"] == 3 / 4, "a source that is retained is left out"
    assert {k: v for k, v in found.items() if "exact" in k} == {
        **{f"{group}/exact_match": share for group, share in shares.items()},
        "eval/macro_exact_match": (3 / 4 + 0) / 2,
    }


def test_exact_matches_are_the_samples_that_greedy_decoding_writes(tmp_path: Path) -> None:
    """Transformers' model writes answers token by token; each is then evaluated as it is, or with one other token."""
    mesh = mesh_of(1, 2, 1)
    torch_model = llama(tmp_path)
    decoder, params = load(tmp_path, mesh)
    compute = Compute(np.dtype("float32"), "reference", "none")
    fns = make_step(decoder, optax.sgd(1.0), mesh, compute, max_held_out_samples=32)
    rng = np.random.default_rng(0)

    def written(prompt: list[int], length: int) -> np.ndarray:
        tokens = torch.tensor([prompt])
        for _ in range(length):
            tokens = torch.cat([tokens, torch_model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        return tokens[0].numpy()

    rows, wanted = [], []
    for row in range(4):
        rows.append([])
        for _ in range(1 + row):  # so that a sample's number depends on the rows before it
            prompt, answer = rng.integers(0, VOCAB, 3).tolist(), int(rng.integers(1, 5))
            ids = written(prompt, answer)
            is_match = bool(rng.integers(2))
            if not is_match:
                place = -int(rng.integers(1, answer + 1))
                ids[place] = (ids[place] + 1) % VOCAB
            rows[-1].append((ids, np.arange(len(ids)) >= 3))
            wanted.append(is_match)
    rows[0].append((np.array([1, 2, 3]), np.zeros(3, bool)))  # a sample without a trained token is not counted
    arrays = packed(rows, SLOTS)
    loss_sum, weight_sum, correct, matches, samples = map(float, fns.evaluate(params, put_rows(arrays, mesh)))
    assert (matches, samples) == (sum(wanted), len(wanted)) and 0 < sum(wanted) < len(wanted)
    assert weight_sum == arrays["loss_weights"].sum() and 0 < correct < weight_sum and loss_sum > 0
    assert matches < correct, "a sample with one other token still has right ones"


@pytest.mark.parametrize(
    ("retain", "message"),
    [
        (["old"], "names 'old', which is not a held-out source; those are a, b"),
        (["a", "b"], "names all held-out sources"),
    ],
)
def test_source_to_retain_must_be_held_out_beside_others(retain: list[str], message: str) -> None:
    held_out.check_retained(["a"], {"a", "b"})
    held_out.check_retained([], set())
    with pytest.raises(UserError, match=message):
        held_out.check_retained(retain, {"a", "b"})


def test_one_behind_yields_each_item_once_and_in_order() -> None:
    def queue(count: int) -> Any:
        for i in range(count):
            queued.append(i)
            yield i

    for count in range(4):
        queued: list[int] = []
        assert [(i, len(queued)) for i in held_out._one_behind(queue(count))] == [
            (i, min(i + 2, count)) for i in range(count)
        ]


def test_kept_share_is_of_what_was_known_before_the_first_step() -> None:
    before = {"eval/old/exact_match": 0.8, "eval/old/token_accuracy": 0.9, "eval/new/exact_match": 0.0}
    before |= {"eval/older/exact_match": 0.5, "eval/older/token_accuracy": 0.6}
    known = held_out.known_before(before, ["old", "older"])
    assert known == {"eval/old/exact_match": 0.8, "eval/older/exact_match": 0.5}
    assert held_out.kept(before, known) == {"eval/kept": 1.0}
    now = {"eval/old/exact_match": 0.2, "eval/older/exact_match": 0.5, "eval/new/exact_match": 0.9}
    assert held_out.kept(now, known) == {"eval/kept": pytest.approx((0.25 + 1) / 2, rel=1e-12)}
    assert held_out.kept(now, held_out.known_before(before, ["new"])) == {}, "nothing was known of it"
    assert held_out.kept(now, {}) == {}
    loss_alone = {k: v for k, v in before.items() if "exact" not in k}
    assert held_out.known_before(loss_alone, ["old"]) == {"eval/old/token_accuracy": 0.9}


def test_run_measures_what_it_keeps_from_before_its_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator.__new__(Evaluator)
    evaluator._held_out, evaluator._retain, evaluator._answer = ["something"], ["old"], lambda params: []
    evaluator._join = lambda params: params
    accuracy = {"params": 0.5, "average": 0.5}
    monkeypatch.setattr(
        evaluator, "_held_out_metrics", lambda of: {"eval/loss": 1.0, "eval/old/token_accuracy": accuracy[of]}
    )
    state: Any = SimpleNamespace(params="params", average="average")
    before, known = evaluator.before_training(state)
    assert before.metrics["eval/kept"] == before.metrics["eval/average/kept"] == 1.0
    accuracy.update(params=0.1, average=0.4)
    # A checkpoint keeps the counters as JSON, and a resumed run goes on from them.
    progress = Progress(**json.loads(json.dumps(dataclasses.asdict(Progress(known_before=known)))))
    now = evaluator(state, HELD_OUT_ALONE, progress.known_before).metrics
    assert (now["eval/kept"], now["eval/average/kept"]) == pytest.approx((0.2, 0.8), rel=1e-12)
    assert "eval/kept" not in evaluator(state, HELD_OUT_ALONE, Progress().known_before).metrics, "of an older run"
