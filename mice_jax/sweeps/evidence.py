"""Measures rules over sweeps on finished sweeps: what they save, and what they lose by it.

Every rule runs by its own code on stored curves (grid_replay.py). It chooses an arm by some of the seeds, and the arm
is scored on the others, for all ways to divide the seeds. Intervals come from a bootstrap of whole sweeps, because the
ways to divide the seeds of one sweep, and its runs, are not independent.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mice_jax.errors import UserError
from mice_jax.sweeps.baselines import ArmHalving, ConstantShare, FullGrid, StopRuns
from mice_jax.sweeps.bracket_rule import BracketRule
from mice_jax.sweeps.grid_replay import NoArmLeft, replay
from mice_jax.sweeps.rule import SweepRule, relative_regret
from mice_jax.sweeps.stored_sweeps import StoredSweep
from mice_jax.sweeps.synthetic import BROKEN_ASSUMPTIONS
from mice_jax.training.stop_rules import HalvingRule, MedianRule, PaperRule

RULES: Mapping[str, SweepRule] = {
    "bracket": BracketRule(),
    "full": FullGrid(),
    "share-20": ConstantShare(0.2, 4),
    "share-50": ConstantShare(0.5, 4),
    "arm-halving": ArmHalving(),
    "paper": StopRuns(PaperRule()),
    "paper-raw-norm": StopRuns(PaperRule(norm="grad_norm")),
    "median": StopRuns(MedianRule()),
    "halving": StopRuns(HalvingRule()),
}
MISS = 0.01  # a regret above this share of the metric is a miss
# What a rule has to show over all sweeps.
MIN_SAVED, MAX_REGRET, MAX_MISSES = 0.6, 0.01, 0.05
ASSUMPTIONS_HOLD, ALL = "one valley, ordered", "all"  # groups of kinds
RESAMPLES = 10_000  # of the bootstrap
LEVEL = 0.95  # of its intervals


@dataclasses.dataclass(frozen=True)
class Score:
    """How a rule did on one sweep: means over all ways to divide its seeds.

    Attributes:
        rule: The name of the rule.
        sweep: The name of the sweep.
        kind: The group that the sweep belongs to.
        splits: How many ways to divide the seeds there are.
        saved: The share of the samples of the full grid that was not run.
        regret: By how much the chosen arm is worse than that of the full grid, as a share of the metric, on the other
            seeds. Where the rule can choose no arm, or one that diverges there, the metric before the first step
            counts.
        misses: The share of the splits with a regret above MISS.
        winner_lost: The share of the splits in which no run of the full grid's arm was finished.
        wall_clock: The time of the sweep in whole runs.
    """

    rule: str
    sweep: str
    kind: str
    splits: int
    saved: float
    regret: float
    misses: float
    winner_lost: float
    wall_clock: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a rule did over some sweeps: means over the sweeps, with the ends of bootstrap intervals.

    Attributes:
        rule: The name of the rule.
        group: The kind of the sweeps, or "all".
        sweeps: How many there are.
        saved: The mean share saved, and the ends of its interval.
        regret: The mean regret, and the ends of its interval.
        misses: The mean share of splits with a regret above MISS.
        winner_lost: The mean share of splits in which no run of the full grid's arm was finished.
        wall_clock: The mean time in whole runs.
    """

    rule: str
    group: str
    sweeps: int
    saved: tuple[float, float, float]
    regret: tuple[float, float, float]
    misses: float
    winner_lost: float
    wall_clock: float

    @property
    def passes(self) -> bool:
        """Whether the rule saves enough, and neither its mean regret nor its misses are too many."""
        return self.saved[0] >= MIN_SAVED and self.regret[2] <= MAX_REGRET and self.misses <= MAX_MISSES


def score(sweep: StoredSweep, name: str, rule: SweepRule, num_seeds: int = 3, workers: int = 4) -> Score:
    """Scores a rule on a sweep.

    Args:
        sweep: The sweep, with at least two seeds.
        name: The name of the rule.
        rule: The rule.
        num_seeds: How many seeds it chooses by; fewer where the sweep would have none left to score on.
        workers: How many runs are trained at a time.

    Raises:
        UserError: The sweep has one seed, or the rule cannot work on it.
    """
    seeds = range(len(sweep.curves))
    if len(seeds) < 2:
        raise UserError(
            f"the sweep {sweep.name} has one seed. An arm is chosen by some seeds and scored on others, so at least "
            "two are needed."
        )
    splits = list(itertools.combinations(seeds, min(num_seeds, len(seeds) - 1)))
    outcomes = np.array([_outcome(sweep, rule, split, workers) for split in splits])
    saved, regret, lost, wall_clock = outcomes.T
    return Score(
        rule=name,
        sweep=sweep.name,
        kind=sweep.kind,
        splits=len(splits),
        saved=float(saved.mean()),
        regret=float(regret.mean()),
        misses=float((regret > MISS).mean()),
        winner_lost=float(lost.mean()),
        wall_clock=float(np.nanmean(wall_clock)) if not np.isnan(wall_clock).all() else math.nan,
    )


