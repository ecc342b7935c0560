"""What a run needs of a device's memory, by arithmetic: by it `train` chooses rows and rematerialisation.

Parameters, moments, sums and a microbatch's gradients are exact, from their shapes and shardings. What else exists at
the peak of a backward pass is counted in arrays of the layer's widths. How many of each are alive at once is the
compiler's doing; the counts below are those that bring the sum nearest to what XLA says for TPUs when it compiles the
whole step (tests/test_aot.py holds them to it). `plan` compiles, and shows both.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mice_jax.hardware import find_chip
from mice_jax.loss import tokens_per_chunk
from mice_jax.models.attention import BACKENDS
from mice_jax.models.transformer import Decoder
from mice_jax.step import TrainState

REMAT_POLICIES = ("none", "dots", "full")  # of rematerialisation, from the fastest to the leanest
MAX_CPU_SLOTS = 4096  # of a microbatch on one CPU device: more is no faster there
MAX_ROWS = 64  # of a microbatch on one device of any other kind
TPU_LANES = 128  # of a TPU: the last dim of its arrays is padded to as many
USABLE_FRACTION = 0.9  # of a device's memory, by an estimate: it may be off by so much


@dataclasses.dataclass(frozen=True)
class MemoryInputs:
    """What a run lays on one device, whatever its rows and rematerialisation are."""

    decoder: Decoder
    state: TrainState  # shapes with shardings
    mesh: Mesh | AbstractMesh
    dtype: Any  # of the forward and backward pass
    attention: str
    sums_dtype: Any
    max_length: int  # slots of a row


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device at the peak of a step, by what they are for."""

    params: int
    optimizer: int
    sums: int  # of the step's gradients
    gradients: int  # of one microbatch
    cast: int  # the parameters in the compute dtype: XLA casts them all before the first layer
    activations: int  # kept for the backward pass
    working: int  # of one layer, or of the loss: the larger

    @property
    def resident(self) -> int:
        """What is there all through a run."""
        return self.params + self.optimizer + self.sums

    @property
    def total(self) -> int:
        return self.resident + self.gradients + self.cast + self.activations + self.working


def estimate_memory(inputs: MemoryInputs, rows: int, remat: str) -> MemoryEstimate:
    """Of a step whose largest microbatch has so many rows on each device."""
    params, itemsize = bytes_per_device(inputs.state.params), inputs.dtype.itemsize
    slots, own = rows * inputs.max_length, rows * _row_bytes(inputs)
    return MemoryEstimate(
        params=params,
        optimizer=bytes_per_device(inputs.state.opt_state),
        sums=params * inputs.sums_dtype.itemsize // 4,
        gradients=params,
        cast=params * itemsize // 4 if itemsize < 4 else 0,
        activations=(slots * _saved_per_slot(inputs, remat) * itemsize + own * (remat == "none"))
        * inputs.decoder.spec.num_layers,
        working=max(
            (slots * _working_per_slot(inputs) + _gathered_weights(inputs)) * itemsize + own,
            _lm_head_bytes(inputs, rows),
        ),
    )


def choose_rows_and_remat(
    inputs: MemoryInputs, memory: float, *, rows: int, policies: Sequence[str], most: int
) -> tuple[int, str]:
    """Rows of a microbatch on one device, where they are not given (0), and one of the remat policies.

    Those are tried in turn, until one leaves room for the rows that are given, or for one. `memory` is the device's,
    in bytes; no more than `most` rows are taken.
    """
    for policy in policies:
        fitting = max_fitting_rows(inputs, memory, policy, max(most, rows))
        if fitting >= max(1, rows) or policy == policies[-1]:
            return rows or max(1, fitting), policy
    raise AssertionError("the last policy is always taken")


def remat_policies_fastest_first(platform: str) -> tuple[str, ...]:
    """The policies worth trying: to keep what `none` keeps takes a CPU longer than to compute it again."""
    return tuple(p for p in REMAT_POLICIES if platform != "cpu" or p != "none")


