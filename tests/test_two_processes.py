"""Runs by two processes of two devices each: equal to one process of four, and ended together."""

import contextlib
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers import bucket
from helpers.forked import ForkedCommand, fork_train
from helpers.runs import (
    arrays,
    lines_of,
    make_chats,
    place_flags,
    read_json,
    read_metrics,
    run_train,
    setting,
    timeless,
    write_jsonl,
)
from mice_jax.runtime import distributed
from mice_jax.sharding import make_mesh
from mice_jax.storage.lock import FolderLock
from mice_jax.training import build

pytestmark = pytest.mark.slow
STEPS = 10
HEARTBEAT_S = "10"
COUNTS = ("step", "phase", "epoch", "samples", "tokens", "loss_tokens", "learning_rate", "num_microbatches")

Processes = list[ForkedCommand]
Start = Callable[..., Processes]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """A function that starts a run of two processes; those that still run at the end are killed."""
    started: Processes = []

    def start(configs: Sequence[Path], run: Path, *flags: str, pace_s: float = 0.0, **more: str) -> Processes:
        for config, place in zip(configs, place_flags(2), strict=True):
            heartbeat = {"MICE_JAX_HEARTBEAT_S": HEARTBEAT_S}
            started.append(fork_train(config, run, *flags, *place, devices=2, pace_s=pace_s, **heartbeat, **more))
        return started[-2:]

    try:
        yield start
    finally:
        for process in started:
            process.kill()  # its child follows it
            process.communicate()


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


