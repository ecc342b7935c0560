"""Measures on finished runs how well early signals predict the end of a run, and what each stop rule would have done.

For each decision point: how well the value of a signal ranks the runs as the final metric does, and what a rule would
have saved and lost. Everything is a pure function of the records of the runs.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from mice_jax.statistics import multiplicity, rank_correlation
from mice_jax.training.stop_rules import (
    FRACTIONS,
    SIGNALS,
    HalvingRule,
    Objective,
    Records,
    SiblingRule,
    first_samples,
    reason_among_siblings,
    signal,
)

LEVEL = 0.95  # of the intervals


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that was not stopped."""

    name: str
    batch_size: int
    records: Records
    final: float  # the metric at the end of the run
    arm: str = ""  # what it shares with the runs that differ in their seed alone; "" for a run of its own
    learning_rate: float = math.nan


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's correlation over arms of a signal at a fraction of the run with the final metric.

    An arm is the mean of its runs. Arms are ranked and permuted within their batch size. A number is NaN where too few
    arms have the signal.
    """

    signal: str
    fraction: float
    group: str  # "all", or "batch N" for the runs of one batch size
    arms: int
    rho: float
    low: float  # lower end of its interval
    high: float  # its upper end
    p: float  # of the permutation test
    q: float  # the p-value, adjusted to all signals and fractions of the group
    given_rate: float  # the correlation that is left between arms of one learning rate; NaN where there is one rate
    p_given_rate: float
    q_given_rate: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule would have done at one fraction of the run, had all runs been trained side by side."""

    rule: str
    fraction: float
    group: str  # "all", or "batch N" for the runs of one batch size
    runs: int
    stopped: tuple[str, ...]  # names of the runs
    saved: float  # share of the samples of all runs
    regret: float  # by how much the best remaining run is worse than the best of all, at least 0
    winner_killed: bool


def correlations(
    runs: Sequence[FinishedRun], fractions: Sequence[float] = FRACTIONS, names: Sequence[str] = SIGNALS
) -> list[Correlation]:
    """Correlates early signals with the final metric, over all arms and within each batch size.

    Args:
        runs: the finished runs.
        fractions: shares of the samples of a run at which its signals are read.
        names: the signals.

    Returns:
        One correlation for each group of runs, signal and fraction.
    """
    correlated = []
    for group, members in _groups(runs).items():
        found = [_correlation(members, name, f, group) for name, f in itertools.product(names, fractions)]
        q, q_given_rate = (_adjusted([getattr(c, k) for c in found]) for k in ("p", "p_given_rate"))
        correlated += [
            dataclasses.replace(c, q=a, q_given_rate=b) for c, a, b in zip(found, q, q_given_rate, strict=True)
        ]
    return correlated


def _correlation(runs: Sequence[FinishedRun], name: str, fraction: float, group: str) -> Correlation:
    """Returns the correlation of one signal at one fraction, its p-values not yet adjusted."""
    arms: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for run in runs:
        early = signal(_records_until(run, fraction), name)
        if not math.isnan(early) and not math.isnan(run.final):
            arms.setdefault((run.arm or run.name, run.batch_size), []).append((early, run.final, run.learning_rate))
    x, y, rate = np.array([np.mean(values, axis=0) for values in arms.values()]).reshape(-1, 3).T
    batches = [batch for _, batch in arms]
    plain = rank_correlation.over_arms(x, y, batches)
    # The rate sets both the signal and the end, so it alone makes them correlate.
    has_rates = len(rate) > 0 and not np.isnan(rate).any() and rate.max() > rate.min()
    partial = rank_correlation.over_arms(x, y, batches, [rate]) if has_rates else None
    return Correlation(
        signal=name,
        fraction=fraction,
        group=group,
        arms=len(arms),
        rho=plain.rho,
        low=plain.low,
        high=plain.high,
        p=plain.p,
        q=math.nan,
        given_rate=partial.rho if partial else math.nan,
        p_given_rate=partial.p if partial else math.nan,
        q_given_rate=math.nan,
    )


def _adjusted(p: Sequence[float]) -> list[float]:
    """Returns the q-values of those p-values that are known; NaN for the others."""
    values = np.array(p)
    known = ~np.isnan(values)
    values[known] = multiplicity.benjamini_hochberg(values[known])
    return values.tolist()


def verdicts(
    runs: Sequence[FinishedRun],
    rules: Sequence[SiblingRule],
    objective: Objective,
    fractions: Sequence[float] = FRACTIONS,
) -> list[Verdict]:
    """Evaluates stop rules on runs that were not stopped, over all runs and within each batch size.

    Args:
        runs: the finished runs.
        rules: the rules to evaluate.
        objective: what the runs are compared by.
        fractions: shares of the samples of a run at which a rule decides.

    Returns:
        One verdict for each group of runs, rule and fraction.
    """
    return [
        _verdict(members, rule, objective, fraction, group)
        for group, members in _groups(runs).items()
        for rule in rules
        for fraction in fractions
    ]


def _verdict(
    runs: Sequence[FinishedRun], rule: SiblingRule, objective: Objective, fraction: float, group: str
) -> Verdict:
    early = [_records_until(r, fraction) for r in runs]
    stopped = _stopped_by(rule, runs, early, objective)
    samples = [r.records[-1]["samples"] for r in runs]
    saved = sum(samples[i] - early[i][-1]["samples"] for i in stopped) / sum(samples)
    sign = -1.0 if objective.mode == "max" else 1.0
    finals = [sign * r.final for r in runs]
    best = min(finals)
    remaining = [f for i, f in enumerate(finals) if i not in stopped]
    return Verdict(
        rule=type(rule).__name__,
        fraction=fraction,
        group=group,
        runs=len(runs),
        stopped=tuple(runs[i].name for i in sorted(stopped)),
        saved=saved,
        regret=min(remaining) - best if remaining else math.nan,
        winner_killed=finals.index(best) in stopped,
    )


def _stopped_by(
    rule: SiblingRule, runs: Sequence[FinishedRun], early: Sequence[Records], objective: Objective
) -> set[int]:
    """Returns the indices of the runs that a rule stops, given the early records of each."""
    if isinstance(rule, HalvingRule):
        return _stopped_by_halving(early, rule, objective)
    stopped = set()
    for i, records in enumerate(early):
        siblings = [r.records for r in runs if r is not runs[i]]
        if reason_among_siblings(rule, records, siblings, objective):
            stopped.add(i)
    return stopped


def _stopped_by_halving(early: Sequence[Records], rule: HalvingRule, objective: Objective) -> set[int]:
    """Returns all but the best one of `reduction` runs: what Optuna's pruner decides once all have come this far."""
    values = [objective.comparable_values(records, early)[0] for records in early]
    survivors = max(1, len(values) // rule.reduction)
    worst_kept = sorted(values)[survivors - 1]
    return {i for i, value in enumerate(values) if value > worst_kept}


def _groups(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Returns all runs as one group and, where batch sizes differ, the runs of each batch size as a group."""
    sizes = sorted({r.batch_size for r in runs})
    by_size = {f"batch {b}": [r for r in runs if r.batch_size == b] for b in sizes} if len(sizes) > 1 else {}
    return {"all": list(runs)} | by_size


def _records_until(run: FinishedRun, fraction: float) -> Records:
    """Returns the records of a run up to a fraction of its samples, at least the first one."""
    samples = math.floor(fraction * run.records[-1]["samples"])
    return first_samples(run.records, samples) or run.records[:1]
