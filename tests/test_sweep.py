"""Sweeps as users run them: the command, early stops, kills, shared databases, and the files that are left."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from helpers.forked import fork_train
from helpers.runs import lines_of, read_json, read_metrics, run_verb, timeless
from helpers.sweeps import (
    await_no_process,
    kill,
    processes_of,
    results,
    run_sweep,
    start_sweep,
    study_of,
    sweep_file,
    write_sweep_file,
)
from mice_jax import sweep
from mice_jax.storage import paths
from mice_jax.training import stop_rules
from mice_jax.training.stop_rules import FRACTIONS, SIGNALS, Objective, first_samples
from test_page import content_of

STATUS = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
RATE = "optim.learning_rate"
DIVERGING, POOR = 1e3, 3e-5


# ---------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    "fields, message",
    [
        ("axes={'optim.learning_rat': [1]}", "did you mean 'optim.learning_rate'"),
        ("axes={'optim.learning_rate': []}", "must be a list of at least one value"),
        ("axes={'optim.learning_rate': [-1.0]}", "optim.learning_rate=-1.0 must be at least 0"),
        ("axes={}, stop='luck'", "stop='luck' of the sweep is not a stop rule"),
        ("axes={}, mode='least'", "is not one of min, max"),
        ("axes={}, search='random'", "trials=0 with search='random'"),
        ("axes={'seed': [1]}", "give seeds="),
        ("axes={}, seed=3", "unexpected keyword argument 'seed'"),
        ("axes={}, metric=", "is not valid Python"),
    ],
)
def test_wrong_sweep_file_is_an_error_message(fields: str, message: str, tmp_path: Path, capsys) -> None:
    file = write_sweep_file(tmp_path, fields)
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed


def test_sweep_file_without_get_sweep_is_an_error_message(tmp_path: Path, capsys) -> None:
    (tmp_path / "sweep.py").write_text("x = 1\n")
    assert run_verb(sweep.main, [f"--config={tmp_path / 'sweep.py'}", f"--workdir={tmp_path / 'out'}"]) == 2
    assert "does not define get_sweep(arg)" in capsys.readouterr().err
    assert run_verb(sweep.main, [f"--config={tmp_path / 'no.py'}", f"--workdir={tmp_path / 'out'}"]) == 2
    assert "no.py" in capsys.readouterr().err


def test_sweep_in_a_bucket_is_an_error_before_any_access(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(paths, "parse_path", lambda name: pytest.fail("the bucket was accessed"))
    file = write_sweep_file(tmp_path, "axes={'optim.learning_rate': [1e-3]}")
    assert run_verb(sweep.main, [f"--config={file}", "--workdir=gs://bucket/sweep"]) == 2
    assert "cannot be in a bucket" in capsys.readouterr().err


def test_dry_run_prints_trials_steps_and_cost_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    file = sweep_file(tmp_path, "axes={'optim.batch_size': [4, 8]}, seeds=[0, 1], metric='loss'", held_out=False)
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "4 trials, 120 steps" in printed and "seconds of one" in printed and not (tmp_path / "out").exists()
    rows = [line for line in printed.splitlines() if "│ 4 " in line or "│ 8 " in line]
    assert len(rows) == 4 and "40" in rows[0] and "20" in rows[-1]  # 40 samples, 4 epochs


# ---------------------------------------------------------------------------------------- early stops
@pytest.mark.slow
def test_halving_sweep_stops_poor_trials_and_never_the_best(tmp_path: Path) -> None:
    """The one sweep here that runs undisturbed: its trials, results.csv, study.db and report.html agree."""
    rates = [5e-3, 1e-2, POOR, DIVERGING]
    body = "c.optim.batch_size = 4\nc.eval.every_samples = 16\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': {rates}}}, stop='halving'", body, samples=60)
    workdir = tmp_path / "sweep"
    output = run_sweep(file, workdir)
    rows = results(workdir)
    assert len(rows) == 4 and "4 of 4 ended" in output
    assert_results_agree_with_study(workdir)
    assert_page_agrees_with_results(workdir)
    by_rate = {float(r[RATE]): r for r in rows}
    for rate in (POOR, DIVERGING):
        assert by_rate[rate]["status"] == "stopped" and by_rate[rate]["reason"]
    total_steps = max(int(r["steps"]) for r in rows)
    assert sum(int(r["steps"]) for r in rows) <= 0.6 * len(rows) * total_steps, "two fifths of the compute are saved"
    best = min((r for r in rows if r["metric"]), key=lambda r: float(r["metric"]))
    assert best["status"] == "completed" and int(best["steps"]) == total_steps
    best_records = read_metrics(workdir / "runs" / best["number"])
    stopped = [r for r in rows if r["status"] == "stopped"]
    for row in stopped:
        assert_best_was_ahead(read_metrics(workdir / "runs" / row["number"]), best_records)
    for name in SIGNALS:
        for fraction in FRACTIONS:
            value = stop_rules.signal(best_records[: math.ceil(round(fraction * total_steps, 6))], name)
            assert best[f"{name}@{fraction:.0%}"] == ("" if math.isnan(value) else repr(value))
    assert len({p.name for p in (tmp_path / "stores").iterdir() if p.is_dir()}) == 1, "all share one token store"
    # A stopped run that is run by itself continues to its end, and does not end as the best.
    revived = workdir / "runs" / by_rate[POOR]["number"]
    steps_before = len(read_metrics(revived))
    run_alone(revived / "config.py", revived)
    records = read_metrics(revived)
    assert len(records) == total_steps > steps_before
    assert records[-1]["eval/loss"] >= float(best["metric"])


def run_alone(config: Path, run: Path) -> None:
    """Runs a trial's config by itself, on one device as the sweep does."""
    process = fork_train(config, run, devices=1)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def assert_best_was_ahead(records: list[dict], best_records: list[dict]) -> None:
    """At the last sample of a stopped run, the best run was better than it."""
    comparable = first_samples(best_records, records[-1]["samples"])
    objective = Objective()
    assert objective.comparable_values(records, [comparable])[0] > objective.comparable_values(comparable, [records])[0]


