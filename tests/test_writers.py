"""FLOPs counted by hand, and the writers of metrics.jsonl, TensorBoard and the terminal."""

import io
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from helpers.models import spec_of
from mice_jax.hardware import CHIPS, peak_flops, train_flops
from mice_jax.models.spec import ModelSpec
from mice_jax.training.writers import JsonlWriter, TensorBoardWriter, TerminalWriter


# ---------------------------------------------------------------------------------------- FLOPs
def tiny(**changes: Any) -> ModelSpec:
    sizes = {"vocab_size": 11, "d_model": 6, "d_ff": 10, "num_layers": 3}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 5}
    return spec_of(**(sizes | heads | {"qkv_bias": False, "out_bias": False, "mlp_bias": False} | changes))


def test_train_flops_are_as_counted_by_hand() -> None:
    lengths = np.array([7, 4])
    # A token's multiply-adds in one layer: queries 6 x 20, keys 6 x 10, values 6 x 10, output 20 x 6; gate, up and
    # down 6 x 10 each. Once at the end: 6 x 11 logits.
    layer = 120 + 60 + 60 + 120 + 60 + 60 + 60
    of_weights = (7 + 4) * (3 * layer + 66)
    # A sample of n tokens has n^2 / 2 pairs; each takes 5 multiply-adds for the score and 5 for the value, in 4 heads
    # of 3 layers.
    of_pairs = (49 + 16) / 2 * (5 + 5) * 4 * 3
    # 2 FLOPs a multiply-add; the backward pass takes two products for the forward's one.
    expected = 2 * 3 * (of_weights + of_pairs)
    assert train_flops(tiny(), lengths) == expected
    assert train_flops(tiny(tie_embeddings=True), lengths) == expected  # tied or not, the logits are computed
    for change in ({"num_kv_heads": 4}, {"d_ff": 11}, {"vocab_size": 12}, {"num_layers": 2}, {"head_dim": 6}):
        assert train_flops(tiny(**change), lengths) != expected
    assert train_flops(tiny(), np.array([11])) > expected  # one sample of 11 tokens
    # In a layer with a window of 5 the sample of 7 has, of its 49/2 pairs, not the 2 x 2 / 2 of the triangle beyond.
    windowed = tiny(windows=(None, 5, None))
    assert train_flops(windowed, lengths) == expected - 2 * 3 * (2 * 2 / 2) * (5 + 5) * 4
    assert train_flops(tiny(windows=(7, 8, None)), lengths) == expected  # it reaches over the whole sample


def test_peak_flops_are_those_of_the_longest_matching_device_name() -> None:
    def peak(kind: str) -> float | None:
        return peak_flops(SimpleNamespace(platform="tpu", device_kind=kind))

    assert peak("TPU v5 lite") == 197e12
    assert peak("TPU v5p") == peak("TPU v5") == 459e12
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("TPU v3") is None
    assert peak("NVIDIA A100-SXM4-40GB") == peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("TPU7x") == 2307e12 / 2  # JAX makes two devices of a chip
    assert all(peak(kind) == chip.peak_flops for chip in CHIPS.values() for kind in chip.kinds)


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_devices() -> None:
    peak = peak_flops(jax.devices()[0])
    assert peak is not None
    assert 1e8 < peak * len(jax.devices()) < 1e14  # from a slow core to a large server


# ---------------------------------------------------------------------------------------- metrics.jsonl
def test_jsonl_writer_flushes_each_line_and_appends(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = [{"step": i, "loss": 0.1 * i, "phase": "stacked"} for i in (1, 2, 3)]

    def read() -> list[dict[str, Any]]:
        text = file.read_text()
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    writer = JsonlWriter(file)
    for i, record in enumerate(records[:2], 1):
        writer.write(record)
        assert read() == records[:i]  # not closed yet
    writer.close()
    second = JsonlWriter(file)
    second.write(records[2])
    assert read() == records
    second.close()


# ---------------------------------------------------------------------------------------- TensorBoard
def events_of(folder: Path) -> list[tuple[str, float, int]]:
    """(tag, value, step) of a folder's events: records of a length, its checksum, the event, its checksum."""
    found = []
    for file in folder.glob("events.out.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_has_the_numbers_of_every_nth_step_by_samples(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, every_steps=2)
    for step in (1, 2, 3, 4):
        writer.write({"step": step, "samples": 10 * step, "loss": 1.5 * step, "phase": "stacked", "mfu": None})
    writer.close()
    expected = {("step", s, 10 * s) for s in (2, 4)} | {("samples", 10 * s, 10 * s) for s in (2, 4)}
    expected |= {("loss", 1.5 * s, 10 * s) for s in (2, 4)}
    assert set(events_of(tmp_path)) == expected


# ---------------------------------------------------------------------------------------- terminal
def record(step: int, seconds: float = 2.0, **more: float) -> dict[str, Any]:
    numbers = {"loss": 1.23456, "token_accuracy": 0.25, "grad_norm": 0.98765, "tokens_per_s": 12345.6}
    numbers |= {"step_time_s": seconds}
    return {"step": step} | numbers | more


def lines_of(records: list[dict[str, Any]], total: int, every: int, first: int = 0) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=False, width=40, highlight=False, soft_wrap=True)
    writer = TerminalWriter(console, first, total, every)
    for r in records:
        writer.write(r)
    writer.close()
    return console.file.getvalue().splitlines()


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    lines = lines_of([record(1, 60.0), record(2), record(3, 4.0, **{"eval/loss": 1.0})], total=5, every=1)
    numbers = "loss 1.2346  accuracy 0.250  grad_norm 0.988  12,346 tok/s"
    # The first step compiles and does not count: after the second, 3 steps of 2 s are left, then 2 of 3 s.
    assert lines == [
        f"step 1/5  {numbers}",
        f"step 2/5  {numbers}  6 s left",
        f"step 3/5  {numbers}  6 s left  eval/loss 1.0000",
    ]


def test_evaluation_before_the_first_step_is_a_line_without_a_loss() -> None:
    """It takes no part in the time that is left: the first step after it is the one that compiles."""
    before = {"step": 0, "samples": 0, "eval/loss": 3.0}
    lines = lines_of([before, record(1, 60.0), record(2)], total=5, every=1)
    assert lines[0] == "step 0/5  eval/loss 3.0000" and lines[1].endswith("tok/s") and "  6 s left" in lines[2]


def test_lines_come_every_nth_step_and_at_the_last() -> None:
    lines = lines_of([record(s) for s in range(1, 8)], total=7, every=3)
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]


def test_on_a_terminal_a_bar_shows_the_same_numbers() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    writer = TerminalWriter(console, 2, 5, 1)
    writer.write(record(3))
    writer.close()
    text = console.file.getvalue()
    assert "loss 1.2346  accuracy 0.250  grad_norm 0.988  12,346 tok/s" in text
    assert "3/5" in text
    assert "step 3/5" not in text
