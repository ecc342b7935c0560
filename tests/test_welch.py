"""The mouse study's intervals, against SciPy's, and how often they miss a true difference."""

import sys

import numpy as np
import pytest
from scipy import stats

from helpers.runs import REPOSITORY

sys.path.append(str(REPOSITORY / "studies" / "mouse"))
from welch import difference

pytestmark = pytest.mark.smoke


def test_interval_of_two_arms_equals_scipy_s_welch_interval() -> None:
    arms = {"a": [1.0, 1.2, 1.15], "b": [2.0, 2.9, 2.2, 2.1]}
    reference = stats.ttest_ind(arms["a"], arms["b"], equal_var=False).confidence_interval(0.95)
    d = difference(arms, ["a"], ["b"])
    assert (d.low, d.high) == pytest.approx((reference.low, reference.high), rel=1e-12)
    pooled = stats.ttest_ind(arms["a"], arms["b"], equal_var=True).confidence_interval(0.95)
    assert d.high != pytest.approx(pooled.high, rel=1e-3)


def test_difference_is_decided_where_its_interval_excludes_zero() -> None:
    arms = {"a": [1.0, 1.2, 1.1], "b": [2.0, 2.1, 2.2], "c": [1.0, 1.1, 1.2]}
    far, near = difference(arms, ["a"], ["b"]), difference(arms, ["a"], ["c"])
    assert far.mean == pytest.approx(-1.0) and far.sign == -1 and far.low < -1.0 < far.high
    assert difference(arms, ["b"], ["a"]).sign == 1
    assert near.mean == pytest.approx(0.0) and near.sign == 0
    both = difference(arms, ["a", "b"], ["c"])
    assert both.mean == pytest.approx((1.1 + 2.1) / 2 - 1.1)
    assert both.high - both.low < far.high - far.low, "the mean of two arms has less noise than one"
    same = difference({0: [1.0, 1.0], 1: [3.0, 3.0]}, [1], [0])
    assert (same.mean, same.low, same.high, same.sign) == (2.0, 2.0, 2.0, 1), "seeds without noise"


def test_interval_of_three_seeds_misses_about_one_time_in_twenty() -> None:
    """By simulation; a bootstrap of three pairs, the negative control, misses far more often."""
    rng, repeats = np.random.default_rng(1), 400
    misses, bootstrap_misses = 0, 0
    for _ in range(repeats):
        arms = {0: rng.normal(0.3, 0.1, 3), 1: rng.normal(0.0, 0.1, 3)}
        d = difference(arms, [0], [1])
        misses += not d.low <= 0.3 <= d.high
        resampled = (arms[0] - arms[1])[rng.integers(0, 3, (200, 3))].mean(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        bootstrap_misses += not low <= 0.3 <= high
    # Three standard errors of 400 repeats around 0.05 are 0.033; Welch's interval is a little too wide for few seeds.
    assert misses / repeats < 0.05 + 0.033
    assert bootstrap_misses / repeats > 0.2
