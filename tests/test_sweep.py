"""Sweeps as users run them: stopped early, killed, shared; and what they leave."""

import contextlib
import io
import json
import math
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from helpers.runs import read_json, read_metrics, run_train, run_verb, setting, start_train, timeless
from helpers.sweeps import await_none, kill, processes_of, results, run_sweep, start_sweep, study_of, sweep_file
from mice_jax import sweep
from mice_jax.cli import command
from mice_jax.config import Config, ConfigError, Range, Sweep
from mice_jax.errors import Preempted, UserError
from mice_jax.sweeps import study as study_module
from mice_jax.sweeps.devices import share_of_devices
from mice_jax.sweeps.study import Study, combinations, config_of
from mice_jax.training import stop_rules
from mice_jax.training.stop_rules import FRACTIONS, SIGNALS, Objective, first_samples
from test_page import data_of

STATUS = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
RATE = "optim.learning_rate"
DIVERGING, POOR = 1e3, (1e-5, 3e-5)


def assert_agree(workdir: Path) -> None:
    """results.csv and study.db say the same of every trial."""
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


def assert_page_agrees(workdir: Path) -> None:
    """report.html says what results.csv says of every trial."""
    rows, runs = results(workdir), data_of(workdir / "report.html")["runs"]
    assert [r["name"] for r in runs] == [r["number"] for r in rows]
    for row, run in zip(rows, runs, strict=True):
        assert (run["status"], run["step"], run["samples"]) == (row["status"], int(row["steps"]), int(row["samples"]))
        assert run["reason"] == row["reason"] and {k: str(v) for k, v in run["fields"].items()}.items() <= row.items()
        assert run["metric"] == (pytest.approx(float(row["metric"]), rel=1e-4) if row["metric"] else None)


# ---------------------------------------------------------------------------------------- early termination
@pytest.mark.slow
def test_of_eight_trials_the_bad_are_stopped_the_best_never_and_the_two_files_agree(tmp_path: Path) -> None:
    rates = [1e-2, 3e-3, 5e-3, 2e-2, 7e-3, *POOR, DIVERGING]
    body = "c.optim.batch_size = 4\nc.eval.every_samples = 16\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': {rates}}}, stop='halving'", body, samples=100)
    said = run_sweep(file, tmp_path / "sweep", "--workers=2")
    assert_page_agrees(tmp_path / "sweep")
    rows = results(tmp_path / "sweep")
    assert len(rows) == 8 and "8 of 8 ended" in said
    by_rate = {float(r[RATE]): r for r in rows}
    for rate in (*POOR, DIVERGING):
        assert by_rate[rate]["status"] == "stopped" and by_rate[rate]["reason"]
    whole = max(int(r["steps"]) for r in rows)
    assert sum(int(r["steps"]) for r in rows) <= 0.6 * 8 * whole, "two fifths of the compute are saved"
    # The best of all at the end was not beaten, at any stopped trial's last sample, by that trial.
    best = min((r for r in rows if r["metric"]), key=lambda r: float(r["metric"]))
    assert best["status"] == "completed" and int(best["steps"]) == whole
    for row in rows:
        if row["status"] == "stopped":
            mine, its = (read_metrics(tmp_path / "sweep" / "runs" / r["number"]) for r in (row, best))
            its = first_samples(its, mine[-1]["samples"])
            assert Objective().comparable_values(mine, [its])[0] > Objective().comparable_values(its, [mine])[0]
    assert_agree(tmp_path / "sweep")
    lines = read_metrics(tmp_path / "sweep" / "runs" / best["number"])
    for name in SIGNALS:
        for fraction in FRACTIONS:
            value = stop_rules.signal(lines[: math.ceil(round(fraction * whole, 6))], name)
            assert best[f"{name}@{fraction:.0%}"] == ("" if math.isnan(value) else repr(value))
    # All of them read the one token store.
    assert len({p.name for p in (tmp_path / "stores").iterdir() if p.is_dir()}) == 1
    # Each stopped one but the diverged goes on where it was when it is run by itself: none would have been the best.
    for row in rows:
        if row["status"] != "stopped" or float(row[RATE]) == DIVERGING:
            continue
        run = tmp_path / "sweep" / "runs" / row["number"]
        before = len(read_metrics(run))
        assert run_train(run / "config.py", run, "--config.mesh.fsdp=1", "--config.mesh.data=8") == 0
        revived = read_metrics(run)
        assert len(revived) == whole > before
        assert revived[-1]["eval/loss"] >= float(best["metric"]), "the best trial is never stopped"


