"""What a paired comparison of n seeds can find: the power of its tests, and the smallest differences they detect.

Sizes are in units of the standard deviation of a paired difference. Power is an integral over the estimated standard
deviation, which is the true one times the root of chi-squared over its degrees of freedom; given it, the mean is
normal.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from mice_jax.statistics import student_t

POWER = 0.8  # that "detectable" asks for
NODES = 1000  # of the integral; its error is below 1e-5
TAIL = 8.0  # standard deviations of the estimated one beyond which its density is neglected
STEPS = 40  # of the bisection, which divide its range by 1e12


def of_difference(effect: float, n: int, level: float) -> float:
    """Returns the power of the two-sided paired t test.

    Args:
        effect: The true mean difference.
        n: The number of pairs, at least 2.
        level: The level of the test.
    """
    deviation, weight = _estimated_deviation(n - 1)
    bound, shift = student_t.quantile(1 - level / 2, n - 1) * deviation, effect * math.sqrt(n)
    return float(weight @ (_normal(shift - bound) + _normal(-shift - bound)))


def of_equivalence(margin: float, n: int, level: float) -> float:
    """Returns the power of the two one-sided tests where there is no difference.

    Args:
        margin: The largest difference that counts as alike.
        n: The number of pairs, at least 2.
        level: The level of each one-sided test.
    """
    deviation, weight = _estimated_deviation(n - 1)
    bound = margin * math.sqrt(n) - student_t.quantile(1 - level, n - 1) * deviation
    return float(weight @ np.maximum(2 * _normal(bound) - 1, 0))


@functools.lru_cache(maxsize=256)
def detectable_difference(n: int, level: float = 0.05, power: float = POWER) -> float:
    """Returns the smallest true difference that the paired t test finds with some power.

    Args:
        n: The number of pairs, at least 2.
        level: The level of the two-sided test.
        power: The probability to find it.
    """
    return _smallest(lambda effect: of_difference(effect, n, level) >= power)


@functools.lru_cache(maxsize=256)
def detectable_margin(n: int, level: float = 0.05, power: float = POWER) -> float:
    """Returns the smallest margin within which equal arms are found alike with some power.

    Args:
        n: The number of pairs, at least 2.
        level: The level of each one-sided test.
        power: The probability to find it.
    """
    return _smallest(lambda margin: of_equivalence(margin, n, level) >= power)


def _smallest(suffices: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    while not suffices(high):
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _estimated_deviation(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns values of the estimated standard deviation over the true one, and their probabilities, [NODES] each."""
    top = 1 + TAIL / math.sqrt(2 * degrees)
    deviation = (np.arange(NODES) + 0.5) * top / NODES
    density = deviation ** (degrees - 1) * np.exp(-degrees * (deviation**2 - 1) / 2)
    return deviation, density / density.sum()


def _normal(x: np.ndarray) -> np.ndarray:
    """Returns the standard normal distribution function of an array [N]."""
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
