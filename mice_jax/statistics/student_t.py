"""The distribution function and quantiles of Student's t, without SciPy."""

import functools
import math

import numpy as np
from numpy.typing import ArrayLike


def cumulative(t: ArrayLike, degrees: int) -> np.ndarray:
    """Returns the probability that Student's t is at most `t`.

    The finite sums for whole degrees of freedom are those of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Args:
        t: The value or values.
        degrees: The degrees of freedom, at least 1.
    """
    angle = np.arctan2(np.asarray(t, np.float64), math.sqrt(degrees))
    cosine = np.cos(angle)
    odd = degrees % 2
    term = cosine if odd else np.ones_like(cosine)
    total = np.zeros_like(cosine)
    for k in range(1 + odd, degrees, 2):
        total = total + term
        term = term * cosine**2 * k / (k + 1)
    central = 2 / math.pi * (angle + np.sin(angle) * total) if odd else np.sin(angle) * total
    return np.asarray((1 + central) / 2)


@functools.lru_cache(maxsize=256)
def quantile(probability: float, degrees: int) -> float:
    """Returns the value that Student's t stays below with some probability.

    Args:
        probability: A number between 0 and 1, both excluded.
        degrees: The degrees of freedom, at least 1.
    """
    low, high = -1.0, 1.0
    while cumulative(low, degrees) > probability:
        low *= 2
    while cumulative(high, degrees) < probability:
        high *= 2
    # Bisection ends where no float64 is left between the two ends.
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if cumulative(middle, degrees) < probability else (low, middle)
    return high
