"""Keeps a worker process running on each share of the machine's devices."""

import dataclasses
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from mice_jax.errors import UserError
from mice_jax.runtime import watchdog

MAX_FUTILE_STARTS = 3  # starts of a worker in a row that failed before any trial ended


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    pipe: int  # the worker and its run end when this end of the pipe closes, at the latest with this process
    ended_at_start: int  # trials that had ended when the worker started
    futile_starts: int = 0


class WorkerPool:
    """The worker processes of a sweep on this machine.

    Args:
        arguments: arguments of the command that each worker runs.
        shares: the environment of each worker, which gives it its share of the devices.
        log: file for the workers' output.
        num_ended: returns how many trials have ended.
    """

    def __init__(
        self, arguments: Sequence[str], shares: Sequence[Mapping[str, str]], log: IO, num_ended: Callable[[], int]
    ):
        self._arguments, self._shares, self._log, self._num_ended = arguments, shares, log, num_ended
        self._is_leaving = False
        self._workers = [self._start(share) for share in shares]

    def _start(self, share: Mapping[str, str], futile_starts: int = 0) -> _Worker:
        process, pipe = watchdog.start_child("mice_jax.sweep", self._arguments, share, self._log)
        return _Worker(process, pipe, self._num_ended(), futile_starts)

    def forward(self, signal_number: int) -> None:
        """Passes a request to end on to every worker; from then on no worker is started again."""
        self._is_leaving = True
        for worker in self._workers:
            worker.process.send_signal(signal_number)

    def poll(self) -> bool:
        """Starts workers that died again; returns whether all workers have ended for good."""
        return all([self._has_ended(i) for i in range(len(self._workers))])

    def _has_ended(self, index: int) -> bool:
        worker = self._workers[index]
        exit_code = worker.process.poll()
        if exit_code is None:
            return False
        progressed = self._num_ended() != worker.ended_at_start
        futile_starts = 0 if exit_code < 0 or progressed else worker.futile_starts + 1
        if self._is_leaving or not needs_restart(exit_code, futile_starts):
            return True
        os.close(worker.pipe)
        self._workers[index] = self._start(self._shares[index], futile_starts)
        return False

    def close(self) -> None:
        """Ends the workers that still run, and their runs with them."""
        for worker in self._workers:
            os.close(worker.pipe)


def needs_restart(exit_code: int, futile_starts: int) -> bool:
    """Decides whether a worker that has ended is started again.

    Args:
        exit_code: the worker's exit code, negative where a signal killed it.
        futile_starts: starts in a row, this one included, that failed before any trial ended.
    """
    if exit_code in (0, UserError.exit_code):
        return False
    return exit_code < 0 or futile_starts < MAX_FUTILE_STARTS
