"""Two real processes of four devices each against one of eight; and what becomes of one when the other is gone."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import bucket
from helpers.runs import (
    arrays,
    lines_of,
    make_chats,
    place_flags,
    read_json,
    read_metrics,
    run_train,
    setting,
    start_train,
    timeless,
    write_jsonl,
)

pytestmark = pytest.mark.slow
STEPS = 20
HEARTBEAT_S = "10"
COUNTS = ("step", "phase", "epoch", "samples", "tokens", "loss_tokens", "learning_rate", "num_microbatches")

Processes = list[subprocess.Popen[str]]
Start = Callable[..., Processes]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """What starts a run of two processes; whatever is left of it at the end is killed."""
    started: Processes = []

    def start(configs: Sequence[Path], run: Path, *flags: str, **more: str) -> Processes:
        for config, place in zip(configs, place_flags(2), strict=True):
            heartbeat = {"MICE_JAX_HEARTBEAT_S": HEARTBEAT_S}
            started.append(start_train(config, run, *flags, *place, devices=4, **heartbeat, **more))
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


def ends(processes: Processes, seconds: float = 150) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    until = time.monotonic() + seconds
    told = [process.communicate(timeout=max(1, until - time.monotonic()))[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


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
        "c.data.phases[0].num_epochs = 4",
        f"c.data.validation = [Source(path='{held}')]",
        "c.eval.every_samples = 100",
        "c.checkpoint.every_samples = 56",  # steps 7 and 14, in the middle of an epoch of five
        "c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 2, 2",
    ]
    return setting(folder, "\n".join(body))


@pytest.fixture(scope="module")
def one(config: Path, folder: Path) -> Path:
    """The run by one process of eight devices."""
    assert run_train(config, folder / "one") == 0
    assert len(read_metrics(folder / "one")) == STEPS
    return folder / "one"


@pytest.fixture(scope="module")
def two(config: Path, folder: Path) -> Path:
    """The run by two processes of four devices each."""
    with starting() as start:
        told = ends(start([config, config], folder / "two"))
    assert [code for code, _ in told] == [0, 0], told
    assert "step 20/20" in told[0][1] and "step 20/20" not in told[1][1]  # the lead speaks, for both
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
def test_two_processes_do_what_one_does(one: Path, two: Path) -> None:
    assert_same_run(one, two)
    assert read_json(two, "summary.json")["status"] == "completed"
    losses = [line["loss"] for line in read_metrics(one)]
    assert not np.allclose(losses[1:], losses[:-1], rtol=1e-4)  # a run that was one step off would be seen


def from_half(run: Path, other: Path) -> None:
    """A copy of a run as it was after its checkpoint of step 7."""
    shutil.copytree(run, other)
    for step in (14, 20):
        shutil.rmtree(other / "checkpoints" / str(step))


def test_what_two_processes_left_one_goes_on_with(config: Path, one: Path, two: Path, tmp_path: Path) -> None:
    from_half(two, tmp_path / "run")
    assert run_train(config, tmp_path / "run") == 0
    assert_same_run(one, tmp_path / "run")


def test_what_one_process_left_two_go_on_with(config: Path, one: Path, two: Path, tmp_path: Path, start: Start) -> None:
    from_half(one, tmp_path / "run")
    told = ends(start([config, config], tmp_path / "run"))
    assert [code for code, _ in told] == [0, 0], told
    assert "resumed after step 7" in told[0][1]
    assert_same_run(two, tmp_path / "run")


# ---------------------------------------------------------------------------------------- refusals
def test_what_one_process_refuses_none_waits_for(config: Path, tmp_path: Path, start: Start) -> None:
    """The other host's data has a bad line."""
    here = setting(tmp_path / "here")
    there = tmp_path / "there.py"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    good = tmp_path / "here" / "chats.jsonl"
    there.write_text(here.read_text())
    process = start([here, there], tmp_path / "run", "--config.seed=1")
    assert [code for code, _ in ends(process)] == [0, 0]  # the control: the two configs are the same
    good.rename(tmp_path / "moved.jsonl")
    began = time.monotonic()
    told = ends(start([here, there], tmp_path / "run2"), 100)
    assert [code for code, _ in told] == [2, 2] and time.monotonic() - began < 60, told
    assert all("chats.jsonl" in text.splitlines()[-1] for _, text in told)


