"""Measures on finished runs how well early signals predict the end of a run, and what each stop rule would have done.

For each decision point: how well the value of a signal ranks the runs as the final metric does, and what a rule would
have saved and lost. Everything is a pure function of the records of the runs.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

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

RESAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of the bootstrap intervals
MIN_INTERVAL_RUNS = 5  # resamples of fewer runs have too few orders for an interval


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that was not stopped."""

    name: str
    batch_size: int
    records: Records
    final: float  # the metric at the end of the run


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of a signal at a fraction of the run with the final metric.

    The numbers are NaN where fewer than three runs have the signal, and `low` and `high` where fewer than five have it.
    """

    signal: str
    fraction: float
    group: str  # "all", or "batch N" for the runs of one batch size
    runs: int
    rho: float
    low: float  # lower end of the bootstrap interval
    high: float  # its upper end


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
    runs: Sequence[FinishedRun], fractions: Sequence[float] = FRACTIONS, names: Sequence[str] = SIGNALS, seed: int = 0
) -> list[Correlation]:
    """Correlates early signals with the final metric, over all runs and within each batch size.

    Args:
        runs: the finished runs.
        fractions: shares of the samples of a run at which its signals are read.
        names: the signals.
        seed: of the bootstrap.

    Returns:
        One correlation for each group of runs, signal and fraction.
    """
    correlated = []
    for group, members in _groups(runs).items():
        for name, fraction in itertools.product(names, fractions):
            pairs = [(signal(_records_until(r, fraction), name), r.final) for r in members]
            known = np.array([p for p in pairs if not any(map(math.isnan, p))]).reshape(-1, 2)
            rho, low, high = _bootstrap(known[:, 0], known[:, 1], seed)
            correlated.append(Correlation(name, fraction, group, len(known), rho, low, high))
    return correlated


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


# ---------------------------------------------------------------------------------------- rank correlation
def spearman(x: np.ndarray, y: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Computes Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        x: float array [N].
        y: float array [N].
        times: float array [R, N], how often each pair is counted in each of R resamples; each pair once by default.

    Returns:
        Float array [R], NaN where x or y is constant.
    """
    times = np.ones((1, len(x))) if times is None else times
    count = np.maximum(times.sum(1, keepdims=True), 1)
    a, b = (_centred(_ranks(values, times), times, count) for values in (x, y))
    scale = np.sqrt((times * a * a).sum(1) * (times * b * b).sum(1))
    return np.divide((times * a * b).sum(1), scale, out=np.full(len(times), math.nan), where=scale > 0)


def _centred(ranks: np.ndarray, times: np.ndarray, count: np.ndarray) -> np.ndarray:
    return ranks - (times * ranks).sum(1, keepdims=True) / count


def _ranks(x: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the ranks [R, N] of values [N] of which each is counted `times` [R, N]."""
    order = np.argsort(x, kind="stable")
    # A run of equal values starts where the difference is not 0; a NaN differs from everything.
    starts = np.flatnonzero(np.diff(x[order], prepend=math.nan) != 0)
    counts = np.add.reduceat(times[:, order], starts, axis=1)
    mean_ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2
    ranks = np.empty(times.shape)
    ranks[:, order] = np.repeat(mean_ranks, np.diff(starts, append=len(x)), axis=1)
    return ranks


def _bootstrap(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Returns Spearman's correlation of two arrays [N] and the ends of its percentile interval over resamples."""
    if len(x) < 3:
        return math.nan, math.nan, math.nan
    rho = float(spearman(x, y)[0])
    if len(x) < MIN_INTERVAL_RUNS:
        return rho, math.nan, math.nan
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES).astype(np.float64)
    resampled = spearman(x, y, times)
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return rho, math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return rho, float(low), float(high)
