"""A parent process for each process of a multi-process run, which reports how its child ended and forwards signals.

If a peer is lost, JAX's coordination service aborts the surviving processes from C++, and no Python code in them can
report it. The command that the user started therefore becomes a parent, which touches no device, starts itself again
as its child and waits. A child ends as soon as its parent is gone, so killing the visible command ends the run.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Protocol

from mice_jax.runtime import xla_flags

if TYPE_CHECKING:
    from mice_jax.storage.paths import RunPath

PARENT_PIPE = "MICE_JAX_PARENT_PIPE"  # variable of a child: the read end of a pipe that closes when its parent ends
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOST = "another process of this run has ended, or could not be reached"


class Child(Protocol):
    """A child process."""

    def wait(self) -> int:
        """Waits for its end; returns its exit code, which is negative if a signal ended it."""
        ...

    def send_signal(self, sig: int, /) -> None:
        """Sends it a signal."""
        ...


def is_child() -> bool:
    """Whether a parent of this module started this process."""
    return PARENT_PIPE in os.environ


def start_child(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, output: IO | None = None
) -> tuple[subprocess.Popen, int]:
    """Starts `python -m module` as a child of this process.

    Args:
        module: name of the module to run.
        arguments: its command-line arguments.
        environment: variables in addition to those of this process.
        output: file for its stdout and stderr; None = those of this process.

    Returns:
        The child, and the write end of a pipe; closing it terminates the child.
    """
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**xla_flags.HUGE_PAGES_ENV, **os.environ, **(environment or {}), PARENT_PIPE: str(read_end)},
        stdout=output,
        stderr=output,
        pass_fds=[read_end],
        start_new_session=True,  # the Ctrl-C of a terminal reaches it once, through this process
    )
    os.close(read_end)
    return child, write_end


def run_child(
    module: str,
    arguments: Sequence[str],
    workdir: "RunPath",
    environment: Mapping[str, str] | None = None,
    output: IO | None = None,
) -> int:
    """Runs `python -m module` as a child of this process and waits for it.

    Args:
        module: name of the module to run.
        arguments: its command-line arguments.
        workdir: workdir of the run, for the report on a child that a signal ended.
        environment: variables in addition to those of this process.
        output: file for its stdout and stderr; None = those of this process.

    Returns:
        The exit code that this command should have.
    """
    child, write_end = start_child(module, arguments, environment, output)
    return await_child(child, lambda: os.close(write_end), workdir)


def await_child(child: Child, release: Callable[[], None], workdir: "RunPath") -> int:
    """Forwards signals to a child until it has ended.

    Args:
        child: the child.
        release: closes this process's end of the pipe to it.
        workdir: workdir of the run, for the report on a child that a signal ended.

    Returns:
        The exit code that this command should have.
    """
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        release()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else _report_signal(-code, workdir)


@functools.cache
def exit_when_parent_exits() -> None:
    """Starts a thread that kills this process as soon as its parent has ended; once, however often it is called."""
    pipe = int(os.environ[PARENT_PIPE])

    def wait() -> None:
        os.read(pipe, 1)  # returns when the other end closes, because nothing is ever written
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def broadcast_startup_error(address: tuple[str | None, int | None, int | None], error: str) -> None:
    """Sends an error of this process, which will not join the run, to the other processes, which wait for it.

    A separate process sends it, because JAX aborts a process whose peers do not join, and that must not change the
    exit code of this one.

    Args:
        address: the coordinator's address, the number of processes, and the number of this process.
        error: message of the error.
    """
    imports = "import json, sys; from mice_jax.runtime import distributed"
    program = f"{imports}; distributed.initialize(*json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", program, json.dumps([*address, error])]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _report_signal(number: int, workdir: "RunPath") -> int:
    """Prints which signal ended the child and what that means; returns the exit code of this command."""
    if number == signal.SIGABRT:
        return report_lost_peer(workdir)
    name = signal.Signals(number).name
    hint = " The system kills processes that use too much memory." if number == signal.SIGKILL else ""
    print(f"error: the training process was ended by {name}.{hint} {_how_to_resume(workdir)}", file=sys.stderr)
    return 128 + number


def report_lost_peer(workdir: "RunPath", cause: str = "") -> int:
    """Prints that a peer was lost, and the error by which that was noticed; returns the exit code of this command.

    The code is 75 if there is a checkpoint to resume from, else 1.
    """
    resumable = _newest_checkpoint(workdir) is not None
    word = "preempted" if resumable else "error"
    noticed = f" ({cause})" if cause else ""
    print(f"{word}: {LOST}, so this one ended too{noticed}. {_how_to_resume(workdir)}", file=sys.stderr, flush=True)
    return 75 if resumable else 1


def _how_to_resume(workdir: "RunPath") -> str:
    newest = _newest_checkpoint(workdir)
    if newest is None:
        return "There is no checkpoint yet. Run the same command in every process to start again."
    return f"The last checkpoint is {newest}; run the same command in every process to resume from it."


def _newest_checkpoint(workdir: "RunPath") -> "RunPath | None":
    import orbax.checkpoint as ocp  # The parent needs it only where its child was killed, and it imports jax.

    folder = workdir / "checkpoints"
    steps = ocp.utils.checkpoint_steps(str(folder)) if folder.is_dir() else []
    return folder / str(max(steps)) if steps else None
