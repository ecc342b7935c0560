"""What the bracket rule rests its answer on: the neighbours of the best arm, and the arm that comes closest to it."""

import dataclasses
import math
from typing import Any

import numpy as np

from mice_jax.statistics import paired
from mice_jax.sweeps.bracket_rule import BracketRule
from mice_jax.sweeps.grid import Grid
from mice_jax.sweeps.rule import Runs

NOT_FINISHED, DIVERGED = "not finished", "diverged"


@dataclasses.dataclass(frozen=True)
class Rival:
    """An arm that is compared with the best one, by the seeds with which both are finished.

    Attributes:
        values: Its value on each axis.
        seeds: The number of these seeds.
        lag: By how much its metric is worse, as a mean over the seeds; NaN where it has none.
        low: The lower end of the paired 95 % interval of the lag; NaN with fewer than three seeds.
        high: Its upper end.
        status: Why it has no lag: not finished, or diverged; "" where it has one.
    """

    values: dict[str, Any]
    seeds: int
    lag: float
    low: float
    high: float
    status: str


@dataclasses.dataclass(frozen=True)
class Bracket:
    """The neighbours of the best arm on one axis; None at an end of the axis."""

    axis: str
    lower: Rival | None
    higher: Rival | None


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The answer of the bracket rule and what it rests on.

    Attributes:
        values: The best arm's value on each axis.
        metric: The name of the metric.
        mean: Its mean over the best arm's seeds.
        seeds: How many of them are finished.
        saved: The share of the samples of the whole grid that was not run.
        brackets: The neighbours on each ordered axis.
        runner_up: Of the other finished arms, the one that comes closest; None if there is none.
        notes: Sentences on how far the answer can be trusted.
    """

    values: dict[str, Any]
    metric: str
    mean: float
    seeds: int
    saved: float
    brackets: list[Bracket]
    runner_up: Rival | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the certificate as plain JSON values, None in place of NaN."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain

    def sentence(self) -> str:
        """Returns the answer in one line."""
        values = ", ".join(f"{name}={value}" for name, value in self.values.items())
        of_seeds = f" (mean of {self.seeds} seeds)" if self.seeds > 1 else ""
        return f"best arm: {values}; {self.metric} {self.mean:.4g}{of_seeds}; saved {self.saved:.0%}"


def of_sweep(rule: BracketRule, grid: Grid, runs: Runs, metric: str, sign: float) -> Certificate | None:
    """Returns the certificate of a sweep; None if every run has failed or diverged.

    Args:
        rule: The rule.
        grid: The arms of the sweep.
        runs: What has been measured so far.
        metric: The name of the metric.
        sign: -1 where more of it is better, so that the runs hold its negative; 1 otherwise.
    """
    best = rule.choose(grid, runs)
    if best is None:
        return None
    seeds = [s for s in range(runs.num_seeds) if runs.finished(s, best)]
    brackets = []
    for axis in rule.ordered_axes(grid):
        beside = {
            grid.values(a)[axis] < grid.values(best)[axis]: _rival(grid, runs, best, a)
            for a in grid.neighbours(best, axis)
        }
        brackets.append(Bracket(axis, beside.get(True), beside.get(False)))
    others = [_rival(grid, runs, best, a) for a in range(grid.size) if a != best and runs.finished(0, a)]
    measured = [r for r in others if not r.status]
    # Of two arms, the one with more seeds in common with the best one has come through more of the rule's tests.
    runner_up = min(measured, key=lambda r: (-r.seeds, r.lag), default=None)
    done = np.concatenate([[0.0], runs.shares])
    return Certificate(
        values=grid.values(best),
        metric=metric,
        mean=sign * runs.mean_final(best, seeds),
        seeds=len(seeds),
        saved=1 - float(done[runs.done].mean()),
        brackets=brackets,
        runner_up=runner_up,
        notes=rule.notes(grid, runs),
    )


def _rival(grid: Grid, runs: Runs, best: int, arm: int) -> Rival:
    """Returns how far an arm lags behind the best one."""
    common = [s for s in range(runs.num_seeds) if runs.finished(s, best) and runs.finished(s, arm)]
    nothing = Rival(grid.values(arm), len(common), math.nan, math.nan, math.nan, "")
    if runs.failed_arms[arm]:
        return dataclasses.replace(nothing, status=DIVERGED)
    if not common:
        return dataclasses.replace(nothing, status=NOT_FINISHED)
    lags = [runs.final(s, arm) - runs.final(s, best) for s in common]
    found = dataclasses.replace(nothing, lag=float(np.mean(lags)))
    if len(common) < paired.MIN_PAIRS:
        return found
    interval = paired.compare(lags)
    return dataclasses.replace(found, low=float(interval.low), high=float(interval.high))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) or value is None else repr(value)
