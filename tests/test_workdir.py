"""The lock of a workdir, its atomic writes, and metrics.jsonl truncated on resume."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.runs import REPOSITORY
from mice_jax.errors import UserError
from mice_jax.storage.provenance import environment
from mice_jax.storage.workdir import Workdir

pytestmark = pytest.mark.smoke

HOLDER = """
import sys, time
from pathlib import Path
from mice_jax.storage.workdir import Workdir
run = Workdir(Path(sys.argv[1]))
run.lock()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock_holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another live process that holds the lock of the workdir."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lock_and_release(path: Path) -> None:
    with Workdir(path) as run:
        run.lock()


def write_lines(workdir: Path, steps: list[int], end: str = "") -> Path:
    file = workdir / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in steps) + end)
    return file


# ---------------------------------------------------------------------------------------- the lock
def test_a_lock_of_a_live_process_is_an_error_that_names_it(tmp_path: Path, lock_holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=f"--workdir={tmp_path} is being written by another live process") as raised:
        Workdir(tmp_path).lock()
    assert f"process {lock_holder.pid} on" in str(raised.value)


def test_the_lock_of_a_killed_process_is_taken(tmp_path: Path, lock_holder: subprocess.Popen[str]) -> None:
    lock_holder.send_signal(signal.SIGKILL)
    lock_holder.wait()
    assert str(lock_holder.pid) in (tmp_path / "lock").read_text()
    lock_and_release(tmp_path)
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("text", ["", "process 1 on elsewhere\n", "process 99999999 on here\n"])
def test_a_lock_file_that_nobody_holds_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    lock_and_release(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_workdir_is_created_with_its_parents(tmp_path: Path) -> None:
    lock_and_release(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "lock").exists()


def test_a_workdir_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"--workdir={path} cannot be written"):
            Workdir(path).lock()


# ---------------------------------------------------------------------------------------- files
def test_a_json_file_is_written_atomically(tmp_path: Path) -> None:
    run = Workdir(tmp_path)
    run.write_json("summary.json", {"step": 1})
    with pytest.raises(TypeError):
        run.write_json("summary.json", {"step": object()})
    assert run.read_json("summary.json") == {"step": 1}
    run.write_json("summary.json", {"step": 2})
    assert run.read_json("summary.json") == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert run.read_json("config.json") is None


# ---------------------------------------------------------------------------------------- metrics
def test_metrics_are_truncated_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    file = write_lines(tmp_path, [1, 2, 3, 4, 5])
    before = file.read_text().splitlines()
    Workdir(tmp_path).truncate_metrics(3)
    assert file.read_text().splitlines() == before[:3]
    Workdir(tmp_path).truncate_metrics(3)
    assert file.read_text().splitlines() == before[:3]
    Workdir(tmp_path).truncate_metrics(0)
    assert file.read_text() == ""


def test_half_a_line_after_the_checkpoint_is_removed(tmp_path: Path) -> None:
    file = write_lines(tmp_path, [1, 2], end='{"step": 3, "lo')
    Workdir(tmp_path).truncate_metrics(2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    assert file.read_text().endswith("\n")


def test_line_before_the_first_step_stays_unless_the_run_starts_again(tmp_path: Path) -> None:
    file = write_lines(tmp_path, [0, 1, 2, 3])
    Workdir(tmp_path).truncate_metrics(2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]
    Workdir(tmp_path).truncate_metrics(0)
    assert file.read_text() == ""


def test_a_new_run_needs_no_metrics(tmp_path: Path) -> None:
    Workdir(tmp_path).truncate_metrics(0)


@pytest.mark.parametrize("steps", [[], [1], [1, 3, 4], [2, 3, 4], [1, 1, 2, 3]])
def test_metrics_without_all_steps_up_to_the_checkpoint_are_an_error(tmp_path: Path, steps: list[int]) -> None:
    file = write_lines(tmp_path, steps)
    before = file.read_text()
    with pytest.raises(UserError, match=r"metrics.jsonl does not hold the steps 1 to 3"):
        Workdir(tmp_path).truncate_metrics(3)
    assert file.read_text() == before


def test_the_environment_names_versions_and_command() -> None:
    said = environment()
    assert {"python", "mice_jax", "jax", "flax", "optax", "orbax-checkpoint"} <= said["versions"].keys()
    assert said["command"][0] == sys.executable
    assert json.dumps(said)
