"""Why a run stops before its last step, decided in the same way by all of its processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mice_jax.checkpoint import Checkpoints
from mice_jax.errors import AgreedError, Preempted, StoppedByRule, UserError
from mice_jax.runtime import distributed
from mice_jax.runtime.signals import PreemptionHandler
from mice_jax.storage.paths import RunPath
from mice_jax.training.progress import Deadline


class Seen(NamedTuple):
    """What happened during a step, in this process or, once the processes have agreed, in any of them."""

    signal: bool = False  # SIGTERM, SIGINT or SIGUSR1
    preemption: bool = False  # a notice that a machine will be taken away
    time_limit: bool = False  # train.max_minutes have passed
    stop_rule: bool = False  # a stop rule applies
    benchmark_failed: bool = False
    save_time: bool = False  # checkpoint.every_minutes have passed


class Stop(NamedTuple):
    """The decision to stop after a step; `error` is raised once that step is saved."""

    error: Exception


class Poll(NamedTuple):
    """What `StopSignals.poll` decides after a step."""

    save: bool  # the clock asks for a checkpoint
    stop: Stop | None


def decide(
    seen: Seen,
    *,
    step: int,
    is_last: bool,
    signal_name: str = "",
    rule_reason: str = "",
    failure: Exception | None = None,
    checkpoint: RunPath | Path | str = "",
) -> Stop | None:
    """Decides whether a run stops after a step, and with which error.

    A failed benchmark comes first, since the user has to fix it; then a stop rule; then whatever asked the run to make
    room, which no longer matters after the last step.

    Args:
      seen: what happened in any process.
      step: the step that was just done.
      is_last: whether it is the run's last step.
      signal_name: the name of the signal that this process received.
      rule_reason: the reason that the stop rule of this process gave.
      failure: the error of the benchmark that failed in this process.
      checkpoint: where the step is saved, for messages.

    Returns:
      The stop with its error, or None where the run continues.
    """
    if seen.benchmark_failed:
        return Stop(_benchmark_error(failure, checkpoint))
    if seen.stop_rule:
        reason = rule_reason or "the main process says why"
        return Stop(StoppedByRule(f"{reason}. Step {step} was the last, and is saved."))
    if is_last or not (seen.signal or seen.preemption or seen.time_limit):
        return None
    if seen.preemption and not seen.signal:
        why = "notice that a machine is to be taken away"
    elif signal_name:
        why = signal_name
    elif seen.time_limit:
        why = "train.max_minutes"
    else:
        why = "another process was asked to stop"
    return Stop(Preempted(f"{why} after step {step}; its state is saved, run the same command to continue."))


def _benchmark_error(failure: Exception | None, checkpoint: RunPath | Path | str) -> Exception:
    """The error of a run one of whose benchmarks could not be scored; a bug of ours keeps its own type."""
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
        first_step: int,
        total_steps: int,
        save_every_minutes: float,
        stop_rules: Callable[[dict[str, Any]], str] | None,
    ):
        """Starts to listen for preemption notices.

        Args:
          preemption: the handler of this process's signals.
          checkpoints: the run's checkpoints, whose coordination service knows of preemption notices.
          time_limit: when train.max_minutes have passed.
          first_step: the number of steps that were done before this process started.
          total_steps: the number of the run's last step.
          save_every_minutes: checkpoint.every_minutes; 0 = never.
          stop_rules: returns the reason to stop after a record, or ""; None in all but the main process.
        """
        self._preemption, self._checkpoints, self._time_limit = preemption, checkpoints, time_limit
        self._total_steps, self._stop_rules = total_steps, stop_rules
        self._noticed = checkpoints.preempted_before(first_step)
        self._save_timer = Deadline(save_every_minutes)

    def poll(self, step: int, record: dict[str, Any], failure: Exception | None) -> Poll:
        """Decides, in agreement with all processes, whether to save or to stop after a step.

        Args:
          step: the step that was just done.
          record: its metrics.
          failure: the error of a benchmark that could not be scored after it.

        Returns:
          Whether the clock asks for a checkpoint, and the stop, if any.
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
            signal_name=self._preemption.signal or "",
            rule_reason=reason,
            failure=failure,
            checkpoint=self._checkpoints.folder / str(step),
        )
        return Poll(seen.save_time, stop)

    def saved(self) -> None:
        """Restarts the clock of checkpoint.every_minutes."""
        self._save_timer.restart()
