"""Which samples share a row, and which rows share a microbatch: the plans of steps, from lengths alone.

A step is exactly its samples. They are packed best-fit-decreasing into rows, and rows are dealt to microbatches
whose shapes come from one short fixed list, so that nothing recompiles and short tails waste little. A plan is
a pure function of its arguments: every host computes the same one. The loops over samples are compiled (`best_fit`),
and steps are planned in blocks: at a hundred samples a step, what Python does for each would be most of the time.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mice_jax.packing_limits import max_segments

MAX_SHAPES = 6  # each one costs a compilation
MAX_TAILS = 4  # microbatches smaller than the largest, in one step
LAUNCH_PART = 64  # one more microbatch must save the 64th part of a largest one's slots to be worth it
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


class Microbatch(NamedTuple):
    """`rows[i]` lists the samples of row i, as indices into the step; an empty row is padding."""

    shape: Shape
    rows: Sequence[list[int]]  # shape.rows * num_shards of them


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


class Rows(Sequence[list[int]]):
    """The samples of each row of a microbatch; a row's list is made when it is asked for."""

    __slots__ = ("_bounds", "_samples")

    def __init__(self, samples: list[int], bounds: list[int]):
        """`samples` are those of the step, row by row; `bounds` says where each row begins and the last one ends."""
        self._samples, self._bounds = samples, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1
            return [self._samples[a:b] for a, b in itertools.pairwise(self._bounds[start : stop + 1])]
        at = range(len(self))[at]
        return self._samples[self._bounds[at] : self._bounds[at + 1]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


class Plans(Sequence[list[Microbatch]]):
    """The plan of each of a block of steps."""

    def __init__(self, layouts: "_Layouts", samples: np.ndarray, bounds: np.ndarray, chosen: np.ndarray):
        self._layouts = layouts
        self._samples, self._bounds, self._chosen = samples.tolist(), bounds.tolist(), chosen.tolist()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, step: int) -> list[Microbatch]:
        samples, (mains, tail, at) = self._samples[step], self._chosen[step]
        microbatches = []
        for shape, count in self._layouts.mains * mains + self._layouts.tails[tail]:
            microbatches.append(Microbatch(shape, Rows(samples, self._bounds[at : at + count + 1])))
            at += count
        return microbatches


def pack_steps(lengths: np.ndarray, shapes: tuple[Shape, ...], num_shards: int, rng: np.random.Generator) -> Plans:
    """Packs each step's samples and deals its rows to microbatches.

    Args:
      lengths: [steps, samples] tokens of each, none above the first shape's slots.
      shapes: as `microbatch_shapes` gives them; the first is the largest.
      num_shards: the devices that split a microbatch's rows.
      rng: decides which rows share a microbatch, so that microbatches are comparable samples of their step.

    Returns for each step microbatches that hold every sample once, with few empty slots. What a step's are does not
    depend on the steps that follow it.
    """
    main = shapes[0]
    assert lengths.size and lengths.min() >= 1 and lengths.max() <= main.slots
    num_steps, count = lengths.shape
    layouts = _layouts(shapes, num_shards)
    from mice_jax.data.best_fit import pack  # here alone, as it takes a while

    # In ascending order, the longest and of equals the first come last.
    ranked = np.sort(lengths.astype(np.int64) << 32 | np.arange(count - 1, -1, -1), axis=1)
    seeds = rng.integers(2**64, size=num_steps, dtype=np.uint64)
    return Plans(layouts, *pack(ranked, seeds, *layouts.numbers))


class _Layouts(NamedTuple):
    """What steps may be made of: any number of largest microbatches and one of the tails.

    `mains` and `tails` hold shapes with their rows over all shards. `numbers` is the same for compiled code: rows and
    slots of a row of a largest microbatch, the least that a sample is charged; slots and rows of each tail, and by
    tail and row the slots of the row and where the rows of its shape end.
    """

    mains: list[tuple[Shape, int]]
    tails: list[list[tuple[Shape, int]]]
    numbers: tuple[int, int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@functools.cache
def _layouts(shapes: tuple[Shape, ...], num_shards: int) -> _Layouts:
    main = shapes[0]
    tails = [[(s, s.rows * num_shards) for s in tail] for tail in _tails(shapes)]
    rows = np.array([sum(count for _, count in tail) for tail in tails])
    slots = np.array([sum(s.slots * count for s, count in tail) for tail in tails])
    row_slots, same_until = np.zeros((2, len(tails), rows.max() + 1), np.int64)
    for t, tail in enumerate(tails):
        start = 0
        for shape, same in itertools.groupby(s for s, _ in tail):
            end = start + len(list(same)) * shape.rows * num_shards
            row_slots[t, start:end], same_until[t, start:end] = shape.slots, end
            start = end
    # A sample takes at least so much of a row's room: so no row can hold more samples than it may.
    charge = -(-main.slots // main.max_segments)
    numbers = (main.rows * num_shards, main.slots, charge, slots, rows, row_slots, same_until)
    return _Layouts([(main, main.rows * num_shards)], tails, numbers)


@functools.cache
def _tails(shapes: tuple[Shape, ...]) -> list[tuple[Shape, ...]]:
    """The handfuls of smaller shapes that cost less than one largest microbatch, fewest slots first."""
    main, *smaller = shapes
    area = main.rows * main.slots

    def cost(tail: tuple[Shape, ...]) -> int:  # whole: how a sum of fractions rounds, Python's version decides
        return LAUNCH_PART * sum(s.rows * s.slots for s in tail) + area * len(tail)

    tails = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(smaller, n) for n in range(MAX_TAILS + 1)
    )
    cheapest: dict[int, tuple[Shape, ...]] = {}  # by slots: where one layout fails, its equals seldom fit
    for tail in sorted(tails, key=cost):  # of equals, that of the larger shapes comes first, as they were made
        cheapest.setdefault(sum(s.rows * s.slots for s in tail), tail)
    return [t for slots, t in sorted(cheapest.items()) if slots < area and cost(t) < (LAUNCH_PART + 1) * area]


def slot_efficiency(total_tokens: int, plan: Sequence[Microbatch]) -> float:
    """Real tokens over computed slots, padding rows included."""
    return total_tokens / sum(len(m.rows) * m.shape.slots for m in plan)
