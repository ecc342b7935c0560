"""What a rule over a whole sweep reads and returns.

Such a rule decides which runs are trained how far. It is a pure function of what has been measured so far, so a sweep
that was killed and started again gets the same decisions.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mice_jax.sweeps.grid import Grid
from mice_jax.training.stop_rules import ColumnarRecords

# Shares such as 0.1 and 3/30 are equal to rounding; no decision may depend on their last bit.
ROUNDING = 1e-9
METRIC = "eval/loss"  # the name that the metric of a stored sweep gets where a rule reads records


class Task(NamedTuple):
    """A piece of work: to train one run up to one of its evaluations, from where it is."""

    seed: int  # the position in the seeds of the sweep
    arm: int
    until: int  # the number of evaluations after which the run is paused


@dataclasses.dataclass(frozen=True)
class Runs:
    """What has been measured so far of the runs of a sweep. Letters: S seeds, A arms, P evaluations of a run.

    Attributes:
        curves: The metric at each evaluation, float64 [S, A, P], lower is better. It is inf from the first evaluation
            at which the run had diverged. Values beyond `done` are not read.
        done: How many evaluations of each run are known, int [S, A]. It is 0 before a run has started.
        stopped: Whether a rule has stopped the run for good, bool [S, A].
        shares: The share of a run that is done at each evaluation, float64 [P], increasing, 1 at the last.
        start: The metric before the first step; NaN where it was not measured.
        signals: Other numbers at each evaluation by name, float64 [S, A, P] each.
        records: The runs as records (`progress`), made when they are first read. Later states of the same runs share
            them.
    """

    curves: np.ndarray
    done: np.ndarray
    stopped: np.ndarray
    shares: np.ndarray
    start: float = math.nan
    signals: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    records: dict[tuple[int, int], ColumnarRecords] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def num_seeds(self) -> int:
        """The number of seeds of the sweep."""
        return self.curves.shape[0]

    @property
    def num_points(self) -> int:
        """The number of evaluations of a whole run."""
        return self.curves.shape[2]

    def points_at(self, share: float) -> int:
        """Returns the number of evaluations up to the first one at or past a share of the run."""
        return min(int(np.searchsorted(self.shares, share - ROUNDING)) + 1, self.num_points)

    @functools.cached_property
    def diverged(self) -> np.ndarray:
        """Whether the run is known to have diverged, bool [S, A]."""
        last = np.take_along_axis(self.curves, np.maximum(self.done - 1, 0)[..., None], axis=2)[..., 0]
        return (self.done > 0) & ~np.isfinite(last)

    @functools.cached_property
    def failed_arms(self) -> np.ndarray:
        """Whether a run of the arm has diverged with any seed, bool [A]."""
        return np.asarray(self.diverged.any(axis=0))

    def reached(self, seed: int, arm: int, points: int) -> bool:
        """Returns whether a run has come to an evaluation, or has ended before."""
        return bool(self.done[seed, arm] >= points or self.diverged[seed, arm] or self.stopped[seed, arm])

    def finished(self, seed: int, arm: int) -> bool:
        """Returns whether a run has come to its end without having diverged."""
        return bool(self.done[seed, arm] == self.num_points and not self.diverged[seed, arm])

    def value(self, seed: int, arm: int, points: int) -> float:
        """Returns the metric of a run at an evaluation; inf where the arm has diverged, also with another seed."""
        return math.inf if self.failed_arms[arm] else float(self.curves[seed, arm, points - 1])

    def final(self, seed: int, arm: int) -> float:
        """Returns the metric of a run at its end; inf where the arm has diverged, also with another seed."""
        return self.value(seed, arm, self.num_points)

    def progress(self, seed: int, arm: int) -> ColumnarRecords:
        """Returns the evaluations of a run so far as records, as the stop rules of runs read them."""
        key = seed, arm
        if key not in self.records:
            points = np.arange(1.0, self.num_points + 1)
            own = {name: values[seed, arm] for name, values in self.signals.items()}
            self.records[key] = ColumnarRecords(
                own | {"step": points, "samples": points, METRIC: self.curves[seed, arm]}
            )
        return self.records[key][: int(self.done[seed, arm])]

    def mean_final(self, arm: int, seeds: Sequence[int]) -> float:
        """Returns the mean over some seeds of the metric of an arm at its end."""
        return float(np.mean([self.final(s, arm) for s in seeds]))


class SweepRule(abc.ABC):
    """A rule that decides which runs of a sweep are trained how far, and which arm is the best."""

    @abc.abstractmethod
    def next_tasks(self, grid: Grid, runs: Runs) -> list[Task]:
        """Returns what can be run now.

        A task stays in the list until it is done, so that the caller leaves out those that are being run.

        Args:
            grid: The arms of the sweep.
            runs: What has been measured so far.

        Returns:
            Tasks that do not depend on one another, the most urgent first; empty once nothing is left to run.
        """

    @abc.abstractmethod
    def choose(self, grid: Grid, runs: Runs) -> int | None:
        """Returns the best arm by what was measured; None if every run has diverged."""

    @property
    def signals(self) -> tuple[str, ...]:
        """The names of the numbers that the rule reads besides the metric."""
        return ()

    def stops(self, grid: Grid, runs: Runs, task: Task) -> bool:
        """Returns whether the run of a task that was just done is stopped for good, instead of paused."""
        return False

    def check(self, grid: Grid, runs: Runs) -> None:
        """Raises UserError where the rule cannot work on this grid, or lacks a number that it needs."""
        return

    def notes(self, grid: Grid, runs: Runs) -> list[str]:
        """Returns sentences on how far the choice can be trusted."""
        return []


def best_arm(runs: Runs, arms: Sequence[int], seeds: Sequence[int]) -> int | None:
    """Returns the arm with the lowest mean over some seeds at the end of its runs; None if all have diverged."""
    return lowest({a: runs.mean_final(a, seeds) for a in arms})


def lowest(finals: Mapping[int, float]) -> int | None:
    """Returns the arm with the lowest value, the first of equal ones; None if no value is finite."""
    best = min(finals, key=lambda a: finals[a], default=None)
    return None if best is None or not math.isfinite(finals[best]) else best


def relative_regret(value: float, reference: float) -> float:
    """Returns by how much a value is above a reference, as a share of it; NaN for a reference of 0.

    A metric of which more is better is turned, and so may be negative.
    """
    return float((value - reference) / abs(reference)) if reference else math.nan
