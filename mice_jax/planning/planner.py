"""Plans a run for devices that this machine need not have: its memory, its largest microbatch, and better meshes.

The memory model and the step-time estimate propose layouts, and the compiler checks them until a deadline.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from mice_jax.config import Config, holds_data_out
from mice_jax.config_checks import row_problem
from mice_jax.errors import UserError
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute
from mice_jax.planning import ahead_of_time, step_time
from mice_jax.planning.ahead_of_time import CompiledMemory, Topology
from mice_jax.sharding import AXES, LENGTH_AXIS, abstract_mesh, make_mesh, mesh_sizes
from mice_jax.step import StepFunctions
from mice_jax.training import build, memory_model

MAX_ROWS = 1024  # largest number of rows of one device that is tried
TENSOR_AXIS_SIZES = (1, 2, 4, 8)  # tensor parallelism needs the fast links within a host or between neighbours


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, a rematerialisation policy, and the rows of a microbatch on each device."""

    sizes: tuple[int, ...]  # sizes of the mesh axes, in the order of sharding.AXES
    remat: str
    rows: int

    def flags(self) -> str:
        """Returns the flags that set this layout in a config."""
        data, fsdp, sequence, tensor = self.sizes
        mesh = f"--config.mesh.data={data} --config.mesh.fsdp={fsdp} --config.mesh.tensor={tensor}"
        mesh += f" --config.mesh.sequence={sequence}" if sequence > 1 else ""
        return f"{mesh} --config.model.remat={self.remat} --config.train.rows_per_device={self.rows}"

    def with_rows(self, rows: int) -> "Layout":
        """Returns this layout with another number of rows."""
        return dataclasses.replace(self, rows=rows)


