"""Counters, the spike threshold, deadlines."""

import math

import pytest

from mice_jax.training import progress as progress_module
from mice_jax.training.progress import MIN_NORMS, NORMS_KEPT, Deadline, Progress, crosses_multiple

pytestmark = pytest.mark.smoke

BATCH = {"samples": 8, "tokens": 100, "loss_tokens": 60, "phase": 0}


def after(norms: list[float]) -> Progress:
    progress = Progress()
    for norm in norms:
        progress = progress.advance(BATCH, norm, skipped=False)
    return progress


def test_counters_add_up_over_the_run() -> None:
    progress = Progress().advance(BATCH, 1.0, skipped=False).advance(BATCH, 9.0, skipped=True)
    assert progress.counters() == {"samples": 16, "tokens": 200, "loss_tokens": 120}
    assert progress.skipped == 1 and progress.norms == (1.0, 9.0)
    for counts in ({"a": 60, "b": 0}, {"a": 20, "b": 40}):
        progress = progress.advance(BATCH | {"loss_tokens_by_source": counts}, 1.0, skipped=False)
    assert {k: v for k, v in progress.counters().items() if "/" in k} == {
        "train/a/loss_tokens": 80,
        "train/b/loss_tokens": 40,
    }


def test_a_spike_is_a_multiple_of_the_median_of_the_latest_norms() -> None:
    norms = [1.0, 2.0, 3.0] * MIN_NORMS
    assert after(norms).spike_threshold(5.0) == 10.0
    assert after(norms).spike_threshold(0.0) == math.inf  # off
    assert after(norms[: MIN_NORMS - 1]).spike_threshold(5.0) == math.inf  # too few to tell


def test_a_norm_that_stays_high_is_soon_no_spike() -> None:
    progress = after([1.0] * NORMS_KEPT)
    assert progress.spike_threshold(3.0) == 3.0 < 10.0
    for _ in range(NORMS_KEPT // 2 + 1):
        progress = progress.advance(BATCH, 10.0, skipped=True)
    assert progress.spike_threshold(3.0) == 30.0 > 10.0


@pytest.mark.parametrize(
    ("before", "after", "every", "due"), [(7, 8, 8, True), (8, 9, 8, False), (0, 100, 8, True), (7, 8, 0, False)]
)
def test_a_multiple_is_crossed_once_by_the_step_that_reaches_it(before: int, after: int, every: int, due: bool) -> None:
    assert crosses_multiple(before, after, every) == due


def test_a_deadline_passes_after_its_minutes_and_can_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    deadline, never = Deadline(2.0), Deadline(0.0)
    now[0] += 119.9
    assert not deadline.passed()
    now[0] += 0.1
    assert deadline.passed() and not never.passed()
    deadline.restart()
    assert not deadline.passed()
