"""How much the arms of a sweep differ, and whether their seeds can tell.

An arm has few seeds, and a bootstrap of three numbers is far too sure: where there is no difference at all it finds one
in a quarter of the cases. So an interval is Welch's (Biometrika 34, 1947): from the noise of the compared arms alone,
by Student's distribution with Satterthwaite's degrees of freedom.
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
    mean: float
    low: float  # of the interval
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1; 0 where the interval holds zero: undecided."""
        return int(self.low > 0) - int(self.high < 0)


def difference(arms: Mapping[Arm, Sequence[float]], plus: Sequence[Arm], minus: Sequence[Arm]) -> Difference:
    """The mean of some arms' means less that of others', with its interval; each of two seeds at least."""
    weights = [(arms[arm], 1 / len(plus)) for arm in plus] + [(arms[arm], -1 / len(minus)) for arm in minus]
    mean = sum(w * float(np.mean(values)) for values, w in weights)
    variances = [w**2 * float(np.var(values, ddof=1)) / len(values) for values, w in weights]
    total = sum(variances)
    if not total:  # seeds that change nothing
        return Difference(mean, mean, mean)
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, (values, _) in zip(variances, weights, strict=True))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return Difference(mean, mean - reach, mean + reach)
