"""Keeps the counters of a run, the threshold of gradient spikes, and deadlines."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from mice_jax.training.noise_scale import NoiseScale, NoiseSums, estimate

NORMS_KEPT = 64  # The number of latest gradient norms that a spike is compared with.
MIN_NORMS = 8  # No step is called a spike before there are this many norms.


@dataclasses.dataclass(frozen=True)
class Progress:
    """The part of a checkpoint that is not arrays. The counters are cumulative over the run.

    Attributes:
      samples: The number of samples seen.
      tokens: The number of tokens seen.
      loss_tokens: The number of tokens with a loss.
      loss_tokens_by_source: The same of each source, by its name.
      skipped: The number of steps whose update was skipped because of train.skip_spikes.
      norms: The gradient norms of the latest steps.
      noise: The sums from which the noise scale is estimated, as `NoiseSums`.
      known_before: What was known of the sources in eval.retain before the first step, by the names of metrics.
    """

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    loss_tokens_by_source: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    norms: tuple[float, ...] = ()
    noise: tuple[float, ...] = NoiseSums()
    known_before: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def advance(
        self, batch: Mapping[str, Any], grad_norm: float, skipped: bool, grad_sq_corrected: float = math.nan
    ) -> "Progress":
        """Returns the progress after one more step.

        Args:
          batch: The step's counts, as the loader returns them.
          grad_norm: The norm of the step's mean gradient.
          skipped: Whether the update was skipped.
          grad_sq_corrected: An unbiased estimate of the true gradient's squared norm; NaN if there is none.
        """
        noise = NoiseSums(*self.noise)
        if math.isfinite(grad_sq_corrected):
            noise = noise.plus_step(grad_norm, grad_sq_corrected, batch["samples"], batch["loss_tokens"])
        return Progress(
            samples=self.samples + batch["samples"],
            tokens=self.tokens + batch["tokens"],
            loss_tokens=self.loss_tokens + batch["loss_tokens"],
            loss_tokens_by_source={
                name: self.loss_tokens_by_source.get(name, 0) + count
                for name, count in batch.get("loss_tokens_by_source", {}).items()
            },
            skipped=self.skipped + skipped,
            norms=(*self.norms, grad_norm)[-NORMS_KEPT:],
            noise=tuple(noise),
            known_before=self.known_before,
        )

    def counters(self) -> dict[str, int]:
        """Returns the counters that every line of metrics.jsonl has."""
        by_source = {f"train/{name}/loss_tokens": count for name, count in self.loss_tokens_by_source.items()}
        return {"samples": self.samples, "tokens": self.tokens, "loss_tokens": self.loss_tokens} | by_source

    def noise_scale(self) -> NoiseScale:
        """Returns the batch size whose noise equals the true gradient, with an interval."""
        return estimate(NoiseSums(*self.noise))

    def spike_threshold(self, factor: float) -> float:
        """Returns the gradient norm above which a step is a spike: `factor` times the median of the latest norms.

        Spikes count among the latest norms too, so a norm that stays high soon stops being a spike. The threshold is
        infinite if `factor` is 0 or there are too few norms.
        """
        if not factor or len(self.norms) < MIN_NORMS:
            return math.inf
        return factor * statistics.median(self.norms)


def crosses_multiple(before: int, after: int, every: int) -> bool:
    """Returns whether a counter passed a multiple of `every`.

    Args:
      before: The counter's value before a step.
      after: The counter's value after the step.
      every: The distance of the multiples; 0 means that there are none.
    """
    return bool(every) and after // every > before // every


class Deadline:
    """A deadline that passes a number of minutes after it is made or restarted; 0 minutes never pass."""

    def __init__(self, minutes: float):
        self._minutes = minutes
        self.restart()

    def restart(self) -> None:
        """Restarts the minutes from now."""
        self._start = time.monotonic()

    def passed(self) -> bool:
        """Returns whether the minutes have passed."""
        return bool(self._minutes) and time.monotonic() - self._start >= 60 * self._minutes


class LapTimer:
    """Measures the wall-clock time between two calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last call, or since the object was made."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
