"""Compiling: programs are kept on disk from run to run, and each one that a run needs is there before its first step."""

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
from mice_jax.sharding import put_rows
from mice_jax.step import StepFunctions, Sums, TrainState

PLANNED_AHEAD = 2_000_000  # samples whose steps are planned before the first, about two seconds


def keep(folder: Path) -> Path:
    """Has jax keep compiled programs under `folder`, which processes may share; returns where.

    A folder that the user gives to jax stays ($JAX_COMPILATION_CACHE_DIR). Programs for a CPU use what that CPU has, so
    each kind of machine has a folder of its own; jax's key knows the versions, the flags and the devices.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
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
    """The microbatch shapes of a run's steps, largest first.

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


def compile_step(
    fns: StepFunctions, state: TrainState, sums: Sums, shapes: Iterable[Shape], shards: int, mesh: Mesh
) -> float:
    """Compiles what a step runs, for microbatches of each shape, without running it; returns the seconds it took.

    So no step later in the run waits for a compilation.
    """
    began = time.perf_counter()
    state, sums = _abstract((state, sums))
    for shape in shapes:
        batch = _abstract(put_rows(empty_rows(shape.rows * shards, shape.slots), mesh))
        fns.accumulate.compile(state.params, sums, batch)
    fns.apply.compile(state, sums, 0.0)
    return time.perf_counter() - began


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
