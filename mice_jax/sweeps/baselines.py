"""Rules over a whole sweep that `BracketRule` is compared with.

They are the full grid, stopping all arms at a constant share of the run, successive halving by arm, and the rules that
stop single runs for good (mice_jax/training/stop_rules.py), each asked as `mice sweep` asks it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mice_jax.errors import UserError
from mice_jax.sweeps.grid import Grid
from mice_jax.sweeps.rule import METRIC, Runs, SweepRule, Task, best_arm, lowest
from mice_jax.training import stop_rules
from mice_jax.training.stop_rules import HalvingRule, PaperRule

OBJECTIVE = stop_rules.Objective(METRIC, "min")


@dataclasses.dataclass(frozen=True)
class FullGrid(SweepRule):
    """Runs every arm with every seed."""

    def next_tasks(self, grid: Grid, runs: Runs) -> list[Task]:
        """Returns all runs that have not ended."""
        return _unfinished(runs, range(runs.num_seeds), range(grid.size), runs.num_points)

    def choose(self, grid: Grid, runs: Runs) -> int | None:
        """Returns the arm with the lowest mean over all seeds."""
        return best_arm(runs, range(grid.size), range(runs.num_seeds))


@dataclasses.dataclass(frozen=True)
class ConstantShare(SweepRule):
    """Runs all arms with the first seed to a constant share, and the best of them to the end with every seed.

    This simple rule equals multi-fidelity methods on many benchmarks (arXiv 2404.04111), so it is the one to beat.

    Attributes:
        share: The share of the run to which every arm is run.
        keep: How many arms are finished.
    """

    share: float = 0.2
    keep: int = 4

    def next_tasks(self, grid: Grid, runs: Runs) -> list[Task]:
        """Returns what can be run now; see `SweepRule`."""
        early = _unfinished(runs, [0], range(grid.size), runs.points_at(self.share))
        return early or _unfinished(runs, range(runs.num_seeds), self._kept(grid, runs), runs.num_points)

    def choose(self, grid: Grid, runs: Runs) -> int | None:
        """Returns the arm of those finished with the lowest mean over all seeds."""
        return best_arm(runs, self._kept(grid, runs), range(runs.num_seeds))

    def _kept(self, grid: Grid, runs: Runs) -> list[int]:
        return _best(runs, range(grid.size), [0], runs.points_at(self.share), self.keep)


@dataclasses.dataclass(frozen=True)
class ArmHalving(SweepRule):
    """Successive halving of arms, judged by the mean over all seeds at rungs that all of them reach.

    Attributes:
        first: The share of the run at which the first rung is.
        reduction: One of this many arms goes on at each rung, and the next rung is at as many times the share.
    """

    first: float = 0.1
    reduction: int = 2

    def next_tasks(self, grid: Grid, runs: Runs) -> list[Task]:
        """Returns what can be run now; see `SweepRule`."""
        arms: Sequence[int] = range(grid.size)
        for points in self._rungs(runs):
            if tasks := _unfinished(runs, range(runs.num_seeds), arms, points):
                return tasks
            arms = self._promoted(runs, arms, points)
        return []

    def choose(self, grid: Grid, runs: Runs) -> int | None:
        """Returns the arm that is left with the lowest mean over all seeds."""
        arms: Sequence[int] = range(grid.size)
        for points in self._rungs(runs)[:-1]:
            arms = self._promoted(runs, arms, points)
        return best_arm(runs, arms, range(runs.num_seeds))

    def _rungs(self, runs: Runs) -> list[int]:
        """Returns the number of evaluations at each rung; the last one is the end of the run."""
        rungs, share = [], self.first
        while share < 1:
            rungs.append(runs.points_at(share))
            share *= self.reduction
        return [*rungs, runs.num_points]

    def _promoted(self, runs: Runs, arms: Sequence[int], points: int) -> list[int]:
        return _best(runs, arms, range(runs.num_seeds), points, math.ceil(len(arms) / self.reduction))


@dataclasses.dataclass(frozen=True)
class StopRuns(SweepRule):
    """Runs the whole grid with a rule that stops single runs for good, as `mice sweep` does.

    Runs start in the order of the grid, the seeds of an arm one after another. Each is asked at the decision points of
    the rule, where it is compared with the siblings that have come as far by then.

    Attributes:
        rule: The rule that stops runs.
    """

    rule: stop_rules.SiblingRule

    @property
    def signals(self) -> tuple[str, ...]:
        """The training loss and the gradient norm for the paper's rule, nothing for the others."""
        return ("loss", stop_rules.recorded_name(self.rule.norm)) if isinstance(self.rule, PaperRule) else ()

    def check(self, grid: Grid, runs: Runs) -> None:
        """Raises UserError where the signals that the rule compares are missing."""
        for name in self.signals:
            if name not in runs.signals:
                listed = ", ".join(f"{n!r}: ..." for n in self.signals)
                raise UserError(
                    f"signals has no {name!r}. PaperRule compares training losses and gradient norms: give both, as "
                    f"in signals={{{listed}}}, arrays of the shape of curves."
                )

    def next_tasks(self, grid: Grid, runs: Runs) -> list[Task]:
        """Returns each run's way to its next decision point, runs that have started first."""
        decisions = [*sorted(stop_rules.decision_steps(self.rule, runs.num_points)), runs.num_points]
        order = [(s, a) for a in range(grid.size) for s in range(runs.num_seeds)]
        alive = [(s, a) for s, a in order if not runs.reached(s, a, runs.num_points)]
        alive.sort(key=lambda run: runs.done[run] == 0)  # stable, so otherwise in the order of the grid
        return [Task(s, a, min(d for d in decisions if d > runs.done[s, a])) for s, a in alive]

    def stops(self, grid: Grid, runs: Runs, task: Task) -> bool:
        """Returns whether the rule stops the run of a task that has come to a decision point."""
        if runs.diverged[task.seed, task.arm] or task.until == runs.num_points:
            return False
        if isinstance(self.rule, HalvingRule):
            return not _promoted_asynchronously(runs, task, self.rule.reduction)
        # Siblings that have not come as far do not count, and what others have measured since then is not compared.
        as_far = runs.done >= task.until
        as_far[task.seed, task.arm] = False
        siblings = [runs.progress(int(s), int(a))[: task.until] for s, a in np.argwhere(as_far)]
        own = runs.progress(task.seed, task.arm)
        return bool(stop_rules.reason_among_siblings(self.rule, own, siblings, OBJECTIVE))

    def choose(self, grid: Grid, runs: Runs) -> int | None:
        """Returns the arm with the lowest mean over those of its runs that were not stopped."""
        seeds = {a: [s for s in range(runs.num_seeds) if runs.finished(s, a)] for a in range(grid.size)}
        return lowest({a: runs.mean_final(a, listed) for a, listed in seeds.items() if listed})


