"""Differences between arms: how often an interval from three seeds misses the truth."""

import numpy as np
import pytest
from scipy import stats

from mice_jax.lab.compare import difference

REPEATS = 2000


def missed(scales: list[float], by_seeds: bool = False) -> float:
    """How often the interval of the first arm less the second misses the true 0.3, by simulation."""
    rng, misses = np.random.default_rng(1), 0
    for _ in range(REPEATS):
        arms = {i: rng.normal(0.3 * (i == 0), scale, 3) for i, scale in enumerate(scales)}
        if by_seeds:
            drawn = (arms[0] - arms[1])[rng.integers(0, 3, (600, 3))].mean(axis=1)
            low, high = np.quantile(drawn, [0.025, 0.975])
        else:
            found = difference(arms, [0], [1])
            low, high = found.low, found.high
        misses += not low <= 0.3 <= high
    return misses / REPEATS


# One in twenty, give or take three standard errors of 2,000 repeats (0.015). Welch's interval is a little too wide for
# so few seeds, and a little too narrow where one arm alone has noise: then its two degrees of freedom are estimated.
@pytest.mark.parametrize("scales", [[0.1] * 8, [1.0, 1.0] + [0.1] * 6, [0.1, 0.1] + [5.0] * 6, [1.0, 0.1]])
def test_an_interval_misses_the_true_difference_about_one_time_in_twenty(scales: list[float]) -> None:
    assert 0.02 < missed(scales) < 0.065 + 0.015
    assert missed(scales, by_seeds=True) > 0.2, "a bootstrap of three pairs is too sure"


def test_an_interval_is_scipy_s_of_welch_for_two_arms() -> None:
    arms = {"a": [1.0, 1.2, 1.15], "b": [2.0, 2.9, 2.2, 2.1]}
    theirs = stats.ttest_ind(arms["a"], arms["b"], equal_var=False).confidence_interval(0.95)
    ours = difference(arms, ["a"], ["b"])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    pooled = stats.ttest_ind(arms["a"], arms["b"], equal_var=True).confidence_interval(0.95)
    assert ours.high != pytest.approx(pooled.high, rel=1e-3)


def test_seeds_that_change_nothing_leave_a_point() -> None:
    same = difference({0: [1.0, 1.0], 1: [3.0, 3.0]}, [1], [0])
    assert (same.mean, same.low, same.high, same.sign) == (2.0, 2.0, 2.0, 1)


def test_a_difference_is_that_of_the_means_and_is_decided_where_its_interval_leaves_out_zero() -> None:
    arms = {"a": [1.0, 1.2, 1.1], "b": [2.0, 2.1, 2.2], "c": [1.0, 1.1, 1.2]}
    far, near = difference(arms, ["a"], ["b"]), difference(arms, ["a"], ["c"])
    assert far.mean == pytest.approx(-1.0) and far.sign == -1 and far.low < -1.0 < far.high
    assert difference(arms, ["b"], ["a"]).sign == 1
    assert near.mean == pytest.approx(0.0) and near.sign == 0
    both = difference(arms, ["a", "b"], ["c"])
    assert both.mean == pytest.approx((1.1 + 2.1) / 2 - 1.1)
    assert both.high - both.low < far.high - far.low, "two arms' mean is surer than one's"
