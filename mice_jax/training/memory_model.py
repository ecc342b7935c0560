"""Analytical model of the peak device memory of a step, used to choose rows_per_device and remat.

Parameters, moments, sums and the gradients of a microbatch are exact, from their shapes and shardings. Everything else
that is alive at the peak of the backward pass is counted in arrays of the layer's widths. How many of those are alive
at once is up to the compiler: the counts below bring the total closest to what XLA reports for TPUs when it compiles
the whole step, and tests/test_aot.py bounds the error. `mice plan` compiles, and shows both numbers.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mice_jax.errors import UserError
from mice_jax.hardware import find_chip
from mice_jax.loss import tokens_per_chunk
from mice_jax.models.attention import BACKENDS
from mice_jax.models.layer_groups import Group, find_groups
from mice_jax.models.mixers import MIXERS
from mice_jax.models.mixers.costs import MixerWidths, padded
from mice_jax.models.spec import Kind, is_recurrent
from mice_jax.models.transformer import Decoder, Params
from mice_jax.numerics.offload import is_on_host
from mice_jax.numerics.wide_gradient import gradient_dtype
from mice_jax.sharding import LENGTH_AXIS
from mice_jax.step import TrainState

# The remat policies that are chosen by themselves, from the fastest to the one that needs the least memory. Another,
# "offload", is "full" with the inputs of layers in host memory.
REMAT_POLICIES = ("none", "dots", "full")
# Layers whose offloaded inputs are on the device too, since they are sent or awaited.
OFFLOADED_IN_FLIGHT = 2
# The maximum number of slots of a microbatch on one CPU device. Larger microbatches are not faster.
MAX_CPU_SLOTS = 4096
# The maximum number of rows of a microbatch on one device of any other kind.
MAX_ROWS = 64
# The last dim of an array on a TPU is padded to a multiple of this.
TPU_LANES = 128
# The fraction of a device's memory that an estimate may fill, which leaves room for the error of the estimate.
USABLE_FRACTION = 0.9


@dataclasses.dataclass(frozen=True)
class MemoryInputs:
    """Inputs of the memory model that do not depend on rows or remat.

    Attributes:
      decoder: The model.
      state: The shapes and shardings of the training state.
      mesh: The run's mesh.
      dtype: The dtype of the forward and backward pass.
      attention: The name of the attention backend.
      sums_dtype: The dtype of the accumulated gradients.
      reduce_dtype: The dtype in which gradients are summed over devices.
      max_length: The number of slots of a row.
      base: The shapes and shardings of the frozen parameters that adapters are added to; None if all are trained.
    """

    decoder: Decoder
    state: TrainState
    mesh: Mesh | AbstractMesh
    dtype: Any
    attention: str
    sums_dtype: Any
    reduce_dtype: Any
    max_length: int
    base: Params | None = None


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one device at the peak of a step, by purpose.

    Attributes:
      params: The parameters.
      optimizer: The optimizer's state.
      average: The running average of the parameters; 0 if the run keeps none.
      sums: The accumulated gradients of the step.
      gradients: The gradients of one microbatch.
      cast: The parameters in the compute dtype. XLA casts all of them before the first layer.
      activations: The activations that are saved for the backward pass.
      working: The temporary arrays of one layer or of the loss, whichever are larger.
    """

    params: int
    optimizer: int
    average: int
    sums: int
    gradients: int
    cast: int
    activations: int
    working: int

    @property
    def resident(self) -> int:
        """The bytes that are allocated during the whole run."""
        return self.params + self.optimizer + self.average + self.sums

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        return self.resident + self.gradients + self.cast + self.activations + self.working


