"""Differences between arms: how often an interval from three seeds misses the truth."""

import numpy as np
import pytest

from mice_jax.lab import compare
from mice_jax.lab.compare import difference

REPEATS = 600


def missed(scales: list[float], monkeypatch: pytest.MonkeyPatch, by_seeds: bool = False) -> float:
    """How often the interval of the first arm less the second misses the true 0.3, by simulation."""
    monkeypatch.setattr(compare, "RESAMPLES", 600)
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


# One in twenty, give or take three standard errors of 600 repeats (0.027); 1 of 20 becomes 0.064 with the 16 degrees
# of freedom of eight arms, since the noise's width is itself estimated.
@pytest.mark.parametrize("scales", [[0.1] * 8, [1.0, 1.0] + [0.1] * 6])
def test_an_interval_misses_the_true_difference_about_one_time_in_twenty(
    scales: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of arms ten times as noisy as the rest only their own six runs tell: 4 degrees of freedom.
    bound = 0.064 + 0.027 if scales[0] == scales[-1] else 0.125 + 0.027
    assert missed(scales, monkeypatch) < bound
    assert missed(scales, monkeypatch, by_seeds=True) > 0.2, "a bootstrap of three pairs is too sure"


def test_a_difference_is_that_of_the_means_and_is_decided_where_its_interval_leaves_out_zero() -> None:
    arms = {"a": [1.0, 1.2, 1.1], "b": [2.0, 2.1, 2.2], "c": [1.0, 1.1, 1.2]}
    far, near = difference(arms, ["a"], ["b"]), difference(arms, ["a"], ["c"])
    assert far.mean == pytest.approx(-1.0) and far.sign == -1 and far.low < -1.0 < far.high
    assert difference(arms, ["b"], ["a"]).sign == 1
    assert near.mean == pytest.approx(0.0) and near.sign == 0
    both = difference(arms, ["a", "b"], ["c"])
    assert both.mean == pytest.approx((1.1 + 2.1) / 2 - 1.1)
    assert both.high - both.low < far.high - far.low, "two arms' mean is surer than one's"
