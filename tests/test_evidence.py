"""What rules over sweeps save and lose: scores by hand, stored and synthetic sweeps, files, and the command."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mice_jax import evidence as command
from mice_jax.errors import UserError
from mice_jax.sweeps import BracketRule, evidence, replay, stored_sweeps, synthetic
from mice_jax.sweeps.baselines import ConstantShare, FullGrid, StopRuns
from mice_jax.sweeps.stored_sweeps import StoredSweep
from mice_jax.training.stop_rules import HalvingRule, PaperRule

pytestmark = pytest.mark.smoke
STORED = [Path(__file__).parent / "data" / "lab_curves" / f"{name}.npz" for name in "ABCD"]


def sweep_of(probe: list[float], finals: list[list[float]], **fields: Any) -> StoredSweep:
    """Returns a sweep of rates with a row of finals for each seed, at `probe` for the first fifth of the run."""
    final = np.array(finals, float)
    curves = np.stack([np.broadcast_to(probe, final.shape), *[final] * 4], axis=-1)
    return StoredSweep("small", curves, {"rate": list(range(1, final.shape[1] + 1))}, 10.0, **fields)


# ---------------------------------------------------------------------------------------- scores
def test_score_is_the_mean_over_all_ways_to_divide_the_seeds() -> None:
    """One arm is kept, the first. The full grid takes the second by either seed, and the other seed scores both."""
    sweep = sweep_of([1, 2, 3], [[2.0, 1.0, 3.0], [2.2, 2.0, 3.0]])
    s = evidence.score(sweep, "share", ConstantShare(0.2, 1), num_seeds=1)
    assert (s.splits, s.misses, s.winner_lost) == (2, 1.0, 1.0)
    assert s.regret == pytest.approx(((2.2 - 2.0) / 2.0 + (2.0 - 1.0) / 1.0) / 2)
    assert s.saved == pytest.approx(1 - (3 * 0.2 + 0.8) / 3)
    full = evidence.score(sweep, "full", FullGrid(), num_seeds=1)
    assert (full.regret, full.saved, full.winner_lost) == (0.0, 0.0, 0.0)
    assert evidence.score(sweep, "full", FullGrid(), num_seeds=5).splits == 2, "one seed is left to score on"


def test_rule_that_is_left_without_an_arm_has_missed() -> None:
    """By the first seed, on which all arms diverge, there is none to choose, and what is left is the model before: 10.

    By the second seed it is the first arm, like that of the full grid; it diverges with the other seed for both.
    """
    sweep = sweep_of([1, 2, 3], [[np.nan] * 3, [2.0, 3.0, 4.0]])
    s = evidence.score(sweep, "share", ConstantShare(0.2, 1), num_seeds=1)
    assert s.misses == 0.5 and s.regret == pytest.approx((10 / 2 - 1) / 2)


def test_regret_is_positive_where_metrics_are_negative() -> None:
    """An accuracy of 0.5 in place of 0.8, as a metric whose lower values are better."""
    sweep = sweep_of([-3, -2, -1], [[-0.5, -0.8, -0.1]] * 2)
    assert evidence.score(sweep, "share", ConstantShare(0.2, 1), num_seeds=1).regret == pytest.approx(0.3 / 0.8)


def test_sweep_of_one_seed_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="the sweep small has one seed"):
        evidence.score(sweep_of([1, 2, 3], [[1, 2, 3]]), "full", FullGrid())
    with pytest.raises(UserError, match="the sweep small: start is nan"):
        lost = dataclasses.replace(sweep_of([1, 2, 3], [[1, 2, 3]] * 2), start=math.nan)
        evidence.score(lost, "bracket", BracketRule())


def test_paper_rule_is_left_out_where_its_signals_are_missing() -> None:
    rules = {"paper": StopRuns(PaperRule(norm="grad_norm")), "full": FullGrid()}
    bare = sweep_of([1, 2, 3], [[1, 2, 3]] * 2)
    whole = dataclasses.replace(bare, signals={"loss": bare.curves, "grad_norm": bare.curves})
    assert [s.rule for s in evidence.evaluate([bare, whole], rules)] == ["full", "paper", "full"]


def test_interval_is_that_of_scipy_s_bootstrap() -> None:
    """With 10,000 resamples each, the ends differ by a few hundredths of the standard error."""
    values = np.random.default_rng(0).normal(size=12)
    mean, low, high = evidence.bootstrap(values)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    error = values.std(ddof=1) / math.sqrt(12)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.1 * error)
    assert evidence.bootstrap([0.0, 0.0, math.inf])[2] == math.inf


def test_summaries_are_by_kind_and_over_all() -> None:
    score = evidence.score(sweep_of([1, 2, 3], [[1, 2, 3]] * 2), "full", FullGrid())
    scores = [dataclasses.replace(score, kind=k, saved=s) for k, s in (("a", 0.5), ("a", 0.7), ("two valleys", 0.9))]
    by_group = {s.group: s for s in evidence.summarise(scores)}
    assert list(by_group) == ["a", "two valleys", evidence.ASSUMPTIONS_HOLD, "all"]
    assert [s.saved[0] for s in by_group.values()] == pytest.approx([0.6, 0.9, 0.6, 0.7])
    assert by_group["all"].sweeps == 3 and by_group["all"].passes
    assert not dataclasses.replace(by_group["all"], saved=(0.59, 0.5, 0.7)).passes
    assert not dataclasses.replace(by_group["all"], regret=(0.0, 0.0, 0.011)).passes
    assert not dataclasses.replace(by_group["all"], misses=0.06).passes


# ---------------------------------------------------------------------------------------- stored and synthetic sweeps
def test_bracket_rule_meets_its_targets_on_stored_sweeps() -> None:
    scores = evidence.evaluate([stored_sweeps.load(f) for f in STORED], {"bracket": BracketRule()})
    [summary] = evidence.summarise(scores)
    assert summary.passes and summary.sweeps == 4
    assert all(s.splits == 20 and s.saved >= 0.69 and s.misses == 0 for s in scores)
    # Probes are 9 of 54 runs. The halves of five to seven arms and 2 to 3 arms with further seeds make another 6.
    assert summary.saved[0] == pytest.approx(0.721, abs=0.002)


def test_halving_of_runs_loses_the_winner_of_a_stored_sweep() -> None:
    [summary] = evidence.summarise(evidence.evaluate([stored_sweeps.load(STORED[2])], {"h": StopRuns(HalvingRule())}))
    assert not summary.passes and summary.misses == 1.0


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_synthetic_sweeps_have_what_their_kind_promises(kind: str) -> None:
    for sweep in [s for s in synthetic.sweeps(3) if s.kind == kind]:
        assert sweep.curves.shape == (6, 3, 6, 20)
        means = np.where(np.isnan(sweep.curves), np.inf, sweep.curves).mean(axis=0)
        leader, winner = (np.unravel_index(np.argmin(means[..., point]), (3, 6)) for point in (3, -1))
        if kind == "batch crossing":
            assert leader[0] != winner[0]
        if kind == "two valleys":
            assert leader[1] != winner[1]
        assert np.isnan(sweep.curves).any() == (kind == "diverging")
        replay(sweep.curves, sweep.axes, BracketRule(), start=sweep.start)
        assert isinstance(sweep.axes["optim.learning_rate"][0], str) == (kind == "names")


def test_synthetic_sweeps_are_the_same_each_time() -> None:
    a, b, other = synthetic.sweeps(1), synthetic.sweeps(2), synthetic.sweeps(1, seed=1)
    assert np.array_equal(a[0].curves, b[0].curves) and not np.array_equal(a[0].curves, other[0].curves)
    assert len({s.name for s in b}) == len(b) == 2 * len(synthetic.KINDS)


# ---------------------------------------------------------------------------------------- files
def test_sweep_is_read_as_it_was_saved(tmp_path: Path) -> None:
    sweep = sweep_of([1, 2, 3], [[1, 2, np.nan]] * 2)
    sweep = dataclasses.replace(sweep, signals={"loss": sweep.curves + 1})
    stored_sweeps.save(sweep, tmp_path / "small.npz")
    read = stored_sweeps.load(tmp_path / "small.npz")
    np.testing.assert_array_equal(read.curves, sweep.curves)  # the values are exact in float32
    np.testing.assert_array_equal(read.signals["loss"], sweep.curves + 1)
    assert (read.name, read.axes, read.start) == ("small", {"rate": [1, 2, 3]}, 10.0)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, message in (("bad", "is not a sweep that can be read"), ("other", "has no array 'curves'")):
        with pytest.raises(UserError, match=message):
            stored_sweeps.load(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"gone\.npz does not exist"):
        stored_sweeps.load(tmp_path / "gone.npz")
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        stored_sweeps.load(tmp_path)


def write_run(folder: Path, final: float, batch: int, samples: int = 80, status: str = "completed") -> None:
    """Writes a run of four evaluations at or past each quarter, from 3.0 before the first step to `final`."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "samples": 0, "eval/loss": 3.0}]
    quarter = 1
    for step in range(1, samples // batch + 1):
        line = {"step": step, "samples": step * batch, "loss": float(step), "grad_norm": 1.0}
        if step * batch >= quarter * 20:
            line["eval/loss"] = 3.0 + (final - 3.0) * quarter / 4
            quarter += 1
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"status": status, "reason": "diverged: so it is"}))


