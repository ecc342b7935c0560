"""A run on devices that need not be here: what it needs as it is, its largest rows, and meshes that may suit better.

The arithmetic of fit.py and pace.py proposes, the compiler says how it is, as long as there is time for it.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import jax.numpy as jnp

from mice_jax import aot, fit, pace, resolve
from mice_jax.aot import Need, Target
from mice_jax.config import Config
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_schedule
from mice_jax.sharding import abstract_mesh, make_mesh, mesh_sizes, num_shards

MOST_ROWS = 1024  # of one device that are tried
TENSOR_WAYS = (1, 2, 4, 8)  # as links within a host, or next to each other, bear it


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, a policy of rematerialisation, and rows of a microbatch on each device."""

    sizes: tuple[int, ...]  # data, fsdp, tensor
    remat: str
    rows: int

    def flags(self) -> str:
        """What makes a config so."""
        data, fsdp, tensor = self.sizes
        mesh = f"--config.mesh.data={data} --config.mesh.fsdp={fsdp} --config.mesh.tensor={tensor}"
        return f"{mesh} --config.model.remat={self.remat} --config.train.rows_per_device={self.rows}"


class Planned:
    """A config's run on a target."""

    def __init__(self, config: Config, spec: ModelSpec, architecture: str, target: Target, mean_length: float):
        self.config, self.spec, self.target, self.mean_length = config, spec, target, mean_length
        self._architecture = architecture
        self._loads: dict[tuple[int, ...], fit.Load] = {}
        self.dtype = resolve.compute_dtype(config, target.platform)
        self.attention = resolve.attention(config, spec, target.platform, target.capability)
        sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, target.count)
        rows, remat = resolve.rows_and_remat(
            config, self.load(sizes), mean_length=mean_length, memory=target.memory, platform=target.platform
        )
        self.layout = Layout(sizes, remat, rows)  # as `train` would have it

    def load(self, sizes: tuple[int, ...]) -> fit.Load:
        if sizes not in self._loads:
            self._loads[sizes] = self._load(sizes)
        return self._loads[sizes]

    def _load(self, sizes: tuple[int, ...]) -> fit.Load:
        decoder = make_decoder(self.spec, sizes[2])
        mesh = abstract_mesh(sizes)
        return resolve.load(self.config, decoder, self._architecture, mesh, self.dtype, self.attention)

    def estimate(self, layout: Layout) -> fit.Memory:
        return fit.estimate(self.load(layout.sizes), layout.rows, layout.remat)

    def pace(self, layout: Layout) -> pace.Pace | None:
        """None on CPUs, of which no table says what they can do."""
        if self.target.chip is None:
            return None
        load, samples = self.load(layout.sizes), self.config.optim.batch_size
        return pace.estimate(load, self.target.chip, layout.rows, layout.remat, samples, self.mean_length)

    def compile(self, layout: Layout, only: tuple[str, ...] = ()) -> list[Need]:
        """What the functions of the step need, of all or of some; nothing where there is no compiler."""
        if self.target.devices is None:
            return []
        o, d = self.config.optim, self.config.data
        mesh = make_mesh(*layout.sizes, self.target.devices)
        schedule = make_schedule(o.schedule, o.learning_rate, o.max_steps or 1)
        compute = Compute(jnp.dtype(self.dtype), self.attention, layout.remat)
        decoder = make_decoder(self.spec, layout.sizes[2])
        fns = resolve.step_functions(self.config, decoder, self._architecture, mesh, compute, schedule)
        holds_out = d.validation or d.validation_fraction or any(p.validation for p in d.phases)
        functions = only or tuple(n for n in aot.FUNCTIONS if n != "evaluate" or holds_out)
        return list(aot.measure(fns, mesh, layout.rows, d.max_length, functions))

    # ---------------------------------------------------------------------------------------- rows
    def largest_rows(self, needs: list[Need], deadline: float) -> tuple[int, str]:
        """The most rows that fit, and how that is known.

        `needs` are those of the layout as it is. No compilation begins that would not end by the deadline.
        """
        layout, memory = self.layout, self.target.memory

        def estimated(rows: int) -> int:
            return self.estimate(dataclasses.replace(layout, rows=rows)).total

        if not needs:
            rows = fit.largest_rows(self.load(layout.sizes), memory, layout.remat, MOST_ROWS)
            return rows, f"estimated, to {fit.USABLE:.0%} of the memory"
        by_name = {n.function: n for n in needs}
        fixed = max(n.total for n in needs if n.function != "accumulate")
        known = {layout.rows: by_name["accumulate"].total}
        while True:
            fitting = max((r for r, total in known.items() if max(total, fixed) <= memory), default=0)
            failing = min((r for r, total in known.items() if max(total, fixed) > memory), default=MOST_ROWS + 1)
            if failing - fitting == 1:
                return (
                    fitting,
                    "compiled, and one more does not fit" if fitting < MOST_ROWS else "compiled; no more tried",
                )
            # The estimate's slope, from the nearest that was compiled.
            near = min(known, key=lambda r: min(abs(r - fitting), abs(r - failing)))
            gap = known[near] - estimated(near)
            best = max((r for r in range(fitting + 1, failing) if estimated(r) + gap <= memory), default=fitting)
            if time.monotonic() + by_name["accumulate"].compile_s > deadline:
                return best, "compiled" if best in known else "estimated from the rows that were compiled"
            rows = best if best > fitting else fitting + 1
            (need,) = self.compile(dataclasses.replace(layout, rows=rows), ("accumulate",))
            known[rows] = need.total

    # ---------------------------------------------------------------------------------------- meshes
    def suggestions(self, deadline: float) -> Iterator[tuple[str, Layout, int, str]]:
        """The layout of the least memory and, where it can be told, the fastest that fits: with bytes, and whence."""
        layouts = [self._fitted(sizes, remat) for sizes, remat in itertools.product(self._meshes(), fit.POLICIES)]
        chosen = {"least memory": min(layouts, key=lambda x: self.estimate(dataclasses.replace(x, rows=1)).total)}
        chosen["least memory"] = dataclasses.replace(chosen["least memory"], rows=1)
        fits = [x for x in layouts if self.estimate(x).total <= fit.USABLE * self.target.memory]
        if self.target.chip and fits:
            chosen["most speed"] = min(fits, key=lambda x: (self._seconds(x), self.estimate(x).total))
        took = 0.0
        for name, layout in chosen.items():
            if layout == self.layout or time.monotonic() + took > deadline or not self.target.devices:
                yield name, layout, self.estimate(layout).total, "estimated"
                continue
            (need,) = self.compile(layout, ("accumulate",))
            took = need.compile_s
            yield name, layout, need.total, "compiled"

    def _seconds(self, layout: Layout) -> float:
        made = self.pace(layout)
        assert made is not None
        return made.seconds

    def _meshes(self) -> Iterator[tuple[int, ...]]:
        """All whose tensor axis divides the key heads, so that none is repeated."""
        for tensor in TENSOR_WAYS:
            if self.target.count % tensor or self.spec.num_kv_heads % tensor:
                continue
            left = self.target.count // tensor
            yield from ((left // fsdp, fsdp, tensor) for fsdp in range(1, left + 1) if left % fsdp == 0)

    def _fitted(self, sizes: tuple[int, ...], remat: str) -> Layout:
        """With the rows that `train` would take there."""
        load, c = self.load(sizes), self.config
        wanted = self.mean_length * c.optim.batch_size / (c.data.max_length * num_shards(load.mesh))
        most = fit.most_rows(self.target.platform, c.data.max_length, wanted)
        return Layout(sizes, remat, max(1, fit.largest_rows(load, self.target.memory, remat, most)))
