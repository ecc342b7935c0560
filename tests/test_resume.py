"""Runs that are killed at any point and resumed equal an uninterrupted run bit for bit."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

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
    start_train,
    timeless,
    write_jsonl,
)

SAMPLES, EPOCHS = 36, 16  # five steps an epoch
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
        "c.checkpoint.every_samples = 180",  # every 25 steps
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

    record = json.loads(lines[40])
    record["loss"] = float(np.nextafter(np.float32(record["loss"]), np.float32(1e9)))  # the next float32
    file.write_text("\n".join([*lines[:40], json.dumps(record), *lines[41:]]) + "\n")
    assert_detected()
    file.write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert_detected()
    file.write_text("\n".join(lines) + "\n")
    assert_equal_runs(copy, uninterrupted, STEPS)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))  # the last state is replaced by an earlier one
    shutil.copytree(copy / "checkpoints" / "75", copy / "checkpoints" / str(STEPS))
    assert_detected()


# ---------------------------------------------------------------------------------------- paused
def test_paused_and_resumed_run_is_bit_equal(config: Path, uninterrupted: Path, tmp_path: Path, capsys) -> None:
    """It pauses at 31 % of 80 steps, the first at or past which is 25, where each of the runs evaluates besides."""
    run, pause = tmp_path / "run", "--config.train.pause_at_share=0.31"
    assert run_train(config, run, pause) == 75
    assert "paused: train.pause_at_share after step 25" in capsys.readouterr().err
    assert read_json(run, "summary.json")["status"] == "paused" and (run / "checkpoints" / "25").is_dir()
    assert run_train(config, run, pause) == 75 and lines_of(run) == 25, "the same command stays paused"
    assert ["eval/loss" in line for line in read_metrics(run)[22:]] == [False, False, True]
    assert read_all_metrics(run)[0]["eval/loss"] > read_metrics(run)[24]["eval/loss"], "before the first step"
    assert run_train(config, run) == 0
    assert_equal_runs(run, uninterrupted, STEPS)


# ---------------------------------------------------------------------------------------- killed
def test_resume_after_sigkill_is_bit_equal(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed between saves: some steps past its last checkpoint are done again."""
    run = tmp_path / "run"
    kill_when(start_train(config, run), lambda: lines_of(run) >= 30 and (run / "checkpoints" / "25").exists())
    assert 30 <= lines_of(run) < STEPS
    checkpoints = {p.name for p in (run / "checkpoints").iterdir() if p.name.isdecimal()}
    assert checkpoints and str(lines_of(run)) not in checkpoints
    assert not (run / "summary.json").exists()
    assert run_train(config, run) == 0
    assert_equal_runs(run, uninterrupted, STEPS)


@pytest.mark.slow
def test_resume_after_kills_at_startup_and_during_saves_is_bit_equal(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed by time while it starts, before any checkpoint, then twice in the middle of a save."""
    run, amid = tmp_path / "run", 0
    process = start_train(config, run, EVERY_STEP)
    time.sleep(5)
    process.kill()
    process.communicate()
    for kill in range(2):
        process = start_train(config, run, EVERY_STEP)
        kill_when(process, lambda: saving(run) and lines_of(run) >= 20 * (kill + 1))  # noqa: B023
        left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.isdecimal()]
        amid += bool(left)
    assert amid  # what half-written saves leave was there
    assert run_train(config, run, EVERY_STEP) == 0
    assert all(p.name.isdecimal() for p in (run / "checkpoints").iterdir())
    assert_equal_runs(run, uninterrupted, STEPS)


@pytest.mark.slow
def test_sigterm_exits_with_75_and_resume_is_bit_equal(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_train(config, run)
    try:
        while lines_of(run) < 10:
            assert process.poll() is None
            time.sleep(0.001)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "preempted: SIGTERM after step" in said.splitlines()[-1] and "Traceback" not in said
    summary = read_json(run, "summary.json")
    assert summary["status"] == "preempted" and summary["step"] == lines_of(run) < STEPS
    assert run_train(config, run) == 0
    assert_equal_runs(run, uninterrupted, STEPS)


# ---------------------------------------------------------------------------------------- on another mesh
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


@pytest.mark.slow
def test_resume_on_another_mesh_sees_the_same_samples(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    start, *later = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    for step in later:
        shutil.rmtree(run / "checkpoints" / str(step))
    assert start == 25
    assert run_train(config, run, *MESH) == 0
    there, here = read_metrics(run), read_metrics(uninterrupted)
    assert timeless(there[:start]) == timeless(here[:start])
    for key in ("step", "phase", "epoch", "samples", "tokens", "loss_tokens", "learning_rate"):
        assert [line[key] for line in there] == [line[key] for line in here]
    losses, wanted = (np.array([line["loss"] for line in lines[start:]]) for lines in (there, here))
    # Sums in another order: 1e-7 of the loss in a step, which the updates of 55 steps make larger.
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert (losses != wanted).any()  # it did compute in another way
    assert not np.allclose(wanted[:-1], wanted[1:], rtol=1e-3)  # and a step's loss is not its neighbour's


@pytest.mark.slow
def test_resume_on_8_4_and_1_devices_sees_the_same_samples(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Each time it is asked to leave in the middle of an epoch, of five steps."""
    run = tmp_path / "run"
    for devices, lines in ((8, 12), (4, 33)):
        process = start_train(folder / "run.py", run, devices=devices)
        try:
            while lines_of(run) < lines:
                assert process.poll() is None
                time.sleep(0.001)
            process.terminate()
            assert process.wait(60) == 75
        finally:
            process.kill()
            process.communicate()
    process = start_train(folder / "run.py", run, devices=1)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    there, here = read_metrics(run), read_metrics(uninterrupted)
    for key in ("step", "phase", "epoch", "samples", "tokens", "loss_tokens", "learning_rate"):
        assert [line[key] for line in there] == [line[key] for line in here]
    assert there[-1]["num_microbatches"] > here[-1]["num_microbatches"]
    losses, wanted = ([line["loss"] for line in lines] for lines in (there, here))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[:12] == wanted[:12] and losses != wanted  # bit-equal on eight, and not only on eight
