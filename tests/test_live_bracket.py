"""The bracket rule at work on a sweep: what it runs next by the files of the trials, pauses, and how it ends."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.runs import read_all_metrics, read_json
from helpers.sweeps import results, run_sweep, small_sweep, study_of, sweep_file
from mice_jax.config import Source, Sweep
from mice_jax.errors import UserError
from mice_jax.report_page import content
from mice_jax.sweeps import BracketRule, certificate, replay
from mice_jax.sweeps.grid import checked_grid
from mice_jax.sweeps.live_bracket import LiveBracket, check
from mice_jax.sweeps.rule import Runs
from mice_jax.sweeps.study import Study
from mice_jax.sweeps.trials import bracket_rule, check_metric, settled, trial_config

RATE = "optim.learning_rate"
RATES = [1e-5, 2e-5, 4e-5, 8e-5, 16e-5]
STEPS = 10
PROBED = 0.5  # the share of a run to which every arm is probed


def bracket_sweep(**fields: Any) -> Sweep:
    """Returns a valid sweep of five rates with the bracket rule."""
    sweep = small_sweep(**({"axes": {RATE: RATES}, "seeds": [3, 4, 5], "stop": "bracket"} | fields))
    sweep.base.data.validation_fraction = 0.1
    return sweep


def write_run(folder: Path, curve: np.ndarray, share: float, start: float, status: str) -> None:
    """Writes the files of a run of ten steps that came to a share of them, evaluated at half of them and at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"step": 0, "samples": 0, "eval/loss": start}]
    for step in range(1, round(share * STEPS) + 1):
        line = {"step": step, "samples": 8 * step, "loss": 1.0}
        if step in (5, STEPS):
            line["eval/loss"] = float(curve[0 if step == 5 else 1])
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data_report.json").write_text(json.dumps({"steps": STEPS}))
    summary = {"status": status, "reason": "", "last_metrics": lines[-1]}
    (folder / "summary.json").write_text(json.dumps(summary))


# ---------------------------------------------------------------------------------------- decisions from files
@pytest.mark.parametrize("seed", range(12))
def test_trials_that_run_are_those_of_a_replay(seed: int, tmp_path: Path) -> None:
    """Each time one task is done, as by one worker, a new process reads the files and decides."""
    rng = np.random.default_rng(seed)
    axes = {RATE: RATES[: 3 + seed % 3], "optim.schedule": ["constant", "cosine"][: 1 + seed % 2]}
    shape = (3, *map(len, axes.values()))
    curves = 2 + np.abs(rng.normal(size=(*shape, 4)).cumsum(axis=1))  # points at 25, 50, 75 and 100 %
    if seed % 4 == 3:
        curves[:, -1, :, -1] = np.nan
    sweep = bracket_sweep(axes=axes, stop=BracketRule(seed_margin=0.2))
    by_arm = curves.reshape(3, -1, 4)
    finals: dict[int, float] = {}
    failed: set[int] = set()
    ran = np.zeros(by_arm.shape[:2])
    while True:
        live = LiveBracket(sweep, sweep.stop, tmp_path, lambda n: STEPS if (tmp_path / str(n)).exists() else 0)
        tasks = live.tasks(finals, failed)
        if not tasks:
            break
        number, until = tasks[0]
        arm, s = divmod(number, 3)
        values = by_arm[s, arm, [1, 3]]
        diverges = until == 1 and np.isnan(values[1])
        ran[s, arm] = until
        write_run(tmp_path / str(number), values, 0.9 if diverges else until, 6.0, "completed")
        if diverges:
            failed.add(number)
        elif until == 1:
            finals[number] = float(values[1])
    r = replay(curves, axes, sweep.stop, start=6.0)
    assert ran == pytest.approx(r.ran.reshape(ran.shape), abs=1e-9)
    first, *notes = live.conclusion(finals, failed)
    assert all(f"{name}={value}" in first for name, value in r.chosen.items())
    assert f"saved {r.saved:.0%}" in first and tuple(notes) == r.notes


