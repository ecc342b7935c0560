"""Planning: how many samples a second are packed, and how full the computed slots are, against two baselines.

    python bench/packing.py [--samples=230400] [--repeats=5]

All plan the same steps: log-normal lengths (mean of log 6.2, sigma 0.9, clipped to 16..4,096), rows of up to 4,096
slots, 8 devices, one row a device and microbatch, in steps of 3,840 and of 128 samples. One process plans, in Python,
without jax.

  mice_jax   pack_step: best-fit-decreasing into a short list of microbatch shapes
  fixed      best-fit-decreasing into rows of 4,096, their number rounded up to whole microbatches of 8: the limit of
             any planner that knows one shape (nearly: best-fit-decreasing is seldom a row above the optimum)
  multipack  a stand-in for the paper's trainer: the longest run of a step's samples, in the order drawn, that
             first-fit-decreasing packs into one microbatch of 8 rows, found by bisection; then the next

The figures are medians over the repeats, each with lengths of its own: samples a second of this process's CPU time
(planning alone, one thread; other programs on the machine do not count), and slot efficiency = real tokens over
computed slots (1 = no padding). Targets: 1,000,000 samples/s and 0.995 at 3,840 samples a step. The baselines' slots
are the comparison, not their speeds: `fixed` counts rows and gives back no plan, `multipack` is plain Python where
the original is compiled.
"""

import argparse
import json
import statistics
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

import numpy as np

from mice_jax.data.packing import microbatch_shapes, pack_step

MAX_LENGTH = 4096
NUM_SHARDS = 8
STEP_SAMPLES = (3840, 128)
SHAPES = microbatch_shapes(MAX_LENGTH, rows_per_shard=1)
Planner = Callable[[np.ndarray, np.random.Generator], int]  # a step's lengths -> computed slots


def ours(lengths: np.ndarray, rng: np.random.Generator) -> int:
    plan = pack_step(lengths, SHAPES, NUM_SHARDS, rng)
    return sum(len(m.rows) * m.shape.slots for m in plan)


def fixed(lengths: np.ndarray, rng: np.random.Generator) -> int:
    """A sample goes to the row with the least room that fits it, else to a new one."""
    rooms: list[int] = []
    rows = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows += 1
            insort(rooms, MAX_LENGTH - length)
        else:
            insort(rooms, rooms.pop(at) - length)
    return -(-rows // NUM_SHARDS) * NUM_SHARDS * MAX_LENGTH


def multipack(lengths: np.ndarray, rng: np.random.Generator) -> int:
    slots = start = 0
    while start < len(lengths):
        start += longest_fit(lengths[start:])
        slots += NUM_SHARDS * MAX_LENGTH
    return slots


def longest_fit(lengths: np.ndarray) -> int:
    """How many samples from the first on fill one microbatch."""
    fits, high = 1, int(np.searchsorted(np.cumsum(lengths), NUM_SHARDS * MAX_LENGTH, side="right"))
    while fits < high:
        middle = (fits + high + 1) // 2
        if first_fit(lengths[:middle]):
            fits = middle
        else:
            high = middle - 1
    return fits


def first_fit(lengths: np.ndarray) -> bool:
    """Whether first-fit-decreasing packs all of them into one microbatch."""
    rooms = [MAX_LENGTH] * NUM_SHARDS
    for length in np.sort(lengths)[::-1].tolist():
        row = next((i for i, room in enumerate(rooms) if room >= length), None)
        if row is None:
            return False
        rooms[row] -= length
    return True


PLANNERS: dict[str, Planner] = {"mice_jax": ours, "fixed": fixed, "multipack": multipack}


def draw_lengths(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(6.2, 0.9, count)
    return np.clip(np.round(drawn), 16, MAX_LENGTH).astype(np.int64)


def steps_of(lengths: np.ndarray, samples: int) -> Iterator[np.ndarray]:
    """Whole steps only."""
    return (lengths[i : i + samples] for i in range(0, len(lengths) - samples + 1, samples))


def measure(planner: Planner, lengths: np.ndarray, samples: int) -> tuple[float, float]:
    """Samples/s, and slot efficiency over all steps together."""
    steps = list(steps_of(lengths, samples))
    rng = np.random.default_rng(0)
    started = time.process_time()
    slots = sum(planner(step, rng) for step in steps)
    seconds = time.process_time() - started
    return len(steps) * samples / seconds, sum(int(step.sum()) for step in steps) / slots


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=230_400, help="planned in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.samples < max(STEP_SAMPLES) or args.repeats < 1:
        parser.error(f"give at least {max(STEP_SAMPLES)} samples and one repeat")
    ours(draw_lengths(128, 0), np.random.default_rng(0))  # fills the planner's cache of layouts
    figures: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for repeat in range(args.repeats):
        lengths = draw_lengths(args.samples, seed=repeat)
        for samples in STEP_SAMPLES:
            for name, planner in PLANNERS.items():
                figures.setdefault((samples, name), []).append(measure(planner, lengths, samples))
    results = []
    print(f"{'samples a step':<16}{'planner':<11}{'samples/s':>11}{'slot efficiency':>17}   (least, most)")
    for (samples, name), runs in figures.items():
        speeds, slots = zip(*runs, strict=True)
        speed, slot = statistics.median(speeds), statistics.median(slots)
        spread = f"({min(speeds):,.0f}, {max(speeds):,.0f}; {min(slots):.4f}, {max(slots):.4f})"
        print(f"{samples:<16,}{name:<11}{speed:>11,.0f}{slot:>17.4f}   {spread}")
        results.append({"step": samples, "planner": name, "samples_per_s": round(speed), "efficiency": round(slot, 5)})
    print(json.dumps({"bench": "packing", "samples": args.samples, "repeats": args.repeats, "results": results}))


if __name__ == "__main__":
    main()
