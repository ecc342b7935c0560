"""Trackers: what they are told, and that a resumed run goes on in the same place. Their packages are stand-ins."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import read_json, read_metrics, run_train, setting
from mice_jax import trackers

Calls = list[tuple[Any, ...]]


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


def both(tmp_path: Path) -> tuple[Path, Path]:
    return setting(tmp_path / "in", "c.log.trackers = ['wandb', 'mlflow']\nc.log.project = 'mice'"), tmp_path / "run"


def test_every_number_of_every_step_is_told_and_a_resumed_run_goes_on_in_the_same_place(
    tmp_path: Path, wandb: Calls, mlflow: Calls
) -> None:
    config, run = both(tmp_path)
    for part in range(5):  # a step each
        assert run_train(config, run, "--config.train.max_minutes=1e-9") == (75 if part < 4 else 0)
    lines = read_metrics(run)
    for calls in (wandb, mlflow):
        logged = {call[1]: call[2] for call in calls if call[0] == "log"}
        assert list(logged) == [1, 2, 3, 4, 5]
        assert logged == {line["step"]: trackers.numbers(line) for line in lines}
        assert {"loss", "grad_norm", "samples"} <= logged[1].keys() and "phase" not in logged[1]
    assert [call[1]["id"] for call in wandb if call[0] == "init"] == [None, *["abc"] * 4]
    assert wandb[0][1]["project"] == "mice" and wandb[0][1]["config"]["optim"]["batch_size"] == 8
    assert [call[1:] for call in mlflow if call[0] == "start"] == [(None, "run"), *[("xyz", None)] * 4]
    assert sum(call == ("finish",) for call in wandb) == sum(call == ("end",) for call in mlflow) == 5
    assert ("config", 8) in mlflow
    assert list((run / "tensorboard").glob("events*"))  # these are always written
    assert read_json(run, "tracking.json") == {"wandb": "abc", "mlflow": "xyz"}


def test_only_every_so_many_steps_are_told_where_that_is_asked(tmp_path: Path, wandb: Calls, mlflow: Calls) -> None:
    config, run = both(tmp_path)
    assert run_train(config, run, "--config.log.every_steps=2") == 0
    assert [call[1] for call in wandb if call[0] == "log"] == [2, 4]
    assert len(read_metrics(run)) == 5


def test_a_tracker_that_is_not_installed_is_refused_before_the_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = both(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert run_train(config, run) == 2
    err = capsys.readouterr().err
    assert "log.trackers has 'wandb'" in err and "mice_jax[tracking]" in err
    assert not (run / "metrics.jsonl").exists()
