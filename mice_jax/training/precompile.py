"""Compiles the step functions for every microbatch shape that a run will need: before its first step, or beside it.

What the first step needs is compiled before it. The rest is compiled by another thread while the run begins, unless
that could change what the run computes or wait for other processes; a step waits for a program that it needs.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mice_jax.cli.progress_display import Display
from mice_jax.data.loader import StepSource, empty_rows
from mice_jax.data.mixture import Mixture
from mice_jax.data.packing import Shape
from mice_jax.errors import format_count
from mice_jax.sharding import batch_sharding, num_shards
from mice_jax.step import Batch, Jitted, StepFunctions
from mice_jax.training import held_out
from mice_jax.training.build import RunData

MAX_PLANNED_SAMPLES = 2_000_000  # Planning the steps of this many takes two seconds.


def shapes_to_compile(steps: StepSource, start: int, stop: int) -> list[Shape]:
    """Returns the microbatch shapes of a range of steps, in the order in which they are needed.

    Only the steps of the first MAX_PLANNED_SAMPLES samples are planned. A later step may still need another shape.

    Args:
      steps: The steps of the run.
      start: The first step, counted from 0.
      stop: The end of the range, exclusive.
    """
    shapes: dict[Shape, None] = {}
    samples = 0
    for i in range(start, stop):
        if samples > MAX_PLANNED_SAMPLES:
            break
        plan = steps.plan(i)
        shapes |= dict.fromkeys(m.shape for m in plan)
        samples += sum(len(row) for m in plan for row in m.rows)
    return list(shapes)


class Compiled(NamedTuple):
    """What was compiled before the first step, and what still is.

    Attributes:
      shapes: The number of microbatch shapes that are compiled.
      later: The number of those that are compiled while the run begins.
      seconds: The seconds that the others took.
      stop: Ends the compilation in the other thread; what has not begun by then is compiled by the call that needs it.
    """

    shapes: int
    later: int
    seconds: float
    stop: Callable[[], None]

    def describe(self, cache: Path) -> str:
        """Returns a sentence about the compilation; `cache` is the folder of compiled programs."""
        done = format_count(self.shapes - self.later, "microbatch shape")
        rest = f"; {self.later} more while the run begins" if self.later else ""
        return f"{done} compiled, or found in {cache}, in {self.seconds:.0f} s{rest}"


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
      What was compiled, which is nothing if the run is complete.
    """
    shapes = shapes_to_compile(steps, start, data.total_steps)
    if not shapes:
        return Compiled(0, 0, 0.0, lambda: None)
    first = shapes_to_compile(steps, start, start + 1)
    passes = held_out.sources(data.dataset.validation, pack)
    evaluated = dict.fromkeys(shape for source in passes for shape in shapes_to_compile(source, 0, len(source)))
    resets = any(span.phase.optimizer == "reset" for span in data.spans if span.first >= max(start, 1))
    programs = step_programs(
        fns, shapes, first, evaluated, mesh,
        resets=resets, evaluates_first=start == 0, may_compile_later=may_compile_later(mesh),
    )  # fmt: skip

    began = time.perf_counter()
    with display.status() as announce:
        for program in programs:
            if program.first:
                announce(f"compiling {program.name}")
                program.function.compile(*program.arguments)
    seconds = time.perf_counter() - began
    threads = ThreadPoolExecutor(1, "compile")
    for program in programs:
        if not program.first:
            program.function.compile_in(threads, *program.arguments)

    def stop() -> None:
        threads.shutdown(cancel_futures=True)
        for function in {id(p.function): p.function for p in programs}.values():
            function.forget_cancelled()

    later = sum(not program.first and program.function is fns.accumulate for program in programs)
    return Compiled(len(shapes), later, seconds, stop)


def may_compile_later(mesh: Mesh) -> bool:
    """Whether programs may be compiled while others run.

    On a GPU they may not: XLA measures kernels in order to choose some, and would do so beside the run, in its memory.
    Neither may they where there are several processes, which would wait for the slowest of them within a step.
    """
    return mesh.devices.flat[0].platform != "gpu" and jax.process_count() == 1


class Program(NamedTuple):
    """A function to compile for one set of shapes.

    Attributes:
      name: What is compiled, for the user.
      function: The function.
      arguments: ShapeDtypeStructs of its arguments.
      first: Whether it is compiled before the first step.
    """

    name: str
    function: Jitted
    arguments: tuple
    first: bool


def step_programs(
    fns: StepFunctions,
    trained: Sequence[Shape],
    first: Collection[Shape],
    evaluated: Iterable[Shape],
    mesh: Mesh,
    *,
    resets: bool,
    evaluates_first: bool,
    may_compile_later: bool,
) -> list[Program]:
    """Lists the programs of a run, those that are compiled before its first step in front.

    Args:
      fns: The run's step functions.
      trained: The microbatch shapes of the steps, in the order in which they are needed.
      first: Those that the first step needs.
      evaluated: The microbatch shapes of the held-out loss.
      mesh: The run's mesh.
      resets: Whether a later phase resets the optimizer, which needs another function.
      evaluates_first: Whether the held-out loss is measured before the first step.
      may_compile_later: Whether what the first step does not need may be compiled while the run begins.
    """
    state, sums = fns.abstract_state, fns.abstract_sums
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    update = (state, sums, scalar, scalar, None if state.average is None else scalar)
    programs = [Program("the update", fns.apply, update, True)]
    for number, shape in enumerate(trained, 1):
        name = f"shape {number} of {len(trained)}: {shape.rows} x {shape.slots} tokens a device"
        arguments = fns.abstract_params, sums, abstract_batch(mesh, shape.rows, shape.slots)
        programs.append(Program(name, fns.accumulate, arguments, shape in first))
    for shape in evaluated:
        name = f"the held-out loss: {shape.rows} x {shape.slots} tokens a device"
        arguments = fns.abstract_params, abstract_batch(mesh, shape.rows, shape.slots)
        programs.append(Program(name, fns.evaluate, arguments, evaluates_first))
    if resets:
        programs.append(Program("the reset of the optimizer", fns.from_params, (state.params,), False))
    if not may_compile_later:
        return [program._replace(first=True) for program in programs]
    return sorted(programs, key=lambda program: not program.first)


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