def estimate_memory(inputs: MemoryInputs, rows: int, remat: str) -> MemoryEstimate:
    """Estimates the peak memory of a step on one device.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        rows: The number of rows of the largest microbatch on one device.
        remat: The rematerialisation policy, one of REMAT_POLICIES or offload.

    Returns:
        The estimate, in bytes of one device.
    """
    # A base is held in the compute dtype, has no gradients and is used as it is; adapters are what is trained.
    trained, itemsize = entries_per_device(inputs.state.params), inputs.dtype.itemsize
    cast = [p for p in jax.tree.leaves(inputs.state.params) if p.dtype != inputs.dtype]
    mixers, slots = inputs.decoder.spec.mixers, rows * _slots_of_row(inputs)

    def attention_bytes(kind: Kind) -> int:
        return 0 if is_recurrent(kind) else rows * _attention_bytes_per_row(inputs)

    def gathered_bytes(kind: Kind) -> int:
        return rows * inputs.max_length * gathered_width(inputs, kind) * itemsize

    def saved_by_layer(kind: Kind) -> int:
        saved = slots * _saved_per_slot(inputs, kind, remat) * itemsize
        return saved + attention_bytes(kind) + gathered_bytes(kind) if remat == "none" else saved

    def working_bytes(kind: Kind) -> int:
        entries = slots * _working_per_slot(inputs, kind) + _gathered_weights(inputs)
        # Of gathered keys and values, there are also the gradients, in the same dtype and in float32.
        gathered = gathered_bytes(kind) * (2 * itemsize + 4) // itemsize
        return entries * itemsize + attention_bytes(kind) + gathered

    def working_of_group(group: Group) -> int:
        """Counts every run of a group, and twice more what a run saves that is a scan inside of a scan."""
        nested = [run.count * saved_by_layer(run.kind) for run in group.runs if run.count > 1 and group.repeats > 1]
        return sum(working_bytes(run.kind) for run in group.runs) + 2 * max(nested, default=0)

    groups = find_groups(mixers)
    # The gradients of each group are put into stacks of all layers, and then added.
    gradients = sum(
        entries_per_device(p) * gradient_dtype(p, inputs.sums_dtype).itemsize
        for p in jax.tree.leaves(inputs.state.params)
    )
    padded = gradients if len(groups) > 1 else 0
    own_inputs = 2 * slots * inputs.decoder.spec.num_layers * inputs.decoder.spec.per_layer_dim  # and their gradients
    return MemoryEstimate(
        params=bytes_per_device(inputs.state.params) + bytes_per_device(inputs.base),
        optimizer=bytes_per_device(inputs.state.opt_state),
        average=bytes_per_device(inputs.state.average),
        sums=trained * inputs.sums_dtype.itemsize,
        gradients=gradients + padded,
        cast=entries_per_device(cast) * itemsize,
        activations=sum(saved_by_layer(kind) for kind in mixers) + own_inputs * itemsize,
        working=max(_lm_head_bytes(inputs, rows), _own_table_bytes(inputs), *map(working_of_group, groups)),
    )


def estimate_host_memory(inputs: MemoryInputs, rows: int, remat: str) -> int:
    """Returns the bytes of host memory that a step keeps arrays of one device in.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        rows: The number of rows of the largest microbatch on one device.
        remat: The rematerialisation policy.
    """
    return host_bytes_per_device(inputs.state) + offloaded_activations(inputs, rows, remat)


def check_host_memory(inputs: MemoryInputs, rows: int, remat: str, devices: int, memory: float) -> None:
    """Raises UserError if what a run keeps in host memory does not fit there.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        rows: The number of rows of the largest microbatch on one device.
        remat: The rematerialisation policy.
        devices: The number of devices that share a host's memory.
        memory: The memory of the host in bytes.
    """
    needed = devices * estimate_host_memory(inputs, rows, remat)
    if needed > USABLE_FRACTION * memory:
        raise UserError(
            f"optim.offload_moments and model.remat={remat!r} keep {needed / 2**30:,.1f} GiB in the memory of a host, "
            f"for {devices} devices, and it has {memory / 2**30:,.1f} GiB, of which {USABLE_FRACTION:.0%} are counted "
            "on. Set optim.moments_dtype to bfloat16 or int8, use more hosts, or leave the moments on the devices."
        )


def offloaded_activations(inputs: MemoryInputs, rows: float, remat: str) -> int:
    """Returns the bytes of a microbatch's activations that are kept in host memory, with arguments as above."""
    spec = inputs.decoder.spec
    slots = rows * _slots_of_row(inputs)
    return int(slots * spec.num_layers * spec.d_model * inputs.dtype.itemsize) if remat == "offload" else 0


