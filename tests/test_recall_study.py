"""The study of what a small model learns and keeps: its world, and that its sweeps and claims are what can be run."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import REPOSITORY
from mice_jax.errors import UserError
from mice_jax.statistics import registered_claims
from mice_jax.sweep import load_sweep
from mice_jax.sweeps.trials import fixed_params, trial_config

pytestmark = pytest.mark.smoke
STUDY = REPOSITORY / "studies" / "recall"
sys.path.append(str(STUDY))
recall, world, keep = (pytest.importorskip(name) for name in ("recall", "world", "keep"))
SMALL = recall.Size(facts=30, drawn=400, phase=220, held_out=20)


def answer(question: str) -> str:
    """Answers a question about numbers or strings by other code than the world's."""
    if "+" in question:
        return str(sum(int(n) for n in question.split("+")))
    name, text = question.split()
    return {
        "copy": text,
        "reverse": "".join(reversed(text)),
        "sort": "".join(sorted(text)),
        "double": "".join(2 * c for c in text),
        "turn": (text + text)[1 : 1 + len(text)],
        "ends": text[:1] + text[-1:],
    }[name]


def test_held_out_questions_are_never_trained_on_and_answers_are_right() -> None:
    files = world.make_world(SMALL)
    for name in (*recall.PHASES, *recall.OLD):
        trained, held = files[name], files[f"{name}.heldout"]
        assert len(held) == SMALL.held_out and not {q for q, _ in trained} & {q for q, _ in held}
        if "facts" not in name and name != "knowledge":
            assert all(a == answer(q) for q, a in trained + held)
    assert all(len(files[name]) == SMALL.phase for name in recall.PHASES)
    assert world.make_world(SMALL) == files != world.make_world(SMALL, seed=1)


def words(question: str) -> list[str]:
    return question.replace("?", "").replace(":", "").split()


def test_held_out_wordings_ask_for_facts_that_other_wordings_teach() -> None:
    files = world.make_world(SMALL)
    names = {w for name in ("old_facts", "knowledge") for q, _ in files[name] for w in words(q) if len(w) == 6}
    entities = {name: {w for q, _ in files[name] for w in words(q)} & names for name in ("old_facts", "knowledge")}
    assert len(entities["old_facts"]) == len(entities["knowledge"]) == SMALL.facts
    assert not entities["old_facts"] & entities["knowledge"], "no entity is in both worlds"
    for name in ("old_facts", "knowledge"):
        taught = {(w, a) for q, a in files[name] for w in words(q)}
        assert all(any((w, a) in taught for w in {*words(q)} & names) for q, a in files[f"{name}.heldout"])
    wrong = sum(a != b for (_, a), (_, b) in zip(files["knowledge"], files["knowledge_noisy"], strict=True))
    assert 0 < wrong < 0.2 * SMALL.phase


@pytest.mark.parametrize(
    "name, trials, primary",
    [("batch", 72, 0), ("final", 28, 1), ("control", 12, 0), ("schedule", 42, 2), ("phases", 42, 1)],
)
def test_every_sweep_and_its_claims_can_be_run(name: str, trials: int, primary: int, tmp_path: Path) -> None:
    (tmp_path / "batch").mkdir()
    header = "number,optim.batch_size,optim.learning_rate,seed,status,metric\n"
    rows = ["0,8,0.001,0,completed,1.0", "1,8,0.002,0,completed,0.5", "2,512,0.004,0,completed,0.4"]
    rows += ["3,512,0.008,0,stopped,", "4,32,0.002,0,completed,0.3", "5,32,0.001,0,completed,0.6"]
    (tmp_path / "batch" / "results.csv").write_text(header + "\n".join(rows) + "\n")
    assert recall.best_rates(str(tmp_path)) == {8: 0.002, 512: 0.004, 32: 0.002}
    sweep, _ = load_sweep(f"{STUDY / f'{name}.py'}:{tmp_path}")
    params = fixed_params(sweep)
    assert len(params) == trials
    for one in (params[0], params[-1]):
        config = trial_config(sweep, one)
        assert config.eval.retain == list(recall.OLD) and config.optim.rate_for_batch == "sqrt"
    if sweep.claims != registered_claims.NONE:
        claims = registered_claims.read(Path(sweep.claims), sweep).claims
        assert sum(c.primary for c in claims) == primary
    else:
        assert not primary


def test_evaluations_of_a_sweep_are_kept_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"base": str(tmp_path.parent / "base")}))
    header = "number,optim.batch_size,seed,status,steps,loss@2%,eval/loss@5%,optim.learning_rate@resolved,metric"
    (tmp_path / "results.csv").write_text(f"{header}\n0,8,3,completed,2,1.5,1.4,1e-3,0.9\n1,512,3,waiting,0,,,,\n")
    (tmp_path / "runs" / "0").mkdir(parents=True)
    lines = [{"step": 0, "eval/loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0, "eval/loss": 0.9}]
    (tmp_path / "runs" / "0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "results" / "final.jsonl.gz"
    assert keep.keep(tmp_path, file) == 1, "the trial that waits has nothing to keep"
    sweep, [trial] = keep.read(file)
    assert sweep == {"base": "base"} and trial.pop("evaluations") == [lines[0], lines[2]]
    assert trial["optim.batch_size"] == "8" and trial["metric"] == "0.9" and "loss@2%" not in trial
    before = file.read_bytes()
    keep.keep(tmp_path, file)
    assert file.read_bytes() == before, "the same runs give the same file"
    with pytest.raises(UserError, match="not the folder of a sweep"):
        keep.keep(tmp_path / "other", file)


def test_page_is_computed_from_the_kept_results_alone(tmp_path: Path) -> None:
    page = pytest.importorskip("page")
    [h1, _] = page.verdict_lines("final")
    assert h1.startswith(
        "H1: the large batch knows more, each at its best rate: refuted; -0.304 [-0.335, -0.273], 95%, 5"
    )
    [h4, *_] = page.verdict_lines("phases")
    assert h4.startswith("H4: stacked data ends better than phases with 5 % replay, each at its best rate: supported")
    arms = page.arms_of(page.trials_of("final"), "optim.batch_size")
    small, large = (statistics.fmean(t.end(page.LEARNED) for t in arms[(size,)]) for size in ("8", "512"))
    assert f"| 8 | {small:.3f} (" in page.table(arms, {"exact match": page.LEARNED})[2] and small > large + 0.2
    assert page.command.run("", page.define, page.begin, [f"--plots={tmp_path}"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"batch.svg", "frontier.svg", "phases.svg", "schedule.svg"}


def test_signal_is_judged_by_sweeps_that_it_was_not_fitted_to() -> None:
    signals = pytest.importorskip("signals")
    rng = np.random.default_rng(0)
    arms = []
    for i in range(30):
        batch, rate = int(2 ** rng.integers(3, 9)), float(10 ** rng.uniform(-4, -2))
        early = {name: float(rng.uniform(0.5, 2)) for name in (signals.HELD_OUT, *signals.SIGNALS)}
        end = 1 + 0.1 * np.log(batch) - 0.2 * np.log(rate) - np.log(early[signals.HELD_OUT]) + early["grad_norm@10%"]
        arms.append(signals.Arm("abc"[i % 3], batch, rate, early, end / 2, end))
    assert signals.explained(arms, "grad_norm@10%") == pytest.approx(1), "the end is made of these"
    assert signals.explained(arms) < 0.9 and signals.explained(arms, "entropy@10%") < 0.9
    table = signals.rank_lines(arms)
    assert table[2].startswith(f"| {signals.HELD_OUT} | -") and len(table) == 2 + len(signals.SIGNALS) + 1
