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
from mice_jax.loss import logit_tokens
from mice_jax.models.attention import BACKENDS
from mice_jax.models.transformer import Decoder
from mice_jax.step import TrainState

POLICIES = ("none", "dots", "full")  # of rematerialisation, from the fastest to the leanest
CPU_SLOTS = 4096  # of a microbatch on one CPU device: more is no faster there
MOST_ROWS = 64  # of a microbatch on one device of any other kind
LANES = 128  # of a TPU: the last dim of its arrays is padded to as many
USABLE = 0.9  # of a device's memory, by an estimate: it may be off by so much


@dataclasses.dataclass(frozen=True)
class Load:
    """What a run lays on one device, whatever its rows and rematerialisation are."""

    decoder: Decoder
    state: TrainState  # shapes with shardings
    mesh: Mesh | AbstractMesh
    dtype: Any  # of the forward and backward pass
    attention: str
    sums_dtype: Any
    max_length: int  # slots of a row


@dataclasses.dataclass(frozen=True)
class Memory:
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


def estimate(load: Load, rows: int, remat: str) -> Memory:
    """Of a step whose largest microbatch has so many rows on each device."""
    params, itemsize = device_bytes(load.state.params), load.dtype.itemsize
    slots, own = rows * load.max_length, rows * _row_bytes(load)
    return Memory(
        params=params,
        optimizer=device_bytes(load.state.opt_state),
        sums=params * load.sums_dtype.itemsize // 4,
        gradients=params,
        cast=params * itemsize // 4 if itemsize < 4 else 0,
        activations=(slots * _kept(load, remat) * itemsize + own * (remat == "none")) * load.decoder.spec.num_layers,
        working=max((slots * _working(load) + _gathered(load)) * itemsize + own, _head(load, rows)),
    )


def choose(load: Load, memory: float, *, rows: int, policies: Sequence[str], most: int) -> tuple[int, str]:
    """Rows of a microbatch on one device, where they are not given (0), and one of the remat policies.

    Those are tried in turn, until one leaves room for the rows that are given, or for one. `memory` is the device's,
    in bytes; no more than `most` rows are taken.
    """
    for policy in policies:
        fitting = largest_rows(load, memory, policy, max(most, rows))
        if fitting >= max(1, rows) or policy == policies[-1]:
            return rows or max(1, fitting), policy
    raise AssertionError("the last policy is always taken")


def fastest_first(platform: str) -> tuple[str, ...]:
    """The policies worth trying: to keep what `none` keeps takes a CPU longer than to compute it again."""
    return tuple(p for p in POLICIES if platform != "cpu" or p != "none")


def largest_rows(load: Load, memory: float, remat: str, most: int) -> int:
    """The most rows of which an estimate fits; 0 where none does."""
    return bisect.bisect(range(1, most + 1), USABLE * memory, key=lambda rows: estimate(load, rows, remat).total)


def most_rows(load: Load, platform: str, wanted: float) -> int:
    """Rows that attention can count, beyond which a microbatch is no faster, or a step (of `wanted`) has no more."""
    most = max(1, CPU_SLOTS // load.max_length) if platform == "cpu" else MOST_ROWS
    countable = BACKENDS[load.attention].entries / (load.max_length * _widths(load)[1])
    return max(1, int(min(most, round(wanted), countable)))


def device_memory(device: Any) -> int:
    """Bytes that a program may use of a device; a CPU device has its share of the machine."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if chip := find_chip(device):
        return int(chip.memory)
    return machine_memory() // max(1, jax.local_device_count())


def machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_bytes(tree: Any) -> int:
    """What of a tree of shapes with shardings lies on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


# ---------------------------------------------------------------------------------------- what is alive at once
def _widths(load: Load) -> tuple[int, int, int, int]:
    """d_model, and the columns of queries, of keys and of the MLP that one device has."""
    s, tensor = load.decoder.spec, load.mesh.shape["tensor"]
    head = -(-s.head_dim // LANES) * LANES if load.attention == "splash" else s.head_dim
    return s.d_model, s.num_heads * head // tensor, s.num_kv_heads * head // tensor, s.d_ff // tensor


def _kept(load: Load, remat: str) -> int:
    """Entries a slot that a layer keeps for the backward pass."""
    d, q, k, f = _widths(load)
    result = q if BACKENDS[load.attention].keeps else 0
    windows = len(set(load.decoder.spec.windows))  # a branch each: a switch keeps more for several
    return {
        "full": d,  # what went in
        "dots": 2 * d + q + 2 * k + 2 * f + result,  # and what products with weights gave, but the last one
        "none": 10 * d + 3 * q + 3 * k + 6 * f + (windows - 1) * (q + k),
    }[remat]


def _working(load: Load) -> int:
    """Entries a slot of the layer whose backward pass is under way."""
    d, q, k, f = _widths(load)
    entries = 4 * d + 2 * q + 2 * k + 5 * f
    if load.attention == "reference":  # masks and scores of a row's slots with each other
        entries += 4 * load.max_length * load.decoder.spec.num_heads // load.mesh.shape["tensor"]
    return entries


def _row_bytes(load: Load) -> int:
    """Of one row in one layer, what its attention takes beside entries of the layer's widths."""
    heads = -(-load.decoder.spec.num_heads // load.mesh.shape["tensor"])
    return BACKENDS[load.attention].row_bytes(load.max_length, heads)


def _gathered(load: Load) -> int:
    """Entries of the weights that are whole on a device for the time of their use: a layer's and the next one's."""
    whole = sum(x.size for x in jax.tree.leaves(load.decoder.abstract["layers"]))
    return 2 * whole // load.decoder.spec.num_layers // load.mesh.shape["tensor"]


def _head(load: Load, rows: int) -> int:
    """Bytes of the output projection, whole, and of its gradient in float32, and of a chunk's logits, three of them."""
    vocab = load.decoder.vocab_rows // load.mesh.shape["tensor"]
    tokens = max(rows, logit_tokens(load.decoder.vocab_rows))
    return vocab * (load.decoder.spec.d_model * (load.dtype.itemsize + 4) + 3 * 4 * tokens)
