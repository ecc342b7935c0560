"""Which samples share a row, and which rows share a microbatch: the plan of one step, from lengths alone.

A step is exactly its samples. They are packed best-fit-decreasing into rows, and rows are dealt to microbatches
whose shapes come from one short fixed list, so that nothing recompiles and short tails waste little. The plan is
a pure function of its arguments: every host computes the same one.
"""

import dataclasses
import functools
import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from mice_jax.rows import max_segments

MAX_SHAPES = 6  # each one costs a compilation
MAX_TAILS = 4  # microbatches smaller than the largest, in one step
LAUNCH_COST = 1 / 64  # of a largest microbatch's slots: what one more microbatch must save to be worth it
ROUND_TO = 128  # slots; kernels and vector units want whole tiles


@dataclasses.dataclass(frozen=True)
class Shape:
    """A microbatch: `rows` on each of the shards that split a batch, by `slots`."""

    rows: int
    slots: int

    @property
    def max_segments(self) -> int:
        """Samples in a row at most."""
        return max_segments(self.slots)


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """`rows[i]` lists the samples of row i, as indices into the step; an empty row is padding."""

    shape: Shape
    rows: list[list[int]]  # shape.rows * num_shards of them


def microbatch_shapes(max_length: int, rows_per_shard: int) -> tuple[Shape, ...]:
    """The at most six shapes of a run, largest first: rows are halved down to one, then slots are cut.

    Every shape's slots are a multiple of 128, or `max_length` itself.
    """
    rows = rows_per_shard
    shapes = [Shape(rows, max_length)]
    while rows > 1 and len(shapes) < MAX_SHAPES:
        rows = (rows + 1) // 2
        shapes.append(Shape(rows, max_length))
    for eighths in (6, 4, 3, 2, 1) if rows_per_shard == 1 else (4, 2, 1):
        slots = -(-max_length * eighths // (8 * ROUND_TO)) * ROUND_TO
        shape = Shape(1, min(slots, max_length))
        if len(shapes) < MAX_SHAPES and rows == 1 and shape not in shapes:
            shapes.append(shape)
    return tuple(shapes)


def pack_step(
    lengths: np.ndarray, shapes: tuple[Shape, ...], num_shards: int, rng: np.random.Generator
) -> list[Microbatch]:
    """Packs one step's samples and deals the rows to microbatches.

    Args:
      lengths: [samples] tokens of each, none above the first shape's slots.
      shapes: as `microbatch_shapes` gives them; the first is the largest.
      num_shards: the devices that split a microbatch's rows.
      rng: decides which rows share a microbatch, so that microbatches are comparable samples of the step.

    Returns microbatches that hold every sample once, with few empty slots.
    """
    main = shapes[0]
    assert lengths.size and lengths.min() >= 1 and lengths.max() <= main.slots
    total = int(lengths.sum())
    by_length = np.argsort(-lengths, kind="stable")
    order, descending = by_length.tolist(), lengths[by_length].tolist()
    # A layout that cannot hold even the tokens is not tried. More mains than tokens need are wanted only where
    # samples just above half a row leave the other half empty: at worst every sample takes a row of its own.
    fewest = max(total // main.slots, lengths.size // main.max_segments)  # rows
    for mains in itertools.count(fewest // (main.rows * num_shards)):
        for tail in _tails(shapes):
            layout = [main] * mains + list(tail)
            if sum(s.rows * s.slots for s in layout) * num_shards < total:
                continue
            bins = _best_fit(descending, [s for s in layout for _ in range(s.rows * num_shards)])
            if bins is not None:
                rows = [[order[i] for i in row] for row in bins]
                return _deal(rows, layout, num_shards, rng)
    raise AssertionError("a layout with a row for every sample always fits")


@functools.cache
def _tails(shapes: tuple[Shape, ...]) -> list[tuple[Shape, ...]]:
    """The handfuls of smaller shapes that cost less than one largest microbatch, fewest slots first."""
    main, *smaller = shapes
    area = main.rows * main.slots

    def cost(tail: tuple[Shape, ...]) -> float:
        return sum(s.rows * s.slots / area + LAUNCH_COST for s in tail)

    tails = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(smaller, n) for n in range(MAX_TAILS + 1)
    )
    cheapest: dict[int, tuple[Shape, ...]] = {}  # by slots: where one layout fails, its equals seldom fit
    for tail in sorted(tails, key=cost):
        cheapest.setdefault(sum(s.rows * s.slots for s in tail), tail)
    return [t for slots, t in sorted(cheapest.items()) if slots < area and cost(t) < 1 + LAUNCH_COST]


def _best_fit(descending: Sequence[int], shapes: Sequence[Shape]) -> list[list[int]] | None:
    """Best-fit-decreasing into a row of each of the shapes: the rows' items, or None where one does not fit.

    Rows are kept sorted as room * num_bins + bin, so that one bisection finds the tightest that fits.
    """
    num_bins = len(shapes)
    rooms = sorted(s.slots * num_bins + i for i, s in enumerate(shapes))
    caps = [s.max_segments for s in shapes]
    bins: list[list[int]] = [[] for _ in shapes]
    smallest = descending[-1] * num_bins
    for item, length in enumerate(descending):
        need = length * num_bins
        at = bisect_left(rooms, need)
        if at == len(rooms):
            return None
        room = rooms.pop(at)
        number = room % num_bins
        bins[number].append(item)
        if room - need >= smallest and len(bins[number]) < caps[number]:  # else it is full
            insort(rooms, room - need)
    return bins


def _deal(rows: list[list[int]], layout: list[Shape], num_shards: int, rng: np.random.Generator) -> list[Microbatch]:
    """Rows in random order to the microbatches whose shape they were packed for."""
    microbatches = []
    start = 0
    for shape, same in itertools.groupby(layout):
        count = shape.rows * num_shards
        rows_of_shape = len(list(same)) * count
        order = (start + rng.permutation(rows_of_shape)).tolist()
        dealt = [rows[i] for i in order]
        microbatches += [Microbatch(shape, dealt[i : i + count]) for i in range(0, rows_of_shape, count)]
        start += rows_of_shape
    return microbatches


def slot_efficiency(total_tokens: int, plan: Sequence[Microbatch]) -> float:
    """Real tokens over computed slots, padding rows included."""
    return total_tokens / sum(len(m.rows) * m.shape.slots for m in plan)