def max_fitting_rows(inputs: MemoryInputs, memory: float, remat: str, most: int) -> int:
    """The most rows of which an estimate fits; 0 where none does."""
    return bisect.bisect(
        range(1, most + 1), USABLE_FRACTION * memory, key=lambda rows: estimate_memory(inputs, rows, remat).total
    )


def max_useful_rows(inputs: MemoryInputs, platform: str, wanted: float) -> int:
    """Rows that attention can count, beyond which a microbatch is no faster, or a step (of `wanted`) has no more."""
    most = max(1, MAX_CPU_SLOTS // inputs.max_length) if platform == "cpu" else MAX_ROWS
    countable = BACKENDS[inputs.attention].max_entries / (inputs.max_length * _widths(inputs)[1])
    return max(1, int(min(most, round(wanted), countable)))


def device_memory_bytes(device: Any) -> int:
    """Bytes that a program may use of a device; a CPU device has its share of the machine."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if chip := find_chip(device):
        return int(chip.memory)
    return host_memory_bytes() // max(1, jax.local_device_count())


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_per_device(tree: Any) -> int:
    """What of a tree of shapes with shardings lies on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


# ---------------------------------------------------------------------------------------- what is alive at once
def _widths(inputs: MemoryInputs) -> tuple[int, int, int, int]:
    """d_model, and the columns of queries, of keys and of the MLP that one device has."""
    s, tensor = inputs.decoder.spec, inputs.mesh.shape["tensor"]
    head = -(-s.head_dim // TPU_LANES) * TPU_LANES if inputs.attention == "splash" else s.head_dim
    return s.d_model, s.num_heads * head // tensor, s.num_kv_heads * head // tensor, s.d_ff // tensor


def _saved_per_slot(inputs: MemoryInputs, remat: str) -> int:
    """Entries a slot that a layer keeps for the backward pass."""
    d, q, k, f = _widths(inputs)
    result = q if BACKENDS[inputs.attention].saved_by_dots else 0
    windows = len(set(inputs.decoder.spec.windows))  # a branch each: a switch keeps more for several
    return {
        "full": d,  # what went in
        "dots": 2 * d + q + 2 * k + 2 * f + result,  # and what products with weights gave, but the last one
        "none": 10 * d + 3 * q + 3 * k + 6 * f + (windows - 1) * (q + k),
    }[remat]


def _working_per_slot(inputs: MemoryInputs) -> int:
    """Entries a slot of the layer whose backward pass is under way."""
    d, q, k, f = _widths(inputs)
    entries = 4 * d + 2 * q + 2 * k + 5 * f
    if inputs.attention == "reference":  # masks and scores of a row's slots with each other
        entries += 4 * inputs.max_length * inputs.decoder.spec.num_heads // inputs.mesh.shape["tensor"]
    return entries


def _row_bytes(inputs: MemoryInputs) -> int:
    """Of one row in one layer, what its attention takes beside entries of the layer's widths."""
    heads = -(-inputs.decoder.spec.num_heads // inputs.mesh.shape["tensor"])
    return BACKENDS[inputs.attention].row_bytes(inputs.max_length, heads)


def _gathered_weights(inputs: MemoryInputs) -> int:
    """Entries of the weights that are whole on a device for the time of their use: a layer's and the next one's."""
    whole = sum(x.size for x in jax.tree.leaves(inputs.decoder.abstract["layers"]))
    return 2 * whole // inputs.decoder.spec.num_layers // inputs.mesh.shape["tensor"]


def _lm_head_bytes(inputs: MemoryInputs, rows: int) -> int:
    """Bytes of the output projection, whole, and of its gradient in float32, and of a chunk's logits, three of them."""
    vocab = inputs.decoder.vocab_rows // inputs.mesh.shape["tensor"]
    tokens = max(rows, tokens_per_chunk(inputs.decoder.vocab_rows))
    return vocab * (inputs.decoder.spec.d_model * (inputs.dtype.itemsize + 4) + 3 * 4 * tokens)
