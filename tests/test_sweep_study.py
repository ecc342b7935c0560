"""The study of a sweep in one process: trials, claims, how trials end, and what the terminal shows of them."""

import io
import json
import os
import runpy
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.sweeps import results, small_sweep, study_of
from mice_jax.config import Config, ConfigError, Phase, Range, locate
from mice_jax.errors import Preempted, UserError
from mice_jax.runtime import cpu_devices
from mice_jax.runtime.cpu_devices import usable_cores
from mice_jax.runtime.fork_server import CommandProcess
from mice_jax.sweeps import claims, worker_pool, workers
from mice_jax.sweeps.devices import share_of_devices
from mice_jax.sweeps.progress_table import ProgressTable, trials_to_show
from mice_jax.sweeps.study import Study, TrialEnd, trial_end
from mice_jax.sweeps.trials import fixed_params, trial_config
from mice_jax.sweeps.worker_pool import MAX_FUTILE_STARTS, needs_restart

RATE = "optim.learning_rate"


# ---------------------------------------------------------------------------------------- trials
def test_grid_has_every_combination_with_every_seed() -> None:
    params = fixed_params(small_sweep(axes={RATE: [1e-3, 1e-2], "optim.batch_size": [4, 8]}, seeds=[0, 1, 2]))
    assert len(params) == 12 and len({tuple(p.items()) for p in params}) == 12
    assert params[0] == {RATE: 1e-3, "optim.batch_size": 4, "seed": 0}


def test_any_field_can_be_an_axis_and_phases_too() -> None:
    sweep = small_sweep()
    phases = sweep.base.data.phases
    sweep.axes |= {
        "data.phases": [phases, [*phases, Phase(name="one", sources=phases[0].sources)]],
        "optim.frozen": [[], ["lm_head.*"]],
        "data.phases[0].num_epochs": [2.0],
    }
    with pytest.raises(ConfigError, match="2 phases named"):
        trial_config(sweep, fixed_params(sweep)[2])
    config = trial_config(sweep, fixed_params(sweep)[1])
    assert config.optim.frozen == ["lm_head.*"] and config.data.phases[0].num_epochs == 2.0
    assert sweep.base.optim.frozen == [] and sweep.base.data.phases[0].num_epochs == 4.0, "the base is unchanged"


def test_config_file_of_a_trial_defines_its_config(tmp_path: Path) -> None:
    sweep = small_sweep(axes={RATE: [1e-3, 1e-2]}, seeds=[5])
    study = Study(sweep, tmp_path / "out")
    assert study.claim() == 0 and study.claim() == 1 and study.claim() is None
    config = runpy.run_path(str(study.begin(1)))["get_config"]()
    assert config == study.config(1)
    assert isinstance(config, Config) and (config.optim.learning_rate, config.seed) == (1e-2, 5)
    assert config == trial_config(sweep, {RATE: 1e-2, "seed": 5})


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_search_draws_the_same_in_every_worker(search: str, tmp_path: Path) -> None:
    axes = {
        RATE: Range(1e-5, 1e-2, log=True),
        "optim.warmup_steps": Range(0, 100),
        "optim.schedule": ["constant", "cosine"],
    }
    drawn = []
    for name in ("a", "b"):
        study = Study(small_sweep(axes=axes, search=search, trials=3, seeds=[7, 8]), tmp_path / name)
        for number in (0, 1, 2):
            study.begin(number)
        drawn.append([t.params for t in study.trials()])
    assert drawn[0] == drawn[1] and len({p[RATE] for p in drawn[0]}) == 3
    assert [p["seed"] for p in drawn[0]] == [7, 8, 7]
    assert all(1e-5 <= p[RATE] <= 1e-2 and isinstance(p["optim.warmup_steps"], int) for p in drawn[0])


