"""Compiling: programs are kept on disk from run to run, and those of a run's steps are made before the first."""

import hashlib
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mice_jax.data.loader import StepSource, empty_rows
from mice_jax.data.packing import Shape
from mice_jax.sharding import batch_sharding, num_shards
from mice_jax.step import Batch, StepFunctions

PLANNED_AHEAD = 2_000_000  # samples whose steps are planned before the first, about two seconds


def keep(folder: Path) -> Path:
    """Has jax keep compiled programs under `folder`, which processes may share; returns where.

    A folder that the user gives to jax stays ($JAX_COMPILATION_CACHE_DIR), and $JAX_ENABLE_COMPILATION_CACHE=0 keeps
    none. Programs for a CPU use what that CPU has, so each kind of machine has a folder of its own; jax's key knows the
    program, the versions, the flags and the devices. One that cannot be read is compiled anew, with a warning.
    """
    settings: Any = jax.config  # its attributes are made when it is imported
    if given := settings.jax_compilation_cache_dir:
        return Path(given)
    kept = folder / "programs" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return kept


def _machine() -> str:
    """This machine's architecture and what its CPU can do, in short."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    can = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    features = " ".join(sorted(can.partition(":")[2].split())) or can
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def shapes_ahead(steps: StepSource, start: int, stop: int) -> list[Shape]:
    """The microbatch shapes of steps number `start` up to `stop`, largest first.

    Only the steps of the first PLANNED_AHEAD samples are looked at: beyond them, a shape that none of them needed may
    still come up.
    """
    shapes: set[Shape] = set()
    samples = 0
    for i in range(start, stop):
        if samples > PLANNED_AHEAD:
            break
        plan = steps.plan(i)
        shapes |= {m.shape for m in plan}
        samples += sum(len(row) for m in plan for row in m.rows)
    return sorted(shapes, key=steps.shapes.index)


def compile_ahead(
    fns: StepFunctions, trained: Iterable[Shape], evaluated: Iterable[Shape], mesh: Mesh, *, resets: bool
) -> float:
    """Compiles what steps and evaluations run on microbatches of these shapes; returns the seconds it took.

    Where a phase still to come `resets` the optimizer, what makes its state anew as well. So no step later in the run
    waits for a compilation. Nothing is run.
    """
    began = time.perf_counter()
    state, sums = fns.abstract_state, fns.abstract_sums
    for shape in trained:
        fns.accumulate.compile(state.params, sums, abstract_batch(mesh, shape.rows, shape.slots))
    fns.apply.compile(state, sums, 0.0)
    if resets:
        fns.start.compile(state.params)
    for shape in evaluated:
        fns.evaluate.compile(state.params, abstract_batch(mesh, shape.rows, shape.slots))
    return time.perf_counter() - began


def abstract_batch(mesh: Mesh, rows: int, slots: int) -> Batch:
    """A microbatch as shapes with shardings."""
    sharding, total = batch_sharding(mesh), rows * num_shards(mesh)
    one = empty_rows(1, slots)
    made: Any = {n: jax.ShapeDtypeStruct((total, slots), a.dtype, sharding=sharding) for n, a in one.items()}
    return made
