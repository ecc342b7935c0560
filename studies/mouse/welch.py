"""Differences between the arms of a sweep, with intervals that are valid for few seeds.

A bootstrap of three numbers is overconfident: where there is no difference, it finds one in a quarter of the cases. So
an interval is Welch's (Biometrika 34, 1947): it uses the noise of the compared arms alone, Student's distribution and
Satterthwaite's degrees of freedom.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.95
Arm = TypeVar("Arm", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference and its interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1; 0 where the interval contains zero, so that the difference is undecided."""
        return int(self.low > 0) - int(self.high < 0)


def difference(arms: Mapping[Arm, Sequence[float]], plus: Sequence[Arm], minus: Sequence[Arm]) -> Difference:
    """Computes the mean of some arms' means minus that of others.

    Args:
        arms: the value of each seed, at least two, by arm.
        plus: the arms whose mean counts positively.
        minus: the arms whose mean counts negatively.

    Returns:
        The difference with Welch's interval.
    """
    weights = [(arms[arm], 1 / len(plus)) for arm in plus] + [(arms[arm], -1 / len(minus)) for arm in minus]
    mean = sum(w * float(np.mean(values)) for values, w in weights)
    variances = [w**2 * float(np.var(values, ddof=1)) / len(values) for values, w in weights]
    total = sum(variances)
    if not total:  # the seeds make no difference
        return Difference(mean, mean, mean)
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, (values, _) in zip(variances, weights, strict=True))
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return Difference(mean, mean - half_width, mean + half_width)