def test_processes_of_different_configs_refuse_and_say_so(config: Path, tmp_path: Path, start: Start) -> None:
    here = setting(tmp_path / "here")
    there = tmp_path / "here" / "there.py"
    there.write_text(here.read_text().replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
    told = ends(start([here, there], tmp_path / "run"), 100)
    assert [code for code, _ in told] == [2, 2], told
    assert all("do not have the same config" in text for _, text in told)


def test_a_lead_that_alone_refuses_is_repeated_by_the_other(config: Path, tmp_path: Path, start: Start) -> None:
    """Only the lead looks at what a workdir was made with."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"seed": 5}')
    told = ends(start([config, config], run), 100)
    assert [code for code, _ in told] == [2, 2], told
    assert "was made with another config" in told[0][1]
    assert "error: process 0 refused: " in told[1][1]


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_config_that_one_process_alone_refuses_is_told_to_the_other(
    refusing: int, config: Path, tmp_path: Path, start: Start
) -> None:
    """It is refused before the processes join; the other would wait for as long as it waits for any."""
    bad = tmp_path / "bad.py"
    bad.write_text(config.read_text().replace("batch_size = 8", "batch_size = -8"))
    configs = [config, config]
    configs[refusing] = bad
    began = time.monotonic()
    told = ends(start(configs, tmp_path / "run"), 100)
    assert [code for code, _ in told] == [2, 2] and time.monotonic() - began < 60, told
    assert "error: in the config, optim.batch_size=-8" in told[refusing][1]
    assert f"error: process {refusing} refused: in the config, optim.batch_size=-8" in told[1 - refusing][1]


# ---------------------------------------------------------------------------------------- a peer is lost
def two_that_begin(run: Path, config: Path, half_of: Path | None, start: Start) -> Processes:
    """Two processes that have the lock, with data, model and compiling still to come; they may go on from a half."""
    if half_of:
        from_half(half_of, run)
        (run / "lock").unlink()
    processes = start([config, config], run)
    wait_for(processes, (run / "lock").exists)
    return processes


@pytest.mark.parametrize("saved", [True, False])
def test_a_peer_that_is_lost_before_the_first_step_ends_the_other_with_a_word(
    saved: bool, config: Path, one: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    processes = two_that_begin(run, config, one if saved else None, start)
    processes[1].kill()
    code, text = ends([processes[0]])[0]
    assert code == (75 if saved else 1), text
    word = "preempted" if saved else "error"
    assert text.splitlines()[-1].startswith(f"{word}: another process of this run has ended"), text
    assert "Traceback" not in text and f"step {8 if saved else 1}/" not in text


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_peer_ends_the_other_with_a_word_and_the_run_goes_on(
    victim: int, config: Path, two: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    processes = start([config, config], run)
    wait_for(processes, lambda: lines_of(run) >= 8)
    began = time.monotonic()
    processes[victim].kill()
    code, text = ends([processes[1 - victim]])[0]
    assert time.monotonic() - began < 120
    assert code == 75, text
    last = text.splitlines()[-1]
    assert last.startswith("preempted: another process of this run has ended") and "checkpoints/" in last
    told = ends(start([config, config], run))
    assert [code for code, _ in told] == [0, 0], told
    assert timeless(read_metrics(run)) == timeless(read_metrics(two))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_notice_that_comes_while_a_run_starts_is_heard_by_both_in_the_first_steps(
    resumed: bool, config: Path, two: Path, tmp_path: Path, start: Start
) -> None:
    """SIGTERM is then jax's own, which tells the coordination service, and that the other process."""
    run = tmp_path / "run"
    processes = two_that_begin(run, config, two if resumed else None, start)
    processes[1].send_signal(signal.SIGTERM)
    told = ends(processes)
    assert [code for code, _ in told] == [75, 75], told
    assert all("notice that a machine is to be taken away after step" in text for _, text in told)
    assert read_json(run, "summary.json")["status"] == "preempted" and 0 < lines_of(run) < STEPS
    told = ends(start([config, config], run))
    assert [code for code, _ in told] == [0, 0], told
    assert timeless(read_metrics(run)) == timeless(read_metrics(two))


def test_one_that_is_asked_to_leave_takes_the_other_along(
    config: Path, two: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    processes = start([config, config], run)
    wait_for(processes, lambda: lines_of(run) >= 3)
    processes[1].send_signal(signal.SIGTERM)
    told = ends(processes)
    assert [code for code, _ in told] == [75, 75], told
    assert "another process was asked to leave" in told[0][1] and "SIGTERM" in told[1][1]
    assert read_json(run, "summary.json")["status"] == "preempted"
    told = ends(start([config, config], run))
    assert [code for code, _ in told] == [0, 0], told
    assert timeless(read_metrics(run)) == timeless(read_metrics(two))


# ---------------------------------------------------------------------------------------- in a bucket
def test_two_processes_on_a_bucket_lose_their_lead_and_end_as_two_on_disk(
    config: Path, two: Path, tmp_path: Path, start: Start
) -> None:
    """Each has its own view of the bucket: what the lead has saved, deleted or set aside, the other has to see."""
    with bucket.serve() as store:
        environment, keep = bucket.environment(store), "--config.checkpoint.keep_last=2"
        name: Any = f"gs://{bucket.NAME}/run"
        processes = start([config, config], name, keep, **environment)
        wait_for(processes, lambda: "run/checkpoints/14/manifest.json" in store.objects)
        processes[0].kill()
        code, text = ends([processes[1]])[0]
        assert code == 75 and f"{name}/checkpoints/" in text.splitlines()[-1], text
        newest = max(int(key.split("/")[2]) for key in store.objects if key.endswith("/commit_success.txt"))
        store.put(b"{", {"name": f"run/checkpoints/{newest}/params/_METADATA"})  # set aside by one, seen by both
        told = ends(start([config, config], name, keep, **environment))
        assert [code for code, _ in told] == [0, 0], told
        assert newest == 14 and "resumed after step 7" in told[0][1]
        run = bucket.download(store, "run", tmp_path / "run")
    assert timeless(read_metrics(run)) == timeless(read_metrics(two))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["14", "20", "damaged"]
    left, right = arrays(run, STEPS), arrays(two, STEPS)
    assert all(left[k].tobytes() == right[k].tobytes() for k in right) and left.keys() == right.keys()
    assert not (run / "lock").exists()
