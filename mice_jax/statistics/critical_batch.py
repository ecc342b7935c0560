"""The critical batch size by branching: the largest one that trains on equally many samples without losing by it.

Runs branch off from one checkpoint with several batch sizes and train on equally many samples. The loss of each is
compared with that of the smallest batch size, paired by the seed of the order (Merrill et al., arXiv 2505.23971). A
batch size is at most critical where its loss is at most a tolerance above that of the smallest.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mice_jax.statistics import student_t
from mice_jax.statistics.paired import MIN_PAIRS

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Excess:
    """By how much a metric of one batch size is above that of the smallest.

    Attributes:
        mean: The mean over seeds; inf where a run diverged.
        low: The one-sided lower bound that is used for the upper end of the interval; NaN with too few seeds.
        high: The one-sided upper bound that is used for its lower end; NaN with too few seeds.
    """

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class CriticalBatch:
    """The critical batch size by some metrics, of each of which less is better.

    Attributes:
        tolerance: The largest excess that does not count.
        batch_sizes: Those compared, in rising order.
        excesses: For each metric, the excess of each batch size; 0 for the smallest.
        estimate: Where the first mean excess crosses the tolerance, between two batch sizes in their logarithm; inf
            where none of those compared is above it.
        low: The lower end of the interval, one of the batch sizes; None with too few seeds.
        high: Its upper end, one of the batch sizes; inf where none of them is shown to be too large, None with too few
            seeds.
    """

    tolerance: float
    batch_sizes: tuple[int, ...]
    excesses: Mapping[str, tuple[Excess, ...]]
    estimate: float
    low: int | None
    high: float | None


def critical_batch(
    values: Mapping[str, ArrayLike], batch_sizes: Sequence[int], tolerance: float, level: float = LEVEL
) -> CriticalBatch:
    """Finds the largest batch size whose metrics all stay within a tolerance of the smallest batch size's.

    Both ends of the interval are found by tests in a fixed order, which need no correction for their number, each at
    half the level. From the smallest batch size on, the lower end moves up while all metrics are shown to be within the
    tolerance. From the largest on, the upper end moves down while some metric is shown to be above it. If the excess
    rises with the batch size, the interval misses the critical one with a probability of at most `level`.

    Args:
        values: float array [B, S] of each metric by batch size and seed; inf or NaN where the run diverged.
        batch_sizes: The B batch sizes, in rising order.
        tolerance: The largest excess that does not count, in units of the metrics.
        level: The probability with which the interval may miss.

    Returns:
        The critical batch size with its interval, and what it rests on.
    """
    arrays = {name: np.asarray(v, np.float64) for name, v in values.items()}
    excesses = {
        name: tuple(_excess(row - array[0], level / 2, level / 2 / len(arrays)) for row in array)
        for name, array in arrays.items()
    }
    within = [all(e[b].high <= tolerance for e in excesses.values()) for b in range(len(batch_sizes))]
    beyond = [any(e[b].low > tolerance for e in excesses.values()) for b in range(len(batch_sizes))]
    judged = all(a.shape[1] >= MIN_PAIRS for a in arrays.values())
    num_within = len(list(itertools.takewhile(bool, within[1:])))
    num_beyond = len(list(itertools.takewhile(bool, reversed(beyond[1:]))))
    return CriticalBatch(
        tolerance=tolerance,
        batch_sizes=tuple(batch_sizes),
        excesses=excesses,
        estimate=min(_crossing([e.mean for e in of], batch_sizes, tolerance) for of in excesses.values()),
        low=batch_sizes[num_within] if judged else None,
        high=(batch_sizes[-num_beyond] if num_beyond else math.inf) if judged else None,
    )


def _excess(differences: np.ndarray, level_above: float, level_below: float) -> Excess:
    """Returns the mean of paired differences [S] with its one-sided bounds."""
    n = len(differences)
    if not np.isfinite(differences).all():  # a diverged run needs no statistics
        return Excess(math.inf, math.inf, math.inf)
    mean = float(differences.mean())
    if n < MIN_PAIRS:
        return Excess(mean, math.nan, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    low = mean - student_t.quantile(1 - level_below, n - 1) * error
    return Excess(mean, low, mean + student_t.quantile(1 - level_above, n - 1) * error)


def _crossing(means: Sequence[float], batch_sizes: Sequence[int], tolerance: float) -> float:
    """Returns the batch size at which the means first cross the tolerance, on lines between their logarithms."""
    first = next((i for i, mean in enumerate(means) if mean > tolerance), 0)
    if not first:
        return math.inf
    below, above = means[first - 1], means[first]
    share = (tolerance - below) / (above - below) if math.isfinite(above) else 0.0
    return float(batch_sizes[first - 1] * (batch_sizes[first] / batch_sizes[first - 1]) ** share)
