"""Quantiles of Student's t distribution, from the standard library alone."""

import math


def cumulative(t: float, degrees: int) -> float:
    """Returns the probability that Student's t is at most `t`.

    The finite sums for whole degrees of freedom are those of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Args:
        t: The value.
        degrees: The degrees of freedom, at least 1.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cos_squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cos_squared * k / (k + 1)
    central = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + central) / 2


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
