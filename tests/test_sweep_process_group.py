"""A sweep's worker of several processes: every process takes part in each trial, and all of them end together."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.runs import place_flags, read_json, read_metrics, run_verb
from helpers.sweeps import (
    await_no_process,
    kill,
    processes_of,
    results,
    start_sweep,
    sweep_file,
    write_sweep_file,
)
from mice_jax import sweep
from mice_jax.errors import UserError
from mice_jax.sweeps import process_group, workers
from mice_jax.sweeps.process_group import Followers, ProcessSpec

RATE = "optim.learning_rate"
SHORT_HEARTBEAT = {"MICE_JAX_HEARTBEAT_S": "40"}


def start_two(file: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    environment = {"JAX_NUM_CPU_DEVICES": "1"} | SHORT_HEARTBEAT
    return [start_sweep(file, workdir, "--worker", *flags, **environment) for flags in place_flags(2)]


def exit_codes(processes: list[subprocess.Popen[str]]) -> list[int]:
    try:
        print(*[p.communicate(timeout=800)[0] for p in processes], sep="\n")
    finally:
        for p in processes:
            p.kill()  # a run ends with the process that started it
    return [p.returncode for p in processes]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_run_each_trial_and_resume_after_one_was_lost(tmp_path: Path) -> None:
    body = "c.checkpoint.every_samples = 40\nc.data.phases[0].num_epochs = 8.0\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}", body)
    workdir = tmp_path / "sweep"
    both = start_two(file, workdir)
    metrics = workdir / "runs" / "0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 8):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both), exit_codes(both)
        time.sleep(0.02)
    both[1].kill()
    assert exit_codes(both) == [75, -signal.SIGKILL]
    await_no_process(workdir)
    codes = exit_codes(start_two(file, workdir))
    if codes == [75, 75]:  # on a busy machine the two may not find each other in time, as any run of two may
        codes = exit_codes(start_two(file, workdir))
    assert codes == [0, 0]
    await_no_process(workdir)
    assert [r["status"] for r in results(workdir)] == ["completed", "completed"]
    for row in results(workdir):
        run = workdir / "runs" / row["number"]
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step is there twice"
        assert (run / "log.txt").read_text().count("\ndone: ") == 1 and (run / "log.1.txt").exists()
        # Both devices, one of each process, take part in each step; test_two_processes compares its numbers.
        assert read_json(run, "config.json")["resolved"]["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.slow
def test_followers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}", "c.data.phases[0].num_epochs = 4000.0\n")
    workdir = tmp_path / "sweep"
    both = start_two(file, workdir)
    deadline = time.monotonic() + 300
    while not any("log.1.txt" in text for texts in processes_of(workdir).values() for text in texts):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both), exit_codes(both)
        time.sleep(0.1)
    kill(both[0].pid)
    assert exit_codes(both) == [-signal.SIGKILL, 1]
    await_no_process(workdir)


def test_process_that_does_not_connect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "JOIN_TIMEOUT_S", 0.3)
    address = place_flags(3)[0][0].partition("=")[2]
    with pytest.raises(UserError, match=r"of this worker's 3 processes, \[1, 2\] did not connect within"):
        Followers(ProcessSpec(address, 3, 0))
    with pytest.raises(UserError, match=r"could not be reached at 127\.0\.0\.1:"):
        workers.follow_main_process(Path("/nowhere"), ProcessSpec(address, 3, 2))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_processes=2"], "are for a worker of several processes"),
        (["--worker", "--num_processes=2"], "--coordinator_address and --process_id missing"),
        (["--worker", "--num_processes=2", "--process_id=0", "--coordinator_address=here"], "must be host:port"),
    ],
)
def test_incomplete_launch_flags_are_an_error(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    file = write_sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}")
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}", *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
