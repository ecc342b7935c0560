"""Differences between two arms that were trained with the same seeds.

Runs of one seed see the same samples in the same order, so their errors have a part in common, which cancels in their
difference. The interval of the mean difference is Student's, over seeds. Where runs also start from several base
models, one base is one observation, because all seeds of a base share what is particular to it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mice_jax.statistics import power, student_t

LEVEL = 0.05
MIN_PAIRS = 3  # the interval of two pairs is 13 times as wide as their standard error
FEW_PAIRS = 5  # with fewer, only differences above two standard deviations are found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean of paired differences. Fields have the shape of what was compared but its last axis.

    Attributes:
        n: The number of pairs.
        mean: The mean difference.
        deviation: The standard deviation of a difference.
        low: The lower end of the interval.
        high: Its upper end.
        p: The two-sided p-value of the paired t test.
        detectable: The smallest true difference that such a test finds with a power of 80 %, by this deviation.
    """

    n: int
    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    detectable: np.ndarray


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Whether paired differences lie within a margin. Fields have the shape of what was compared but its last axis.

    Attributes:
        n: The number of pairs.
        mean: The mean difference.
        deviation: The standard deviation of a difference.
        low: The lower end of the interval, which has twice the level outside it, as the two tests have.
        high: Its upper end.
        p: The larger p-value of the two one-sided tests; a small one shows that the difference is within the margin.
        p_beyond: The p-value of the test that shows the contrary, that the difference is beyond the margin.
        detectable: The smallest margin within which equal arms are found alike with a power of 80 %, by this deviation.
    """

    n: int
    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_beyond: np.ndarray
    detectable: np.ndarray


def compare(differences: ArrayLike, level: float = LEVEL) -> Comparison:
    """Tests whether the mean of paired differences is zero.

    Args:
        differences: float array [..., N], one difference a seed; N at least 3.
        level: The level of the test; the interval covers the rest.

    Returns:
        The mean with its interval.
    """
    n, mean, deviation = _moments(differences)
    half_width = student_t.quantile(1 - level / 2, n - 1) * deviation / math.sqrt(n)
    p = np.minimum(1, 2 * _above(np.abs(mean), deviation, n))
    detectable = power.detectable_difference(n, level) * deviation
    return Comparison(n, mean, deviation, mean - half_width, mean + half_width, p, detectable)


def equivalence(differences: ArrayLike, margin: float, level: float = LEVEL) -> Equivalence:
    """Tests by two one-sided tests whether the mean of paired differences lies within a margin of zero.

    The procedure is that of Schuirmann (1987, J. Pharmacokin. Biopharm. 15). A test that finds no difference does not
    show that there is none; this one does.

    Args:
        differences: float array [..., N], one difference a seed; N at least 3.
        margin: The largest difference that counts as alike. It must have been set before the differences were seen.
        level: The level of each of the two tests.

    Returns:
        The mean with the interval at twice the level: it lies within the margin where `p` is below the level.
    """
    n, mean, deviation = _moments(differences)
    half_width = student_t.quantile(1 - level, n - 1) * deviation / math.sqrt(n)
    p = np.maximum(_above(margin - mean, deviation, n), _above(margin + mean, deviation, n))
    p_beyond = _above(np.abs(mean) - margin, deviation, n)
    detectable = power.detectable_margin(n, level) * deviation
    return Equivalence(n, mean, deviation, mean - half_width, mean + half_width, p, p_beyond, detectable)


def _moments(differences: ArrayLike) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns how many differences [..., N] there are, N, and their mean and standard deviation [...]."""
    d = np.asarray(differences, np.float64)
    n = d.shape[-1] if d.ndim else 0
    if n < MIN_PAIRS:
        raise ValueError(f"{n} pairs: a comparison needs at least {MIN_PAIRS}")
    if not np.isfinite(d).all():
        raise ValueError("a difference is not finite")
    return n, d.mean(axis=-1), d.std(axis=-1, ddof=1)


def _above(excess: np.ndarray, deviation: np.ndarray, n: int) -> np.ndarray:
    """Returns the p-value of the test that a mean is above zero, from the estimates."""
    # Differences without variance leave no doubt about the sign of their mean, and none about zero.
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(excess == 0, 0.0, excess / (deviation / math.sqrt(n)))
    return student_t.cumulative(-t, n - 1)


# ---------------------------------------------------------------------------------------- several bases
@dataclasses.dataclass(frozen=True)
class Components:
    """What differences vary by, as standard deviations.

    Attributes:
        between: Of the true mean difference of a base, over bases; 0 where seeds explain what bases differ by.
        within: Of a difference over the seeds of one base; NaN with one seed a base.
    """

    between: float
    within: float


def base_means(differences: Sequence[ArrayLike]) -> tuple[np.ndarray, Components]:
    """Reduces the differences of several bases to one of each, which `compare` and `equivalence` take.

    Args:
        differences: For each base, a float array [S] with one difference a seed.

    Returns:
        The mean difference of each base, float64 [B], and by what the differences vary.
    """
    by_base = [np.asarray(d, np.float64) for d in differences]
    means = np.array([d.mean() for d in by_base])
    degrees = sum(len(d) - 1 for d in by_base)
    if not degrees:
        return means, Components(float(means.std(ddof=1)), math.nan)
    within = sum(float(((d - d.mean()) ** 2).sum()) for d in by_base) / degrees
    noise = within * float(np.mean([1 / len(d) for d in by_base]))
    return means, Components(math.sqrt(max(0.0, float(means.var(ddof=1)) - noise)), math.sqrt(within))


# ---------------------------------------------------------------------------------------- chosen settings
def choose(values: ArrayLike, seeds: Sequence[int]) -> int | None:
    """Chooses the setting with the lowest mean over some seeds, which are then not to be compared by.

    Comparing by the same seeds favours the arm that had more settings to choose from.

    Args:
        values: float array [C, S] of a metric of which less is better, by setting and seed; NaN where unmeasured.
        seeds: The positions of the seeds that choose.

    Returns:
        The setting, the first of equal ones; None where no setting was measured with each of these seeds.
    """
    means = np.asarray(values, np.float64)[:, list(seeds)].mean(axis=1)
    return None if np.isnan(means).all() else int(np.nanargmin(means))
