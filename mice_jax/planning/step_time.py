"""Estimates the duration of a step, with matmuls, links and memory each at an assumed share of its peak.

The estimate is meant for comparing meshes, and for the order of magnitude of a run's cost. `describe_assumptions` lists
the assumptions. How much of the communication overlaps with matmuls is read from the compiled program if there is one,
or else assumed as `bench/compiled.py` has read it from other programs.
"""

import dataclasses
import math

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mice_jax.hardware import (
    GPUS_PER_HOST,
    NETWORK_RATE,
    Chip,
    attention_flops,
    matmul_flops,
    passes_with_weights,
    train_flops,
)
from mice_jax.models.attention import BACKENDS
from mice_jax.sharding import LENGTH_AXIS, num_shards
from mice_jax.training import memory_model

MATMUL_EFFICIENCY = 0.6  # share of the peak FLOP/s of a device that matmuls reach
LINK_EFFICIENCY = 0.7  # share of the link rate that collectives reach
MEMORY_EFFICIENCY = 0.7  # share of the memory rate that the update reaches
ROW_FILL = 0.95  # share of slots that hold a token
# Share of the bytes between devices that is sent while matmuls run, if no program is compiled.
SPARSE_CORE_OVERLAP = 0.75  # of 3B to 7B models on v5p and v6e, with `xla_flags.SPARSE_CORE_OPTIONS`
OTHER_TPU_OVERLAP = 0.0  # every collective runs alone
GPU_OVERLAP = 0.8  # a guess at XLA's latency-hiding scheduler; no program was read
MIN_ROWS = 1 / 8  # rows of the smallest microbatch shape on one device, as a fraction of a full row


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Estimated duration of one step and its parts."""

    seconds: float
    compute_s: float
    network_s: float  # all communication
    exposed_s: float  # the part of it during which no matmul runs
    update_s: float
    host_s: float  # transfers from and to host memory
    microbatches: int
    tokens: float
    mfu: float


def estimate_step_time(
    inputs: memory_model.MemoryInputs,
    chip: Chip,
    rows: int,
    remat: str,
    samples: float,
    mean_length: float,
    overlap: float | None = None,
) -> StepTime:
    """Estimates the duration of a step.

    Args:
        inputs: model, mesh, dtype and attention of the run.
        chip: the device.
        rows: rows of a microbatch on one device.
        remat: rematerialisation policy.
        samples: samples of a step.
        mean_length: mean number of tokens of a sample.
        overlap: share of the bytes between devices that a compiled program sends while matmuls run; None assumes one.

    Returns:
        Seconds of the step, their parts, and the model FLOPs utilisation.
    """
    tokens = samples * mean_length
    device_rows = max(tokens / ROW_FILL / num_shards(inputs.mesh) / inputs.max_length, MIN_ROWS)
    microbatches = math.ceil(device_rows / rows)
    row_slots = device_rows * inputs.max_length
    slots = row_slots / inputs.mesh.shape[LENGTH_AXIS]  # of one device
    trained = memory_model.entries_per_device(inputs.state.params)  # trained parameters of one device
    weights = trained + memory_model.bytes_per_device(inputs.base) / inputs.dtype.itemsize  # and all of them

    compute_s = _device_flops(inputs, remat, slots, mean_length) / (MATMUL_EFFICIENCY * chip.peak_flops)
    network_s = sum(
        count / (LINK_EFFICIENCY * _link_rate(chip, inputs.mesh, axis))
        for axis, count in _sent_bytes(inputs, remat, row_slots, microbatches, weights, trained).items()
    )
    update_s = _update_bytes(inputs, trained) / (MEMORY_EFFICIENCY * chip.memory_rate)
    overlapped = network_s * (assumed_overlap(chip) if overlap is None else overlap)
    exposed_s = network_s - overlapped + max(0.0, overlapped - compute_s)
    # Moments are moved while nothing else happens, the inputs of layers while products run.
    host_rate = LINK_EFFICIENCY * chip.host_rate
    moments_s = 2 * memory_model.host_bytes_per_device(inputs.state) / host_rate
    activations_s = 2 * memory_model.offloaded_activations(inputs, device_rows, remat) / host_rate
    seconds = compute_s + exposed_s + update_s + moments_s + max(0.0, activations_s - compute_s)
    frozen = inputs.base is not None
    model_flops = train_flops(inputs.decoder.spec, np.array([mean_length]), frozen=frozen) * samples
    mfu = model_flops / (seconds * inputs.mesh.size * chip.peak_flops)
    host_s = moments_s + activations_s
    return StepTime(seconds, compute_s, network_s, exposed_s, update_s, host_s, microbatches, tokens, mfu)


def assumed_overlap(chip: Chip) -> float:
    """Returns the share of the bytes between devices that is sent while matmuls run, if no program is compiled."""
    if chip.platform == "gpu":
        return GPU_OVERLAP
    return SPARSE_CORE_OVERLAP if chip.sparse_cores else OTHER_TPU_OVERLAP


def _device_flops(inputs: memory_model.MemoryInputs, remat: str, slots: float, mean_length: float) -> float:
    """Returns the FLOPs of one device for forward, backward and recomputation over `slots` slots of its rows."""
    spec = inputs.decoder.spec
    whole_rows = inputs.attention in ("splash", "reference")  # these backends compute scores over whole rows
    length = inputs.max_length if whole_rows else mean_length
    forward = matmul_flops(spec) * slots
    matmul = passes_with_weights(inputs.base is not None) * forward
    attention = 3 * attention_flops(spec, np.array([length])) / length * slots
    recomputed = 0.0
    if remat in ("full", "offload"):
        recomputed = forward + attention / 3
    elif remat == "dots" and not BACKENDS[inputs.attention].saved_by_dots:
        recomputed = attention / 3
    return (matmul + attention + recomputed) / inputs.mesh.shape["tensor"]


def _update_bytes(inputs: memory_model.MemoryInputs, trained: int) -> int:
    """Returns the bytes of its own memory that a device reads and writes in the update of a step.

    Parameters, moments and the running average are read and written, also where moments come from the host. The sums of
    gradients are read for their norm and for the update, and set to zero.
    """
    state = memory_model.bytes_per_device(inputs.state) + memory_model.host_bytes_per_device(inputs.state)
    return 2 * state + 3 * trained * inputs.sums_dtype.itemsize


def _sent_bytes(
    inputs: memory_model.MemoryInputs, remat: str, row_slots: float, microbatches: int, weights: float, trained: float
) -> dict[str, float]:
    """Returns the bytes that one device sends along each axis of the mesh in a step.

    Along fsdp, each microbatch all-gathers the weights twice and reduce-scatters the gradients of those that are
    trained. Along data, the gradients are all-reduced. Along tensor, the activations are all-reduced. Along sequence,
    the gradients are all-reduced, the keys and values of rows are all-gathered, again if they are not saved, and their
    gradients are reduce-scattered in float32. Queries and results that are moved go along it too, again if they are
    not saved, and so do their gradients. Of all parts of a row about one in `sequence` stays where it is. The links in
    between, which on a torus carry them too, are not counted.
    """
    spec, mesh, itemsize = inputs.decoder.spec, inputs.mesh, inputs.dtype.itemsize
    gradient, sequence = inputs.reduce_dtype.itemsize, mesh.shape[LENGTH_AXIS]
    slots = row_slots / sequence
    keys = row_slots * sum(memory_model.gathered_width(inputs, kind) for kind in spec.mixers)
    queries = slots * sum(memory_model.moved_width(inputs, kind) for kind in spec.mixers)
    passes = 1 if remat == "none" else 2
    moved = keys * (passes * itemsize + 4) + queries * 2 * (passes + 1) * itemsize
    return {
        "sequence": (moved + microbatches * trained * gradient * 2) * (1 - 1 / sequence),
        "fsdp": microbatches * (mesh.shape["fsdp"] - 1) * (2 * itemsize * weights + gradient * trained),
        "data": microbatches * trained * gradient * 2 * (1 - 1 / mesh.shape["data"]),
        "tensor": 8 * spec.num_layers * slots * spec.d_model * itemsize * (1 - 1 / mesh.shape["tensor"]),
    }


def _link_rate(chip: Chip, mesh: Mesh | AbstractMesh, axis: str) -> float:
    """Returns the bytes/s that one device can send along an axis of the mesh; the last axis connects neighbours.

    The GPUs of a group that share a host send to other hosts through all of their links, as NCCL's rings do, but not
    faster than within the host.
    """
    names = list(mesh.shape)
    stride = math.prod(mesh.shape[name] for name in names[names.index(axis) + 1 :])  # between devices of a group
    if chip.platform != "gpu" or stride * mesh.shape[axis] <= GPUS_PER_HOST:
        return chip.link_rate
    return min(chip.link_rate, max(1, GPUS_PER_HOST // stride) * NETWORK_RATE)


def describe_assumptions(chip: Chip, overlap: float | None) -> str:
    """Returns the assumptions of an estimate, as `mice plan` prints them.

    Args:
        chip: the device.
        overlap: as in `estimate_step_time`.
    """
    peak = "the peak measured on this machine" if chip.platform == "cpu" else "the peak"
    share = f"{assumed_overlap(chip) if overlap is None else overlap:.0%} of the bytes between devices"
    source = "" if overlap is None else ", as the compiled program schedules them"
    return (
        f"matrix products run at {MATMUL_EFFICIENCY:.0%} of {peak}, links and memory at {LINK_EFFICIENCY:.0%} and "
        f"{MEMORY_EFFICIENCY:.0%} of theirs, {share} are sent while products run{source}, rows are "
        f"{ROW_FILL:.0%} full, the run never waits for data; compilation, evaluation and saves are left out"
    )