def write_sweep(folder: Path, **settings: Any) -> Path:
    """Writes a finished sweep of two batch sizes, three rates and two seeds."""
    stored = {"axes": {"batch": [5, 20], "rate": [1, 2, 3]}, "seeds": [7, 8], "metric": "eval/loss", "mode": "min"}
    stored |= {"search": "grid", "stop": None} | settings
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"sweep": {k: repr(v) for k, v in stored.items()}}))
    for number in range(12):
        write_run(folder / "runs" / str(number), 1.0 + number / 10, 5 if number < 6 else 20)
    return folder


def test_curves_of_a_finished_sweep_are_read_from_its_runs(tmp_path: Path) -> None:
    sweep = stored_sweeps.load(write_sweep(tmp_path / "rates"))
    assert sweep.curves.shape == (2, 2, 3, 4) and sweep.start == 3.0 and sweep.name == "rates"
    assert sweep.axes == {"batch": [5, 20], "rate": [1, 2, 3]}
    # Trials are numbered with the seeds innermost, so the first seed has the even ones.
    assert sweep.curves[0, 0, :, -1].tolist() == pytest.approx([1.0, 1.2, 1.4])
    assert sweep.curves[1, 1, 2].tolist() == pytest.approx([3 - 0.9 / 4, 3 - 0.9 / 2, 3 - 0.9 * 3 / 4, 2.1])
    assert sweep.signals["loss"][0, 0, 0].tolist() == [2.5, 6.5, 10.5, 14.5], "means of four steps each"
    assert sweep.signals["loss"][0, 1, 0].tolist() == [1, 2, 3, 4]
    assert set(sweep.signals) == {"loss", "grad_norm"}