def assert_results_agree_with_study(workdir: Path) -> None:
    rows, trials = results(workdir), study_of(workdir).trials
    assert [int(r["number"]) for r in rows] == [t.number for t in trials]
    for row, trial in zip(rows, trials, strict=True):
        assert row["status"] == STATUS[trial.state]
        assert row["metric"] == ("" if trial.value is None else repr(trial.value))
        for name, value in trial.params.items():
            assert row[name] == str(value)
        assert row["reason"] == trial.user_attrs["reason"]
        if row["status"] != "failed":
            assert row["status"] == read_json(workdir / "runs" / row["number"], "summary.json")["status"]
            assert int(row["steps"]) == len(read_metrics(workdir / "runs" / row["number"]))


def assert_page_agrees_with_results(workdir: Path) -> None:
    rows, runs = results(workdir), content_of(workdir / "report.html")["runs"]
    assert [r["name"] for r in runs] == [r["number"] for r in rows]
    for row, run in zip(rows, runs, strict=True):
        assert (run["status"], run["step"], run["samples"]) == (row["status"], int(row["steps"]), int(row["samples"]))
        assert run["reason"] == row["reason"] and {k: str(v) for k, v in run["fields"].items()}.items() <= row.items()
        assert run["metric"] == (pytest.approx(float(row["metric"]), rel=1e-4) if row["metric"] else None)


