"""Kills a run many times, at random instants and during saves, and compares its results with an undisturbed run.

    python bench/faults.py                                   # 50 kills, 20 of a pair of processes, 20 SIGTERMs
    python bench/faults.py --kills=4 --pair_kills=2 --terms=2

A tiny model saves at every fifth step, on 8 CPU devices: 8 of one process, or 4 of each of two. Half of the kills
wait until a checkpoint is half written; the others come at a random instant, from the first second of the process on.
When a run is complete, its metrics.jsonl (except for times) and every array of its last checkpoint must be bit-equal
to those of an undisturbed run with the same number of processes; then the next run starts. The benchmark prints a
table, and exits with 1 at any difference. It takes about 20 minutes, most of it to start processes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "MICE_JAX_HEARTBEAT_S": "10"}

from helpers.runs import ENVIRONMENT, assert_equal_runs, lines_of, place_flags, read_metrics, saving, setting
from mice_jax.storage.workdir import EVENTS

STEPS = 200
FLAGS = ["--config.checkpoint.every_samples=40", "--config.checkpoint.keep_last=2"]
START_S = 6.0  # approximate time from the start of a process to its first step
PATIENCE_S = 120.0  # limit for processes to end after a fault
JOINING_S = 180.0  # limit if a process was killed before its peer joined, since the peer waits 100 s for it
WHOLE_S = 600.0  # limit for a run to complete

Processes = list[subprocess.Popen[bytes]]


def start(config: Path, run: Path, count: int, log: Path) -> Processes:
    """Starts the `count` processes of a run."""
    environment = os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(8 // count)}
    started = []
    for place in place_flags(count):
        command = [sys.executable, "-m", "mice_jax.train", f"--config={config}", f"--workdir={run}", *FLAGS]
        command += place if count > 1 else []
        with log.open("ab") as out:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    return started


def begun(run: Path) -> int:
    """Returns the number of a run's events; a start adds one once its processes have joined."""
    file = run / EVENTS
    return len(file.read_text().splitlines()) if file.exists() else 0


def leave(processes: Processes, within_s: float) -> list[int]:
    """Waits until all processes have ended; returns their exit codes."""
    until = time.monotonic() + within_s
    try:
        return [p.wait(max(1.0, until - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            p.kill()


class Campaign:
    """Faults of one kind on runs with a fixed number of processes."""

    def __init__(self, config: Path, folder: Path, count: int, rng: random.Random):
        self._config, self._folder, self._count, self._rng = config, folder, count, rng
        self._log = folder / "log"
        self._undisturbed = folder / f"undisturbed_{count}"
        assert leave(start(config, self._undisturbed, count, self._log), WHOLE_S) == [0] * count
        assert lines_of(self._undisturbed) == STEPS
        self.runs = self.amid_saves = self.begun_again = 0
        self._run = folder / f"run_{count}_0"

    def hit(self, number: signal.Signals, amid_save: bool) -> None:
        """Injects one fault; a run that completes before it is compared, and the next run gets the fault."""
        while True:
            before = begun(self._run)
            processes = start(self._config, self._run, self._count, self._log)
            if self._wait(processes, amid_save):
                break
            self._finish(leave(processes, WHOLE_S))
        self.amid_saves += saving(self._run)
        self.begun_again += lines_of(self._run) == 0
        self._rng.choice(processes).send_signal(number)
        joined = self._count == 1 or begun(self._run) > before
        try:
            codes = leave(processes, PATIENCE_S if joined else JOINING_S)
        except subprocess.TimeoutExpired:
            print(self._log.read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        if number == signal.SIGTERM:
            assert all(code == 75 for code in codes), codes
        else:
            assert all(code != 0 for code in codes), codes
            assert self._count == 1 or any(code in (1, 75) for code in codes), codes

    def _wait(self, processes: Processes, amid_save: bool) -> bool:
        """Waits until the moment of the fault; returns False if the run ends before it."""
        lines = lines_of(self._run)
        further = lines + self._rng.randint(1, 12)
        until = time.monotonic() + self._rng.uniform(0.5, 1.5 * START_S)
        while all(p.poll() is None for p in processes):
            if amid_save and lines_of(self._run) >= further and saving(self._run):
                return True
            if not amid_save and time.monotonic() > until:
                return True
            time.sleep(0.0005)
        return False

    def end(self) -> None:
        """Completes and compares the last run."""
        self._finish(leave(start(self._config, self._run, self._count, self._log), WHOLE_S))

    def _finish(self, codes: list[int]) -> None:
        assert codes == [0] * self._count, codes
        assert_equal_runs(self._run, self._undisturbed, STEPS)
        samples = [line["samples"] for line in read_metrics(self._run)]
        assert samples == [8 * (i + 1) for i in range(STEPS)]
        self.runs += 1
        self._run = self._folder / f"run_{self._count}_{self.runs}"


def main() -> None:
    """Runs the benchmark."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=50, help="SIGKILLs of a run of one process (50)")
    flags.add_argument("--pair_kills", type=int, default=20, help="SIGKILLs of one of two processes (20)")
    flags.add_argument("--terms", type=int, default=20, help="SIGTERMs of a run of one process (20)")
    flags.add_argument("--seed", type=int, default=0)
    asked = flags.parse_args()
    rng = random.Random(asked.seed)
    print("| fault | processes | faults | amid a save | before any line | runs completed, all bit-equal | minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = setting(folder / "in", "c.data.phases[0].num_epochs = 5", samples=8 * STEPS // 5)
        for kind, number, faults, count in (
            ("SIGKILL", signal.SIGKILL, asked.kills, 1),
            ("SIGKILL", signal.SIGKILL, asked.pair_kills, 2),
            ("SIGTERM", signal.SIGTERM, asked.terms, 1),
        ):
            if not faults:
                continue
            began = time.monotonic()
            (folder / f"{kind}_{count}").mkdir()
            campaign = Campaign(config, folder / f"{kind}_{count}", count, rng)
            for i in range(faults):
                campaign.hit(number, amid_save=number == signal.SIGTERM or i % 2 == 0)
            campaign.end()
            minutes = (time.monotonic() - began) / 60
            done = [kind, count, faults, campaign.amid_saves, campaign.begun_again, campaign.runs, f"{minutes:.1f}"]
            print("| " + " | ".join(map(str, done)) + " |", flush=True)


if __name__ == "__main__":
    main()