def test_metric_that_is_better_when_higher_is_turned(tmp_path: Path) -> None:
    sweep = stored_sweeps.load(write_sweep(tmp_path / "rates", mode="max"))
    assert sweep.start == -3.0 and sweep.curves[0, 0, 0, -1] == pytest.approx(-1.0)


def test_trial_that_diverged_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "rates")
    run = folder / "runs" / "2"
    for file in run.iterdir():
        file.unlink()
    run.rmdir()
    write_run(run, 1.0, 5, samples=40, status="stopped")
    sweep = stored_sweeps.load(folder)
    assert sweep.curves[0, 0, 1, :2].tolist() == pytest.approx([2.5, 2.0]) and np.isnan(sweep.curves[0, 0, 1, 2:]).all()
    assert np.isnan(sweep.signals["loss"][0, 0, 1, 2:]).all()


def test_folders_that_cannot_be_replayed_are_named(tmp_path: Path) -> None:
    cases = {
        "stop": ({"stop": "median"}, "trial 0 of .* was not run to its end .stopped: diverged"),
        "search": ({"search": "tpe"}, "is a tpe search"),
        "axes": ({"axes": {"phases": [open]}}, "neither numbers nor texts"),
        "metric": ({"metric": "eval/x"}, "trial 1 of .* has no eval/x"),
    }
    for name, (settings, message) in cases.items():
        folder = write_sweep(tmp_path / name, **settings)
        summary = {"status": "stopped", "reason": "diverged"}
        (folder / "runs" / "0" / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match=message):
            stored_sweeps.load(folder)
    folder = write_sweep(tmp_path / "long")
    write_run(folder / "runs" / "12", 1.0, 5, samples=40)
    (folder / "runs" / "12" / "metrics.jsonl").rename(folder / "runs" / "3" / "metrics.jsonl")
    with pytest.raises(UserError, match="have 40 to 80 samples"):
        stored_sweeps.load(folder)
    folder = write_sweep(tmp_path / "start")
    for file in folder.glob("runs/*/metrics.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="before its first step"):
        stored_sweeps.load(folder)


# ---------------------------------------------------------------------------------------- the command
def test_command_prints_a_table_and_writes_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evidence.json"
    folder = write_sweep(tmp_path / "rates", axes={"batch": [5, 20], "rate": [1, 2, 3]})
    arguments = [f"--sweeps={folder}", "--synthetic=0", "--rules=bracket,full", "--seeds=1", f"--output={file}"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "stored (1)" in out and "bracket, stored (1 sweep): " in out and "the targets. Saved " in out
    written = json.loads(file.read_text())
    assert [s["rule"] for s in written["scores"]] == ["bracket", "full"]
    assert written["summaries"][1]["saved"] == [0.0, 0.0, 0.0] and written["summaries"][1]["passes"] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic=0"], "--sweeps is missing"),
        (["--rules=bracke"], "'bracke' is not a rule of `mice evidence`; did you mean 'bracket'?"),
        (["--output=gone/f.json"], "--output=gone/f.json: there is no folder gone. Make it"),
        (["--sweeps=gone"], "--sweeps: gone does not exist"),
    ],
)
def test_command_names_bad_input(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
