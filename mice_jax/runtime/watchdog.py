"""A parent for each process of a run of several: it says in words why its child ended, and passes signals on.

Where a peer is lost JAX's coordination service aborts the survivors from C++, with a signal and a log of its own; no
Python in them has a say. So the command that the user started becomes a parent that starts itself again as its child
and waits. It touches no device. A child whose parent is gone ends at once, so killing the command that the user sees
ends the run.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

import orbax.checkpoint as ocp

from mice_jax.runtime import xla_flags
from mice_jax.storage.paths import RunPath

CHILD = "MICE_JAX_PARENT_PIPE"  # in a child's environment: the end of a pipe that closes with its parent
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOST = "another process of this run has ended, or could not be reached"


def is_child() -> bool:
    return CHILD in os.environ


def start_child(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, output: IO | None = None
) -> tuple[subprocess.Popen, int]:
    """Starts `python -m module` under this process; also returns the end of the pipe that it lives by."""
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**xla_flags.HUGE_PAGES_ENV, **os.environ, **(environment or {}), CHILD: str(reading)},
        stdout=output,
        stderr=output,
        pass_fds=[reading],
        start_new_session=True,  # a terminal's Ctrl-C reaches it once, through here
    )
    os.close(reading)
    return child, writing


def run_child(
    module: str,
    arguments: Sequence[str],
    workdir: RunPath,
    environment: Mapping[str, str] | None = None,
    output: IO | None = None,
) -> int:
    """Runs `python -m module` under this process, and returns what the command's exit code is to be.

    `environment` is set beside this process's own; `output` is a file for what it says, None = where this one says it.
    """
    child, writing = start_child(module, arguments, environment, output)
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else _report_signal(-code, workdir)


def exit_with_parent() -> None:
    """Ends this process as soon as its parent has ended."""
    pipe = int(os.environ[CHILD])

    def wait() -> None:
        os.read(pipe, 1)  # nothing is ever written: it returns when the other end closes
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def broadcast_startup_error(place: tuple[str | None, int | None, int | None], refusal: str) -> None:
    """Tells the other processes, which wait for this one to join them, that it will not, and why.

    In a process of its own: JAX aborts one that waits in vain, which must not change the exit code of this one.
    """
    imports = "import json, sys; from mice_jax.runtime import distributed"
    program = f"{imports}; distributed.initialize(*json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", program, json.dumps([*place, refusal])]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _report_signal(number: int, workdir: RunPath) -> int:
    """Says which signal ended the child, and what it means."""
    if number == signal.SIGABRT:
        return report_lost_peer(workdir)
    name = signal.Signals(number).name
    mend = " The system kills what takes too much memory." if number == signal.SIGKILL else ""
    print(f"error: the training process was ended by {name}.{mend} {_how_to_resume(workdir)}", file=sys.stderr)
    return 128 + number


def report_lost_peer(workdir: RunPath, by: str = "") -> int:
    """Says that a peer was lost, and by what it was noticed; 75 where there is a checkpoint to go on from, else 1."""
    resumable = _newest_checkpoint(workdir) is not None
    word = "preempted" if resumable else "error"
    noticed = f" ({by})" if by else ""
    print(f"{word}: {LOST}, so this one ended too{noticed}. {_how_to_resume(workdir)}", file=sys.stderr, flush=True)
    return 75 if resumable else 1


def _how_to_resume(workdir: RunPath) -> str:
    newest = _newest_checkpoint(workdir)
    if newest is None:
        return "There is no checkpoint yet: run the same command in every process to start anew."
    return f"The last checkpoint is {newest}; run the same command in every process to go on from it."


def _newest_checkpoint(workdir: RunPath) -> RunPath | None:
    folder = workdir / "checkpoints"
    steps = ocp.utils.checkpoint_steps(str(folder)) if folder.is_dir() else []
    return folder / str(max(steps)) if steps else None