class RunPlan:
    """The run of a config on the devices of a topology.

    Attributes:
        config: config of the run.
        spec: shape of the model, with the vocabulary of the tokenizer.
        topology: devices of the run.
        samples: mean number of samples of a step.
        mean_length: mean number of tokens of a sample.
        dtype: compute dtype.
        attention: attention backend.
        layout: mesh, rematerialisation and rows that `mice train` would choose.
        overlap: share of the bytes between devices that the compiled layout sends while matmuls run; None before it is
            compiled, or if the compiler does not tell.
        memory_inputs: returns the inputs of the memory model for the sizes of a mesh; results are cached.
    """

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        architecture: str,
        topology: Topology,
        *,
        samples: float,
        mean_length: float,
        deadline: float,
    ):
        """Chooses the layout of the run as `mice train` does.

        Args:
            config: config of the run.
            spec: shape of the model, with the vocabulary of the tokenizer.
            architecture: Hugging Face architecture of the model.
            topology: devices of the run.
            samples: mean number of samples of a step.
            mean_length: mean number of tokens of a sample.
            deadline: value of time.monotonic() after which only the run's own layout is compiled.
        """
        self.config, self.spec, self.topology = config, spec, topology
        self.samples, self.mean_length = samples, mean_length
        self._architecture, self._deadline = architecture, deadline
        self.memory_inputs = functools.cache(self._memory_inputs)
        self.overlap: float | None = None
        chip = topology.chip
        self.dtype = build.compute_dtype(config, chip.platform)
        m = config.mesh
        sizes = mesh_sizes(m.data, m.fsdp, m.tensor, topology.count, sequence=m.sequence)
        self.sequence = sizes[AXES.index(LENGTH_AXIS)]
        if problem := row_problem(config.data.max_length, self.sequence):
            raise UserError(f"{problem}.")
        self.attention = build.attention(config, spec, chip.platform, chip.capability, sequence=self.sequence)
        rows, remat = build.rows_and_remat(
            config, self.memory_inputs(sizes), mean_length=mean_length, memory=chip.memory, platform=chip.platform
        )
        self.layout = Layout(sizes, remat, rows)

    def _memory_inputs(self, sizes: tuple[int, ...]) -> memory_model.MemoryInputs:
        return self.inputs_of(self.config, sizes)

    def inputs_of(self, config: Config, sizes: tuple[int, ...]) -> memory_model.MemoryInputs:
        """Returns the inputs of the memory model for a variant of the run's config and the sizes of a mesh."""
        mesh = abstract_mesh(sizes)
        decoder = build.run_decoder(config, self.spec, self._architecture, mesh.shape["tensor"])
        return build.memory_inputs(config, decoder, self._architecture, mesh, self.dtype, self.attention)

    def estimate(self, layout: Layout) -> memory_model.MemoryEstimate:
        """Estimates the memory of a layout without compiling it."""
        return memory_model.estimate_memory(self.memory_inputs(layout.sizes), layout.rows, layout.remat)

    def step_time_of(self, layout: Layout) -> step_time.StepTime:
        """Estimates the duration of a step with a layout."""
        memory_inputs = self.memory_inputs(layout.sizes)
        return step_time.estimate_step_time(
            memory_inputs,
            self.topology.chip,
            layout.rows,
            layout.remat,
            self.samples,
            self.mean_length,
            self.overlap,
        )

    def step_functions(self, layout: Layout) -> tuple[StepFunctions, Mesh]:
        """Makes the functions of the step with a layout, on the devices to compile for."""
        c = self.config
        data, fsdp, sequence, tensor = layout.sizes
        mesh = make_mesh(data, fsdp, tensor, self.topology.devices, sequence=sequence)
        reduce_dtype = jnp.dtype(c.optim.reduce_dtype)
        parts = build.row_parts(self.spec, mesh)
        compute = Compute(jnp.dtype(self.dtype), self.attention, layout.remat, reduce_dtype, parts)
        decoder = build.run_decoder(c, self.spec, self._architecture, tensor)
        return build.step_functions(c, decoder, self._architecture, mesh, compute), mesh

    def compile(self, layout: Layout, only: Sequence[str] = ()) -> list[CompiledMemory]:
        """Compiles functions of the step with a layout.

        Args:
            layout: mesh, rematerialisation and rows to compile.
            only: names of the functions to compile; empty means all that the run calls.

        Returns:
            The memory of each function; empty if no compiler for the devices is available.
        """
        if self.topology.devices is None:
            return []
        c = self.config
        fns, mesh = self.step_functions(layout)
        functions = only or [n for n in ahead_of_time.FUNCTIONS if n != "evaluate" or holds_data_out(c)]
        needs = ahead_of_time.compile_memory(fns, mesh, self.topology.chip, layout.rows, c.data.max_length, functions)
        if layout == self.layout:
            self.overlap = next((n.overlap for n in needs if n.function == "accumulate"), self.overlap)
        return needs

    def stop_compiling(self) -> None:
        """Estimates from now on what it would have compiled before the deadline."""
        self._deadline = -math.inf

    # ---------------------------------------------------------------------------------------- rows
    def largest_rows(self, needs: list[CompiledMemory]) -> tuple[int, str]:
        """Finds the largest number of rows that fits on a device.

        Args:
            needs: memory of the functions of the run's own layout; empty if they were not compiled.

        Returns:
            The number of rows, and a phrase that says how it was determined.
        """
        layout, memory = self.layout, self.topology.chip.memory
        if not needs:
            rows = memory_model.max_fitting_rows(self.memory_inputs(layout.sizes), memory, layout.remat, MAX_ROWS)
            return rows, f"estimated, to {memory_model.USABLE_FRACTION:.0%} of the memory"
        fixed = max(n.total for n in needs if n.function != "accumulate")
        known = {layout.rows: next(n.total for n in needs if n.function == "accumulate")}  # rows -> compiled bytes
        if fixed > memory:
            return 0, "compiled: another function than accumulate does not fit"

        @functools.cache
        def estimated(rows: int) -> int:
            return self.estimate(layout.with_rows(rows)).total

        while True:
            fitting = max((rows for rows, total in known.items() if total <= memory), default=0)
            failing = min((rows for rows, total in known.items() if total > memory), default=MAX_ROWS + 1)
            if failing - fitting == 1:
                limit = "no more are tried" if fitting == MAX_ROWS else "one more does not fit"
                return fitting, f"compiled: {limit}"
            # The estimate is corrected by its error at the nearest number of rows that was compiled.
            nearest = min(known, key=lambda rows: min(abs(rows - fitting), abs(rows - failing)))
            error = estimated(nearest) - known[nearest]
            between = range(fitting + 1, failing)
            guess = max((rows for rows in between if estimated(rows) - error <= memory), default=fitting)
            if time.monotonic() > self._deadline:
                return (
                    guess,
                    "compiled; more are not tried" if guess == fitting else "estimated from the compiled rows",
                )
            rows = max(guess, fitting + 1)
            known[rows] = self.compile(layout.with_rows(rows), ["accumulate"])[0].total

    # ---------------------------------------------------------------------------------------- meshes
    def suggestions(self, needs: list[CompiledMemory]) -> Iterator[tuple[str, Layout, int, str]]:
        """Yields the layout with the least memory and, if any layout fits, the fastest that does.

        Args:
            needs: memory of the functions of the run's own layout; empty if they were not compiled.

        Yields:
            The name of the suggestion, its layout, its bytes on one device, and "compiled" or "estimated".
        """
        memory = self.topology.chip.memory
        policies = memory_model.remat_policies_fastest_first(self.topology.chip.platform)
        layouts = [self._fitted(sizes, remat) for sizes, remat in itertools.product(self._meshes(), policies)]
        chosen = {"least memory": min((x.with_rows(1) for x in layouts), key=lambda x: self.estimate(x).total)}
        if fits := [x for x in layouts if self.estimate(x).total <= memory_model.USABLE_FRACTION * memory]:
            chosen["most speed"] = min(fits, key=lambda x: (self.step_time_of(x).seconds, self.estimate(x).total))
        for name, layout in chosen.items():
            compiled = needs if layout == self.layout else []
            if not compiled and time.monotonic() <= self._deadline:
                compiled = self.compile(layout, ["accumulate", "apply"])
            if compiled:
                yield name, layout, max(n.total for n in compiled), "compiled"
            else:
                yield name, layout, self.estimate(layout).total, "estimated"

    def _meshes(self) -> Iterator[tuple[int, ...]]:
        """Yields every mesh whose tensor axis divides the number of key heads, so that no head is replicated.

        The sequence axis keeps its size: it is there because of the samples, and rows must be multiples of it.
        """
        count = self.topology.count // self.sequence
        for tensor in TENSOR_AXIS_SIZES:
            heads = [attention.num_kv_heads for attention in self.spec.attention_kinds]
            if count % tensor or any(n % tensor for n in heads):
                continue
            left = count // tensor
            fsdp_sizes = (fsdp for fsdp in range(1, left + 1) if left % fsdp == 0)
            yield from ((left // fsdp, fsdp, self.sequence, tensor) for fsdp in fsdp_sizes)

    def _fitted(self, sizes: tuple[int, ...], remat: str) -> Layout:
        """Returns the layout with the rows that `mice train` would choose for it."""
        memory_inputs, chip = self.memory_inputs(sizes), self.topology.chip
        max_rows = build.max_useful_rows(self.config, memory_inputs, self.mean_length, chip.platform)
        return Layout(sizes, remat, max(1, memory_model.max_fitting_rows(memory_inputs, chip.memory, remat, max_rows)))
