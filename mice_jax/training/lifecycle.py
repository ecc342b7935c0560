"""The ways in which a run can end, in one place.

`lifecycle` is the context of a whole run, from its lock to its last file. However the run ends, it closes the metric
writers, writes summary.json, closes the checkpoints and gives the lock back, in this order, and turns what happened
into the error whose exit code the command returns.
"""

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mice_jax.checkpoint import Checkpoints
from mice_jax.errors import AgreedError, Interrupted, Paused, Preempted, StoppedByRule, StoreError, UserError, one_line
from mice_jax.runtime import distributed, watchdog
from mice_jax.runtime.signals import PreemptionHandler
from mice_jax.step import TrainState
from mice_jax.storage.paths import RunPath
from mice_jax.storage.provenance import environment
from mice_jax.storage.workdir import Workdir
from mice_jax.training.progress import Progress
from mice_jax.training.writers import Writer

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Any other error is a failure.
STATUS = {StoppedByRule: "stopped", Paused: "paused", Preempted: "preempted", Interrupted: "preempted"}


class Run:
    """A run in progress: its workdir, and the state that summary.json reports.

    Attributes:
      workdir: The run's workdir.
      preemption: The handler of this process's signals.
      progress: The run's counters.
      record: The latest line of metrics.jsonl.
      start: The number of steps that were done before this process started.
      saved_step: The newest step that was saved, or is being saved.
    """

    def __init__(self, workdir: RunPath, owns_process: bool):
        self.workdir = Workdir(workdir)
        self.preemption = PreemptionHandler(owns_process)
        self.progress = Progress()
        self.record: dict[str, Any] = {}
        self.start = 0
        self.saved_step = 0
        self._checkpoints: Checkpoints | None = None
        self._writers: list[Writer] = []
        self._stop_compiling: Callable[[], None] = lambda: None

    def begin(
        self,
        start: int,
        progress: Progress,
        checkpoints: Checkpoints,
        writers: list[Writer],
        stop_compiling: Callable[[], None],
    ) -> None:
        """Marks the start of training. From now on the run writes a summary, and saves before a signal stops it.

        Args:
          start: The number of steps that are done.
          progress: The counters after these steps.
          checkpoints: The run's checkpoints.
          writers: The writers of the run's records.
          stop_compiling: Ends the compilation of programs that no step has needed yet.
        """
        self.start = self.saved_step = start
        self.progress, self._checkpoints, self._writers = progress, checkpoints, writers
        self._stop_compiling = stop_compiling
        self.preemption.enable_saving()

    def log(self, record: dict[str, Any], answers: Sequence[Mapping[str, str]] = ()) -> None:
        """Passes a step's record to every writer, and stores what the model answered after that step."""
        self.record = record
        for writer in self._writers:
            writer.write(record)
        if distributed.is_main_process():
            self.workdir.log_answers(record["step"], answers)

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Saves a state unless its step is saved already. The lines of metrics.jsonl are stored first.

        Args:
          state: The state after a step.
          score: The step's value of checkpoint.best_metric; None if the checkpoint may not be selected.
        """
        step = int(jax.device_get(state.step))
        if step == self.saved_step:
            return
        assert self._checkpoints is not None, "training has begun"
        with distributed.raise_on_all_processes():
            self.workdir.sync()
        self._checkpoints.save(state, dataclasses.asdict(self.progress), score)
        self.saved_step = step

    def check_lock(self) -> None:
        """Raises UserError in every process if another run has locked the workdir."""
        with distributed.raise_on_all_processes():
            self.workdir.check_lock()

    def _finish(self, status: str, reason: str) -> None:
        while self._writers:
            self._writers.pop().close()
        if distributed.is_main_process():
            self.workdir.log_event(status, int(self.record.get("step", self.start)))
            self._write_summary(status, reason)

    def _write_summary(self, status: str, reason: str) -> None:
        last_metrics = self.record or (self.workdir.read_json("summary.json") or {}).get("last_metrics", {})
        summary = {
            "status": status,
            "reason": reason,
            "step": self.saved_step,
            "samples": self.progress.samples,
            "last_metrics": last_metrics,
        }
        self.workdir.write_json("summary.json", summary | environment())

    def _fail(self, error: BaseException) -> BaseException:
        """Writes the summary of a run that ends with an error; returns the error that the command reports."""
        # Closing the checkpoints would wait for a lost process forever.
        if distributed.is_lost_peer_error(error):
            if distributed.is_main_process():
                self._write_summary("failed", watchdog.LOST)
            self.workdir.close()
            os._exit(watchdog.report_lost_peer(self.workdir.path, one_line(error)))
        assert self._checkpoints is not None, "training has begun"
        if isinstance(error, StoreError) and (newest := self._checkpoints.last_committed_step()) is not None:
            checkpoint = self._checkpoints.folder / str(newest)
            error = Preempted(f"{error} Run the same command to continue from {checkpoint}, which is complete.")
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            error = UserError(
                f"{self.workdir.path} cannot be written: {error.strerror}. Make room, and run the same command to "
                "resume from the last checkpoint."
            )
        try:
            self._finish(STATUS.get(type(error), "failed"), str(error) or type(error).__name__)
        except OSError as e:  # A full disk, perhaps, which is what `error` says too.
            print(f"summary.json of {self.workdir.path} could not be written: {one_line(e)}", file=sys.stderr)
        return error


@contextlib.contextmanager
def lifecycle(workdir: RunPath, owns_process: bool = True) -> Iterator[Run]:
    """Provides the context of a run, from before its workdir is locked until the lock is released.

    If one of several processes fails alone, it prints its error and ends at once. The others then notice that it is
    gone, instead of waiting for it in the next collective.

    Args:
      workdir: The run's workdir, which is not locked yet.
      owns_process: Whether this process runs nothing but the run, so that a signal may end it.

    Yields:
      The run. The caller locks its `workdir`, and calls `begin` before the first step.

    Raises:
      Preempted: The checkpoint store failed, and there is a checkpoint to continue from.
    """
    run = Run(workdir, owns_process)
    try:
        with run.workdir, _summary(run):
            yield run
    except (AgreedError, StoppedByRule, Preempted):  # Every process of the run raises these.
        raise
    except BaseException as error:
        if watchdog.is_child():
            if distributed.is_lost_peer_error(error):
                os._exit(watchdog.report_lost_peer(workdir, one_line(error)))
            distributed.exit_immediately(error)
        raise
    finally:
        run.preemption.restore_handlers()


@contextlib.contextmanager
def _summary(run: Run) -> Iterator[None]:
    """Writes summary.json and closes the checkpoints, once training has begun."""
    try:
        yield
        run._finish("completed", "")
        with distributed.raise_on_all_processes():
            run.workdir.sync()
    except BaseException as error:
        if run._checkpoints is None:
            raise
        reported = run._fail(error)
        if reported is error:
            raise
        raise reported from error
    finally:
        if run._checkpoints is not None:
            run._stop_compiling()
            run._checkpoints.close()
