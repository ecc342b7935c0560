"""The record of a step, and the check of the metric that selects checkpoints."""

import math
from typing import Any

import numpy as np
import pytest

from helpers.models import spec_of
from mice_jax import hardware
from mice_jax.config import Config
from mice_jax.errors import UserError
from mice_jax.hardware import train_flops
from mice_jax.training.progress import Progress
from mice_jax.training.record import PEAK_MEMORY, STEP_METRICS, Throughput, check_best_metric, make_record

pytestmark = pytest.mark.smoke

SPEC = spec_of()
BATCH = {"epoch": 1, "microbatches": [None, None], "tokens": 300, "slots": 400, "lengths": np.array([100, 200])}
MEASURED = {
    "loss": 2.5, "token_accuracy": 0.25, "entropy": 1.5, "train/a/loss": 2.0, "grad_norm": 1.5,
    "param_norm": 9.0, "update_norm": 0.1, "grad_sq_corrected": 0.25,
    "learning_rate": 1e-3, "finite": True, "skipped": False,
}  # fmt: skip
PROGRESS = Progress(
    samples=16, tokens=600, loss_tokens=200, skipped=3, noise=(1.0, 1.0, 0.5, 8.0, 100.0, 0.25, 64.0, 4.0)
)


def record_of(peak: float | None = 1e9, skips_spikes: bool = False, **measured: Any) -> dict[str, Any]:
    throughput = Throughput(SPEC, peak, num_params=1000, max_length=512)
    return make_record(7, "one", BATCH, MEASURED | measured, PROGRESS, 2.0, throughput, skips_spikes=skips_spikes)


def test_record_has_every_metric_and_no_other() -> None:
    record = record_of()
    assert set(record) == {"step", "phase", "train/a/loss", *STEP_METRICS}
    assert set(record_of(skips_spikes=True)) == {*record, "skipped_steps"}


def test_record_values_by_hand() -> None:
    record = record_of(skips_spikes=True)
    assert (record["step"], record["phase"], record["epoch"]) == (7, "one", 1)
    assert (record["samples"], record["tokens"], record["loss_tokens"]) == (16, 600, 200)
    assert (record["num_microbatches"], record["slot_efficiency"], record["skipped_steps"]) == (2, 0.75, 3)
    assert (record["tokens_per_s"], record["step_time_s"], record["noise_scale"]) == (150.0, 2.0, 16.0)
    assert (record["noise_scale_tokens"], record["noise_scale_low"], record["noise_scale_high"]) == (200.0, None, None)
    assert record["flops"] == train_flops(SPEC, BATCH["lengths"]) == 2e9 * record["mfu"]


def test_record_has_the_customary_utilisation_too() -> None:
    flops = 300 * (6 * 1000 + 12 * SPEC.num_layers * SPEC.num_heads * SPEC.head_dim * 512)
    assert record_of(peak=flops * 1.0)["mfu_6p"] == 0.5  # the step takes 2 s


def test_record_has_the_peak_memory_where_devices_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, peak: int | None):
            self.peak = peak

        def memory_stats(self) -> dict[str, int] | None:
            return None if self.peak is None else {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}

    monkeypatch.setattr(hardware.jax, "local_devices", lambda: [Device(5), Device(7)])
    assert record_of()[PEAK_MEMORY] == 7
    monkeypatch.setattr(hardware.jax, "local_devices", lambda: [Device(None)])
    assert PEAK_MEMORY not in record_of()


def test_record_is_null_where_nothing_was_measured() -> None:
    record = record_of(peak=None, **{"grad_sq_corrected": math.nan, "train/a/loss": math.nan})
    assert record["mfu"] is None and record["grad_sq_corrected"] is None and record["train/a/loss"] is None


def test_mfu_above_one_is_null() -> None:
    flops = train_flops(SPEC, BATCH["lengths"])
    assert record_of(peak=flops / 1.9)["mfu"] == pytest.approx(0.95)  # the step takes 2 s
    assert record_of(peak=flops / 2.1)["mfu"] is None


@pytest.mark.parametrize(
    ("metric", "evaluated", "skips", "words"),
    [
        ("loss", [], 0.0, None),
        ("eval/loss", ["eval/loss"], 0.0, None),
        ("eval/loss", [], 0.0, "Held-out losses are measured where data is held out"),
        ("eval/los", ["eval/loss"], 0.0, "eval/loss"),  # the nearest name
        ("skipped_steps", [], 5.0, None),
        ("skipped_steps", [], 0.0, "no line of metrics.jsonl will have it"),
    ],
)
def test_best_metric_must_be_one_that_the_run_has(
    metric: str, evaluated: list[str], skips: float, words: str | None
) -> None:
    config = Config()
    config.checkpoint.best_metric, config.train.skip_spikes = metric, skips
    if words is None:
        check_best_metric(config, evaluated, holds_out=bool(evaluated))
        return
    with pytest.raises(UserError) as error:
        check_best_metric(config, evaluated, holds_out=bool(evaluated))
    assert words in str(error.value)