@pytest.mark.parametrize("rate, what", [("1e2", "diverged: "), ("1e4", "dead: ")])
def test_a_rate_that_is_huge_stops_a_run_with_the_reason_and_its_state(rate: str, what: str, tmp_path: Path) -> None:
    config = setting(tmp_path, "c.data.phases[0].num_epochs = 4.0\nc.optim.grad_clip = 0.0\nc.log.trackers = []")
    at = (config, tmp_path / "run", f"--config.optim.learning_rate={rate}")
    assert run_train(*at) == 3
    summary = read_json(tmp_path / "run", "summary.json")
    assert summary["status"] == "stopped" and summary["reason"].startswith(what)
    assert len(read_metrics(tmp_path / "run")) == 11, "ten steps after its start"
    assert (tmp_path / "run" / "checkpoints" / "11").is_dir()
    assert run_train(*at, "--config.stop.steps=0") == 0, "revived without the rule"
    assert len(read_metrics(tmp_path / "run")) == 20


# ---------------------------------------------------------------------------------------- kills
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_of_the_sweep_and_its_workers_leave_every_trial_ended_once(tmp_path: Path) -> None:
    body = "c.checkpoint.every_samples = 24\nc.optim.batch_size = 4\nc.data.phases[0].num_epochs = 8.0\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}, seeds=[0, 1]", body, samples=60)
    workdir, rng, done = tmp_path / "sweep", random.Random(0), 0
    process = start_sweep(file, workdir, "--workers=2")
    while done < 10:
        time.sleep(rng.uniform(2, 9))
        if process.poll() is not None:  # it has ended before the tenth: whatever is killed now must not start it anew
            process = start_sweep(file, workdir, "--workers=2")
            time.sleep(rng.uniform(0, 4))
        workers = [n for n, command in processes_of(workdir).items() if "--worker " in command + " "]
        if done % 2 and workers:
            for worker in rng.sample(workers, rng.randint(1, len(workers))):
                kill(worker)
        else:
            process.kill()
            process.communicate()
            await_none(workdir)  # a killed sweep leaves no training process behind
            process = start_sweep(file, workdir, "--workers=2")
        done += 1
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    await_none(workdir)
    rows = results(workdir)
    assert [r["status"] for r in rows] == ["completed"] * 4
    assert_agree(workdir)
    for row in rows:
        run = workdir / "runs" / row["number"]
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step twice"
        assert (run / "log.txt").read_text().count("\ndone: ") == 1, "ended once"
    # Killed or not, a trial's numbers are those of its config run alone.
    alone = tmp_path / "alone"
    own = subprocess_train(workdir / "runs" / "1" / "config.py", alone)
    assert own == 0 and timeless(read_metrics(alone)) == timeless(read_metrics(workdir / "runs" / "1"))
    # Once more: nothing is run again.
    before = {f: f.stat().st_mtime_ns for f in workdir.glob("runs/*/log.txt")}
    run_sweep(file, workdir)
    assert before == {f: f.stat().st_mtime_ns for f in workdir.glob("runs/*/log.txt")}


def subprocess_train(config: Path, workdir: Path) -> int:
    process = start_train(config, workdir, devices=1)
    process.communicate()
    return process.returncode