def test_different_sweep_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    sweep = small_sweep(axes={RATE: [1e-3]})
    Study(sweep, tmp_path / "out")
    sweep.axes[RATE] = [1e-2]
    with pytest.raises(UserError, match=r"holds a different sweep.* axes: .*0\.001.* -> .*0\.01"):
        Study(sweep, tmp_path / "out")
    sweep.axes[RATE], sweep.base.optim.beta1 = [1e-3], 0.5
    with pytest.raises(UserError, match=r"optim.beta1: 0.9 -> 0.5"):
        Study(sweep, tmp_path / "out")


def test_results_have_the_rate_that_follows_the_batch_size(tmp_path: Path) -> None:
    sweep = small_sweep(axes={"optim.batch_size": [4, 16], "optim.rate_for_batch": ["sqrt", "linear"]})
    sweep.base.optim.learning_rate, sweep.base.optim.rate_batch_size = 1e-3, 4
    study = Study(sweep, tmp_path / "out")
    rates = [row["resolved_learning_rate"] for row in study.rows()]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-3, 4e-3], rel=1e-12)
    plain = Study(small_sweep(axes={RATE: [1e-3]}), tmp_path / "plain")
    assert "resolved_learning_rate" not in plain.rows()[0]


# ---------------------------------------------------------------------------------------- claims
def test_claim_belongs_to_one_worker_until_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = small_sweep(axes={RATE: [1e-3, 1e-2]})
    one, two, three = (Study(sweep, tmp_path / "out") for _ in range(3))
    assert one.claim() == 0 and two.claim() == 1 and three.claim() is None
    child = subprocess.Popen(["sleep", "60"])
    host, _, _, unique = two.claims.owner.split("|")
    owner = f"{host}|{child.pid}|{claims.process_start_time(child.pid)}|{unique}"
    table, engine = two.claims._table, two.claims._engine
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 1).values(owner=owner))
    assert three.claim() is None, "its process lives"
    child.kill()
    child.wait()
    assert three.claim() == 1 and not two.claims.renew(1) and three.claims.renew(1)
    # Whether a worker of another machine lives shows in its heartbeat alone.
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 0).values(owner="elsewhere|1|2|x"))
    assert not three.claims.take(0)
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 0.0)
    with engine.begin() as db:
        db.execute(table.update().where(table.c.trial == 0).values(beat=7))
    assert not three.claims.take(0), "a new heartbeat since the last look"
    assert three.claims.take(0), "no heartbeat since then"


def test_one_of_many_workers_takes_a_dead_worker_s_claim(tmp_path: Path) -> None:
    studies = [Study(small_sweep(axes={RATE: [1e-3]}), tmp_path / "out") for _ in range(4)]
    assert studies[0].claim() == 0
    table = studies[0].claims._table
    with studies[0].claims._engine.begin() as db:
        # Process 1 of this machine started at another time than the owner's.
        db.execute(table.update().values(owner=f"{socket.gethostname()}|1|0|x"))
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda s: s.claims.take(0), studies))
    assert sum(taken) == 1


