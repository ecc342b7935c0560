"""Why a run stops, as a table; and what one process asks of the others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mice_jax.errors import AgreedError, Paused, Preempted, StoppedByRule, UserError
from mice_jax.runtime import distributed
from mice_jax.training import stop_signals
from mice_jax.training.progress import Deadline
from mice_jax.training.stop_signals import Seen, StopSignals, decide

pytestmark = pytest.mark.smoke

BUG, TASK = RuntimeError("our own"), UserError("the task 'arc' fails.")


@pytest.mark.parametrize(
    ("seen", "is_last", "error", "words"),
    [
        (Seen(), False, None, ""),
        (Seen(save_time=True), False, None, ""),  # a save is no stop
        (Seen(signal=True), False, Preempted, "SIGTERM after step 7; its state is saved"),
        (Seen(preemption=True), False, Preempted, "notice that a machine is to be taken away after step 7"),
        (Seen(signal=True, preemption=True), False, Preempted, "SIGTERM after step 7"),
        (Seen(time_limit=True), False, Preempted, "SIGTERM after step 7"),  # the signal of this process says more
        (Seen(signal=True, preemption=True, time_limit=True), True, None, ""),  # the run is complete
        (Seen(stop_rule=True), False, StoppedByRule, "it diverges. Step 7 was the last, and is saved."),
        (Seen(stop_rule=True, signal=True), False, StoppedByRule, "it diverges"),
        (Seen(benchmark_failed=True), True, AgreedError, "the task 'arc' fails. The step is saved in run/7"),
        (Seen(benchmark_failed=True, stop_rule=True, signal=True), False, AgreedError, "the task 'arc' fails."),
    ],
)
def test_decide_ranks_failures_over_rules_over_requests(
    seen: Seen, is_last: bool, error: type[Exception] | None, words: str
) -> None:
    stop = decide(
        seen,
        step=7,
        is_last=is_last,
        signal_name="SIGTERM",
        rule_reason="it diverges",
        failure=TASK,
        checkpoint="run/7",
    )
    assert (type(stop) if stop else None) == error
    assert words in str(stop or "")


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (Seen(signal=True), "another process was asked to stop after step 7"),
        (Seen(time_limit=True), "train.max_minutes after step 7"),
        (Seen(stop_rule=True), "the main process says why. Step 7"),
        (Seen(benchmark_failed=True), "another process says why its tasks could not be scored. The step is saved"),
    ],
)
def test_decide_in_a_process_that_did_not_see_the_cause(seen: Seen, words: str) -> None:
    stop = decide(seen, step=7, is_last=False)
    assert stop is not None and words in str(stop)


def test_a_bug_in_a_benchmark_keeps_its_own_type() -> None:
    stop = decide(Seen(benchmark_failed=True), step=7, is_last=False, failure=BUG)
    assert stop is not None and stop is BUG


class FakeCheckpoints:
    """Gives the preemption notice of one step."""

    folder = Path("run")

    def __init__(self, notice_at: int | None = None):
        self.notice_at = notice_at

    def preempted_before(self, start: int) -> bool:
        return self.notice_at is not None and start >= self.notice_at

    def reached_preemption(self, step: int) -> bool:
        return step == self.notice_at


def signals_of(signal: str | None = None, notice_at: int | None = None, **changes: Any) -> StopSignals:
    given: dict[str, Any] = {"steps_done": 0, "total_steps": 10, "save_every_minutes": 0.0, "stop_rules": None}
    handler: Any = SimpleNamespace(signal=signal)
    checkpoints: Any = FakeCheckpoints(notice_at)
    return StopSignals(handler, checkpoints, Deadline(0.0), **(given | changes))


@pytest.mark.parametrize(
    ("seen", "is_last", "error"),
    [
        (Seen(), False, Paused),
        (Seen(), True, None),
        (Seen(signal=True), False, Preempted),
        (Seen(time_limit=True), False, Preempted),
        (Seen(stop_rule=True), False, StoppedByRule),
    ],
)
def test_planned_pause_yields_to_every_other_reason(seen: Seen, is_last: bool, error: type[Exception] | None) -> None:
    stop = decide(seen, step=7, is_last=is_last, pauses=True, rule_reason="it diverges")
    assert (type(stop) if stop else None) == error
    if error is Paused:
        assert "train.pause_at_share after step 7" in str(stop) and Paused.exit_code == 75


def test_run_pauses_after_its_step_only() -> None:
    signals = signals_of(pause_at=4)
    assert [type(signals.poll(step, {}, None).stop) for step in (3, 4, 5)] == [type(None), Paused, type(None)]


def test_poll_asks_the_rules_of_every_step_but_the_last() -> None:
    asked: list[dict[str, Any]] = []
    signals = signals_of(stop_rules=lambda record: asked.append(record) or "it is dead")
    stop = signals.poll(3, {"loss": 1.0}, None).stop
    assert stop and "it is dead. Step 3" in str(stop)
    assert signals.poll(10, {"loss": 2.0}, None).stop is None
    assert asked == [{"loss": 1.0}]


def test_a_preemption_notice_is_remembered() -> None:
    signals = signals_of(notice_at=4)
    assert signals.poll(3, {}, None).stop is None
    first, later = signals.poll(4, {}, None).stop, signals.poll(5, {}, None).stop
    assert first and later and isinstance(later, Preempted)
    assert signals_of(notice_at=4, steps_done=4).poll(5, {}, None).stop, "a notice from before the first step"


def test_the_save_clock_restarts_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mice_jax.training.progress.time.monotonic", lambda: now[0])
    signals = signals_of(save_every_minutes=1.0)
    assert not signals.poll(1, {}, None).save
    now[0] = 61.0
    assert signals.poll(2, {}, None).save
    signals.saved()
    assert not signals.poll(3, {}, None).save


def test_a_flag_that_another_process_raises_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag is agreed on by its name: a swapped order would stop for the wrong reason."""
    for name in Seen._fields:
        others = Seen(**{name: True})
        agreed = lambda *here, others=others: [a or b for a, b in zip(here, others, strict=True)]  # noqa: E731
        monkeypatch.setattr(distributed, "any_across_processes", agreed)
        poll = signals_of().poll(2, {}, None)
        assert poll.save == (name == "save_time")
        expected = decide(others, step=2, is_last=False, checkpoint="run/2")
        assert str(poll.stop) == str(expected)
    assert stop_signals.distributed is distributed