def _promoted_asynchronously(runs: Runs, task: Task, reduction: int) -> bool:
    """Returns whether a run at a rung is among the best 1 of `reduction` that have come there, as Optuna decides.

    The best one of fewer than `reduction` runs goes on too.
    """
    own = runs.curves[task.seed, task.arm, task.until - 1]
    at_rung = runs.curves[..., task.until - 1][runs.done >= task.until]
    competing = np.sort(at_rung[np.isfinite(at_rung)])
    return bool(own <= competing[max(len(competing) // reduction - 1, 0)])


def _unfinished(runs: Runs, seeds: Sequence[int], arms: Sequence[int], points: int) -> list[Task]:
    """Returns the tasks that bring these runs to an evaluation; arms that have diverged are left out."""
    return [
        Task(s, a, points) for a in arms if not runs.failed_arms[a] for s in seeds if not runs.reached(s, a, points)
    ]


def _best(runs: Runs, arms: Sequence[int], seeds: Sequence[int], points: int, keep: int) -> list[int]:
    """Returns the arms with the lowest means at an evaluation that have not diverged, the best first."""
    means = {a: float(np.mean([runs.value(s, a, points) for s in seeds])) for a in arms if not runs.failed_arms[a]}
    return sorted(means, key=lambda a: means[a])[:keep]
