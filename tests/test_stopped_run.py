"""A run that diverges: it is stopped with a reason and its state, and its report page shows what happened."""

from pathlib import Path

import pytest

from helpers.runs import read_json, read_metrics, run_train, run_verb, setting
from mice_jax import report
from test_page import content_of

BODY = """c.data.phases[0].num_epochs = 4.0
c.data.validation_fraction = 0.2
c.eval.every_samples = 16
c.checkpoint.every_samples = 16
c.optim.grad_clip = 0.0
c.log.trackers = []"""


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diverged")
    config = setting(folder / "in", BODY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICE_JAX_CACHE", str(folder / "cache"))
        assert run_train(config, folder / "run", "--config.optim.learning_rate=1e2") == 3
    return folder / "run"


def test_diverging_run_stops_with_code_3_a_reason_and_its_state(diverged: Path) -> None:
    summary = read_json(diverged, "summary.json")
    assert summary["status"] == "stopped" and summary["reason"].startswith("diverged: ")
    assert [line["step"] for line in read_metrics(diverged)] == list(range(1, 12)), "ten steps after its start"
    assert (diverged / "checkpoints" / "11").is_dir()


def test_page_of_a_run_shows_curves_data_config_and_events(diverged: Path) -> None:
    assert run_verb(report.main, [f"--workdir={diverged}"]) == 0
    data = content_of(diverged / "report.html")
    [run] = data["runs"]
    lines = read_metrics(diverged)
    assert data["problems"] == [] and run["grid"][0] == [line["step"] for line in lines]
    assert run["status"] == "stopped" and run["reason"].startswith("diverged: ")
    assert run["grid"][1] == [line["samples"] for line in lines]
    assert run["means"]["loss"] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    squares = [line["grad_sq_corrected"] for line in lines]
    known = [v if v is None else pytest.approx(v, rel=1e-4) for v in squares]
    assert run["means"]["grad_norm_corrected"] == known and any(v is not None for v in squares)
    held_out = run["evaluations"]["eval/loss"][1]
    assert held_out == [0, *(line["samples"] for line in lines if "eval/loss" in line)] and len(held_out) > 3
    assert [e["event"] for e in run["events"]] == ["started", "stopped"]
    assert run["checkpoints"] == sorted(int(f.name) for f in (diverged / "checkpoints").iterdir())
    [trained, held_out] = data["data"][0]["sources"]
    assert trained["kept"] + held_out["kept"] == 40 and held_out["source"] == "chats (held out)"
    fields = {f["name"]: f for f in data["config"]["fields"]}
    batch_size = {"name": "optim.batch_size", "value": 8, "changed": True, "default": 3840}
    assert fields["optim.batch_size"] == batch_size
    assert not fields["data.phases.0.replay"]["changed"] and fields["data.phases.0.sources.0.path"]["changed"]