# ---------------------------------------------------------------------------------------- how a trial ends
@pytest.mark.parametrize(
    "summary, exit_code, wanted",
    [
        ({"status": "completed", "last_metrics": {"loss": 2.5}}, 0, TrialEnd("completed", "", 2.5)),
        ({"status": "stopped", "reason": "dead", "last_metrics": {"loss": 6.0}}, 3, TrialEnd("stopped", "dead", None)),
        (
            {"status": "completed", "last_metrics": {}},
            0,
            TrialEnd("failed", "its last line has no loss; hold data out, or name another metric", None),
        ),
        # The summary is of an earlier process; the exit code is of the last.
        ({"status": "completed"}, 2, TrialEnd("failed", "exit code 2: error: no data", None)),
        ({}, 1, TrialEnd("failed", "exit code 1: error: no data", None)),
    ],
)
def test_end_of_a_trial_from_its_summary_and_exit_code(
    summary: dict[str, Any], exit_code: int, wanted: TrialEnd, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    log.write_text("step 1\nerror: no data\nbye\n")
    assert trial_end(summary, exit_code, "loss", log) == wanted


def test_failed_trial_without_a_log_has_a_reason(tmp_path: Path) -> None:
    assert trial_end({}, 1, "loss", tmp_path / "log.txt").reason == "exit code 1: it printed nothing"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_trial_asked_to_end_is_preempted_and_a_killed_one_is_retried(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(small_sweep(axes={RATE: [1e-3]}), tmp_path / "out")
    started: list[str] = []

    def run(process: CommandProcess, module: str, *rest: object) -> int:
        started.append(module)
        return 128 + signal.Signals[name]

    monkeypatch.setattr(CommandProcess, "run", run)
    if name == "SIGKILL":
        assert workers.work(study) == 0 and len(started) == workers.MAX_ATTEMPTS
        assert results(tmp_path / "out")[0]["status"] == "failed"
        return
    with pytest.raises(Preempted, match="asked to end before its first step"):
        workers.work(study)
    assert len(started) == 1 and study.claim() == 0, "the next worker takes it"


def test_trials_that_differ_in_settings_of_a_process_run_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process settles the number of its CPU devices, and XLA's flags, once."""
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu_devices, "usable_cores", lambda: 4)

    def settings(**changes: Any) -> Any:
        config = Config()
        config.optim.batch_size = 8
        for name, value in changes.items():
            locate(config, name.replace("__", "."))[0].__setattr__(name.rpartition("__")[2], value)
        return workers.settings_of_process(config, tmp_path)

    new = settings()
    assert settings(optim__learning_rate=1.0, optim__batch_size=16) == new
    for change in ({"optim__batch_size": 2}, {"mesh__fsdp": 2}, {"train__deterministic": True}):
        assert settings(**change) != new, change
    resolved = {"mesh": {"data": 1, "fsdp": 4}, "device": "cpu"}
    (tmp_path / "config.json").write_text(json.dumps({"resolved": resolved}))
    assert settings() == new, "a trial that goes on, on as many devices"
    resolved["mesh"]["fsdp"] = 2
    (tmp_path / "config.json").write_text(json.dumps({"resolved": resolved}))
    assert settings() != new, "it began on fewer"


@pytest.mark.parametrize(
    "exit_code, futile_starts, wanted",
    [
        (0, 1, False),
        (2, 1, False),  # the user's mistake: it would fail again
        (1, 1, True),
        (1, MAX_FUTILE_STARTS, False),
        (75, 0, True),  # trials have ended since it started
        (-9, 0, True),
    ],
)
def test_workers_are_restarted_unless_done_or_futile(exit_code: int, futile_starts: int, wanted: bool) -> None:
    assert needs_restart(exit_code, futile_starts) == wanted


class FakeProcess:
    """A process that runs until its exit code is set."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.exit_code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


def test_pool_restarts_killed_workers_and_forwards_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[FakeProcess, dict[str, str]]] = []

    def start_child(module: str, arguments: list[str], share: dict[str, str], log: object) -> tuple[FakeProcess, int]:
        assert (module, arguments) == ("mice_jax.sweep", ["--worker"])
        started.append((FakeProcess(), share))
        return started[-1][0], os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(worker_pool.watchdog, "start_child", start_child)
    pool = worker_pool.WorkerPool(["--worker"], [{"GPU": "0"}, {"GPU": "1"}], io.StringIO(), num_ended=lambda: 0)
    assert not pool.poll() and len(started) == 2
    started[0][0].exit_code = 0
    started[1][0].exit_code = -9
    assert not pool.poll(), "the killed worker runs again"
    assert [share["GPU"] for _, share in started] == ["0", "1", "1"]
    for _ in range(MAX_FUTILE_STARTS):  # each start fails before any trial has ended
        started[-1][0].exit_code = 1
        ended = pool.poll()
    assert ended and len(started) == 2 + MAX_FUTILE_STARTS
    pool.close()

    pool = worker_pool.WorkerPool(["--worker"], [{"GPU": "0"}], io.StringIO(), num_ended=lambda: 0)
    pool.forward(signal.SIGTERM)
    assert started[-1][0].signals == [signal.SIGTERM]
    started[-1][0].exit_code = -signal.SIGTERM
    assert pool.poll(), "a worker that was asked to end is not started again"
    pool.close()


# ---------------------------------------------------------------------------------------- devices
def test_devices_are_split_evenly() -> None:
    assert share_of_devices(1) == [{}]
    gpus = {"CUDA_VISIBLE_DEVICES": "3,4,5,6", "JAX_PLATFORMS": "cuda"}
    assert share_of_devices(2, gpus) == [{"CUDA_VISIBLE_DEVICES": "3,4"}, {"CUDA_VISIBLE_DEVICES": "5,6"}]
    with pytest.raises(UserError, match="does not divide the 4 GPUs"):
        share_of_devices(3, gpus)
    chips = share_of_devices(2, {"TPU_VISIBLE_CHIPS": "0,1,2,3", "JAX_PLATFORMS": "tpu"})
    assert [c["TPU_VISIBLE_CHIPS"] for c in chips] == ["0,1", "2,3"]
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    assert share_of_devices(2, cpu) == [{"JAX_NUM_CPU_DEVICES": "4"}] * 2
    each = max(1, usable_cores() // 2)
    assert share_of_devices(2, {"JAX_PLATFORMS": "cpu"}) == [{"JAX_NUM_CPU_DEVICES": str(each)}] * 2


# ---------------------------------------------------------------------------------------- the terminal
def test_progress_table_and_results_show_the_state_of_trials(tmp_path: Path) -> None:
    study = Study(small_sweep(axes={RATE: [1e-3, 1e-2, 3e-2, 5e-2]}, metric="loss"), tmp_path / "out")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system=None, width=150)
    table = ProgressTable(console, study, ["learning_rate", "seed"])

    def printed() -> str:
        console.print(table.table())
        output = text.getvalue()
        text.truncate(0)
        return output

    assert "waiting" in printed()
    for number, (steps, status) in enumerate([(20, "completed"), (5, "stopped"), (7, "running")]):
        assert study.claim() == number
        study.begin(number)
        run = study.run_folder(number)
        lines = [{"step": i, "samples": 8 * i, "loss": 2.5, "grad_norm": 1.0} for i in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "data_report.json").write_text('{"steps": 20}')
        reason = "worse than its siblings" if status == "stopped" else ""
        (run / "summary.json").write_text(json.dumps({"status": status, "reason": reason, "last_metrics": lines[-1]}))
        if status != "running":
            assert study.end(number, {"completed": 0, "stopped": 3}[status]) == status
    output = printed()
    assert "completed (best)" in output and "stopped worse than its siblings" in output and "running" in output
    assert "32 steps done, at most " in output and "2.5000" in output
    assert "1 completed, 1 stopped, 1 running, 1 waiting" in output and "best: trial 0, loss 2.5" in output
    log = io.StringIO()
    lines = ProgressTable(Console(file=log, force_terminal=False, width=500), study, ["learning_rate", "seed"])
    for _ in range(2):
        lines.update()
    assert log.getvalue() == f"trial 2: running, its log is {study.run_folder(2) / 'log.txt'}\n"
    rows, trials = results(tmp_path / "out"), study_of(tmp_path / "out").trials
    # results.csv is as old as the last trial that ended.
    assert [r["status"] for r in rows] == ["completed", "stopped", "waiting", "waiting"]
    assert [t.value for t in trials] == [2.5, None, None, None] and [r["metric"] for r in rows] == ["2.5", "", "", ""]


def test_screen_shows_the_trials_that_matter_most() -> None:
    statuses = ["completed"] * 18 + ["running"] * 2 + ["waiting"] * 20
    shown = trials_to_show(statuses, best=3, room=10)
    assert shown == {18, 19, 3, 17, 16, 15, 14, 13, 20, 21}
    assert trials_to_show(["completed", "stopped", "running", "waiting"], best=0, room=4) == {0, 1, 2, 3}
    assert trials_to_show(["waiting"] * 9, best=None, room=4) == {0, 1, 2, 3}
