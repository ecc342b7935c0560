"""Compiles the functions of a step for devices that this machine need not have, and reads their memory from XLA.

A topology is `cpu:N`, a TPU slice (`v5p:2x2x2`, compiled by libtpu, which works without a TPU), or NVIDIA GPUs
(`h100:8`, compiled if JAX's CUDA plugin is installed and a description of the device is given).
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import Mesh

from mice_jax.cli.topology_names import SLICES, parse_topology
from mice_jax.config_checks import nearest
from mice_jax.errors import UserError, install_command, one_line
from mice_jax.hardware import (
    CHIPS,
    DEFAULT_GPU_MEMORY_FRACTION,
    GPUS_PER_HOST,
    Chip,
    cpu_chip,
    gpu_memory_fraction,
    measure_matmul_flops,
)
from mice_jax.planning import compiled_step
from mice_jax.step import Jitted, StepFunctions
from mice_jax.training.memory_model import bytes_per_device, host_memory_bytes
from mice_jax.training.precompile import abstract_batch

# The jitted functions of a run: training steps, evaluation on held-out samples, and initialization.
FUNCTIONS = ("accumulate", "apply", "evaluate", "zero_sums", "start")
MAX_CONCURRENT_COMPILES = 2
# These keep libtpu from locking TPU chips and from querying Google Cloud's metadata, since this machine has no TPU.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# Options for a program that is not run: LLVM, which comes after buffers are assigned, leaves its slow passes out.
MEMORY_ONLY = {"cpu": {"xla_backend_optimization_level": 0}}
OUT_OF_MEMORY = re.compile(r"\(([0-9.]+)([KMG])\) exceeds available HBM|Used ([0-9.]+)([KMG]) of [0-9.]+[KMG] hbm")


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a run is planned for."""

    topology: str
    chip: Chip
    count: int
    devices: list[Any] | None  # devices to compile for; None if no compiler for them is available


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes that one device has allocated while a function of the step runs."""

    function: str
    arguments: int  # bytes of the function's arguments and of the run's other live arrays
    temporary: int
    out_of_memory: bool = False  # True if compilation failed and the compiler reported the required memory
    # Share of the bytes between devices that the program sends while products run; None if the compiler does not tell.
    overlap: float | None = None

    @property
    def total(self) -> int:
        """Bytes at the peak of the function."""
        return self.arguments + self.temporary


# ---------------------------------------------------------------------------------------- devices
def find_topology(topology: str, device_file: str = "") -> Topology:
    """Returns the devices of a topology.

    Args:
        topology: name of the topology as the user gave it: cpu:8, v5p:2x2x2, h100:8.
        device_file: file that describes an NVIDIA GPU to compile for; "" means that the plan is an estimate.

    Returns:
        The topology, with devices to compile for if a compiler is available.

    Raises:
        UserError: if the topology does not exist, or its compiler is not installed.
    """
    family, shape = parse_topology(topology)
    if family in SLICES:
        return _tpus(topology, family, shape)
    return _cpus(topology, int(shape)) if family == "cpu" else _gpus(topology, family, int(shape), device_file)


def _cpus(topology: str, count: int) -> Topology:
    devices = jax.devices("cpu")
    assert len(devices) >= count, "the command sets the number of CPU devices before JAX starts"
    return Topology(topology, cpu_chip(count, measure_matmul_flops(), host_memory_bytes()), count, devices[:count])


def _tpus(topology: str, family: str, shape: str) -> Topology:
    """Returns the devices of a TPU slice, as libtpu describes them.

    Args:
        topology: name of the topology as the user gave it.
        family: kind of TPU, of SLICES.
        shape: the chips in each direction, such as 2x2x2.
    """
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if family == "v4":
        options["chip_config_name"] = "megacore"  # JAX sees each v4 chip as one device
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu before 0.0.52 assumes four chips per host
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{family}:{shape}", **options)
    except Exception as e:  # the type differs between a missing libtpu, one that is too old, and an unknown name
        if "INVALID_ARGUMENT" in str(e):
            raise UserError(
                f"--topology={topology} is not a slice of TPU {family}{nearest(shape, SLICES[family])} "
                f"The error of libtpu is: {one_line(e)}."
            ) from None
        raise UserError(
            f"--topology={topology} needs libtpu, the compiler for TPUs, which runs without a TPU: "
            f"{install_command('aot')}. The error is: {one_line(e)}."
        ) from None
    return Topology(topology, CHIPS[family], len(found.devices), found.devices)


def _gpus(topology: str, family: str, count: int, device_file: str) -> Topology:
    """Returns the devices of NVIDIA GPUs.

    Args:
        topology: name of the topology as the user gave it.
        family: kind of GPU, of CHIPS.
        count: number of GPUs.
        device_file: file that describes the GPU to compile for; "" means that the plan is an estimate.
    """
    chip, devices = CHIPS[family], None
    chip = dataclasses.replace(chip, memory=chip.memory * gpu_memory_fraction() / DEFAULT_GPU_MEMORY_FRACTION)
    if device_file and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(
            f"--topology={topology}: {count} GPUs are not whole hosts of {GPUS_PER_HOST} GPUs, so nothing can be "
            f"compiled for them. Take {count // GPUS_PER_HOST * GPUS_PER_HOST} GPUs, or leave --device_file out for an "
            "estimate."
        )
    if device_file:
        if not Path(device_file).is_file():
            raise UserError(f"--device_file={device_file}: there is no such file.")
        hosts = f"1x{-(-count // GPUS_PER_HOST)}x{min(count, GPUS_PER_HOST)}"
        try:
            devices = topologies.get_topology_desc(
                platform="cuda", topology_name=family, target_config=Path(device_file).read_text(), topology=hosts
            ).devices
        except Exception as e:
            raise UserError(
                f"the run cannot be compiled for --topology={topology}: {one_line(e)}. That needs JAX's CUDA plugin "
                f"({install_command('cuda')}) and, as --device_file, the file *.gpu_target_config.pbtxt that a run "
                "on such a GPU writes with XLA_FLAGS=--xla_dump_to=DIR. Without --device_file the plan is an estimate."
            ) from None
    return Topology(topology, chip, count, devices)


# ---------------------------------------------------------------------------------------- compiled memory
def compile_memory(
    fns: StepFunctions, mesh: Mesh, chip: Chip, rows: int, slots: int, names: Sequence[str]
) -> list[CompiledMemory]:
    """Compiles functions of a step for a mesh and returns the memory that each of them needs on one device.

    The memory includes the arrays that are live during a call without being arguments of the function. For example,
    the optimizer's moments stay allocated while `accumulate` computes gradients.

    Args:
        fns: the jitted functions of the run.
        mesh: mesh of devices to compile for.
        chip: kind of these devices.
        rows: rows of a microbatch on one device.
        slots: slots of a row.
        names: functions to compile, of FUNCTIONS.

    Returns:
        The memory of each function, in the order of `names`.
    """
    state, sums, batch = fns.abstract_state, fns.abstract_sums, abstract_batch(mesh, rows, slots)
    params, base = fns.abstract_params, fns.abstract_base
    loaded = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
    functions = {
        "accumulate": (fns.accumulate, (params, sums, batch), (state.step, state.opt_state, state.average)),
        "apply": (fns.apply, (state, sums, 0.0, float("inf"), None if state.average is None else 0.0), base),
        "evaluate": (fns.evaluate, (params, batch), (state.step, state.opt_state, state.average, sums)),
        "zero_sums": (fns.zero_sums, (), (state, base)),
        "start": (fns.from_params, (loaded,), (sums, base)),
    }

    on_gpu = assume_compute_capability(chip.capability) if chip.capability else contextlib.nullcontext()
    with on_gpu, ThreadPoolExecutor(MAX_CONCURRENT_COMPILES) as pool:
        return list(pool.map(lambda name: _compile_function(name, *functions[name], platform=chip.platform), names))


def _compile_function(name: str, function: Jitted, arguments: tuple, held: Any, platform: str) -> CompiledMemory:
    """Compiles one function and returns its memory.

    Args:
        name: name of the function, for the result.
        function: the function.
        arguments: its arguments, as jax.ShapeDtypeStruct or numbers.
        held: a tree of the arrays that are live during a call without being arguments.
        platform: cpu, gpu or tpu.
    """
    held_bytes = bytes_per_device(held)
    try:
        compiled = function.compile(*arguments, options=MEMORY_ONLY.get(platform, {}))
    except jax.errors.JaxRuntimeError as e:
        if (match := OUT_OF_MEMORY.search(str(e))) is None:
            raise
        number, unit = (g for g in match.groups() if g)
        needed = int(float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])
        own = bytes_per_device([a for a in jax.tree.leaves(arguments) if isinstance(a, jax.ShapeDtypeStruct)])
        return CompiledMemory(name, own + held_bytes, max(0, needed - own), out_of_memory=True)
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # those that do not reuse a donated argument
    temporary = memory.temp_size_in_bytes + outputs + memory.generated_code_size_in_bytes
    overlap = _overlap(compiled) if name == "accumulate" else None
    return CompiledMemory(name, memory.argument_size_in_bytes + held_bytes, temporary, overlap=overlap)


def _overlap(compiled: Any) -> float | None:
    """Returns the share of bytes that a TPU's program sends while products run; None if it cannot be read."""
    try:
        text = compiled.as_text()
    except RuntimeError:  # some versions of libtpu do not return the program
        return None
    # Only a TPU's arrays have such tiles. The products of GPUs are calls of libraries, which are not counted.
    return compiled_step.overlap(compiled_step.count_schedule(text)) if ":T(8,128)" in text else None


@contextlib.contextmanager
def assume_compute_capability(capability: str) -> Iterator[None]:
    """Within the context, JAX assumes this compute capability instead of querying a GPU for it."""

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    answers = {
        "check_compute_capability": lambda least: version(capability) >= version(least),
        "is_cuda_compute_capability_equal": lambda other: version(capability) == version(other),
    }
    originals = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention_stablehlo, name, answer)
        yield
    finally:
        for name, original in originals.items():
            setattr(fused_attention_stablehlo, name, original)
