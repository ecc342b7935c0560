"""Shortens curves of thousands of steps to what a screen can show, and keeps every spike."""

import numpy as np


def extremes(values: np.ndarray, max_points: int) -> np.ndarray:
    """Selects the points of a curve that show its extremes.

    The curve is cut into stretches of equal length, and the lowest and the highest value of each is kept, so that no
    spike is lost, however short it is.

    Args:
        values: float array [N]; NaN where nothing was measured.
        max_points: largest number of points to keep.

    Returns:
        At most `max_points` indices in ascending order, none of them of a NaN; all of them where there are few enough.
    """
    known = np.flatnonzero(~np.isnan(values))
    if len(known) <= max_points:
        return known
    kept = [known[[0, -1]]]
    for part in np.array_split(known, max(1, (max_points - 2) // 2)):
        kept.append(part[[np.argmin(values[part]), np.argmax(values[part])]])
    return np.unique(np.concatenate(kept))


def means(values: np.ndarray, count: int) -> np.ndarray:
    """Averages a curve over stretches of equal length.

    Args:
        values: float array [N]; NaN where nothing was measured.
        count: number of stretches.

    Returns:
        The mean of each stretch, float array [min(N, count)]; NaN where a stretch has no measured value.
    """
    n = min(len(values), count)
    if not n:
        return np.zeros(0)
    starts = np.arange(n) * len(values) // n
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
