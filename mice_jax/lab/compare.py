"""How much the arms of a sweep differ, and whether their seeds can tell.

An arm has few seeds, and a bootstrap of three numbers is far too sure: where there is no difference at all it finds one
in a quarter of the cases. So what is resampled are the distances of all runs from the means of their arms. Since arms
may differ in noise, the same is done with those of the compared arms alone, and the wider interval is taken.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
Arm = TypeVar("Arm", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Difference:
    mean: float
    low: float  # of the bootstrap interval
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1; 0 where the interval holds zero: undecided."""
        return int(self.low > 0) - int(self.high < 0)


def difference(arms: Mapping[Arm, Sequence[float]], plus: Sequence[Arm], minus: Sequence[Arm]) -> Difference:
    """The mean of some arms' means less that of others', with its interval; each of two seeds at least."""
    weights = [(arm, 1 / len(plus)) for arm in plus] + [(arm, -1 / len(minus)) for arm in minus]
    mean = sum(w * float(np.mean(arms[arm])) for arm, w in weights)
    own = {arm: arms[arm] for arm, _ in weights}
    bounds = [_noise(pool, [(len(arms[arm]), w) for arm, w in weights]) for pool in (arms, own)]
    return Difference(mean, mean - max(high for _, high in bounds), mean - min(low for low, _ in bounds))


def _noise(pool: Mapping[Arm, Sequence[float]], drawn: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The interval of a weighted sum of means of so many draws from the noise of a pool of arms."""
    rng = np.random.default_rng(0)
    noise = np.concatenate([_residuals(np.asarray(values, float)) for values in pool.values() if len(values) > 1])
    total = np.zeros(RESAMPLES)
    for count, weight in drawn:
        total += weight * rng.choice(noise, (RESAMPLES, count)).mean(axis=1)
    low, high = np.quantile(total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _residuals(values: np.ndarray) -> np.ndarray:
    """Distances from their mean, as wide as those from the true mean are."""
    return (values - values.mean()) * np.sqrt(len(values) / (len(values) - 1))
