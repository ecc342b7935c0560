"""SIGTERM, SIGINT and SIGUSR1: a run saves its state and stops after the step in progress."""

import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

import jax

from mice_jax.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class PreemptionHandler:
    """Records a signal that asks this process to save and stop; a second SIGINT ends it at once.

    Until `enable_saving` is called there is nothing to save: a single process exits on the signal, and one of several
    stops in its first step, since the others would otherwise miss it. While several processes join, JAX replaces the
    handler of SIGTERM and reports that signal as a preemption notice (see Checkpoints.preempted_before);
    `enable_saving` installs this handler again.

    In a Python program of the user's, such as a notebook, a signal that would end the process is passed to the handler
    that was there before, which for SIGINT raises KeyboardInterrupt. In a thread other than the main one, where Python
    allows no handlers, there are none.

    Args:
        owns_process: whether this process runs nothing but the run.

    Attributes:
        signal: name of the signal that arrived, or None.
    """

    def __init__(self, owns_process: bool = True) -> None:
        self.signal: str | None = None
        self._owns_process, self._can_save = owns_process, False
        numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def enable_saving(self) -> None:
        """Declares that the run has begun: from now on a signal stops it after the step in progress."""
        self._can_save = True
        if self.signal is None:
            for number in self._previous:
                signal.signal(number, self._handle)

    def restore_handlers(self) -> None:
        """Installs the handlers that were in place before this one."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self._can_save and not jax.distributed.is_initialized():
            kind = "interrupted" if number == signal.SIGINT else "preempted"
            message = f"{kind}: {self.signal} before the first step. Nothing is lost; run the same command again."
            self._end(number, Preempted.exit_code, message)
        message = "stopped at once, without saving: run the same command to resume from the last checkpoint"
        signal.signal(signal.SIGINT, lambda number, frame: self._end(number, 128 + number, message))

    def _end(self, number: int, code: int, message: str) -> None:
        if self._owns_process:
            _exit_at_once(code, message)
        signal.signal(number, self._previous[signal.Signals(number)])
        signal.raise_signal(number)


def _exit_at_once(code: int, message: str) -> NoReturn:
    """Ends this process as a kill would, even during a save; the next run removes the incomplete checkpoint."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, f"{message}\n".encode())
    os._exit(code)
