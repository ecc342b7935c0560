"""Best-fit packing of samples and random dealing of rows for a block of steps, compiled by numba.

The import of numba and the loading of what it has compiled take two CPU seconds, so Python itself runs the loops until
it has planned as much as takes it a tenth of a second. The plans are the same.
"""

import functools
import sys
from typing import Any

import numpy as np

# A row's key holds its free slots and its number; keys below this limit use uint32, which is twice as fast as uint64.
NARROW = 2**31
# As many comparisons of a sample with a row does Python make in this process before the loops are compiled.
MOST_INTERPRETED = 100_000
HELPERS = ("_best_fit", "_deal", "_write")  # what `_pack` calls

_interpreted = 0  # comparisons that Python has made


def pack(ranked: np.ndarray, seeds: np.ndarray, *numbers: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs the samples of each step into rows and deals the rows to microbatches.

    Args:
      ranked: int64 [steps, samples], length << 32 | number of samples behind it in its step, ascending.
      seeds: uint64 [steps], seeds of the random dealing.
      *numbers: the `numbers` of a `packing._Layouts`.

    Returns:
      The samples, bounds and choices that `_pack` returns.
    """
    main_rows, main_slots, *_, row_slots, _ = numbers
    most_rows = ranked.shape[1] + main_rows + row_slots.shape[1]
    word = np.uint32 if main_slots << most_rows.bit_length() < NARROW else np.uint64
    most = np.iinfo(word).max
    arguments = ranked, seeds, np.array([most // 2, most], word), *numbers
    global _interpreted
    _interpreted += ranked.size * most_rows
    if _interpreted <= MOST_INTERPRETED:
        with np.errstate(over="ignore"):  # numbers wrap around, as they do where the loops are compiled
            return _pack(*arguments)
    import numba

    return _compiled(tuple(map(numba.typeof, arguments)))(*arguments)


@functools.cache
def _compile_helpers() -> None:
    """Compiles what `_pack` calls: numba looks these functions up in this module."""
    from numba import njit

    for name in HELPERS:
        globals()[name] = njit(globals()[name])


@functools.cache
def _compiled(types: tuple[Any, ...]) -> Any:
    """Returns `_pack` compiled for arguments of these types, from numba's cache on disk if possible.

    The cache may be damaged, in which case numba may raise any error, and the disk may be full or read-only. Then this
    process compiles without the cache, which takes two seconds, and prints a remark.
    """
    from numba import njit

    _compile_helpers()
    try:
        loops = njit(cache=True)(_pack)
        loops.compile(types)
    except Exception as e:
        loops = njit(_pack)
        loops.compile(types)  # raises the error again if it was not caused by the disk
        print(f"the planner is compiled anew, since numba cannot keep or read it: {e!r}", file=sys.stderr, flush=True)
    return loops


def _pack(ranked, seeds, limits, main_rows, main_slots, least_charge, tail_slots, tail_rows, row_slots, same_until):
    """Packs the samples of each step into rows and deals the rows to microbatches.

    Args:
      ranked: int64 [steps, samples], length << 32 | number of samples behind it in its step, ascending.
      seeds: uint64 [steps], seeds of the random dealing.
      limits: [2], half of the largest value of the keys' dtype, and that value; the dtype is that of the keys.
      main_rows: rows of a largest microbatch, over all shards.
      main_slots: slots of its rows.
      least_charge: the smallest number of slots that a sample is charged.
      tail_slots: [tails], slots of each tail.
      tail_rows: [tails], rows of each tail.
      row_slots: [tails, rows], slots of each row of a tail.
      same_until: [tails, rows], for each row of a tail, the end of the rows of its shape.

    Returns:
      samples: int32 [steps, samples], the samples of each step, row by row.
      bounds: int32 [n], for each step, where each row begins in its samples and where the last one ends.
      chosen: int32 [steps, 3], the number of largest microbatches, the tail, and where the step begins in `bounds`.
    """
    num_steps, count = ranked.shape
    samples = np.empty((num_steps, count), np.int32)
    most_rows = count + main_rows + row_slots.shape[1]
    bounds = np.empty(num_steps * (most_rows + 1), np.int32)
    chosen = np.empty((num_steps, 3), np.int32)
    charges, row_of = np.empty(count, limits.dtype), np.empty(count, np.int32)
    slots, keys = np.empty(most_rows, limits.dtype), np.empty(most_rows, limits.dtype)
    place = np.empty(most_rows, np.int32)
    begin = 0
    for step in range(num_steps):
        total = halves = 0
        for i in range(count):
            charge = max(ranked[step, count - 1 - i] >> 32, least_charge)
            charges[i] = charge
            total += charge
            halves += 2 * charge > main_slots
        # A layout must hold all tokens and have a row for each sample that is longer than half a row.
        mains, tail = total // (main_rows * main_slots), 0
        while True:
            first_tail = mains * main_rows
            rows = first_tail + tail_rows[tail]
            if first_tail * main_slots + tail_slots[tail] >= total and rows >= halves:
                for row in range(rows):
                    slots[row] = main_slots if row < first_tail else row_slots[tail, row - first_tail]
                if _best_fit(charges, slots[:rows], keys[:rows], limits, row_of):
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


def _best_fit(charges, slots, keys, limits, row_of):
    """Packs by best-fit-decreasing; writes the row of each sample into `row_of`, and returns False if one does not fit.

    A row's key is its free slots << bits | row, and at most half of the largest value of its unsigned dtype. If a row
    has fewer free slots than a sample needs, key - need wraps around to more than that half. The minimum of the
    differences is therefore the tightest row that fits, and its next key.
    """
    rows, word = len(slots), keys.dtype.type
    bits = 0
    while rows >> bits:
        bits += 1
    for row in range(rows):
        keys[row] = slots[row] << bits | row
    for i in range(len(charges)):
        need, least = word(charges[i] << bits), limits[1]
        for row in range(rows):
            least = min(least, word(keys[row] - need))
        if least > limits[0]:
            return False
        row_of[i] = np.int64(least) & ((1 << bits) - 1)
        keys[row_of[i]] = least
    return True


def _deal(place, start, end, seed):
    """Permutes the places of the rows from `start` up to `end` at random, with numbers from SplitMix64."""
    for row in range(start, end):
        place[row] = row
    for row in range(start, end):
        mixed = seed + np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        other = row + np.int64((mixed >> np.uint64(32)) * np.uint64(end - row) >> np.uint64(32))
        place[row], place[other] = place[other], place[row]


def _write(ranked, row_of, place, samples, bounds):
    """Writes the samples of each place into `samples`, longest first, and the bounds of the places into `bounds`."""
    count, rows = len(row_of), len(bounds) - 1
    for row in range(rows + 1):
        bounds[row] = 0
    # At first, bounds[p + 1] is where place p begins; writing the samples of p moves it to where p ends.
    for i in range(count):
        if place[row_of[i]] + 2 <= rows:
            bounds[place[row_of[i]] + 2] += 1
    for row in range(2, rows + 1):
        bounds[row] += bounds[row - 1]
    for i in range(count):
        p = place[row_of[i]]
        samples[bounds[p + 1]] = count - 1 - (ranked[count - 1 - i] & 0xFFFFFFFF)
        bounds[p + 1] += 1
