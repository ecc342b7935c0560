"""SIGTERM and SIGINT: a run saves its state and stops after the step in progress."""

import multiprocessing
import os
import signal
from types import FrameType
from typing import NoReturn

import jax

from mice_jax.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class PreemptionHandler:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked this process to save and leave; a second SIGINT ends it at once.

    Until `start` is called there is nothing to save: one process alone leaves then and there, and one of several, whose
    others would miss it, in its first step. Of several JAX takes SIGTERM as they join, and tells it as a notice that
    the machine is to be taken away (Checkpoints.preempted_before), until `start` takes it back.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._started = False
        self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}

    def enable_saving(self) -> None:
        self._started = True
        if self.signal is None:
            for number in STOP_SIGNALS:
                signal.signal(number, self._ask)

    def restore_handlers(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self._started and not jax.distributed.is_initialized():
            said = f"preempted: {self.signal} before the first step: nothing is lost, run the same command to go on."
            _exit_at_once(Preempted.exit_code, said)
        said = "left at once, without saving: run the same command to go on from the last checkpoint"
        signal.signal(signal.SIGINT, lambda number, frame: _exit_at_once(128 + number, said))


def _exit_at_once(code: int, said: str) -> NoReturn:
    """Ends this process, as a kill would, amid a save too: what is not whole of it the next run removes."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, f"{said}\n".encode())
    os._exit(code)
