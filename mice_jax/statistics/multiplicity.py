"""Several tests at once: p-values that are adjusted to how many there are."""

import numpy as np
from numpy.typing import ArrayLike


def holm(p: ArrayLike) -> np.ndarray:
    """Adjusts p-values so that the probability of any false finding is at most the level that they are compared with.

    This holds however the tests depend on one another (Holm 1979, Scand. J. Statist. 6).

    Args:
        p: float array [..., M] of the p-values of M tests.

    Returns:
        The adjusted p-values, float64 [..., M], in the same order.
    """
    values, order = _sorted(p)
    m = values.shape[-1]
    adjusted = np.maximum.accumulate(values * (m - np.arange(m)), axis=-1)
    return _unsorted(np.minimum(adjusted, 1), order)


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
    """Adjusts p-values so that the expected share of false findings is at most the level that they are compared with.

    This holds for tests that are independent or positively dependent (Benjamini and Hochberg 1995, J. R. Statist. Soc.
    B 57).

    Args:
        p: float array [..., M] of the p-values of M tests.

    Returns:
        The adjusted p-values, often called q, float64 [..., M], in the same order.
    """
    values, order = _sorted(p)
    m = values.shape[-1]
    scaled = values * m / np.arange(1, m + 1)
    adjusted = np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    return _unsorted(np.minimum(adjusted, 1), order)


def _sorted(p: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(p, np.float64)
    order = np.argsort(values, axis=-1, kind="stable")
    return np.take_along_axis(values, order, axis=-1), order


def _unsorted(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    result = np.empty_like(values)
    np.put_along_axis(result, order, values, axis=-1)
    return result