def _outcome(
    sweep: StoredSweep, rule: SweepRule, seeds: Sequence[int], workers: int
) -> tuple[float, float, float, float]:
    """Returns what a rule saved, its regret, whether the winner was lost, and the time."""
    curves = np.asarray(sweep.curves, np.float64)
    finals = np.where(np.isfinite(curves).all(axis=-1), curves[..., -1], math.inf)
    means = finals[list(seeds)].mean(axis=0)
    winner = tuple(int(i) for i in np.unravel_index(int(np.argmin(means)), means.shape))
    others = [s for s in range(len(curves)) if s not in seeds]
    # A run that diverges leaves one with the model from before its first step.
    scored = np.where(np.isfinite(finals), finals, sweep.start)[others].mean(axis=0)
    try:
        r = replay(curves, sweep.axes, rule, start=sweep.start, seeds=seeds, signals=sweep.signals, workers=workers)
    except NoArmLeft as e:
        return e.saved, relative_regret(sweep.start, scored[winner]), 1.0, math.nan
    except UserError as e:
        raise UserError(f"the sweep {sweep.name}: {e}") from None
    chosen = tuple(list(values).index(r.chosen[name]) for name, values in sweep.axes.items())
    lost = not (r.ran[(slice(None), *winner)] == 1).any()
    return r.saved, relative_regret(scored[chosen], scored[winner]), float(lost), r.wall_clock


def evaluate(
    sweeps: Sequence[StoredSweep],
    rules: Mapping[str, SweepRule] = RULES,
    num_seeds: int = 3,
    workers: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Scores rules on sweeps.

    Args:
        sweeps: The sweeps.
        rules: The rules by name. The paper's are left out on sweeps without the signals that they read.
        num_seeds: How many seeds a rule chooses by.
        workers: How many runs are trained at a time.
        progress: Called with the number of sweeps that are done.
    """
    scores = []
    for number, sweep in enumerate(sweeps, 1):
        for name, rule in rules.items():
            if set(rule.signals) <= set(sweep.signals):
                scores.append(score(sweep, name, rule, num_seeds, workers))
        progress(number)
    return scores


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """Returns the summary of each rule over each kind of sweeps and, where there are several kinds, over all.

    Before that comes the summary over all in which what `BracketRule` assumes holds.
    """
    kinds = list(dict.fromkeys(s.kind for s in scores))
    groups = {kind: [s for s in scores if s.kind == kind] for kind in kinds}
    sound = [s for s in scores if s.kind not in BROKEN_ASSUMPTIONS]
    if len(kinds) > 1 and 0 < len(sound) < len(scores):
        groups[ASSUMPTIONS_HOLD] = sound
    if len(kinds) > 1:
        groups[ALL] = list(scores)
    rules = list(dict.fromkeys(s.rule for s in scores))
    return [
        _summary(rule, group, of_rule)
        for group, members in groups.items()
        for rule in rules
        if (of_rule := [s for s in members if s.rule == rule])
    ]


def _summary(rule: str, group: str, scores: Sequence[Score]) -> Summary:
    return Summary(
        rule=rule,
        group=group,
        sweeps=len(scores),
        saved=bootstrap([s.saved for s in scores]),
        regret=bootstrap([s.regret for s in scores]),
        misses=float(np.mean([s.misses for s in scores])),
        winner_lost=float(np.mean([s.winner_lost for s in scores])),
        wall_clock=float(np.mean([s.wall_clock for s in scores])),
    )


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Returns the mean of some values and the ends of its percentile interval over resamples of them.

    Args:
        values: One value of each sweep.
        seed: The seed of the resamples.
    """
    array = np.asarray(values, np.float64)
    index = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    means = np.sort(array[index].mean(axis=1))  # sorted here, because inf cannot be interpolated
    low, high = (means[round((RESAMPLES - 1) * q)] for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(array.mean()), float(low), float(high)
