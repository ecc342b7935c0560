"""Sweeps for tests: settings without files, sweep files over the tiny runs of `runs`, and readers of their results."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna

from helpers.runs import ENVIRONMENT, REPOSITORY, setting
from mice_jax.config import Config, Phase, Source, Sweep

SWEEP_FILE = '''"""A sweep of a test."""

import importlib.util
from mice_jax.config import Sweep
spec = importlib.util.spec_from_file_location("base", {base!r})
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=base.get_config(), {fields})
'''
BASE_FILE = '''"""A config of a test that is valid and never run."""

from mice_jax.config import Config, Phase, Source


def get_config(arg: str = "") -> Config:
    c = Config()
    c.model.init_from = "models/mouse"
    c.data.phases = [Phase(sources=[Source(path="chats.jsonl")])]
    c.data.validation_fraction = 0.2
    return c
'''


def small_sweep(**fields: Any) -> Sweep:
    """Returns a valid sweep whose model and data do not exist."""
    c = Config()
    c.model.init_from = "models/mouse"
    c.data.phases = [Phase(name="one", num_epochs=4.0, sources=[Source(path="chats.jsonl")])]
    sweep = Sweep(base=c, **fields)
    sweep.validate()
    return sweep


def write_sweep_file(folder: Path, fields: str) -> Path:
    """Writes the file of a sweep that is never run; `fields` are its arguments as Python source."""
    folder.mkdir(exist_ok=True)
    base, file = folder / "base.py", folder / "sweep.py"
    base.write_text(BASE_FILE)
    file.write_text(SWEEP_FILE.format(base=str(base), fields=fields))
    return file


def sweep_file(folder: Path, fields: str, body: str = "", samples: int = 40, held_out: bool = True) -> Path:
    """Writes data, model and file of a sweep that can run; `body` sets fields of its base."""
    validation = "c.data.validation_fraction = 0.2\n" if held_out else ""
    base = setting(
        folder, f"c.data.phases[0].num_epochs = 4.0\n{validation}c.log.trackers = []\n{body}", samples=samples
    )
    file = folder / "sweep.py"
    file.write_text(SWEEP_FILE.format(base=str(base), fields=fields))
    return file


# ---------------------------------------------------------------------------------------- processes
def start_sweep(file: Path, workdir: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `mice sweep` as a separate process."""
    command = [sys.executable, "-m", "mice_jax.sweep", f"--config={file}", f"--workdir={workdir}", *flags]
    own = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=own, **pipes)


def run_sweep(file: Path, workdir: Path, *flags: str, **environment: str) -> str:
    """Runs a sweep that must succeed; returns its output."""
    process = start_sweep(file, workdir, *flags, **environment)
    output, _ = process.communicate(timeout=500)
    logs = "".join(f"{f}:\n{f.read_text()[-1500:]}" for f in workdir.rglob("*.txt"))
    assert process.returncode == 0, output + logs
    return output


def processes_of(workdir: Path) -> dict[int, list[str]]:
    """Returns the commands and open files of all other processes that name a folder, by process id.

    A trial is known by its open log: its command is that of the fork server.
    """
    named = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                files = [os.readlink(file) for file in (entry / "fd").iterdir()]
            except OSError:  # it has just ended
                continue
            if found := [text for text in (command, *files) if str(workdir) in text]:
                named[int(entry.name)] = found
    return named


def await_no_process(workdir: Path, within_s: float = 30.0) -> None:
    """Waits until no process names a folder in its command or has a file in it open."""
    deadline = time.monotonic() + within_s
    while left := processes_of(workdir):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def kill(process: int) -> None:
    """Kills a process by its id."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


# ---------------------------------------------------------------------------------------- results
def results(workdir: Path) -> list[dict[str, str]]:
    """Returns the rows of results.csv."""
    with (workdir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def study_of(workdir: Path) -> optuna.Study:
    """Loads the study of a sweep."""
    return optuna.load_study(study_name=None, storage=f"sqlite:///{workdir / 'study.db'}")
