"""A sweep's worker of two processes: each trial is one run of both, and the worker ends as a whole."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import place_flags, read_metrics, run_verb, start_train
from helpers.sweeps import await_none, kill, processes_of, results, start_sweep, sweep_file
from mice_jax import sweep
from mice_jax.errors import UserError
from mice_jax.sweeps import workers

RATE = "optim.learning_rate"
QUICK_LOSS = {"MICE_JAX_HEARTBEAT_S": "40"}


def start_two(file: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    both = {"JAX_NUM_CPU_DEVICES": "2"} | QUICK_LOSS
    return [start_sweep(file, workdir, "--worker", *place, **both) for place in place_flags(2)]


def ends(processes: list[subprocess.Popen[str]]) -> list[int]:
    try:
        print(*[p.communicate(timeout=800)[0] for p in processes], sep="\n")
    finally:
        for p in processes:
            p.kill()  # what is left of it; its run follows it
    return [p.returncode for p in processes]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_run_each_trial_together_and_go_on_after_one_was_lost(tmp_path: Path) -> None:
    body = "c.checkpoint.every_samples = 40\nc.data.phases[0].num_epochs = 12.0\n"
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2, 3e-3]}}", body)
    workdir = tmp_path / "sweep"
    both = start_two(file, workdir)
    metrics = workdir / "runs" / "0" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 8):
        assert time.monotonic() < until and all(p.poll() is None for p in both), ends(both)
        time.sleep(0.1)
    both[1].kill()
    assert ends(both) == [75, -signal.SIGKILL]
    await_none(workdir)
    codes = ends(start_two(file, workdir))
    if codes == [75, 75]:  # on a busy machine the two may miss each other, as any run of two may
        codes = ends(start_two(file, workdir))
    assert codes == [0, 0]
    await_none(workdir)
    assert [r["status"] for r in results(workdir)] == ["completed", "completed"]
    for row in results(workdir):
        run = workdir / "runs" / row["number"]
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step twice"
        assert (run / "log.txt").read_text().count("\ndone: ") == 1 and (run / "log.1.txt").exists()
    # One process of as many devices takes the same steps: both were in each of them.
    run = workdir / "runs" / "1"
    alone = start_train(run / "config.py", tmp_path / "alone", devices=4)
    said, _ = alone.communicate(timeout=400)
    assert alone.returncode == 0, said
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (run, tmp_path / "alone")]
    # Sums over devices go by another way; over 48 steps float32's rounding may grow.
    np.testing.assert_allclose(*losses, rtol=1e-3)
    slots = [[line["num_microbatches"] for line in read_metrics(folder)] for folder in (run, tmp_path / "alone")]
    assert slots[0] == slots[1]


@pytest.mark.slow
def test_the_others_end_with_the_first(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}", "c.data.phases[0].num_epochs = 4000.0\n")
    workdir = tmp_path / "sweep"
    both = start_two(file, workdir)
    until = time.monotonic() + 300
    while not any("mice_jax.train" in c and "process_id=1" in c for c in processes_of(workdir).values()):
        assert time.monotonic() < until and all(p.poll() is None for p in both), ends(both)
        time.sleep(0.1)
    kill(both[0].pid)
    assert ends(both) == [-signal.SIGKILL, 1]
    await_none(workdir)


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "JOIN_S", 0.3)
    address = place_flags(3)[0][0].partition("=")[2]
    with pytest.raises(UserError, match=r"of this worker's 3 processes, \[1, 2\] did not come within"):
        workers.Lead(workers.Place(address, 3, 0))
    with pytest.raises(UserError, match=r"was not reached at 127\.0\.0\.1:"):
        workers.follow(Path("/nowhere"), workers.Place(address, 3, 2))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--num_processes=2"], "are for a worker of several processes"),
        (["--worker", "--num_processes=2"], "--coordinator_address and --process_id missing"),
        (["--worker", "--num_processes=2", "--process_id=0", "--coordinator_address=here"], "must be host:port"),
    ],
)
def test_flags_that_make_no_launch_are_refused(flags: list[str], told: str, tmp_path: Path, capsys) -> None:
    file = sweep_file(tmp_path, f"axes={{'{RATE}': [1e-2]}}")
    assert run_verb(sweep.main, [f"--config={file}", f"--workdir={tmp_path / 'out'}", *flags]) == 2
    assert told in capsys.readouterr().err and not os.path.exists(tmp_path / "out")
