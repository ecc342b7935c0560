"""Decides whether a run stops before its last step. All processes of the run come to the same decision."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mice_jax.checkpoint import Checkpoints
from mice_jax.errors import AgreedError, Interrupted, Paused, Preempted, StoppedByRule, UserError
from mice_jax.runtime import distributed
from mice_jax.runtime.signals import PreemptionHandler
from mice_jax.storage.paths import RunPath
from mice_jax.training.progress import Deadline


class Seen(NamedTuple):
    """The events of a step in this process or, after the processes have agreed, in any of them.

    Attributes:
      signal: The process received SIGTERM, SIGINT or SIGUSR1.
      preemption: There is a notice that a machine will be preempted.
      time_limit: train.max_minutes have passed.
      stop_rule: A stop rule applies.
      benchmark_failed: A benchmark could not be scored.
      save_time: checkpoint.every_minutes have passed.
    """

    signal: bool = False
    preemption: bool = False
    time_limit: bool = False
    stop_rule: bool = False
    benchmark_failed: bool = False
    save_time: bool = False


class Poll(NamedTuple):
    """The decisions of `StopSignals.poll` after a step.

    Attributes:
      save: Whether checkpoint.every_minutes have passed, so that a checkpoint is due.
      stop: The error with which the run stops once the step is saved; None if it continues.
    """

    save: bool
    stop: Exception | None


def decide(
    seen: Seen,
    *,
    step: int,
    is_last: bool,
    pauses: bool = False,
    signal_name: str = "",
    rule_reason: str = "",
    failure: Exception | None = None,
    checkpoint: RunPath | Path | str = "",
) -> Exception | None:
    """Decides whether a run stops after a step, and with which error.

    A failed benchmark has priority, because the user has to fix it. A stop rule comes second. Signals, preemption and
    the time limit come next, then a planned pause; they do not matter after the last step.

    Args:
      seen: The events in any process.
      step: The step that was just done.
      is_last: Whether it is the run's last step.
      pauses: Whether the run pauses after this step by its config.
      signal_name: The name of the signal that this process received.
      rule_reason: The reason that the stop rule of this process gave.
      failure: The error of the benchmark that failed in this process.
      checkpoint: The checkpoint of the step, for messages.

    Returns:
      The error with which the run stops, or None if it continues.
    """
    if seen.benchmark_failed:
        return _benchmark_error(failure, checkpoint)
    if seen.stop_rule:
        reason = rule_reason or "the main process says why"
        return StoppedByRule(f"{reason}. Step {step} was the last, and is saved.")
    interrupted = seen.signal or seen.preemption or seen.time_limit
    if is_last or not (interrupted or pauses):
        return None
    if not interrupted:
        return paused(step)
    if seen.preemption and not seen.signal:
        why = "notice that a machine is to be taken away"
    elif signal_name:
        why = signal_name
    elif seen.time_limit:
        why = "train.max_minutes"
    else:
        why = "another process was asked to stop"
    kind = Interrupted if why == signal.SIGINT.name else Preempted
    return kind(f"{why} after step {step}; its state is saved, run the same command to continue.")


def paused(step: int) -> Paused:
    """Returns the error of a run that has come to train.pause_at_share with this step, or an earlier one."""
    return Paused(
        f"train.pause_at_share after step {step}; its state is saved. Run the same command with "
        "--config.train.pause_at_share=0, or a later share, to continue."
    )


def _benchmark_error(failure: Exception | None, checkpoint: RunPath | Path | str) -> Exception:
    """Returns the error of a run with a benchmark that could not be scored. A bug in this package keeps its type."""
    if failure and not isinstance(failure, UserError):
        return failure
    return AgreedError(
        f"{failure or 'another process says why its tasks could not be scored.'} The step is saved in {checkpoint}, "
        "without the missing scores: fix the task or remove it from eval.tasks, then run the same command to continue, "
        "and `mice evaluate` to score that step."
    )


class StopSignals:
    """Collects the reasons to stop from this process and agrees on them with the others."""

    def __init__(
        self,
        preemption: PreemptionHandler,
        checkpoints: Checkpoints,
        time_limit: Deadline,
        *,
        steps_done: int,
        total_steps: int,
        save_every_minutes: float,
        pause_at: int = 0,
        stop_rules: Callable[[dict[str, Any]], str] | None,
    ):
        """Starts to listen for preemption notices.

        Args:
          preemption: The handler of this process's signals.
          checkpoints: The run's checkpoints, whose coordination service knows of preemption notices.
          time_limit: The deadline of train.max_minutes.
          steps_done: The number of steps that were done before this process started.
          total_steps: The number of the run's last step.
          save_every_minutes: The value of checkpoint.every_minutes; 0 means never.
          pause_at: The step after which the run pauses; 0 never pauses.
          stop_rules: Returns the reason to stop after a record, or ""; None in all but the main process.
        """
        self._preemption, self._checkpoints, self._time_limit = preemption, checkpoints, time_limit
        self._total_steps, self._pause_at, self._stop_rules = total_steps, pause_at, stop_rules
        self._noticed = checkpoints.preempted_before(steps_done)
        self._save_timer = Deadline(save_every_minutes)

    def poll(self, step: int, record: dict[str, Any], failure: Exception | None) -> Poll:
        """Decides, in agreement with all processes, whether to save or to stop after a step.

        Args:
          step: The step that was just done.
          record: The metrics of the step.
          failure: The error of a benchmark that could not be scored after the step.

        Returns:
          Whether a checkpoint is due by the clock, and the error to stop with, if any.
        """
        is_last = step == self._total_steps
        reason = self._stop_rules(record) if self._stop_rules and not is_last else ""
        self._noticed |= self._checkpoints.reached_preemption(step)
        here = Seen(
            signal=self._preemption.signal is not None,
            preemption=self._noticed,
            time_limit=self._time_limit.passed(),
            stop_rule=bool(reason),
            benchmark_failed=failure is not None,
            save_time=self._save_timer.passed(),
        )
        seen = Seen(*distributed.any_across_processes(*here))
        self._noticed = seen.preemption
        stop = decide(
            seen,
            step=step,
            is_last=is_last,
            pauses=step == self._pause_at,
            signal_name=self._preemption.signal or "",
            rule_reason=reason,
            failure=failure,
            checkpoint=self._checkpoints.folder / str(step),
        )
        return Poll(seen.save_time, stop)

    def saved(self) -> None:
        """Restarts the clock of checkpoint.every_minutes."""
        self._save_timer.restart()
