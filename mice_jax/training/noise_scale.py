"""Estimates the gradient noise scale of a run from its latest measured steps, with an interval.

A step whose gradient is computed as several microbatches gives an unbiased estimate of the true gradient's squared
norm, |G|^2 (`step.corrected_grad_sq`), and with it one of the variance of one sample's gradient. Each is noisy and may
be negative, so both are averaged before their ratio, the noise scale (McCandlish et al., 2018), is taken.
"""

import math
from typing import NamedTuple

# The weight of a measured step falls by this share with each later one, so about 100 steps count. With a fifth of
# these, the scale was shown at a fraction of its value where it is far above the batch size, or not at all.
FORGOTTEN = 0.02
MIN_COUNT = 5.0  # effective number of measured steps below which there is no interval
NORMAL_QUANTILE = 1.959964  # of an interval of 95 %


class NoiseSums(NamedTuple):
    """Weighted sums over measured steps: of weights, of the two estimates, and of their squares and products."""

    weight: float = 0.0
    weight_sq: float = 0.0
    grad_sq: float = 0.0  # of the true gradient's squared norm
    variance: float = 0.0  # of the variance of one sample's gradient
    variance_tokens: float = 0.0  # of the variance of one trained token's gradient
    grad_sq_sq: float = 0.0
    variance_sq: float = 0.0
    product: float = 0.0  # of grad_sq and variance

    def plus_step(self, grad_norm: float, grad_sq: float, samples: int, loss_tokens: int) -> "NoiseSums":
        """Returns the sums after one more measured step.

        Args:
          grad_norm: The norm of the step's mean gradient.
          grad_sq: The step's unbiased estimate of the true gradient's squared norm.
          samples: The number of samples of the step.
          loss_tokens: The number of its trained tokens.
        """
        of_step = grad_norm**2 - grad_sq  # the variance of the step's mean gradient
        variance = samples * of_step
        new = NoiseSums(1.0, 1.0, grad_sq, variance, loss_tokens * of_step, grad_sq**2, variance**2, grad_sq * variance)
        kept = NoiseSums(*((1 - FORGOTTEN) * total for total in self))
        kept = kept._replace(weight_sq=(1 - FORGOTTEN) ** 2 * self.weight_sq)
        return NoiseSums(*(a + b for a, b in zip(kept, new, strict=True)))


class NoiseScale(NamedTuple):
    """The batch size whose noise equals the true gradient; None where it cannot be estimated.

    Attributes:
      scale: In samples of the run's mean length; None where the mean estimate of |G|^2 is not positive.
      low: The lower end of its interval of 95 %, which there is even where the scale itself is too large to be told.
      high: The upper end; None where the true gradient cannot be told from zero.
      tokens: The scale in trained tokens, which does not depend on how lengths vary.
    """

    scale: float | None = None
    low: float | None = None
    high: float | None = None
    tokens: float | None = None


def estimate(sums: NoiseSums) -> NoiseScale:
    """Estimates the noise scale and its interval by Fieller's theorem.

    A ratio R is in the interval if the mean of variance - R * |G|^2 over steps differs from 0 by no more than its
    standard error times the quantile of Student's t. That is a quadratic inequality in R. Where |G|^2 differs from 0,
    its solutions lie between two roots; elsewhere they are all numbers above one root.

    Args:
      sums: The sums over measured steps.

    Returns:
      The estimate.
    """
    if not sums.weight:
        return NoiseScale()
    g, v, v_tokens = (x / sums.weight for x in (sums.grad_sq, sums.variance, sums.variance_tokens))
    known = g > 0 and v >= 0
    low, high = _interval(sums, g, v)
    return NoiseScale(v / g if known else None, low, high, v_tokens / g if known else None)


def _interval(sums: NoiseSums, g: float, v: float) -> tuple[float | None, float | None]:
    count = sums.weight**2 / sums.weight_sq
    if count < MIN_COUNT or v <= 0:
        return None, None
    of_mean = _t_quantile(count - 1) ** 2 / (count - 1)
    a = g * g - of_mean * (sums.grad_sq_sq / sums.weight - g * g)
    b = g * v - of_mean * (sums.product / sums.weight - g * v)
    c = v * v - of_mean * (sums.variance_sq / sums.weight - v * v)
    root = math.sqrt(max(b * b - a * c, 0.0))
    if c <= 0:  # The variance cannot be told from zero, and so neither can the lower end.
        return 0.0, None
    # The lower end is (b - root) / a, written so that it stays exact where a is near 0.
    low = c / (b + root) if b + root > 0 else None
    return low, (b + root) / a if a > 0 and g > 0 else None


def _t_quantile(degrees: float) -> float:
    """Returns the quantile of Student's t for an interval of 95 %, to 2 % from 4 degrees of freedom on.

    The degrees are those of an effective count, so they need not be whole as in statistics/student_t.py.
    """
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
