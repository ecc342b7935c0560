"""What fits a device: rows of a microbatch and rematerialisation, from an analytic estimate of memory."""

import os
from typing import Any

import jax

from mice_jax.models.spec import ModelSpec

CPU_SLOTS = 4096  # of a microbatch on one CPU device: more is no faster there
STATE_BYTES = 20  # a parameter: itself, two moments, the summed gradient and one microbatch's, float32
USABLE = 0.85  # of a device's memory; the rest is the runtime's and fragments


def device_memory(device: Any) -> int:
    """Bytes of a device; a CPU device has its share of the machine."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // max(1, jax.local_device_count())


def slot_bytes(spec: ModelSpec, itemsize: int, remat: str) -> int:
    """Bytes that one slot's activations hold at the peak of the backward pass."""
    heads = (spec.num_heads * 2 + spec.num_kv_heads * 2) * spec.head_dim
    layer = (6 * spec.d_model + heads + 4 * spec.d_ff) * itemsize
    kept = spec.d_model * itemsize if remat == "full" else layer
    if remat == "dots":
        kept = layer * 2 // 3
    return kept * spec.num_layers + 2 * layer


def choose(
    spec: ModelSpec,
    *,
    num_params: int,
    ways: int,
    itemsize: int,
    max_length: int,
    rows: int,
    remat: str,
    rows_wanted: int,
    device: Any,
) -> tuple[int, str]:
    """Rows of a microbatch on one device, and the remat policy, where they are not given (0, "auto").

    `ways` is how many devices share the parameters; `rows_wanted` what a step can use on one device.
    """
    free = USABLE * device_memory(device) - STATE_BYTES * num_params / ways
    candidates = ["none", "full"] if remat == "auto" else [remat]
    most = max(1, CPU_SLOTS // max_length) if device.platform == "cpu" else 64
    for policy in candidates:
        fitting = int(free / (slot_bytes(spec, itemsize, policy) * max_length))
        if fitting >= 1 or policy == candidates[-1]:
            return rows or max(1, min(fitting, most, rows_wanted)), policy
    raise AssertionError("the last policy is always taken")
