"""Best fit and the deal, for a block of steps: the planner's loops over samples and rows, compiled by numba.

They are apart from `packing`, which imports them with its first plan: numba takes a while to import, and many who know
what a plan is never make one.
"""

import functools
import sys
from typing import Any

import numba
import numpy as np
from numba import njit

# What a row is found by, its room beside its number, is below this in most runs: then half as wide, twice as fast.
NARROW = 2**31


def pack(ranked: np.ndarray, seeds: np.ndarray, *numbers: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs and deals each step, as `_pack` says."""
    main_rows, main_slots, *_, row_slots, _ = numbers
    most_rows = ranked.shape[1] + main_rows + row_slots.shape[1]
    word = np.uint32 if main_slots << most_rows.bit_length() < NARROW else np.uint64
    most = np.iinfo(word).max
    arguments = ranked, seeds, np.array([most // 2, most], word), *numbers
    return _compiled(tuple(map(numba.typeof, arguments)))(*arguments)


@functools.cache
def _compiled(types: tuple[Any, ...]) -> Any:
    """`_pack` for arguments of these types: as numba has kept it on disk, else compiled, and kept if it can be.

    What is kept may be damaged, and a pickle of numba's then raises anything; the disk may be full or read-only. Then
    this process compiles for itself, in two seconds, and says so.
    """
    try:
        loops = njit(cache=True)(_pack)
        loops.compile(types)
    except Exception as e:
        loops = njit(_pack)
        loops.compile(types)  # raises again what is no matter of the disk
        print(f"the planner is compiled anew, since numba cannot keep or read it: {e!r}", file=sys.stderr, flush=True)
    return loops


def _pack(ranked, seeds, limits, main_rows, main_slots, least_charge, tail_slots, tail_rows, row_slots, same_until):
    """Packs and deals each step; the arguments from `main_rows` on are a `packing._Layouts.numbers`.

    Args:
      ranked: [steps, samples] length << 32 | samples behind it in its step, ascending.
      seeds: [steps] that rows are dealt by.
      limits: half and all of the largest number of the type that rows are found by.

    Returns samples [steps, samples], row by row; bounds, where in its step each row begins and the last one ends, of
    all steps in one line; and [steps, 3] the number of largest microbatches, which tail, and where in the line.
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
        # A layout that cannot hold even the tokens, or gives no row to each sample above half of one, is not tried.
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


@njit
def _best_fit(charges, slots, keys, limits, row_of):
    """Best-fit-decreasing: the row of each sample, into `row_of`; False where one does not fit.

    A row's key is its room << bits | row, and no more than half of what its type holds. Below what a sample needs,
    key - need wraps around to more than that, so that one pass for the least of the differences finds the tightest row
    that fits, and its next key.
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


@njit
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


@njit
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
