"""Which samples share a row, and which rows share a microbatch: the plans of steps, from lengths alone.

A step is exactly its samples. They are packed best-fit-decreasing into rows, and rows are dealt to microbatches
whose shapes come from one short fixed list, so that nothing recompiles and short tails waste little. A plan is
a pure function of its arguments: every host computes the same one. The loops over samples are compiled by numba, and
steps are planned in blocks: at a hundred samples a step, what Python does for each of them would be most of the time.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

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
    # In ascending order, the longest and of equals the first come last.
    ranked = np.sort(lengths.astype(np.int64) << 32 | np.arange(count - 1, -1, -1), axis=1)
    seeds = rng.integers(2**64, size=num_steps, dtype=np.uint64)
    return Plans(layouts, *_pack(ranked, seeds, *layouts.numbers))


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

    def cost(tail: tuple[Shape, ...]) -> float:
        return sum(s.rows * s.slots / area + LAUNCH_COST for s in tail)

    tails = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(smaller, n) for n in range(MAX_TAILS + 1)
    )
    cheapest: dict[int, tuple[Shape, ...]] = {}  # by slots: where one layout fails, its equals seldom fit
    for tail in sorted(tails, key=cost):
        cheapest.setdefault(sum(s.rows * s.slots for s in tail), tail)
    return [t for slots, t in sorted(cheapest.items()) if slots < area and cost(t) < 1 + LAUNCH_COST]


def slot_efficiency(total_tokens: int, plan: Sequence[Microbatch]) -> float:
    """Real tokens over computed slots, padding rows included."""
    return total_tokens / sum(len(m.rows) * m.shape.slots for m in plan)


# -------------------------------------------------------------------------------------------------------- compiled
def _compiled(loop: Any) -> Any:
    """The loop as numba compiles it, once for all: it is kept on disk, beside this file or in the user's cache."""
    try:
        return njit(cache=True)(loop)
    except RuntimeError:  # neither can be written: each process compiles anew, in two seconds
        return njit(loop)


@_compiled
def _pack(ranked, seeds, main_rows, main_slots, least_charge, tail_slots, tail_rows, row_slots, same_until):
    """Packs and deals each step; the arguments from `main_rows` on are a `_Layouts.numbers`.

    Args:
      ranked: [steps, samples] length << 32 | samples behind it in its step, ascending.
      seeds: [steps] that rows are dealt by.

    Returns samples [steps, samples], row by row; bounds, where in its step each row begins and the last one ends, of
    all steps in one line; and [steps, 3] the number of largest microbatches, which tail, and where in the line.
    """
    num_steps, count = ranked.shape
    samples = np.empty((num_steps, count), np.int32)
    most_rows = count + main_rows + row_slots.shape[1]
    bounds = np.empty(num_steps * (most_rows + 1), np.int32)
    chosen = np.empty((num_steps, 3), np.int32)
    charges, row_of = np.empty(count, np.uint32), np.empty(count, np.int32)
    slots, place, keys = np.empty(most_rows, np.uint32), np.empty(most_rows, np.int32), np.empty(most_rows, np.uint32)
    begin = 0
    for step in range(num_steps):
        total = halves = 0
        for i in range(count):
            charge = max(ranked[step, count - 1 - i] >> 32, least_charge)
            charges[i] = charge
            total += charge
            halves += 2 * charge > main_slots
        # A layout that cannot hold even the tokens, or gives no row to each sample above half of one, is not tried.
        mains, tail = total // (main_rows * main_slots), 0
        while True:
            first_tail = mains * main_rows
            rows = first_tail + tail_rows[tail]
            if first_tail * main_slots + tail_slots[tail] >= total and rows >= halves:
                for row in range(rows):
                    slots[row] = main_slots if row < first_tail else row_slots[tail, row - first_tail]
                if _best_fit(charges, slots[:rows], keys[:rows], row_of):
                    break
            tail += 1
            if tail == len(tail_slots):
                mains, tail = mains + 1, 0
        _deal(place, 0, first_tail, seeds[step])
        at = 0
        while at < tail_rows[tail]:
            _deal(place, first_tail + at, first_tail + same_until[tail, at], seeds[step])
            at = same_until[tail, at]
        _write(ranked[step], row_of, place, samples[step], bounds[begin : begin + rows + 1])
        chosen[step, 0], chosen[step, 1], chosen[step, 2] = mains, tail, begin
        begin += rows + 1
    return samples, bounds[:begin], chosen


@_compiled
def _best_fit(charges, slots, keys, row_of):
    """Best-fit-decreasing: the row of each sample, into `row_of`; False where one does not fit.

    A row's key is its room << bits | row. Below what a sample needs, key - need wraps around to 2**31 and more, so
    that one pass for the least of the differences finds the tightest row that fits, and its next key.
    """
    rows = len(slots)
    bits = 0
    while rows >> bits:
        bits += 1
    assert slots[0] << bits < 2**31  # fails above half a billion slots a step
    for row in range(rows):
        keys[row] = slots[row] << bits | row
    for i in range(len(charges)):
        need = np.uint32(charges[i] << bits)
        least = np.uint32(2**32 - 1)
        for row in range(rows):
            least = min(least, np.uint32(keys[row] - need))
        if least >= 2**31:
            return False
        row_of[i] = least & ((1 << bits) - 1)
        keys[row_of[i]] = least
    return True


@_compiled
def _deal(place, start, end, seed):
    """A random place, from `start` up to `end`, for each row from `start` up to `end`.

    The random numbers are SplitMix64's, a stream of its own for each start.
    """
    for row in range(start, end):
        place[row] = row
    for row in range(start, end):
        mixed = seed + np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        other = row + np.int64((mixed >> np.uint64(32)) * np.uint64(end - row) >> np.uint64(32))
        place[row], place[other] = place[other], place[row]


@_compiled
def _write(ranked, row_of, place, samples, bounds):
    """Each place's samples, longest first, into `samples`; where places begin and the last one ends, into `bounds`."""
    count, rows = len(row_of), len(bounds) - 1
    for row in range(rows + 1):
        bounds[row] = 0
    # First bounds[p + 1] is made to say where place p begins; as its samples come in, it moves to where p ends.
    for i in range(count):
        if place[row_of[i]] + 2 <= rows:
            bounds[place[row_of[i]] + 2] += 1
    for row in range(2, rows + 1):
        bounds[row] += bounds[row - 1]
    for i in range(count):
        p = place[row_of[i]]
        samples[bounds[p + 1]] = count - 1 - (ranked[count - 1 - i] & 0xFFFFFFFF)
        bounds[p + 1] += 1