# ---------------------------------------------------------------------------------------- PostgreSQL
def _programs() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture
def postgres() -> Iterator[str]:
    """A server of its own; gives its URL."""
    programs = _programs()
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("PostgreSQL's server programs are not installed")
    folder = Path(tempfile.mkdtemp(prefix="mice_jax_pg_"))
    user = {}
    if os.getuid() == 0:  # the server refuses to run as root
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
def test_two_workers_on_postgresql_share_a_study_and_no_trial_is_run_twice(tmp_path: Path, postgres: str) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}, seeds=[0, 1]")
    workdir = tmp_path / "sweep"
    both = [start_sweep(file, workdir, "--worker", f"--storage={postgres}") for _ in range(2)]
    said = [p.communicate(timeout=400)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    rows = results(workdir)
    assert [r["status"] for r in rows] == ["completed"] * 4
    for row in rows:
        assert (workdir / "runs" / row["number"] / "log.txt").read_text().count("\ndone: ") == 1
    assert not (workdir / "study.db").exists()
    name = json.loads((workdir / "sweep.json").read_text())["study"]
    store = optuna.storages.RDBStorage(postgres)
    study = optuna.load_study(study_name=name, storage=store)
    assert [t.value for t in study.trials] == [float(r["metric"]) for r in rows]
    store.remove_session()
    store.engine.dispose()


# ---------------------------------------------------------------------------------------- the study, in this process
def tiny(folder: Path, **fields) -> Sweep:
    return sweep.load_sweep(str(sweep_file(folder, ", ".join(f"{k}={v!r}" for k, v in fields.items()))))


def test_a_grid_is_every_combination_with_every_seed() -> None:
    made = Sweep(axes={RATE: [1e-3, 1e-2], "optim.batch_size": [4, 8]}, seeds=[0, 1, 2])
    found = combinations(made)
    assert len(found) == 12 and len({tuple(p.items()) for p in found}) == 12
    assert found[0] == {RATE: 1e-3, "optim.batch_size": 4, "seed": 0}


def test_any_field_is_an_axis_phases_too(tmp_path: Path) -> None:
    made = tiny(tmp_path, axes={RATE: [1e-3]})
    made.axes |= {
        "data.phases": [made.base.data.phases, made.base.data.phases * 2],
        "optim.frozen": [[], ["lm_head.*"]],
    }
    made.axes["data.phases[0].num_epochs"] = [2.0]
    with pytest.raises(ConfigError, match="2 phases named"):
        config_of(made, combinations(made)[2])
    config = config_of(made, combinations(made)[1])
    assert config.optim.frozen == ["lm_head.*"] and config.data.phases[0].num_epochs == 2.0
    assert made.base.optim.frozen == [] and made.base.data.phases[0].num_epochs == 4.0, "the base stays as it is"


def test_a_trial_s_config_file_makes_its_config(tmp_path: Path) -> None:
    made = tiny(tmp_path, axes={RATE: [1e-3, 1e-2]}, seeds=[5])
    study = Study(made, tmp_path / "out")
    assert study.claim() == 0 and study.claim() == 1 and study.claim() is None
    config = runpy.run_path(str(study.begin(1)))["get_config"]()
    assert isinstance(config, Config) and (config.optim.learning_rate, config.seed) == (1e-2, 5)
    assert config == config_of(made, {RATE: 1e-2, "seed": 5})


def test_a_claim_is_one_worker_s_until_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny(tmp_path, axes={RATE: [1e-3, 1e-2]})
    one, two, three = (Study(made, tmp_path / "out") for _ in range(3))
    assert one.claim() == 0 and two.claim() == 1 and three.claim() is None
    child = subprocess.Popen(["sleep", "60"])
    claim = three.claims
    host, _, _, rest = two.claims.owner.split("|")
    dead = f"{host}|{child.pid}|{study_module._started(child.pid)}|{rest}"
    table, engine = two.claims._table, two.claims._engine
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 1).values(owner=dead))
    assert three.claim() is None, "its process lives"
    child.kill()
    child.wait()
    assert three.claim() == 1 and not two.claims.beat(1) and three.claims.beat(1)
    # Of another machine only silence tells.
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 0).values(owner="elsewhere|1|2|x"))
    assert not claim.take(0)
    monkeypatch.setattr(study_module, "DEAD_S", 0.0)
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 0).values(beat=7))
    assert not claim.take(0), "it has beaten since"
    assert claim.take(0), "and not since then"


