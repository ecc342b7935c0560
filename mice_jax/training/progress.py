"""How far a run is, and what is due: saves, evaluations, the end of its time."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

NORMS_KEPT = 64  # of the latest steps: what a spike is compared with
NORMS_NEEDED = 8  # before any step is called one
NOISE_SHARE = 0.1  # of the latest step in the running means that the noise scale is made of


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint carries beside the arrays; the counters are cumulative over the run."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    skipped: int = 0  # steps whose update was not made, by train.skip_spikes
    norms: tuple[float, ...] = ()  # gradient norms of the latest steps
    # Running means of the true gradient's squared norm, and of one sample's variance: estimates that only an average
    # of many makes good, and of which a ratio is only right once they are averaged.
    grad_sq: float = 0.0
    sample_variance: float = 0.0

    def after(
        self, batch: Mapping[str, Any], grad_norm: float, skipped: bool, corrected: float = math.nan
    ) -> "Progress":
        """One step later; `corrected` is the estimate of the true gradient's squared norm, NaN where there is none."""
        grad_sq, variance = self.grad_sq, self.sample_variance
        if math.isfinite(corrected):
            own = batch["samples"] * (grad_norm**2 - corrected)
            share = NOISE_SHARE if grad_sq or variance else 1.0
            grad_sq, variance = grad_sq + share * (corrected - grad_sq), variance + share * (own - variance)
        return Progress(
            self.samples + batch["samples"],
            self.tokens + batch["tokens"],
            self.loss_tokens + batch["loss_tokens"],
            self.skipped + skipped,
            (*self.norms, grad_norm)[-NORMS_KEPT:],
            grad_sq,
            variance,
        )

    def counters(self) -> dict[str, int]:
        """What every line of metrics.jsonl has."""
        return {"samples": self.samples, "tokens": self.tokens, "loss_tokens": self.loss_tokens}

    def noise_scale(self) -> float | None:
        """The batch, in samples, whose noise is as large as the true gradient; None while that cannot be told."""
        return self.sample_variance / self.grad_sq if self.grad_sq > 0 and self.sample_variance >= 0 else None

    def spike(self, times: float) -> float:
        """The gradient norm above which a step is a spike: so many times the median of the latest; inf at first.

        Spikes are among the latest too: where the norm stays high, it is soon no spike any more.
        """
        if not times or len(self.norms) < NORMS_NEEDED:
            return math.inf
        return times * statistics.median(self.norms)


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a step is the first at or past a multiple of `every` samples; 0 = never."""
    return bool(every) and after // every > before // every


class Alarm:
    """Rings when so many minutes have gone by since it was set; never for 0."""

    def __init__(self, minutes: float):
        self._minutes = minutes
        self.set()

    def set(self) -> None:
        self._set_at = time.monotonic()

    def rings(self) -> bool:
        return bool(self._minutes) and time.monotonic() - self._set_at >= 60 * self._minutes