def choose_rows_and_remat(
    inputs: MemoryInputs, memory: float, *, rows: int, policies: Sequence[str], most: int
) -> tuple[int, str]:
    """Chooses the rows of a microbatch on one device and the remat policy.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        memory: The memory of one device that a program may use, in bytes.
        rows: The number of rows that the config sets; 0 chooses as many as fit.
        policies: The remat policies in the order in which they are tried. The first that leaves room for `rows`, or for
            one row, is chosen; if none does, the last.
        most: The largest number of rows to choose.

    Returns:
        The number of rows and the remat policy.
    """
    for policy in policies[:-1]:
        fitting = max_fitting_rows(inputs, memory, policy, max(most, rows))
        if fitting >= max(1, rows):
            return rows or fitting, policy
    return rows or max(1, max_fitting_rows(inputs, memory, policies[-1], most)), policies[-1]


def remat_policies_fastest_first(platform: str) -> tuple[str, ...]:
    """Returns the remat policies worth trying. On CPUs, recomputing is faster than loading what `none` saves."""
    return tuple(p for p in REMAT_POLICIES if platform != "cpu" or p != "none")


def max_fitting_rows(inputs: MemoryInputs, memory: float, remat: str, most: int) -> int:
    """Returns the largest number of rows whose estimate fits.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        memory: The memory of one device that a program may use, in bytes.
        remat: The rematerialisation policy.
        most: The largest number of rows to return.

    Returns:
        The number of rows of a microbatch on one device; 0 if not even one row fits.
    """

    def needed(rows: int) -> int:
        return estimate_memory(inputs, rows, remat).total

    return bisect.bisect(range(1, most + 1), USABLE_FRACTION * memory, key=needed)


