"""Plans which samples share a row and which rows share a microbatch, from lengths alone.

The samples of a step are packed into rows by best-fit-decreasing, and the rows are dealt to microbatches. The shapes of
microbatches come from a short fixed list, so that no step recompiles and short tails waste few slots. A plan is a pure
function of its arguments, so every host computes the same plan. The loops over samples are compiled (`best_fit`), and
steps are planned in blocks, because Python's overhead for each step would otherwise dominate.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mice_jax.data.best_fit import pack
from mice_jax.packing_limits import balanced_parts, max_segments

MAX_SHAPES = 6  # each shape costs a compilation
MAX_TAIL_MICROBATCHES = 4  # microbatches of a step that are smaller than the largest shape
MICROBATCH_COST_DIVISOR = 64  # another microbatch must save 1/64 of the slots of a largest one
SLOT_MULTIPLE = 128  # kernels and vector units work on whole tiles


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a microbatch: `rows` on each of the shards that split a batch, by `slots`.

    Where `balanced_over` devices share a row, its slots are in the order in which these hold them.
    """

    rows: int
    slots: int
    balanced_over: int = 1

    @property
    def max_segments(self) -> int:
        """The largest number of samples in a row."""
        return max_segments(self.slots)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """The slots of a row in the order in which devices hold them; None if that is the order of the row."""
        if self.balanced_over == 1:
            return None
        parts = np.arange(self.slots).reshape(2 * self.balanced_over, -1)
        return parts[balanced_parts(self.balanced_over)].reshape(-1)


class Microbatch(NamedTuple):
    """`rows[i]` lists the samples of row i, as indices into the step; an empty row is padding."""

    shape: Shape
    rows: Sequence[list[int]]  # its length is shape.rows * num_shards


def microbatch_shapes(
    max_length: int, rows_per_shard: int, row_parts: int = 1, balanced_over: int = 1
) -> tuple[Shape, ...]:
    """Chooses the shapes of a run: rows are halved down to one, then slots are reduced.

    Args:
      max_length: slots of the largest shape.
      rows_per_shard: rows of the largest shape.
      row_parts: the parts into which devices that share a row cut it.
      balanced_over: as in `Shape`.

    Returns:
      At most six shapes, the largest first. The slots of each part of a row are a multiple of 128, or those of the
      parts of a row of `max_length`.
    """
    rows, multiple = rows_per_shard, SLOT_MULTIPLE * row_parts
    shapes = [Shape(rows, max_length, balanced_over)]
    while rows > 1 and len(shapes) < MAX_SHAPES:
        rows = (rows + 1) // 2
        shapes.append(Shape(rows, max_length, balanced_over))
    for eighths in (6, 4, 3, 2, 1) if rows_per_shard == 1 else (4, 2, 1):
        slots = -(-max_length * eighths // (8 * multiple)) * multiple
        shape = Shape(1, min(slots, max_length), balanced_over)
        if len(shapes) < MAX_SHAPES and rows == 1 and shape not in shapes:
            shapes.append(shape)
    return tuple(shapes)


class Rows(Sequence[list[int]]):
    """The samples of each row of a microbatch; the list of a row is created when it is accessed."""

    __slots__ = ("_bounds", "_samples")

    def __init__(self, samples: list[int], bounds: list[int]):
        """Keeps the samples of a step, row by row, and the bounds of the rows in that list."""
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
      lengths: int [steps, samples], tokens of each sample, at most the slots of the first shape.
      shapes: those of `microbatch_shapes`; the first is the largest.
      num_shards: number of devices that share the rows of a microbatch.
      rng: decides which rows share a microbatch, so that microbatches are comparable samples of their step.

    Returns:
      For each step, microbatches that hold every sample once, with few empty slots. They do not depend on the steps
      that follow.
    """
    main = shapes[0]
    assert lengths.size and lengths.min() >= 1 and lengths.max() <= main.slots
    num_steps, count = lengths.shape
    layouts = _layouts(shapes, num_shards)
    # In ascending order, the longest sample comes last; of equally long ones, the first.
    ranked = np.sort(lengths.astype(np.int64) << 32 | np.arange(count - 1, -1, -1), axis=1)
    seeds = rng.integers(2**64, size=num_steps, dtype=np.uint64)
    return Plans(layouts, *pack(ranked, seeds, *layouts.numbers))


class _Layouts(NamedTuple):
    """The microbatches that a step may have: any number of largest ones, then one of the tails.

    Attributes:
      mains: the largest shape, with its rows over all shards.
      tails: for each tail, its shapes with their rows over all shards.
      numbers: the same for compiled code, the arguments of `best_fit._pack` from `main_rows` on.
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
    # A sample is charged at least this number of slots, so that no row exceeds its limit of samples.
    charge = -(-main.slots // main.max_segments)
    numbers = (main.rows * num_shards, main.slots, charge, slots, rows, row_slots, same_until)
    return _Layouts([(main, main.rows * num_shards)], tails, numbers)


@functools.cache
def _tails(shapes: tuple[Shape, ...]) -> list[tuple[Shape, ...]]:
    """Returns the combinations of smaller shapes that cost less than one largest microbatch, in order of slots."""
    main, *smaller = shapes
    area = main.rows * main.slots

    def cost(tail: tuple[Shape, ...]) -> int:  # an integer, since sums of fractions differ between Python versions
        return MICROBATCH_COST_DIVISOR * sum(s.rows * s.slots for s in tail) + area * len(tail)

    tails = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(smaller, n) for n in range(MAX_TAIL_MICROBATCHES + 1)
    )
    # One tail for each number of slots is enough, because others of the same size seldom fit if it does not.
    # The sort is stable, so that among equal costs the tail of larger shapes comes first.
    cheapest: dict[int, tuple[Shape, ...]] = {}
    for tail in sorted(tails, key=cost):
        cheapest.setdefault(sum(s.rows * s.slots for s in tail), tail)
    return [
        t for slots, t in sorted(cheapest.items()) if slots < area and cost(t) < (MICROBATCH_COST_DIVISOR + 1) * area
    ]


def slot_efficiency(total_tokens: int, plan: Sequence[Microbatch]) -> float:
    """Returns the ratio of tokens to computed slots, including the slots of padding rows."""
    return total_tokens / sum(len(m.rows) * m.shape.slots for m in plan)