def wait_for_end(processes: Processes, seconds: float = 150) -> list[tuple[int, str]]:
    """The exit code and the output of each process."""
    until = time.monotonic() + seconds
    outputs = [process.communicate(timeout=max(1, until - time.monotonic()))[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


def wait_for(processes: Processes, ready: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    held = write_jsonl(folder / "held.jsonl", make_chats(6, seed=5))
    body = [
        "c.data.phases[0].num_epochs = 2",
        f"c.data.validation = [Source(path='{held}')]",
        "c.eval.every_samples = 40",
        "c.checkpoint.every_samples = 32",  # steps 4 and 8, in the middle of an epoch of five
        "c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 2, 2",  # each process holds half of the parameters,
    ]
    return setting(folder, "\n".join(body))


def run_alone(config: Path, run: Path) -> int:
    """Runs in this process, on four of its devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
        return run_train(config, run)


@pytest.fixture(scope="module")
def one_process_run(config: Path, folder: Path) -> Path:
    """The workdir of the run by one process."""
    compared: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            distributed, "assert_same_on_all_processes", lambda *what, **named: compared.extend([*what, *named])
        )
        assert run_alone(config, folder / "one") == 0
    assert {"config", "data"} <= set(compared)  # what two processes would compare
    assert len(read_metrics(folder / "one")) == STEPS
    return folder / "one"


@pytest.fixture(scope="module")
def two_process_run(config: Path, folder: Path) -> Path:
    """The workdir of the run by two processes."""
    with starting() as start:
        ended = wait_for_end(start([config, config], folder / "two"))
    assert [code for code, _ in ended] == [0, 0], ended
    last = f"step {STEPS}/{STEPS}"
    assert last in ended[0][1] and last not in ended[1][1]  # only the main process prints
    return folder / "two"


def assert_same_run(a: Path, b: Path) -> None:
    """The same samples in the same steps, losses that differ by the order of sums alone, checkpoints likewise."""
    there, here = read_metrics(a), read_metrics(b)
    for key in COUNTS:
        assert [line[key] for line in there] == [line[key] for line in here], key
    for key in ("loss", "grad_norm", "eval/loss"):
        values = [[line[key] for line in lines if key in line] for lines in (there, here)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5, err_msg=key)
    left, right = arrays(a, STEPS), arrays(b, STEPS)
    assert left.keys() == right.keys()
    for name in left:
        # Adam's update of an entry whose gradient is near zero follows the gradient's rounding: up to the rate.
        np.testing.assert_allclose(left[name], right[name], rtol=1e-3, atol=2e-4, err_msg=name)


# ---------------------------------------------------------------------------------------- the same run
def test_two_processes_equal_one_process(one_process_run: Path, two_process_run: Path) -> None:
    assert_same_run(one_process_run, two_process_run)
    assert read_json(two_process_run, "summary.json")["status"] == "completed"
    losses = [line["loss"] for line in read_metrics(one_process_run)]
    assert not np.allclose(losses[1:], losses[:-1], rtol=1e-4)  # a run that was one step off would be seen


def copy_first_half(run: Path, other: Path) -> None:
    """Copies a run as it was after its checkpoint of step 4."""
    shutil.copytree(run, other)
    for step in (8, STEPS):
        shutil.rmtree(other / "checkpoints" / str(step))
    (other / "lock").unlink()


def test_run_of_one_goes_on_as_two_that_are_preempted_twice_and_as_one(
    config: Path, one_process_run: Path, tmp_path: Path, start: Start
) -> None:
    """First while they start, when JAX's coordination service passes SIGTERM on; then between two steps."""
    run = tmp_path / "run"
    copy_first_half(one_process_run, run)
    processes = start([config, config], run)
    wait_for(processes, (run / "lock").exists)  # data, model and compiling are still to come
    processes[1].send_signal(signal.SIGTERM)
    ended = wait_for_end(processes)
    assert [code for code, _ in ended] == [75, 75], ended
    assert "resumed after step 4" in ended[0][1]
    assert all("notice that a machine is to be taken away after step" in text for _, text in ended)
    first = read_json(run, "summary.json")
    assert first["status"] == "preempted" and 4 < first["step"] < STEPS

    processes = start([config, config], run, pace_s=0.5)
    wait_for(processes, lambda: lines_of(run) > first["step"])
    processes[1].send_signal(signal.SIGTERM)
    ended = wait_for_end(processes)
    assert [code for code, _ in ended] == [75, 75], ended
    assert "another process was asked to stop" in ended[0][1] and "SIGTERM" in ended[1][1]
    second = read_json(run, "summary.json")
    assert second["status"] == "preempted" and first["step"] < second["step"] < STEPS

    assert run_alone(config, run) == 0
    assert_same_run(one_process_run, run)


# ---------------------------------------------------------------------------------------- errors
def test_an_error_of_the_main_process_ends_both(config: Path, tmp_path: Path, start: Start) -> None:
    """Only the main process locks the workdir."""
    run = tmp_path / "run"
    lock = FolderLock(run)
    ended = wait_for_end(start([config, config], run), 100)
    lock.release()
    assert [code for code, _ in ended] == [2, 2], ended
    assert f"another live process (process {os.getpid()} on " in ended[0][1]
    assert "error: process 0 failed: " in ended[1][1]


def test_a_config_error_before_the_processes_join_ends_both(config: Path, tmp_path: Path, start: Start) -> None:
    """The process that finds the error runs the coordination service, for which the other one waits."""
    bad = tmp_path / "bad.py"
    bad.write_text(config.read_text().replace("batch_size = 8", "batch_size = -8"))
    began = time.monotonic()
    ended = wait_for_end(start([bad, config], tmp_path / "run"), 100)
    assert [code for code, _ in ended] == [2, 2] and time.monotonic() - began < 60, ended
    assert "error: in the config, optim.batch_size=-8" in ended[0][1]
    assert "error: process 0 failed: in the config, optim.batch_size=-8" in ended[1][1]


# ---------------------------------------------------------------------------------------- a peer is lost
def test_a_peer_killed_before_the_first_step_ends_the_other(
    config: Path, one_process_run: Path, tmp_path: Path, start: Start
) -> None:
    """The next test kills one between two steps."""
    run = tmp_path / "run"
    copy_first_half(one_process_run, run)
    processes = start([config, config], run)
    wait_for(processes, (run / "lock").exists)
    processes[1].kill()
    code, text = wait_for_end([processes[0]])[0]
    assert code == 75, text
    assert text.splitlines()[-1].startswith("preempted: another process of this run has ended"), text
    assert "Traceback" not in text and "step 5/" not in text


# ---------------------------------------------------------------------------------------- in a bucket
def test_a_run_in_a_bucket_whose_main_process_is_killed_resumes_bit_equal(
    config: Path, two_process_run: Path, tmp_path: Path, start: Start
) -> None:
    """Each process has its own view of the bucket: it must see what the other has saved, deleted or moved."""
    with bucket.serve() as store:
        environment, keep = bucket.environment(store), "--config.checkpoint.keep_last=2"
        name: Any = f"gs://{bucket.NAME}/run"
        processes = start([config, config], name, keep, **environment)
        wait_for(processes, lambda: "run/checkpoints/8/manifest.json" in store.objects)
        processes[0].kill()
        code, text = wait_for_end([processes[1]])[0]
        assert code == 75 and f"{name}/checkpoints/" in text.splitlines()[-1], text
        assert "run/lock" in store.objects  # a dead writer's
        newest = max(int(key.split("/")[2]) for key in store.objects if key.endswith("/commit_success.txt"))
        store.put(
            b"{", {"name": f"run/checkpoints/{newest}/params/_METADATA"}
        )  # one process moves it away, both see it
        ended = wait_for_end(start([config, config], name, keep, **environment))
        assert [code for code, _ in ended] == [0, 0], ended
        assert newest == 8 and "resumed after step 4" in ended[0][1]
        assert "the checkpoint of step 8 is damaged" in ended[0][1]
        run = bucket.download(store, "run", tmp_path / "run")
    assert timeless(read_metrics(run)) == timeless(read_metrics(two_process_run))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "8", "damaged"]
    left, right = arrays(run, STEPS), arrays(two_process_run, STEPS)
    assert all(left[k].tobytes() == right[k].tobytes() for k in right) and left.keys() == right.keys()
    assert list((run / "tensorboard").iterdir()) and not (run / "lock").exists()