# ---------------------------------------------------------------------------------------- kills
def await_steps(process: subprocess.Popen[str], workdir: Path, steps: int) -> None:
    """Waits until one of the trials of a running sweep has done so many steps."""
    while max((lines_of(run) for run in workdir.glob("runs/*")), default=0) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_sweep_and_workers_leave_each_trial_ended_once(tmp_path: Path) -> None:
    body = "c.checkpoint.every_samples = 24\nc.optim.batch_size = 4\nc.data.phases[0].num_epochs = 8.0\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}", body, samples=60)
    workdir = tmp_path / "sweep"
    process = start_sweep(file, workdir, "--workers=2")
    await_steps(process, workdir, 5)
    kill(next(n for n, texts in processes_of(workdir).items() if any("--worker " in text for text in texts)))
    await_steps(process, workdir, 30)
    process.kill()
    process.communicate()
    await_no_process(workdir)  # a killed sweep leaves no training process behind
    assert not all((workdir / "runs" / n / "summary.json").exists() for n in "01"), "both had ended before the kill"
    run_sweep(file, workdir)  # by one worker, which goes on with what two have begun
    await_no_process(workdir)
    rows = results(workdir)
    assert [r["status"] for r in rows] == ["completed"] * 2
    assert_results_agree_with_study(workdir)
    for row in rows:
        run = workdir / "runs" / row["number"]
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step is there twice"
        assert (run / "log.txt").read_text().count("\ndone: ") == 1, "it ended once"
    # Killed or not, a trial has the numbers of its config run alone.
    run_alone(workdir / "runs" / "1" / "config.py", tmp_path / "alone")
    assert timeless(read_metrics(tmp_path / "alone")) == timeless(read_metrics(workdir / "runs" / "1"))
    # The same command once more runs nothing again.
    before = {f: f.stat().st_mtime_ns for f in workdir.glob("runs/*/log.txt")}
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={workdir}"]) == 0
    assert before == {f: f.stat().st_mtime_ns for f in workdir.glob("runs/*/log.txt")}


@pytest.mark.slow
def test_sweep_asked_to_end_saves_its_trials_and_ends_with_75(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}", "c.data.phases[0].num_epochs = 400.0\n")
    process = start_sweep(file, tmp_path / "sweep")
    metrics = tmp_path / "sweep" / "runs" / "0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "1 trial left to end" in output, output
    assert read_json(tmp_path / "sweep" / "runs" / "0", "summary.json")["status"] == "preempted"
    await_no_process(tmp_path / "sweep")


# ---------------------------------------------------------------------------------------- PostgreSQL
def _server_programs() -> Path | None:
    """Returns the folder of PostgreSQL's server programs."""
    initdb = shutil.which("initdb")
    if initdb:
        return Path(initdb).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs for one test."""
    programs = _server_programs()
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("PostgreSQL's server programs are not installed")
    folder = Path(tempfile.mkdtemp(prefix="mice_jax_pg_"))
    user = {}
    if os.getuid() == 0:  # the server does not run as root
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "check": True, "cwd": "/"} | user
    control = [str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    try:
        subprocess.run([str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "mice"], **quiet)
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        subprocess.run([*control, "-l", str(folder / "log"), "-o", options, "start"], **quiet)
        yield f"postgresql+psycopg://mice@127.0.0.1:{port}/postgres"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.postgres
def test_two_workers_share_a_study_on_postgresql(tmp_path: Path, postgres: str) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}")
    workdir = tmp_path / "sweep"
    both = [start_sweep(file, workdir, "--worker", f"--storage={postgres}") for _ in range(2)]
    outputs = [p.communicate(timeout=400)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    rows = results(workdir)
    assert [r["status"] for r in rows] == ["completed"] * 2
    for row in rows:
        assert (workdir / "runs" / row["number"] / "log.txt").read_text().count("\ndone: ") == 1
    assert not (workdir / "study.db").exists()
    name = json.loads((workdir / "sweep.json").read_text())["study"]
    store = optuna.storages.RDBStorage(postgres)
    study = optuna.load_study(study_name=name, storage=store)
    assert [t.value for t in study.trials] == [float(r["metric"]) for r in rows]
    store.remove_session()
    store.engine.dispose()
