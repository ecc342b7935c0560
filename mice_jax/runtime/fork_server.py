"""Runs trials of a sweep in processes that are forked from one whose imports are done, several trials in each.

The imports of `mice train`, and tracing and compiling its programs, take longer than everything else that a small trial
does. Python's own fork server (multiprocessing) makes the imports once per worker of a sweep. It only imports: a
process whose JAX has touched a device has threads, and must not be forked. A forked process runs one trial after
another, and keeps what it has traced and compiled.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from mice_jax.runtime import watchdog

if TYPE_CHECKING:
    from mice_jax.storage.paths import RunPath

PRELOADED = "mice_jax.runtime.fork_server_imports"
# After one of these exit codes (done, stopped by a rule, paused or preempted) a process runs further commands. After
# an error it ends, so that nothing of it reaches the next command.
GOES_ON_AFTER = (0, 3, 75)
MAX_BYTES_KEPT = 2**26  # A process whose arrays of an earlier command take more memory than this ends too.


class CommandProcess:
    """A forked process that runs commands one after another, and is replaced by a new one where it has ended."""

    def __init__(self) -> None:
        self._settings: Hashable = None
        self._child: _Child | None = None

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        workdir: "RunPath",
        environment: Mapping[str, str],
        log: Path,
        settings: Hashable = None,
    ) -> int:
        """Runs the command of a module and waits for it.

        Elsewhere than on Linux, where libraries of the system do not survive a fork, each command runs in a new
        process.

        Args:
            module: name of the command's module, whose `main(arguments)` returns the exit code.
            arguments: its command-line arguments.
            workdir: workdir of the run, for the report on a process that a signal ended.
            environment: variables in addition to those of this process when it ran its first command. Those that JAX
                reads when it is imported have no effect here.
            log: file to which stdout and stderr are appended.
            settings: what a process settles once, such as the number of its devices. A command whose settings differ
                from those of the one before runs in a new process.

        Returns:
            The exit code that this command should have.
        """
        if sys.platform != "linux":
            with log.open("a") as file:
                return watchdog.run_child(module, arguments, workdir, environment, file)
        if settings != self._settings or (self._child and not self._child.is_waiting()):
            self.close()
        self._settings = settings
        child = self._child or _Child()
        self._child = None
        child.begin(module, arguments, environment, log)
        code = watchdog.await_child(child, lambda: None, workdir)
        if child.has_ended():
            child.close()
        else:
            self._child = child
        return code

    def close(self) -> None:
        """Ends the process."""
        if self._child:
            self._child.close()
        self._child = None


class _Child:
    """The part of subprocess.Popen that the watchdog uses, of a process that runs several commands."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._messages, messages = context.Pipe()
        alive, self._parent = context.Pipe(duplex=False)  # Nothing is written: it closes when this process ends.
        self._process: BaseProcess = context.Process(target=_run_commands, args=(messages, alive))
        self._process.start()
        messages.close()
        alive.close()

    def begin(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Begins a command; `wait` returns its exit code."""
        with contextlib.suppress(OSError):  # A process that is killed now is reported by `wait`.
            self._messages.send((module, list(arguments), dict(environment), str(log)))

    def wait(self) -> int:
        try:
            return self._messages.recv()
        except (EOFError, OSError):
            self._process.join()
            assert self._process.exitcode is not None
            return self._process.exitcode

    def has_ended(self) -> bool:
        """Whether the process is known to have ended, so that it runs no further command."""
        return self._process.exitcode is not None

    def is_waiting(self) -> bool:
        """Whether the process waits for a command; where it was killed, its end of the pipe is closed."""
        return not self._messages.poll()

    def send_signal(self, sig: int, /) -> None:
        if not self.has_ended() and self._process.pid is not None:
            os.kill(self._process.pid, sig)

    def close(self) -> None:
        """Ends the process and waits for its end."""
        self._messages.close()
        self._parent.close()
        self._process.join()


def _run_commands(messages: Connection, parent: Connection) -> None:
    """Runs commands in this process, which was forked for them, until its parent wants no more of them."""
    os.setsid()  # The Ctrl-C of a terminal reaches it once, through its parent.
    os.environ[watchdog.PARENT_PIPE] = str(parent.fileno())
    while True:
        try:
            module, arguments, environment, log = messages.recv()
        except (EOFError, OSError):
            return
        code = _run(module, arguments, environment, log)
        if code not in GOES_ON_AFTER or _bytes_kept() > MAX_BYTES_KEPT:
            sys.exit(code)
        messages.send(code)


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> int:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ |= environment
    command = importlib.import_module(module)
    sys.argv = [str(command.__file__), *arguments]  # as for `python -m`
    code = command.main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _bytes_kept() -> int:
    """Returns the bytes of the arrays that the commands of this process have left behind."""
    import jax  # The process that only starts others does not import it.

    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())
