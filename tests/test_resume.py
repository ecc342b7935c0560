"""Runs that are killed at any point and resumed equal an uninterrupted run bit for bit."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.forked import fork_train
from helpers.runs import (
    arrays,
    assert_equal_runs,
    kill_when,
    lines_of,
    make_chats,
    read_all_metrics,
    read_json,
    read_metrics,
    run_train,
    saving,
    setting,
    timeless,
    write_jsonl,
)

SAMPLES, EPOCHS = 36, 6  # five steps an epoch
STEPS = 5 * EPOCHS
EVERY_STEP = "--config.checkpoint.every_samples=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    held = write_jsonl(folder / "held.jsonl", make_chats(6, seed=5))
    body = [
        f"c.data.phases[0].num_epochs = {EPOCHS - 2}",
        "c.data.phases.append(Phase(name='late', num_epochs=2, sources=c.data.phases[0].sources))",
        f"c.data.validation = [Source(path='{held}')]",
        "c.eval.every_samples = 100",
        "c.eval.at_shares = [0.31]",
        "c.checkpoint.every_samples = 72",  # every 10 steps
        "c.optim.schedule = 'cosine'",
        "c.optim.weight_decay = 0.1",
    ]
    return setting(folder, "\n".join(body), samples=SAMPLES)


@pytest.fixture(scope="module")
def uninterrupted(config: Path, folder: Path) -> Path:
    assert run_train(config, folder / "uninterrupted") == 0
    return folder / "uninterrupted"


# ---------------------------------------------------------------------------------------- the comparison itself
def test_comparison_detects_a_changed_loss_array_or_line(uninterrupted: Path, tmp_path: Path) -> None:
    """The negative control of the tests below."""
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    assert_equal_runs(copy, uninterrupted, STEPS)
    assert arrays(uninterrupted, STEPS)["params['embed']['table']"].any()
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines()

    def assert_detected() -> None:
        with pytest.raises(AssertionError):
            assert_equal_runs(copy, uninterrupted, STEPS)

    record = json.loads(lines[20])
    record["loss"] = float(np.nextafter(np.float32(record["loss"]), np.float32(1e9)))  # the next float32
    file.write_text("\n".join([*lines[:20], json.dumps(record), *lines[21:]]) + "\n")
    assert_detected()
    file.write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert_detected()
    file.write_text("\n".join(lines) + "\n")
    assert_equal_runs(copy, uninterrupted, STEPS)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))  # the last state is replaced by an earlier one
    shutil.copytree(copy / "checkpoints" / "20", copy / "checkpoints" / str(STEPS))
    assert_detected()


# ---------------------------------------------------------------------------------------- paused
def test_paused_and_resumed_run_is_bit_equal(config: Path, uninterrupted: Path, tmp_path: Path, capsys) -> None:
    """It pauses at 31 % of 30 steps, the first at or past which is 10, where each of the runs evaluates besides."""
    run, pause = tmp_path / "run", "--config.train.pause_at_share=0.31"
    assert run_train(config, run, pause) == 75
    assert "paused: train.pause_at_share after step 10" in capsys.readouterr().err
    assert read_json(run, "summary.json")["status"] == "paused" and (run / "checkpoints" / "10").is_dir()
    assert run_train(config, run, pause) == 75 and lines_of(run) == 10, "the same command stays paused"
    assert ["eval/loss" in line for line in read_metrics(run)[7:]] == [False, False, True]
    assert read_all_metrics(run)[0]["eval/loss"] > read_metrics(run)[9]["eval/loss"], "before the first step"
    assert run_train(config, run) == 0
    assert_equal_runs(run, uninterrupted, STEPS)


# ---------------------------------------------------------------------------------------- killed
@pytest.mark.slow
def test_resume_is_bit_equal_after_kills_at_startup_and_around_saves(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed while it starts, some steps past a checkpoint, which are done again, and in the middle of a save."""
    run = tmp_path / "run"
    kill_when(fork_train(config, run), (run / "lock").exists)
    process = fork_train(config, run, pace_s=0.2)
    kill_when(process, lambda: lines_of(run) >= 12 and (run / "checkpoints" / "10").exists())
    assert 12 <= lines_of(run) < STEPS
    checkpoints = {p.name for p in (run / "checkpoints").iterdir() if p.name.isdecimal()}
    assert checkpoints and str(lines_of(run)) not in checkpoints
    assert not (run / "summary.json").exists()
    for lines in (14, 20):  # a save may end before the kill comes
        kill_when(fork_train(config, run, EVERY_STEP), lambda: saving(run) and lines_of(run) >= lines)  # noqa: B023
        left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.isdecimal()]
        if left:
            break
    assert left  # what a half-written save leaves was there
    assert run_train(config, run) == 0
    assert all(p.name.isdecimal() for p in (run / "checkpoints").iterdir())
    assert_equal_runs(run, uninterrupted, STEPS)


# ---------------------------------------------------------------------------------------- on another mesh
@pytest.mark.slow
def test_run_preempted_on_8_and_4_devices_sees_the_same_samples_on_1(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """It is asked to leave in the middle of epochs, of five steps, and goes on with other devices and axes."""
    run = tmp_path / "run"
    meshes = (8, ()), (4, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2"))
    for (devices, mesh), lines in zip(meshes, (8, 17), strict=True):
        process = fork_train(config, run, *mesh, devices=devices, pace_s=0.2)
        try:
            while lines_of(run) < lines:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            process.terminate()
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 75, said
        assert "preempted: SIGTERM after step" in said.splitlines()[-1] and "Traceback" not in said
        summary = read_json(run, "summary.json")
        assert summary["status"] == "preempted" and lines <= summary["step"] == lines_of(run) < STEPS
    process = fork_train(config, run, devices=1)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    there, here = read_metrics(run), read_metrics(uninterrupted)
    assert timeless(there[:8]) == timeless(here[:8])  # bit-equal on eight devices, and not only
    for key in ("step", "phase", "epoch", "samples", "tokens", "loss_tokens", "learning_rate"):
        assert [line[key] for line in there] == [line[key] for line in here]
    assert there[-1]["num_microbatches"] > here[-1]["num_microbatches"]
    losses, wanted = (np.array([line["loss"] for line in lines]) for lines in (there, here))
    # Sums in another order: 1e-7 of the loss in a step, which the updates of 22 steps make larger.
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert (losses != wanted).any()  # it did compute in another way
    assert not np.allclose(wanted[:-1], wanted[1:], rtol=1e-3)  # and a step's loss is not its neighbour's