def max_useful_rows(inputs: MemoryInputs, platform: str, wanted: float) -> int:
    """Returns the number of rows of one device beyond which a microbatch is not faster or attention cannot index it.

    Args:
        inputs: The inputs that do not depend on rows or remat.
        platform: The platform of the devices: cpu, gpu or tpu.
        wanted: The number of rows of one device that a whole step has on average.

    Returns:
        The number of rows, at least one.
    """
    most = max(1, MAX_CPU_SLOTS // _slots_of_row(inputs)) if platform == "cpu" else MAX_ROWS
    query_width = max(_widths(inputs, kind)[1] for kind in inputs.decoder.spec.mixers)
    indexable = BACKENDS[inputs.attention].max_entries / (inputs.max_length * query_width)
    return max(1, int(min(most, round(wanted), indexable)))


def device_memory_bytes(device: Any) -> int:
    """Returns the bytes of a device that a program may use. The devices of a CPU share the memory of the machine."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = find_chip(device)
    if chip:
        return int(chip.memory)
    return host_memory_bytes() // max(1, jax.local_device_count())


def host_memory_bytes() -> int:
    """Returns the physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device stores in its own memory, of a pytree of arrays or of shapes with shardings."""
    return _shard_bytes([x for x in jax.tree.leaves(tree) if not is_on_host(x)])


def host_bytes_per_device(tree: Any) -> int:
    """Returns the bytes that the host of a device stores for it, of a pytree of arrays or of shapes with shardings."""
    return _shard_bytes([x for x in jax.tree.leaves(tree) if is_on_host(x)])


def entries_per_device(tree: Any) -> int:
    """Returns the number of entries that one device stores of a pytree of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _shard_bytes(leaves: Sequence[Any]) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


# ---------------------------------------------------------------------------------------- arrays alive at the peak
def gathered_width(inputs: MemoryInputs, kind: Kind) -> int:
    """Returns the entries per slot of the keys and values that devices which share a row gather in a layer; else 0."""
    if is_recurrent(kind) or inputs.mesh.shape[LENGTH_AXIS] == 1:
        return 0
    return 2 * _widths(inputs, kind)[2]


def moved_width(inputs: MemoryInputs, kind: Kind) -> int:
    """Returns the entries per slot of the queries, and as many of results, that these devices move in a layer; else 0.

    Only where recurrent layers keep the order of the row are there any (`attention.split_rows`).
    """
    moved = gathered_width(inputs, kind) and inputs.decoder.spec.is_recurrent
    return _widths(inputs, kind)[1] if moved else 0


def _slots_of_row(inputs: MemoryInputs) -> int:
    """Returns the slots of a row on one device."""
    return inputs.max_length // inputs.mesh.shape[LENGTH_AXIS]


def _widths(inputs: MemoryInputs, kind: Kind) -> tuple[int, int, int, int]:
    """Returns d_model, and the widths of the queries, the keys and the MLP of a layer on one device."""
    s, tensor = inputs.decoder.spec, inputs.mesh.shape["tensor"]
    attention = s.attention_of(None if is_recurrent(kind) else kind)
    head = padded(attention.head_dim, _lanes(inputs))
    return s.d_model, s.num_heads * head // tensor, attention.num_kv_heads * head // tensor, s.d_ff_of(kind) // tensor


def _lanes(inputs: MemoryInputs) -> int:
    """Returns what the devices pad the last dim of an array to a multiple of."""
    return TPU_LANES if inputs.attention == "splash" else 1


def _mixer_widths(inputs: MemoryInputs, kind: Kind) -> MixerWidths:
    """Returns the widths of the arrays of a layer's mixer on one device."""
    spec, tensor = inputs.decoder.spec, inputs.mesh.shape["tensor"]
    if is_recurrent(kind):
        return MIXERS[type(kind)].widths(spec, kind, tensor, _lanes(inputs))
    _, q, k, _ = _widths(inputs, kind)
    attention_output = q if BACKENDS[inputs.attention].saved_by_dots else 0
    # Each window is a branch of a switch, which saves more for several.
    windows = len({w for w, mixer in zip(spec.windows, spec.mixers, strict=True) if mixer == kind})
    working, gate = 2 * q + 2 * k, q if spec.attention_gate else 0
    if inputs.attention == "reference":  # It has masks and scores between all slots of a row.
        working += 4 * inputs.max_length * spec.num_heads // tensor
    return MixerWidths(
        products=q + 2 * k + attention_output + gate,
        saved=3 * q + 3 * k + (windows - 1) * (q + k) + 3 * gate,
        saved_float32=0,
        working=working + 2 * gate,
    )


def _saved_per_slot(inputs: MemoryInputs, kind: Kind, remat: str) -> int:
    """Returns the number of array entries per slot that one layer saves for the backward pass."""
    (d, _, _, f), mixer = _widths(inputs, kind), _mixer_widths(inputs, kind)
    if remat == "full":  # Only the input of the layer is saved.
        return d
    if remat == "offload":  # It is in host memory, but for those of the layers whose transfer is under way.
        return OFFLOADED_IN_FLIGHT * d // inputs.decoder.spec.num_layers
    if remat == "dots":  # The results of all matmuls with weights, except the last, are saved too.
        return 2 * d + mixer.products + 2 * f
    return 10 * d + mixer.saved + 6 * f + mixer.saved_float32 * 4 // inputs.dtype.itemsize


def _working_per_slot(inputs: MemoryInputs, kind: Kind) -> int:
    """Returns the number of array entries per slot of the layer whose backward pass is running."""
    d, _, _, f = _widths(inputs, kind)
    return 4 * d + _mixer_widths(inputs, kind).working + 5 * f


def _attention_bytes_per_row(inputs: MemoryInputs) -> int:
    """Returns the bytes that attention needs for a row in one layer, besides arrays of the layer's widths."""
    heads = -(-inputs.decoder.spec.num_heads // inputs.mesh.shape["tensor"])
    return BACKENDS[inputs.attention].row_bytes(inputs.max_length, heads)


def _gathered_weights(inputs: MemoryInputs) -> int:
    """Returns the number of entries of the weights that a device has gathered, which are those of two layers."""
    total = sum(x.size for x in jax.tree.leaves(inputs.decoder.abstract["layers"]))
    return 2 * total // inputs.decoder.spec.num_layers // inputs.mesh.shape["tensor"]


def _own_table_bytes(inputs: MemoryInputs) -> int:
    """Returns the bytes of the gathered table of the layers' own embeddings and of its float32 gradient."""
    spec, tensor = inputs.decoder.spec, inputs.mesh.shape["tensor"]
    entries = inputs.decoder.vocab_rows // tensor * spec.num_layers * spec.per_layer_dim
    return entries * (inputs.dtype.itemsize + (4 if inputs.base is None else 0))


def _lm_head_bytes(inputs: MemoryInputs, rows: int) -> int:
    """Returns the bytes of the gathered output projection, its float32 gradient and three arrays of chunk logits."""
    vocab = inputs.decoder.vocab_rows // inputs.mesh.shape["tensor"]
    tokens = max(rows, tokens_per_chunk(inputs.decoder.vocab_rows))
    gradient = 4 if inputs.base is None else 0
    return vocab * (inputs.decoder.spec.d_model * (inputs.dtype.itemsize + gradient) + 3 * 4 * tokens)
