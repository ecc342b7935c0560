"""How long a step takes, by arithmetic: the products, the links and the memory of a device, each at an assumed share.

An estimate for comparing meshes and for an order of cost, not a measurement. `assumed` has what is assumed, in the
words that `plan` prints.
"""

import dataclasses
import math

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mice_jax.hardware import GPUS_PER_HOST, NETWORK_RATE, Chip, train_flops
from mice_jax.models.attention import BACKENDS
from mice_jax.sharding import num_shards
from mice_jax.training import memory_model

MATMUL_EFFICIENCY = 0.6  # of a device's peak, in matrix products
LINK_EFFICIENCY = 0.7  # of the rate at which it can send
MEMORY_EFFICIENCY = 0.7  # of the rate at which it reads and writes
ROW_FILL = 0.95  # of the slots that hold a token
OVERLAP = 0.8  # of the shorter of computing and sending goes on beside the longer
UPDATE_BYTES_PER_PARAM = (
    36  # that an update reads and writes a parameter: gradient, parameter, two moments, zeroed sums
)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Of one step."""

    seconds: float
    compute_s: float
    network_s: float
    update_s: float
    microbatches: int
    tokens: float
    mfu: float


def estimate_step_time(
    inputs: memory_model.MemoryInputs, chip: Chip, rows: int, remat: str, samples: float, mean_length: float
) -> StepTime:
    """Of a step of so many samples of so many tokens, with so many rows a microbatch on each device."""
    spec, mesh = inputs.decoder.spec, inputs.mesh
    shards, tensor = num_shards(mesh), mesh.shape["tensor"]
    tokens = samples * mean_length
    share = max(
        tokens / ROW_FILL / shards / inputs.max_length, 1 / 8
    )  # rows of one device; the least microbatch is 1/8 row
    microbatches = math.ceil(share / rows)

    # ---- Compute: products of all slots; attention over whole rows where the backend goes over them.
    by_row = inputs.attention in ("splash", "reference")
    length = inputs.max_length if by_row else mean_length
    slots = share * inputs.max_length
    products = train_flops(spec, np.array([1.0])) * slots
    attention = (train_flops(spec, np.array([length])) / length - train_flops(spec, np.array([1.0]))) * slots
    dots = 0.0 if BACKENDS[inputs.attention].saved_by_dots else attention / 3
    again = {"none": 0.0, "dots": dots, "full": (products + attention) / 3}[remat]
    compute_s = (products + attention + again) / tensor / (MATMUL_EFFICIENCY * chip.peak_flops)

    # ---- Network: each microbatch gathers the weights twice and scatters their gradients; tensor joins activations.
    weights = memory_model.bytes_per_device(inputs.state.params) / 4  # of this device
    fsdp, item = mesh.shape["fsdp"], inputs.dtype.itemsize
    sent = {
        "fsdp": microbatches * weights * (fsdp - 1) * (2 * item + 4),
        "data": microbatches * weights * 4 * 2 * (1 - 1 / mesh.shape["data"]),
        "tensor": 8 * spec.num_layers * slots * spec.d_model * item * (1 - 1 / tensor),
    }
    network_s = sum(count / (LINK_EFFICIENCY * _link_rate(chip, mesh, axis)) for axis, count in sent.items())

    update_s = weights * UPDATE_BYTES_PER_PARAM / (MEMORY_EFFICIENCY * chip.memory_rate)
    longer, shorter = max(compute_s, network_s), min(compute_s, network_s)
    seconds = longer + (1 - OVERLAP) * shorter + update_s
    model = train_flops(spec, np.array([mean_length])) * samples
    mfu = model / (seconds * mesh.size * chip.peak_flops)
    return StepTime(seconds, compute_s, network_s, update_s, microbatches, tokens, mfu)


def _link_rate(chip: Chip, mesh: Mesh | AbstractMesh, axis: str) -> float:
    """Bytes/s that one device can send along an axis of the mesh, whose last axis has neighbours beside each other.

    Between GPUs' hosts those of a group that share a host send through the links of all of them together, as NCCL's
    rings do, and no faster than within it.
    """
    names = list(mesh.shape)
    apart = math.prod(mesh.shape[name] for name in names[names.index(axis) + 1 :])  # from one of a group to the next
    if chip.platform != "gpu" or apart * mesh.shape[axis] <= GPUS_PER_HOST:
        return chip.link_rate
    return min(chip.link_rate, max(1, GPUS_PER_HOST // apart) * NETWORK_RATE)


def describe_assumptions(chip: Chip) -> str:
    peak = "the peak that was measured here just now" if chip.platform == "cpu" else "the peak"
    return (
        f"matrix products run at {MATMUL_EFFICIENCY:.0%} of {peak}, links and memory at {LINK_EFFICIENCY:.0%} and "
        f"{MEMORY_EFFICIENCY:.0%} of theirs, {OVERLAP:.0%} of communication is hidden behind compute, rows are "
        f"{ROW_FILL:.0%} full, the run never waits for data; compiling, evaluating and saving are left out"
    )
