"""Rank correlation between two numbers of the arms of a sweep.

Runs of one arm resemble one another, so a correlation over runs counts the same evidence several times: with 8 arms, 3
seeds and no relation, the bootstrap interval over runs excludes zero in up to a quarter of the cases. Here an arm is
one observation, the mean of its runs.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

PERMUTATIONS = 2000
ROUNDING = 1e-12  # correlations that differ by less are equal


@dataclasses.dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation over arms.

    Attributes:
        arms: The number of arms.
        rho: The correlation; NaN where one of the numbers is the same in all arms.
        low: The lower end of its interval; NaN where there are too few arms for one.
        high: Its upper end.
        p: The two-sided p-value of the permutation test; NaN where there is no correlation.
    """

    arms: int
    rho: float
    low: float
    high: float
    p: float


def over_arms(
    x: ArrayLike,
    y: ArrayLike,
    strata: Sequence[Hashable] = (),
    covariates: ArrayLike = (),
    level: float = 0.05,
    seed: int = 0,
) -> RankCorrelation:
    """Correlates two numbers of arms by their ranks.

    With strata, such as the batch size, numbers are ranked within a stratum, and arms are permuted within theirs: a
    relation that holds between the strata alone does not count. With covariates, such as the learning rate, what their
    ranks explain of the ranks of both numbers is taken out first; it takes a covariate's square too to take out a
    relation with one valley. The interval is Fisher's, with the variance of Bonett and Wright (2000, Psychometrika 65).

    Args:
        x: float array [A] or [A, S], a number of each arm, or of each of its seeds, which is averaged.
        y: The other number, likewise.
        strata: The stratum of each arm; all arms are one stratum by default.
        covariates: float array [K, A], other numbers of the arms.
        level: The interval covers the rest.
        seed: The seed of the permutations.

    Returns:
        The correlation with its interval and its p-value.
    """
    a, b = (_by_arm(v) for v in (x, y))
    labels = list(strata) or [0] * len(a)
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    stratum = np.array([number[label] for label in labels])
    taken_out = np.asarray(covariates, np.float64).reshape(len(np.asarray(covariates)), len(a))
    left = len(a) - len(number) - len(taken_out) + 1  # arms less what is fitted besides a mean
    if left < 3:
        return RankCorrelation(len(a), math.nan, math.nan, math.nan, math.nan)
    a, b = (_residuals(_ranks_within(v, stratum), stratum, taken_out) for v in (a, b))
    rho = float(_correlation(a, b))
    if math.isnan(rho):
        return RankCorrelation(len(a), rho, math.nan, math.nan, math.nan)
    permuted = np.abs(_correlation(_permutations(a, stratum, seed), b))
    p = (1 + np.count_nonzero(permuted >= abs(rho) - ROUNDING)) / (1 + PERMUTATIONS)
    low, high = _interval(rho, left, level)
    return RankCorrelation(len(a), rho, low, high, float(p))


def _by_arm(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return array.mean(axis=1) if array.ndim == 2 else array


def _ranks_within(values: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """Returns the ranks [A] of values [A] within their strata, less the stratum's mean rank."""
    ranks = np.empty(len(values))
    for s in np.unique(stratum):
        at = stratum == s
        _, position, count = np.unique(values[at], return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        ranks[at] = (last - (count - 1) / 2)[position] - (at.sum() + 1) / 2
    return ranks


def _residuals(ranks: np.ndarray, stratum: np.ndarray, covariates: np.ndarray) -> np.ndarray:
    """Returns what the ranks of covariates [K, A] within strata leave of centred ranks [A]."""
    if not len(covariates):
        return ranks
    design = np.stack([_ranks_within(c, stratum) for c in covariates], axis=1)
    return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]


def _permutations(values: np.ndarray, stratum: np.ndarray, seed: int) -> np.ndarray:
    """Returns values [A] in random orders within their strata, [PERMUTATIONS, A]."""
    keys = np.random.default_rng(seed).random((PERMUTATIONS, len(values))) + stratum
    permuted = np.empty_like(keys)
    permuted[:, np.argsort(stratum, kind="stable")] = values[np.argsort(keys, axis=1)]
    return permuted


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the correlation of centred values [..., A] and [A]; NaN where one of them does not vary."""
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(scale > ROUNDING, (a * b).sum(axis=-1) / scale, math.nan))


def _interval(rho: float, arms: int, level: float) -> tuple[float, float]:
    if arms <= 3:
        return math.nan, math.nan
    inside = min(max(rho, -1 + ROUNDING), 1 - ROUNDING)
    half_width = NormalDist().inv_cdf(1 - level / 2) * math.sqrt((1 + inside**2 / 2) / (arms - 3))
    return math.tanh(math.atanh(inside) - half_width), math.tanh(math.atanh(inside) + half_width)
