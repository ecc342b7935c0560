"""Counters, spikes and alarms."""

import math

import pytest

from mice_jax.training import progress as progress_module
from mice_jax.training.progress import NORMS_KEPT, NORMS_NEEDED, Alarm, Progress, crosses

BATCH = {"samples": 8, "tokens": 100, "loss_tokens": 60, "phase": 0}


def after(norms: list[float]) -> Progress:
    progress = Progress()
    for norm in norms:
        progress = progress.after(BATCH, norm, skipped=False)
    return progress


def test_counters_add_up_over_the_run() -> None:
    progress = Progress().after(BATCH, 1.0, skipped=False).after(BATCH, 9.0, skipped=True)
    assert progress.counters() == {"samples": 16, "tokens": 200, "loss_tokens": 120}
    assert progress.skipped == 1 and progress.norms == (1.0, 9.0)


def test_a_spike_is_so_many_times_the_median_of_the_latest_norms() -> None:
    norms = [1.0, 2.0, 3.0] * NORMS_NEEDED
    assert after(norms).spike(5.0) == 10.0
    assert after(norms).spike(0.0) == math.inf  # off
    assert after(norms[: NORMS_NEEDED - 1]).spike(5.0) == math.inf  # too few to tell


def test_a_norm_that_stays_high_is_soon_no_spike() -> None:
    progress = after([1.0] * NORMS_KEPT)
    assert progress.spike(3.0) == 3.0 < 10.0
    for _ in range(NORMS_KEPT // 2 + 1):
        progress = progress.after(BATCH, 10.0, skipped=True)
    assert progress.spike(3.0) == 30.0 > 10.0


@pytest.mark.parametrize(
    ("before", "after", "every", "due"), [(7, 8, 8, True), (8, 9, 8, False), (0, 100, 8, True), (7, 8, 0, False)]
)
def test_what_is_due_by_samples_is_due_once_at_or_past_each_multiple(
    before: int, after: int, every: int, due: bool
) -> None:
    assert crosses(before, after, every) == due


def test_an_alarm_rings_when_its_minutes_are_over_and_not_again_once_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    alarm, never = Alarm(2.0), Alarm(0.0)
    now[0] += 119.9
    assert not alarm.rings()
    now[0] += 0.1
    assert alarm.rings() and not never.rings()
    alarm.set()
    assert not alarm.rings()
