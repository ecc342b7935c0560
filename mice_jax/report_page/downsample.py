"""Curves of thousands of steps made as short as a screen can show, without hiding what matters in them."""

import numpy as np


def extremes(values: np.ndarray, most: int) -> np.ndarray:
    """[N] -> at most `most` indices, in order: of each stretch, where the least and the greatest number is.

    So no spike is lost, however short. All numbers where there are few enough; never a NaN.
    """
    known = np.flatnonzero(~np.isnan(values))
    if len(known) <= most:
        return known
    kept = [known[[0, -1]]]
    for part in np.array_split(known, max(1, (most - 2) // 2)):
        kept.append(part[[np.argmin(values[part]), np.argmax(values[part])]])
    return np.unique(np.concatenate(kept))


def means(values: np.ndarray, count: int) -> np.ndarray:
    """[N] -> [min(N, count)]: the mean of each of `count` stretches of equal length; NaN where nothing is known."""
    n = min(len(values), count)
    if not n:
        return np.zeros(0)
    starts = np.arange(n) * len(values) // n
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