def test_of_many_that_see_a_dead_worker_s_claim_one_takes_it(tmp_path: Path) -> None:
    made = tiny(tmp_path, axes={RATE: [1e-3]})
    several = [Study(made, tmp_path / "out") for _ in range(6)]
    assert several[0].claim() == 0
    claims = several[0].claims
    with claims._engine.begin() as db:
        db.execute(claims._table.update().values(owner=f"{socket.gethostname()}|1|0|x"))  # process 1 is another by now
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda s: s.claims.take(0), several))
    assert sum(taken) == 1


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_search_draws_the_same_whoever_draws_it(search: str, tmp_path: Path) -> None:
    axes = {
        RATE: Range(1e-5, 1e-2, log=True),
        "optim.warmup_steps": Range(0, 100),
        "optim.schedule": ["constant", "cosine"],
    }
    drawn = []
    for name in ("a", "b"):
        made = tiny(tmp_path / name, axes={RATE: [1.0]})
        made.axes, made.search, made.trials, made.seeds = axes, search, 3, [7, 8]
        made.validate()
        study = Study(made, tmp_path / name / "out")
        for number in (0, 1, 2):
            study.begin(number)
        drawn.append([t.params for t in study.trials()])
    assert drawn[0] == drawn[1] and len({p[RATE] for p in drawn[0]}) == 3
    assert [p["seed"] for p in drawn[0]] == [7, 8, 7]
    assert all(1e-5 <= p[RATE] <= 1e-2 and isinstance(p["optim.warmup_steps"], int) for p in drawn[0])


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    made = tiny(tmp_path, axes={RATE: [1e-3]})
    Study(made, tmp_path / "out")
    made.axes[RATE] = [1e-2]
    with pytest.raises(UserError, match=r"holds another sweep, which differs in axes"):
        Study(made, tmp_path / "out")
    made.axes[RATE], made.base.optim.beta1 = [1e-3], 0.5
    with pytest.raises(UserError, match=r"optim.beta1: 0.9 -> 0.5"):
        Study(made, tmp_path / "out")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_trial_that_is_asked_to_leave_before_its_first_step_ends_its_worker_and_a_killed_one_is_tried_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tiny(tmp_path, axes={RATE: [1e-3]}), tmp_path / "out")
    started: list[str] = []

    def run_child(module: str, *rest: object) -> int:
        started.append(module)
        return 128 + signal.Signals[name]

    monkeypatch.setattr(sweep.watchdog, "run_child", run_child)
    if name == "SIGKILL":
        assert sweep.work(study) == 0 and len(started) == sweep.TRIES
        assert results(tmp_path / "out")[0]["status"] == "failed"
        return
    with pytest.raises(Preempted, match="asked to leave before its first step"):
        sweep.work(study)
    assert len(started) == 1 and study.claim() == 0, "the next worker takes it"


# ---------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    "body, told",
    [
        ("axes={'optim.learning_rat': [1]}", "did you mean 'optim.learning_rate'"),
        ("axes={'optim.learning_rate': []}", "must be a list of at least one value"),
        ("axes={'optim.learning_rate': [-1.0]}", "optim.learning_rate=-1.0 must be at least 0"),
        ("axes={}, stop='luck'", "stop='luck' of the sweep is no rule"),
        ("axes={}, mode='least'", "is not one of min, max"),
        ("axes={}, search='random'", "trials=0 with search='random'"),
        ("axes={'seed': [1]}", "give seeds="),
        ("axes={}, seed=3", "unexpected keyword argument 'seed'"),
    ],
)
def test_a_wrong_sweep_is_refused_in_a_sentence(body: str, told: str, tmp_path: Path, capsys) -> None:
    file = sweep_file(tmp_path, body)
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and "Traceback" not in said


def test_a_sweep_in_a_bucket_is_refused_whatever_is_installed(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "parse_path", lambda name: pytest.fail("it was looked for"))
    file = sweep_file(tmp_path, "axes={'optim.learning_rate': [1e-3]}")
    assert run_verb(sweep.main, [f"--config={file}", "--workdir=gs://bucket/sweep"]) == 2
    assert "one that its workers share as a file system" in capsys.readouterr().err


def test_a_dry_run_prints_trials_steps_and_cost_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    file = sweep_file(tmp_path, "axes={'optim.batch_size': [4, 8]}, seeds=[0, 1]", held_out=False)
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "4 trials, 120 steps" in said and "hours of one H100" in said and not (tmp_path / "out").exists()
    rows = [line for line in said.splitlines() if "│ 4 " in line or "│ 8 " in line]
    assert len(rows) == 4 and "40" in rows[0] and "20" in rows[-1]  # 40 samples, 4 epochs


