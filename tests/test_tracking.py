"""Trackers log every number under the same run after a resume. Their packages are replaced by stand-ins."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import read_json, read_metrics, run_train, setting
from mice_jax.cli.tracker_names import check_trackers
from mice_jax.errors import UserError
from mice_jax.storage.workdir import Workdir
from mice_jax.training import trackers
from mice_jax.training.writers import numbers

Calls = list[tuple[Any, ...]]
CONFIG = {"optim": {"batch_size": 8}}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []

    def init(**keys: Any) -> Any:
        calls.append(("init", keys))
        return types.SimpleNamespace(
            id=keys["id"] or "abc",
            log=lambda numbers, step: calls.append(("log", step, numbers)),
            finish=lambda: calls.append(("finish",)),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=True))
    return calls


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []

    def start_run(run_id: str | None, run_name: str | None) -> Any:
        calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "xyz"))

    stand_in = types.SimpleNamespace(
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_dict=lambda value, name: calls.append(("config", value["optim"]["batch_size"])),
        log_metrics=lambda numbers, step: calls.append(("log", step, numbers)),
        end_run=lambda: calls.append(("end",)),
        __spec__=True,
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    return calls


def record(step: int) -> dict[str, Any]:
    return {"step": step, "samples": 8 * step, "phase": "stacked", "loss": 1.0 / step, "mfu": None}


def log_steps(run: Path, *steps: int, every_steps: int = 1) -> None:
    """What one process of a run does with its trackers."""
    run.mkdir(exist_ok=True)
    names = ["wandb", "mlflow"]
    writers = trackers.make_trackers(names, Workdir(run), project="mice", every_steps=every_steps, config=CONFIG)
    for writer in writers:
        for step in steps:
            writer.write(record(step))
        writer.close()


def test_a_resumed_run_logs_to_the_same_run_of_a_tracker(tmp_path: Path, wandb: Calls, mlflow: Calls) -> None:
    run = tmp_path / "run"
    log_steps(run, 1, 2)
    log_steps(run, 3)
    for calls in (wandb, mlflow):
        logged = {call[1]: call[2] for call in calls if call[0] == "log"}
        assert logged == {step: {"step": step, "samples": 8 * step, "loss": 1.0 / step} for step in (1, 2, 3)}
    assert [call[1]["id"] for call in wandb if call[0] == "init"] == [None, "abc"]
    assert wandb[0][1]["project"] == "mice" and wandb[0][1]["config"] == CONFIG
    assert [call[1:] for call in mlflow if call[0] == "start"] == [(None, "run"), ("xyz", None)]
    assert sum(call == ("finish",) for call in wandb) == sum(call == ("end",) for call in mlflow) == 2
    assert mlflow.count(("config", 8)) == 1
    assert list((run / "tensorboard").glob("events*"))  # these are always written
    assert read_json(run, "tracking.json") == {"wandb": "abc", "mlflow": "xyz"}


def test_trackers_get_every_nth_step(tmp_path: Path, wandb: Calls, mlflow: Calls) -> None:
    log_steps(tmp_path / "run", 1, 2, 3, 4, 5, every_steps=2)
    for calls in (wandb, mlflow):
        assert [call[1] for call in calls if call[0] == "log"] == [2, 4]


def test_train_sends_the_lines_of_metrics_jsonl_to_trackers(tmp_path: Path, wandb: Calls, mlflow: Calls) -> None:
    config = setting(tmp_path / "in", "c.log.trackers = ['wandb', 'mlflow']\nc.log.every_steps = 2")
    run = tmp_path / "run"
    assert run_train(config, run) == 0
    lines = {line["step"]: numbers(line) for line in read_metrics(run)}
    assert list(lines) == [1, 2, 3, 4, 5]
    for calls in (wandb, mlflow):
        assert {call[1]: call[2] for call in calls if call[0] == "log"} == {step: lines[step] for step in (2, 4)}
    assert wandb[0][1]["config"]["optim"]["batch_size"] == 8 and ("config", 8) in mlflow


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.trackers has 'wandb'.*\[tracking\]"):
        check_trackers(["tensorboard", "wandb"])
