"""What is kept, and what becomes of a checkpoint that is damaged or finds no room."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.runs import (
    ENVIRONMENT,
    REPOSITORY,
    assert_equal_runs,
    read_json,
    run_train,
    setting,
)
from mice_jax.checkpoint import MANIFEST, damage_of, ranked, to_keep

STEPS = 10


# ---------------------------------------------------------------------------------------- what is kept
def saved(*scores: float | None, every: int = 8) -> dict[int, dict[str, float]]:
    """Steps 1, 2, ... of so many samples each."""
    return {
        i: {"samples": i * every} | ({} if score is None else {"score": score}) for i, score in enumerate(scores, 1)
    }


def keep(steps: dict[int, dict[str, float]], mode: str = "min", **asked: int) -> list[int]:
    policy = {"keep_last": 0, "keep_best": 0, "keep_every": 0} | asked
    return sorted(to_keep(steps, mode=mode, **policy))


FIVE = saved(3.0, 1.0, 2.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"keep_last": 2}, [4, 5]),
        ({"keep_best": 1}, [2, 5]),  # of two equal ones the earlier, and the newest always
        ({"keep_best": 2}, [2, 4, 5]),
        ({"keep_best": 1, "mode": "max"}, [5]),
        ({"keep_best": 2, "mode": "max"}, [1, 5]),
        ({"keep_every": 16}, [2, 4, 5]),
        ({"keep_every": 24}, [3, 5]),
        ({"keep_last": 1, "keep_best": 1, "keep_every": 24}, [2, 3, 5]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5]),
        ({"keep_last": 1, "also": (1, 77)}, [1, 5]),
    ],
)
def test_what_is_kept_is_what_was_asked_for(asked: dict, kept: list[int]) -> None:
    assert keep(FIVE, **asked) == kept


def test_what_was_not_measured_or_is_not_a_number_is_never_the_best() -> None:
    steps = saved(float("nan"), None, 4.0, float("inf"), None)
    assert ranked(steps, "min") == ranked(steps, "max") == [3]
    assert keep(steps, keep_best=3) == [3, 5]
    assert ranked({}, "min") == []


# ---------------------------------------------------------------------------------------- damage
@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    body = "c.data.phases[0].num_epochs = 2\nc.checkpoint.every_samples = 24"
    return setting(tmp_path_factory.mktemp("damage"), body)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    assert run_train(config, config.parent / "undisturbed") == 0
    return config.parent / "undisturbed"


def data_file(step: Path) -> Path:
    """The largest file of arrays."""
    return max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    file.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "the files of arrays are cut": lambda step: [
        os.truncate(file, file.stat().st_size // 2) for file in (step / "params").rglob("d/*")
    ],
    "a file of arrays is gone": lambda step: data_file(step).unlink(),
    "a bit of the arrays is flipped": lambda step: flip(data_file(step)),
    "a bit of the moments' own manifest is flipped": lambda step: flip(step / "opt_state" / "manifest.ocdbt"),
    "the metadata is no JSON": lambda step: (step / "params" / "_METADATA").write_text("{"),
    "the progress is gone": lambda step: shutil.rmtree(step / "progress"),
    "the manifest is no JSON": lambda step: (step / MANIFEST).write_text("[1, 2"),
}


UNSEEN = ("a bit of the arrays is flipped", "the manifest is no JSON")  # by the readers: what the manifest is for


@pytest.mark.parametrize(
    ("damage", "sealed"), [*((d, True) for d in DAMAGES), *((d, False) for d in DAMAGES if d not in UNSEEN)]
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    damage: str, sealed: bool, config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = run / "checkpoints" / str(STEPS)
    if not sealed:  # as a process leaves it that is killed between a save's end and its manifest
        (newest / MANIFEST).unlink()
    DAMAGES[damage](newest)
    assert run_train(config, run) == 0
    said = capsys.readouterr().out
    place = run / "checkpoints" / "damaged" / str(STEPS)
    assert f"the checkpoint of step {STEPS} is damaged (" in said and str(place) in said and place.is_dir()
    assert "resumed after step 9" in said
    assert_equal_runs(run, undisturbed, STEPS)


def test_the_manifest_sees_each_flipped_bit_and_a_whole_checkpoint_passes(undisturbed: Path, tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(undisturbed / "checkpoints" / str(STEPS), step)
    files = [p for p in step.rglob("*") if p.is_file() and p.name != MANIFEST and p.stat().st_size]
    assert len(files) > 5 and damage_of(step) is None
    assert {str(p.relative_to(step)) for p in files} <= json.loads((step / MANIFEST).read_text())["files"].keys()
    for file in files:
        before = file.read_bytes()
        flip(file)
        assert damage_of(step) == f"{file.relative_to(step)} has other bytes than were written"
        file.write_bytes(before)
    assert damage_of(step) is None


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_started_from_nothing(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in (run / "checkpoints").iterdir():
        flip(data_file(step))
    for _ in range(2):  # it does not start the second time either
        assert run_train(config, run) == 2
        assert "holds no checkpoint that is whole; damaged are" in capsys.readouterr().err
    assert len(list((run / "checkpoints" / "damaged").iterdir())) == 4


def test_a_model_of_another_shape_is_no_damage(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, init = tmp_path / "run", tmp_path / "init"
    shutil.copytree(undisturbed, run)
    shutil.copytree(config.parent / "init", init)
    file = init / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 40}))
    resolved = read_json(run, "config.json")
    resolved["model"]["init_from"] = f"random:{init}"
    (run / "config.json").write_text(json.dumps(resolved))
    assert run_train(config, run, f"--config.model.init_from=random:{init}") == 2
    assert "Put back the config.json" in capsys.readouterr().err
    assert not (run / "checkpoints" / "damaged").exists()


# ---------------------------------------------------------------------------------------- no room
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A file-size limit stands for the disk: the second save is of a larger one, so the first fits and it does not."""
    run = tmp_path / "run"
    assert run_train(config, run, "--config.train.max_minutes=1e-9") == 75  # one step, and its checkpoint
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "from mice_jax import checkpoint, train\nsave = checkpoint.Checkpoints.save\n"
    limited += "def full(*a): resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); save(*a)\n"
    limited += "checkpoint.Checkpoints.save = full\nsys.exit(train.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", limited, f"--config={config}", f"--workdir={run}"],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    # Orbax's threads have words of their own, which may stand on the same line.
    assert done.stderr.count("error: the checkpoint could not be written to ") == 1, done.stderr
    assert "bytes are free. The earlier checkpoints are whole." in done.stderr
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == kept
    assert run_train(config, run) == 0
    assert_equal_runs(run, undisturbed, STEPS)
