"""What tests of sweeps are built from: a sweep's file over the tiny runs of `runs`, and what it left."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna

from helpers.runs import ENVIRONMENT, REPOSITORY, setting

OPENING = '''"""A sweep of a test."""

import importlib.util
from mice_jax.config import Sweep
spec = importlib.util.spec_from_file_location("base", {base!r})
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=base.get_config(), {body})
'''


def sweep_file(folder: Path, sweep: str, body: str = "", samples: int = 40, held_out: bool = True) -> Path:
    """A sweep's file, whose `sweep` is what it gives beside its base, whose `body` sets fields of the base."""
    validation = "c.data.validation_fraction = 0.2\n" * held_out
    base = setting(
        folder, f"c.data.phases[0].num_epochs = 4.0\n{validation}c.log.trackers = []\n{body}", samples=samples
    )
    file = folder / "sweep.py"
    file.write_text(OPENING.format(base=str(base), body=sweep))
    return file


def start_sweep(file: Path, workdir: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mice_jax.sweep", f"--config={file}", f"--workdir={workdir}", *flags]
    own = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=own, **pipes)


def run_sweep(file: Path, workdir: Path, *flags: str, **environment: str) -> str:
    process = start_sweep(file, workdir, *flags, **environment)
    said, _ = process.communicate(timeout=500)
    logs = "".join(f"{f}:\n{f.read_text()[-1500:]}" for f in workdir.rglob("*.txt"))
    assert process.returncode == 0, said + logs
    return said


def results(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def study_of(workdir: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{workdir / 'study.db'}")


def processes_of(workdir: Path) -> dict[int, str]:
    """The processes whose command names a folder, but this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(workdir) in command:
                found[int(entry.name)] = command
    return found


def await_none(workdir: Path, within_s: float = 30.0) -> None:
    until = time.monotonic() + within_s
    while left := processes_of(workdir):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
