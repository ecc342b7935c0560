"""Compiles the step functions for every microbatch shape that a run will need, before its first step."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mice_jax.cli.progress_display import Display
from mice_jax.data.loader import StepSource, empty_rows
from mice_jax.data.mixture import Mixture
from mice_jax.data.packing import Shape
from mice_jax.sharding import batch_sharding, num_shards
from mice_jax.step import Batch, StepFunctions
from mice_jax.training import held_out
from mice_jax.training.build import RunData

MAX_PLANNED_SAMPLES = 2_000_000  # Planning the steps of this many takes two seconds.


def shapes_to_compile(steps: StepSource, start: int, stop: int) -> list[Shape]:
    """Returns the microbatch shapes of a range of steps, largest first.

    Only the steps of the first MAX_PLANNED_SAMPLES samples are planned. A later step may still need another shape.

    Args:
      steps: The steps of the run.
      start: The first step, counted from 0.
      stop: The end of the range, exclusive.
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


class Compiled(NamedTuple):
    """The number of microbatch shapes that were compiled, and the seconds that it took."""

    shapes: int
    seconds: float

    def describe(self, cache: Path) -> str:
        """Returns a sentence about the compilation; `cache` is the folder of compiled programs."""
        return f"{self.shapes} microbatch shapes compiled, or found in {cache}, in {self.seconds:.0f} s"


def compile_run(
    fns: StepFunctions,
    steps: StepSource,
    start: int,
    data: RunData,
    pack: Callable[[Mixture], StepSource],
    mesh: Mesh,
    display: Display,
) -> Compiled:
    """Compiles all functions that the remaining steps of a run need.

    Args:
      fns: The run's step functions.
      steps: The run's steps.
      start: The number of steps that are done.
      data: The run's data and its division into steps.
      pack: Packs held-out samples.
      mesh: The run's mesh.
      display: Shows what is being compiled.

    Returns:
      The number of shapes, which is 0 if the run is complete, and the seconds.
    """
    shapes = shapes_to_compile(steps, start, data.total_steps)
    if not shapes:
        return Compiled(0, 0.0)
    passes = held_out.sources(data.dataset.validation, pack)
    evaluated = {shape for source in passes for shape in shapes_to_compile(source, 0, len(source))}
    resets = any(span.phase.optimizer == "reset" for span in data.spans if span.first >= max(start, 1))
    with display.status() as announce:
        return Compiled(len(shapes), compile_step_functions(fns, shapes, evaluated, mesh, announce, resets=resets))


def compile_step_functions(
    fns: StepFunctions,
    trained: Sequence[Shape],
    evaluated: Iterable[Shape],
    mesh: Mesh,
    announce: Callable[[str], None],
    *,
    resets: bool,
) -> float:
    """Compiles the functions of steps and evaluations without running them, so that no later step has to compile.

    Args:
      fns: The run's step functions.
      trained: The microbatch shapes of the steps.
      evaluated: The microbatch shapes of the held-out loss.
      mesh: The run's mesh.
      announce: Called with a sentence about each compilation before it begins.
      resets: Whether a later phase resets the optimizer, which needs another function.

    Returns:
      The seconds that it took.
    """
    began = time.perf_counter()
    state, sums = fns.abstract_state, fns.abstract_sums
    for number, shape in enumerate(trained, 1):
        announce(f"compiling shape {number} of {len(trained)}: {shape.rows} x {shape.slots} tokens a device")
        fns.accumulate.compile(fns.abstract_params, sums, abstract_batch(mesh, shape.rows, shape.slots))
    announce("compiling the update")
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    fns.apply.compile(state, sums, scalar, None if state.average is None else scalar)
    if resets:
        fns.from_params.compile(state.params)
    for shape in evaluated:
        announce(f"compiling the held-out loss: {shape.rows} x {shape.slots} tokens a device")
        fns.evaluate.compile(fns.abstract_params, abstract_batch(mesh, shape.rows, shape.slots))
    return time.perf_counter() - began


def abstract_batch(mesh: Mesh, rows: int, slots: int) -> Batch:
    """Returns the shapes and shardings of a microbatch.

    Args:
      mesh: The run's mesh.
      rows: The number of rows on each device.
      slots: The number of slots of a row.

    Returns:
      ShapeDtypeStructs by name, each with the shape [B T].
    """
    sharding, total = batch_sharding(mesh), rows * num_shards(mesh)
    one = empty_rows(1, slots)
    made: Any = {n: jax.ShapeDtypeStruct((total, slots), a.dtype, sharding=sharding) for n, a in one.items()}
    return made
