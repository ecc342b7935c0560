"""The study of what a small model learns and keeps: its world, and that its sweeps and claims are what can be run."""

import sys
from pathlib import Path

import pytest

from helpers.runs import REPOSITORY
from mice_jax.statistics import registered_claims
from mice_jax.sweep import load_sweep
from mice_jax.sweeps.trials import fixed_params, trial_config

pytestmark = pytest.mark.smoke
STUDY = REPOSITORY / "studies" / "recall"
sys.path.append(str(STUDY))
recall, world = pytest.importorskip("recall"), pytest.importorskip("world")
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
