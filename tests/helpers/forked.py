"""Commands in processes forked from one whose imports are done, for tests that start many.

The imports are most of what a tiny run in a process of its own costs. `runs.start_train` starts the command as a user
does; test_launch.py shows that such processes are signalled, killed and lost in the same way.
"""

import functools
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

import pytest

from helpers.runs import ENVIRONMENT
from mice_jax.runtime import fork_server


class ForkedCommand:
    """A forked process, with the part of subprocess.Popen that tests use; stdout and stderr share one file."""

    def __init__(
        self, name: str, arguments: Sequence[str], devices: int, environment: Mapping[str, str], pace_s: float = 0.0
    ):
        self._name = name
        self.stdout = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        output = f"/proc/{os.getpid()}/fd/{self.stdout.fileno()}"
        self._process = _server().Process(
            target=_run, args=(name, arguments, devices, dict(environment), pace_s, output)
        )
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code once the process has ended, negative if a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the process has ended; returns the exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"mice {self._name}", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits until the process has ended; returns what it printed."""
        self.wait(timeout)
        if not self.stdout.closed:
            self.stdout.seek(0)
            self._printed = self.stdout.read()
            self.stdout.close()
        return self._printed, None

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it still runs."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Asks the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the process."""
        self.send_signal(signal.SIGKILL)


def fork_train(
    config: Path, workdir: Path, *flags: str, devices: int = 8, pace_s: float = 0.0, **more: str
) -> ForkedCommand:
    """Starts `mice train` in a forked process, which a test may signal or kill.

    Args:
        config: the run's config file.
        workdir: the run's workdir.
        *flags: further flags of the command.
        devices: the number of the process's CPU devices.
        pace_s: seconds for which the run waits after it has written the line of a step, for a test that acts on it.
        **more: further environment variables.

    Returns:
        The process.
    """
    return ForkedCommand(
        "train", [f"--config={config}", f"--workdir={workdir}", *flags], devices, os.environ | more, pace_s
    )


@functools.cache
def _server() -> ForkServerContext:
    """Starts the fork server of this test process, which ends with it."""
    context = multiprocessing.get_context("forkserver")
    # `pytest` is the main module of this process, which every forked process imports again.
    context.set_forkserver_preload([fork_server.PRELOADED, "pytest", __name__])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


# ---------------------------------------------------------------------------------------- in the forked process
def _run(
    name: str, arguments: Sequence[str], devices: int, environment: Mapping[str, str], pace_s: float, output: str
) -> NoReturn:
    """Runs the command as `python -m` does: one of several processes forks the one that trains."""
    import fsspec.config
    import jax

    from mice_jax.cli import command
    from mice_jax.runtime import distributed, watchdog

    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ |= {**environment, "JAX_NUM_CPU_DEVICES": str(devices)}
    gc.set_threshold(20_000, 20, 100)  # as conftest.py does
    # What was read from the environment when these were imported.
    jax.config.update("jax_num_cpu_devices", devices)
    fsspec.config.set_conf_env(fsspec.config.conf)
    distributed.HEARTBEAT_S = int(environment.get("MICE_JAX_HEARTBEAT_S", distributed.HEARTBEAT_S))
    watchdog.start_child = _fork_child
    if pace_s:
        _wait_after_steps(pace_s)
    module = importlib.import_module(f"mice_jax.{name}")
    sys.argv = [str(module.__file__), *arguments]
    code = command.early_exit(name, arguments)
    sys.exit(module.main(arguments) if code is None else code)


def _wait_after_steps(seconds: float) -> None:
    """Makes runs of this process wait after each line of a step in metrics.jsonl."""
    from mice_jax.training.writers import JsonlWriter

    write = JsonlWriter.write

    def write_and_wait(self: JsonlWriter, record: dict[str, Any]) -> None:
        write(self, record)
        time.sleep(seconds)

    JsonlWriter.write = write_and_wait


class _Child:
    """A process forked by this one, as the watchdog needs it."""

    def __init__(self, pid: int):
        self.pid = pid

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number: int, /) -> None:
        os.kill(self.pid, number)


def _fork_child(module: str, arguments: Sequence[str], *_: Any) -> tuple[_Child, int]:
    """Takes the place of `watchdog.start_child`."""
    from mice_jax import train
    from mice_jax.runtime import watchdog

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)
        return _Child(pid), write_end
    code = 1
    try:
        os.close(write_end)
        os.setsid()
        os.environ[watchdog.PARENT_PIPE] = str(read_end)
        code = train.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
