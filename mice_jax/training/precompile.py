"""Ahead-of-time compilation of every microbatch shape that a run will need, before its first step."""

import time
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from mice_jax.data.loader import StepSource, empty_rows
from mice_jax.data.packing import Shape
from mice_jax.sharding import batch_sharding, num_shards
from mice_jax.step import Batch, StepFunctions

MAX_PLANNED_SAMPLES = 2_000_000  # samples whose steps are planned before the first, about two seconds


def shapes_to_compile(steps: StepSource, start: int, stop: int) -> list[Shape]:
    """The microbatch shapes of steps number `start` up to `stop`, largest first.

    Only the steps of the first MAX_PLANNED_SAMPLES samples are planned. A later step may still need another shape.
    """
    shapes: set[Shape] = set()
    samples = 0
    for i in range(start, stop):
        if samples > MAX_PLANNED_SAMPLES:
            break
        plan = steps.plan(i)
        shapes |= {m.shape for m in plan}
        samples += sum(len(row) for m in plan for row in m.rows)
    return sorted(shapes, key=steps.shapes.index)


def compile_step_functions(
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
        fns.from_params.compile(state.params)
    for shape in evaluated:
        fns.evaluate.compile(state.params, abstract_batch(mesh, shape.rows, shape.slots))
    return time.perf_counter() - began


def abstract_batch(mesh: Mesh, rows: int, slots: int) -> Batch:
    """A microbatch as shapes with shardings."""
    sharding, total = batch_sharding(mesh), rows * num_shards(mesh)
    one = empty_rows(1, slots)
    made: Any = {n: jax.ShapeDtypeStruct((total, slots), a.dtype, sharding=sharding) for n, a in one.items()}
    return made