def test_higher_metric_is_better_where_the_sweep_says_so(tmp_path: Path) -> None:
    sweep = bracket_sweep(mode="max", seeds=[])
    live = LiveBracket(sweep, BracketRule(seed_margin=0), tmp_path, lambda n: STEPS)
    for number, value in enumerate([1, 2, 3, 2, 1]):
        write_run(tmp_path / str(number), np.array([value, value]), PROBED, 0.5, "paused")
    assert [task.number for task in live.tasks({}, ())] == [2]
    assert [task.number for task in live.tasks({2: 3.0}, ())] == [1, 3]
    assert live.tasks({1: 2.0, 2: 3.0, 3: 2.0}, ()) == []


def test_study_pauses_resumes_and_ends_trials(tmp_path: Path) -> None:
    """The second rate leads and wins: its neighbours and it are finished, and the other two stay at half."""
    study = Study(bracket_sweep(seeds=[3, 4], stop=BracketRule(seed_margin=0)), tmp_path / "sweep")
    values = [2.0, 1.0, 2.0, 3.0, 4.0]
    claimed = [study.claim() for _ in range(6)]
    assert claimed == [0, 2, 4, 6, 8, None], "the first seed of each arm"
    for number in claimed[:-1]:
        config = study.begin(number).read_text()
        assert "pause_at_share=0.5" in config and "at_shares=[0.5]" in config and study.pauses(number)
        write_run(study.run_folder(number), np.full(2, values[number // 2]), PROBED, 5.0, "paused")
        study.pause(number)
    assert [r["status"] for r in results(study.folder)] == ["paused", "waiting"] * 5
    for wanted in ([2], [0, 4]):
        assert [study.claim() for _ in wanted] == wanted and study.claim() is None
        study.end_unneeded()
        assert results(study.folder)[8]["status"] == "paused", "nothing ends while something is to be run"
        for number in wanted:
            assert "pause_at_share=0.0" in study.begin(number).read_text() and not study.pauses(number)
            write_run(study.run_folder(number), np.full(2, values[number // 2]), 1.0, 5.0, "completed")
            assert study.end(number, 0) == "completed"
    assert study.claim() is None
    study.end_unneeded()
    assert study.num_ended() == 10
    rows = results(study.folder)
    assert [r["status"] for r in rows] == ["completed", "stopped"] * 3 + ["stopped"] * 4
    assert rows[6]["reason"] == "paused at 50%: the bracket rule has found the best arm without it"
    assert rows[9]["reason"] == "not run: the bracket rule has found the best arm without it"
    assert "pause_at_share=0.0" in (study.run_folder(6) / "config.py").read_text(), "so that it can be run by hand"
    assert study.conclusion() == [f"best arm: {RATE}=2e-05; eval/loss 1; saved 60%"]
    study.write_certificate()
    found = content.of_sweep(study.folder)["certificate"]
    lags = [(b["axis"], *(b[side]["lag"] for side in ("lower", "higher"))) for b in found["brackets"]]
    assert (found["values"], lags) == ({RATE: 2e-5}, [(RATE, 1.0, 1.0)])
    assert found["runner_up"]["seeds"] == 1 and found["runner_up"]["low"] is None, "one seed has no interval"


def test_certificate_has_neighbours_and_the_runner_up_with_its_interval() -> None:
    """Arms by rate and schedule: the best one has a neighbour that lags, one that diverged, and a close rival."""
    grid = checked_grid({RATE: RATES[:4], "optim.schedule": ["constant", "cosine"]})
    finals = np.full((3, 8), np.nan)
    finals[:, 2], finals[0, 0] = [1.0, 1.1, 0.9], 1.5  # rate 2e-5 and 1e-5, constant
    finals[:, 5] = [1.02, 1.13, 0.94]  # rate 4e-5, cosine
    curves = np.where(np.isnan(finals), 2.0, finals)[..., None].repeat(2, axis=2)
    done = np.where(np.isnan(finals), 0, 2)
    curves[0, 4], done[0, 4] = np.inf, 1  # rate 4e-5, constant
    runs = Runs(curves, done, np.zeros((3, 8), bool), np.array([PROBED, 1.0]), 3.0)
    found = certificate.of_sweep(BracketRule(), grid, runs, "eval/loss", 1.0)
    assert found and found.values == {RATE: 2e-5, "optim.schedule": "constant"}
    assert (found.seeds, found.mean) == (3, pytest.approx(1.0)) and found.saved == pytest.approx(1 - (7 + 0.5) / 24)
    [bracket] = found.brackets
    assert bracket.lower and bracket.higher and bracket.lower.lag == pytest.approx(0.5) and bracket.lower.seeds == 1
    assert bracket.higher.status == "diverged" and np.isnan(bracket.higher.lag)
    lags = finals[:, 5] - finals[:, 2]
    reference = stats.ttest_1samp(lags, 0).confidence_interval(0.95)
    assert found.runner_up and found.runner_up.values["optim.schedule"] == "cosine"
    assert (found.runner_up.low, found.runner_up.high) == pytest.approx((reference.low, reference.high))
    assert found.runner_up.lag == pytest.approx(0.03)
    assert json.loads(json.dumps(found.to_json()))["brackets"][0]["higher"]["lag"] is None
    alone = Runs(curves[:, :1], done[:, :1], np.zeros((3, 1), bool), np.array([PROBED, 1.0]), 3.0)
    at_the_end = certificate.of_sweep(BracketRule(), checked_grid({RATE: RATES[:1]}), alone, "eval/loss", 1.0)
    assert at_the_end and at_the_end.runner_up is None and at_the_end.brackets == []


def test_trials_are_evaluated_at_the_probe() -> None:
    sweep = bracket_sweep(stop=BracketRule(first=0.3))
    sweep.base.eval.at_shares = [0.5]
    assert trial_config(sweep, {RATE: 1e-5}).eval.at_shares == [0.3, 0.5]
    assert bracket_rule(bracket_sweep()) == BracketRule() and bracket_rule(bracket_sweep(stop=None)) is None


def left_to_the_command(num_held_out: int = 1, **fields: Any) -> Sweep:
    """Returns a sweep of five rates that sets neither its metric nor its rule, with some held-out sources."""
    sweep = small_sweep(**({"axes": {RATE: RATES}} | fields))
    sweep.base.data.validation = [Source(path=f"{i}.jsonl") for i in range(num_held_out)]
    return sweep


@pytest.mark.parametrize(
    ("fields", "stop", "note"),
    [
        ({}, "bracket", "rule: bracket, "),
        ({"stop": "auto"}, "bracket", "rule: bracket, "),
        ({"stop": None}, None, ""),
        ({"stop": "median"}, "median", ""),
        ({"axes": {RATE: [1e-5, 2e-5]}}, None, "rule: none, so every trial runs in full. .*it has 2 values"),
        ({"num_held_out": 0}, None, "rule: none, .* holds no data out"),
        ({"metric": "loss"}, None, "rule: none, .* is not measured before the first step"),
        ({"search": "random", "trials": 3}, None, "rule: none, .* needs a grid"),
    ],
)
def test_bracket_is_the_rule_where_it_can_work_and_none_is_set(fields: dict[str, Any], stop: Any, note: str) -> None:
    sweep, notes = settled(left_to_the_command(**fields))
    assert sweep.stop == stop and len(notes) == bool(note) and re.match(note, "".join(notes))
    assert (bracket_rule(sweep) is not None) == (stop == "bracket")
    assert settled(sweep) == (sweep, []), "a settled sweep stays as it is"


@pytest.mark.parametrize(
    ("num_held_out", "fields", "metric"),
    [
        (1, {}, "eval/loss"),
        (2, {}, "eval/macro_loss"),
        (2, {"metric": "eval/loss"}, "eval/loss"),
        (2, {"metric": "eval/0/token_accuracy", "mode": "max"}, "eval/0/token_accuracy"),
    ],
)
def test_macro_loss_is_the_metric_of_several_held_out_sources(
    num_held_out: int, fields: dict[str, Any], metric: str
) -> None:
    sweep, notes = settled(left_to_the_command(num_held_out, stop=None, **fields))
    assert sweep.metric == metric
    assert notes == ["metric: eval/macro_loss, the mean over the 2 held-out sources (metric= takes another one)"] * (
        metric == "eval/macro_loss"
    )


@pytest.mark.parametrize(
    ("num_held_out", "fields", "message"),
    [
        (
            1,
            {"metric": "eval/los"},
            "metric='eval/los' of the sweep is not measured in its runs; did you mean 'eval/loss'",
        ),
        (2, {"metric": "eval/3/loss"}, "is not measured in its runs"),
        (0, {"metric": "eval/loss"}, "its base holds none out"),
        (0, {"metric": "loss"}, ""),
        (2, {"metric": "eval/average/1/loss"}, ""),
        (1, {"metric": "eval/mmlu/acc", "axes": {"eval.tasks": [["mmlu"], []]}}, ""),
    ],
)
def test_metric_that_no_run_measures_is_an_error(num_held_out: int, fields: dict[str, Any], message: str) -> None:
    sweep = left_to_the_command(num_held_out, **fields)
    with pytest.raises(UserError, match=re.escape(message)) if message else contextlib.nullcontext():
        check_metric(sweep)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": {RATE: [1e-5, 2e-5]}}, "cannot bracket the axis 'optim.learning_rate': it has 2 values"),
        ({"axes": {"optim.schedule": ["constant", "cosine"]}}, "no axis to bracket"),
        ({"search": "random", "trials": 3}, "needs a grid"),
        ({"metric": "loss"}, "metric='loss' of the sweep is not measured before the first step"),
        ({"axes": {RATE: RATES, "optim.max_steps": [5, 10]}}, "'optim.max_steps' of the sweep makes some runs longer"),
    ],
)
def test_sweep_that_the_rule_cannot_work_on_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(bracket_sweep(**fields), BracketRule())


def test_runs_of_unequal_length_need_blocks_and_held_out_data() -> None:
    sweep = bracket_sweep(axes={RATE: RATES, "optim.batch_size": [4, 8]})
    check(sweep, BracketRule())
    sweep.base.optim.max_steps = 10
    with pytest.raises(UserError, match=r"'optim\.batch_size' of the sweep makes some runs longer .* of steps"):
        check(sweep, BracketRule())
    check(sweep, BracketRule(blocks=("optim.batch_size",)))
    sweep.base.data.validation_fraction = 0.0
    with pytest.raises(UserError, match="holds no data out"):
        check(sweep, BracketRule(blocks=("optim.batch_size",)))


# ---------------------------------------------------------------------------------------- a whole sweep
@pytest.mark.slow
def test_sweep_pauses_and_resumes_trials_until_the_best_is_bracketed(tmp_path: Path) -> None:
    """Of three rates the highest is best, so it and its neighbour are finished; test_sweep has two workers."""
    rates = [1e-5, 1e-3, 1e-2]
    fields = f"axes={{'{RATE}': {rates}}}, seeds=[0], stop=BracketRule(seed_margin=0)"
    file = sweep_file(tmp_path, fields, "c.optim.batch_size = 4\n")
    file.write_text(
        file.read_text().replace("import Sweep\n", "import Sweep\nfrom mice_jax.sweeps import BracketRule\n")
    )
    workdir = tmp_path / "sweep"
    output = run_sweep(file, workdir)
    rows = results(workdir)
    assert [r["status"] for r in rows] == ["stopped", "completed", "completed"]
    assert "best arm: optim.learning_rate=0.01;" in output and "3 of 3 ended" in output
    total, run = int(rows[2]["steps"]), workdir / "runs" / "0"
    assert rows[0]["reason"].startswith("paused") and int(rows[0]["steps"]) == -(-total // 2)
    assert read_json(run, "summary.json")["status"] == "paused"
    assert "eval/loss" in read_all_metrics(run)[0] and "eval/loss" in read_all_metrics(run)[-1]
    assert len(study_of(workdir).trials) == 3
