"""Makes the record of a step, which is its line of metrics.jsonl, and knows the names of all metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mice_jax import hardware
from mice_jax.config import Config
from mice_jax.config_checks import nearest
from mice_jax.data.source_names import source_names
from mice_jax.errors import UserError
from mice_jax.hardware import customary_train_flops, train_flops
from mice_jax.models.spec import ModelSpec
from mice_jax.training.progress import Progress

# The numbers of every line of metrics.jsonl; some are null where they cannot be measured.
STEP_METRICS = (
    "loss", "token_accuracy", "entropy", "grad_norm", "param_norm", "update_norm", "grad_sq_corrected", "noise_scale",
    "noise_scale_low", "noise_scale_high", "noise_scale_tokens", "learning_rate", "epoch", "samples", "tokens",
    "loss_tokens", "num_microbatches", "slot_efficiency", "tokens_per_s", "flops", "mfu", "mfu_6p", "step_time_s",
)  # fmt: skip
# Those of each source that is trained on, as train/<source>/<metric>.
SOURCE_METRICS = ("loss", "token_accuracy", "loss_tokens")
SKIPPED_STEPS = "skipped_steps"  # Records have this only if train.skip_spikes is set.
PEAK_MEMORY = "device_memory_peak_bytes"  # Records have this only if the devices count their memory (GPU, TPU).


class Throughput(NamedTuple):
    """The numbers that convert the time of a step to rates.

    Attributes:
      spec: The model's architecture.
      peak_flops: The peak FLOP/s of all devices together; None if it is not known.
      num_params: The number of the model's parameters.
      max_length: The number of slots of a row.
      frozen: Whether only adapters are trained.
    """

    spec: ModelSpec
    peak_flops: float | None
    num_params: int
    max_length: int
    frozen: bool = False

    def utilisation(self, flops: float, seconds: float) -> float | None:
        """Returns FLOPs in some seconds as a share of the peak; None if that is not known or too low to be right."""
        share = flops / (seconds * self.peak_flops) if self.peak_flops else None
        return share if share is not None and share <= 1 else None


def make_record(
    step: int,
    phase: str,
    batch: dict[str, Any],
    measured: dict[str, Any],
    progress: Progress,
    seconds: float,
    throughput: Throughput,
    *,
    skips_spikes: bool,
) -> dict[str, Any]:
    """Returns the line of a step, before any evaluation adds to it.

    Args:
      step: The number of steps done, this one included.
      phase: The name of the step's phase.
      batch: The step's counts, as the loader returns them.
      measured: The numbers that the step computed (`step.apply_sums`), as Python numbers.
      progress: The counters after the step.
      seconds: The wall-clock time from the end of the step before to the end of this one.
      throughput: The model and the peak of the devices, for the rates.
      skips_spikes: Whether train.skip_spikes is set.
    """
    record = {"step": step, "phase": phase, "epoch": batch["epoch"]} | progress.counters()
    for name, value in measured.items():
        if name not in ("finite", "skipped"):
            # There may be no estimate of the gradient noise, and no trained token of a source.
            may_be_missing = name == "grad_sq_corrected" or name.startswith("train/")
            record[name] = None if may_be_missing and not math.isfinite(value) else value
    noise = progress.noise_scale()
    record["noise_scale"], record["noise_scale_low"], record["noise_scale_high"] = noise.scale, noise.low, noise.high
    record["noise_scale_tokens"] = noise.tokens
    record["num_microbatches"] = len(batch["microbatches"])
    record["slot_efficiency"] = batch["tokens"] / batch["slots"]
    record["tokens_per_s"] = batch["tokens"] / seconds
    customary = customary_train_flops(throughput.spec, batch["tokens"], throughput.num_params, throughput.max_length)
    flops = train_flops(throughput.spec, batch["lengths"], frozen=throughput.frozen)
    record["flops"] = flops
    record["mfu"] = throughput.utilisation(flops, seconds)
    record["mfu_6p"] = throughput.utilisation(customary, seconds)
    record["step_time_s"] = seconds
    if (peak := hardware.peak_memory_bytes()) is not None:
        record[PEAK_MEMORY] = peak
    if skips_spikes:
        record[SKIPPED_STEPS] = progress.skipped
    return record


def all_finite(metrics: Mapping[str, float | None]) -> bool:
    """Returns whether no metric is NaN or infinite."""
    return all(value is None or math.isfinite(value) for value in metrics.values())


def metric_names(config: Config, evaluated: Sequence[str]) -> list[str]:
    """Returns the names of all metrics of a run; `evaluated` are those of its evaluations."""
    by_source = [f"train/{source}/{name}" for source in source_names(config.data) for name in SOURCE_METRICS]
    return [*STEP_METRICS, *by_source, *([SKIPPED_STEPS] if config.train.skip_spikes else []), *evaluated]


def check_best_metric(config: Config, evaluated: Sequence[str], holds_out: bool) -> None:
    """Checks that the run measures the metric by which its checkpoints are selected.

    Args:
      config: The run's config.
      evaluated: The names of the metrics of its evaluations.
      holds_out: Whether any samples are held out.

    Raises:
      UserError: No record of the run will have the metric.
    """
    name, known = config.checkpoint.best_metric, metric_names(config, evaluated)
    if name in known:
        return
    hint = "" if holds_out else " Held-out losses are measured where data is held out (data.validation)."
    raise UserError(
        f"checkpoint.best_metric={name!r} selects among checkpoints, but no line of metrics.jsonl will have it"
        f"{nearest(name, known)}{hint}"
    )
