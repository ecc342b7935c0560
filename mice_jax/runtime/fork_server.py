"""Runs trials of a sweep in processes that are forked from one whose imports are done.

The imports of `mice train` take longer than everything else that a small trial does. Python's own fork server
(multiprocessing) makes them once per worker of a sweep. It only imports: a process whose JAX has touched a device has
threads, and must not be forked.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from mice_jax.runtime import watchdog

if TYPE_CHECKING:
    from mice_jax.storage.paths import RunPath

PRELOADED = "mice_jax.runtime.fork_server_imports"


def run_forked(
    module: str, arguments: Sequence[str], workdir: "RunPath", environment: Mapping[str, str], log: Path
) -> int:
    """Runs the command of a module in a forked process and waits for it.

    Elsewhere than on Linux, where libraries of the system do not survive a fork, the command runs in a new process.

    Args:
        module: name of the command's module, whose `main(arguments)` returns the exit code.
        arguments: its command-line arguments.
        workdir: workdir of the run, for the report on a process that a signal ended.
        environment: variables in addition to those of this process when it ran its first command. Those that JAX reads
            when it is imported have no effect here.
        log: file to which stdout and stderr are appended.

    Returns:
        The exit code that this command should have.
    """
    if sys.platform != "linux":
        with log.open("a") as file:
            return watchdog.run_child(module, arguments, workdir, environment, file)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    reader, writer = context.Pipe(duplex=False)  # Nothing is written: it closes when this process ends.
    process = context.Process(target=_run, args=(module, arguments, environment, log, reader))
    process.start()
    reader.close()
    return watchdog.await_child(_Child(process), writer.close, workdir)


class _Child:
    """The part of subprocess.Popen that the watchdog uses."""

    def __init__(self, process: BaseProcess):
        self._process = process

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, sig: int, /) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, sig)


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path, parent: Connection) -> None:
    """Runs the command in this process, which was forked for it."""
    os.setsid()  # The Ctrl-C of a terminal reaches it once, through its parent.
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {**environment, watchdog.PARENT_PIPE: str(parent.fileno())}
    command = importlib.import_module(module)
    sys.argv = [str(command.__file__), *arguments]  # as for `python -m`
    sys.exit(command.main(list(arguments)))