def test_devices_are_split_evenly_or_refused() -> None:
    assert share_of_devices(1) == [{}]
    gpus = {"CUDA_VISIBLE_DEVICES": "3,4,5,6", "JAX_PLATFORMS": "cuda"}
    assert share_of_devices(2, gpus) == [{"CUDA_VISIBLE_DEVICES": "3,4"}, {"CUDA_VISIBLE_DEVICES": "5,6"}]
    with pytest.raises(UserError, match="does not divide the 4 GPUs"):
        share_of_devices(3, gpus)
    chips = share_of_devices(2, {"TPU_VISIBLE_CHIPS": "0,1,2,3", "JAX_PLATFORMS": "tpu"})
    assert [c["TPU_VISIBLE_CHIPS"] for c in chips] == ["0,1", "2,3"]
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    assert share_of_devices(2, cpu) == [{"JAX_NUM_CPU_DEVICES": "4"}] * 2


def test_the_screen_shows_each_trial_the_best_the_stopped_and_why_and_the_time_left(tmp_path: Path) -> None:
    study = Study(tiny(tmp_path, axes={RATE: [1e-3, 1e-2, 3e-2, 5e-2]}, metric="loss"), tmp_path / "out")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system=None, width=150)
    screen = sweep._Screen(console, study)

    def shown() -> str:
        console.print(screen._table())
        said = text.getvalue()
        text.truncate(0)
        return said

    assert "waiting" in shown()
    for number, (steps, status) in enumerate([(20, "completed"), (5, "stopped"), (7, "running")]):
        assert study.claim() == number
        study.begin(number)
        run = study.run_of(number)
        lines = [{"step": i, "samples": 8 * i, "loss": 2.5, "grad_norm": 1.0} for i in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "data_report.json").write_text('{"steps": 20}')
        summary = {"status": status, "reason": "worse than its siblings" * (number == 1), "last_metrics": lines[-1]}
        (run / "summary.json").write_text(json.dumps(summary))
        if status != "running":
            assert study.end(number, {"completed": 0, "stopped": 3}[status]) == status
    said = shown()
    assert "completed (best)" in said and "stopped worse than its siblings" in said and "running" in said
    assert "32 steps done, at most " in said and "2.5000" in said
    assert "1 completed, 1 stopped, 1 running, 1 waiting" in said and "best: trial 0, loss 2.5" in said
    console.size = (150, 9)  # room for four
    assert screen._shown(study.trials()) == {0, 1, 2, 3}
    assert_agree_but_the_running(tmp_path / "out")


def test_of_more_trials_than_the_screen_has_lines_those_that_matter_are_shown(tmp_path: Path) -> None:
    study = Study(tiny(tmp_path, axes={RATE: [i / 1000 for i in range(1, 41)]}, metric="loss"), tmp_path / "out")
    for number in range(20):
        study.claim()
        study.begin(number)
        if number < 18:
            summary = {"status": "completed", "last_metrics": {"loss": 5.0 - (number == 3)}}
            (study.run_of(number) / "summary.json").write_text(json.dumps(summary))
            study.end(number, 0)
    screen = sweep._Screen(Console(file=io.StringIO(), force_terminal=True, width=150, height=16), study)
    shown = screen._shown(study.trials())
    assert len(shown) == 10 and {3, 18, 19, 17, 16} <= shown and 20 in shown and not shown & {0, 1, 2, 30}


def assert_agree_but_the_running(workdir: Path) -> None:
    rows, trials = results(workdir), study_of(workdir).trials
    assert [r["status"] for r in rows] == ["completed", "stopped", "waiting", "waiting"], "as of the last that ended"
    assert [t.value for t in trials] == [2.5, None, None, None] and [r["metric"] for r in rows] == ["2.5", "", "", ""]


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_leave_saves_and_goes_on(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}", "c.data.phases[0].num_epochs = 400.0\n")
    process = start_sweep(file, tmp_path / "sweep")
    metrics = tmp_path / "sweep" / "runs" / "0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "1 trials have not ended" in said, said
    assert read_json(tmp_path / "sweep" / "runs" / "0", "summary.json")["status"] == "preempted"
    await_none(tmp_path / "sweep")
