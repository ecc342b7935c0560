"""Whether early signals and rules tell anything: measured on runs that were not stopped.

For each decision point, from finished runs alone: how well a signal's value there orders the runs as the final metric
does, and what a rule would have saved and lost. Everything is a pure function of the runs' records.
"""

import dataclasses
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

RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that went to its end."""

    name: str
    batch_size: int
    records: Records
    final: float  # the metric at its end


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's, of a signal at a fraction of the run with the final metric; NaN from fewer than three runs."""

    signal: str
    fraction: float
    group: str  # "all", or the batch size
    runs: int
    rho: float
    low: float  # of the bootstrap interval
    high: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule would have done, had it been asked at one fraction of the run with all runs side by side."""

    rule: str
    fraction: float
    group: str
    runs: int
    stopped: tuple[str, ...]
    saved: float  # of the samples of all runs
    regret: float  # how much worse the best run left is than the best of all; 0 or more
    winner_killed: bool


def correlations(
    runs: Sequence[Finished], fractions: Sequence[float] = FRACTIONS, names: Sequence[str] = SIGNALS, seed: int = 0
) -> list[Correlation]:
    """Within each batch size and over all."""
    found = []
    for group, members in _groups(runs).items():
        for name in names:
            for fraction in fractions:
                pairs = [(signal(_at(r, fraction), name), r.final) for r in members]
                known = np.array([p for p in pairs if not any(map(math.isnan, p))]).reshape(-1, 2)
                rho, low, high = _bootstrap(known[:, 0], known[:, 1], seed)
                found.append(Correlation(name, fraction, group, len(known), rho, low, high))
    return found


def verdicts(
    runs: Sequence[Finished], rules: Sequence[SiblingRule], objective: Objective, fractions: Sequence[float] = FRACTIONS
) -> list[Verdict]:
    return [
        _verdict(members, rule, objective, fraction, group)
        for group, members in _groups(runs).items()
        for rule in rules
        for fraction in fractions
    ]


def _verdict(runs: Sequence[Finished], rule: SiblingRule, objective: Objective, fraction: float, group: str) -> Verdict:
    seen = [_at(r, fraction) for r in runs]
    if isinstance(rule, HalvingRule):
        stopped = _halved(seen, rule, objective)
    else:
        others = [[r.records for r in runs if r is not run] for run in runs]
        stopped = {i for i, mine in enumerate(seen) if reason_among_siblings(rule, mine, others[i], objective)}
    whole = [r.records[-1]["samples"] for r in runs]
    saved = sum(whole[i] - seen[i][-1]["samples"] for i in stopped) / sum(whole)
    sign = -1.0 if objective.mode == "max" else 1.0
    finals = [sign * r.final for r in runs]
    best = min(finals)
    left = [f for i, f in enumerate(finals) if i not in stopped]
    names = tuple(runs[i].name for i in sorted(stopped))
    regret = min(left) - best if left else math.nan
    return Verdict(type(rule).__name__, fraction, group, len(runs), names, saved, regret, finals.index(best) in stopped)


def _halved(seen: Sequence[Records], rule: HalvingRule, objective: Objective) -> set[int]:
    """All but the best one of `reduction`, and the best: what Optuna's pruner decides once all have come so far."""
    values = [objective.comparable_values(mine, seen)[0] for mine in seen]
    kept = max(1, len(values) // rule.reduction)
    level = sorted(values)[kept - 1]
    return {i for i, v in enumerate(values) if v > level}


def _groups(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """All runs, and where there are several batch sizes those of each."""
    sizes = sorted({r.batch_size for r in runs})
    own = {f"batch {b}": [r for r in runs if r.batch_size == b] for b in sizes} if len(sizes) > 1 else {}
    return {"all": list(runs)} | own


def _at(run: Finished, fraction: float) -> Records:
    """A run's records up to a fraction of its samples; at least the first."""
    return first_samples(run.records, math.floor(fraction * run.records[-1]["samples"])) or run.records[:1]


def spearman(x: np.ndarray, y: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """[N] [N] -> [R]: the correlation of ranks, equal values sharing the mean of theirs; NaN where one is constant.

    `times` [R, N] says how often each pair is counted in each of R samples; once in one, where it is not given.
    """
    times = np.ones((1, len(x))) if times is None else times
    a, b = _ranks(x, times), _ranks(y, times)
    count = np.maximum(times.sum(1, keepdims=True), 1)
    a, b = (r - (times * r).sum(1, keepdims=True) / count for r in (a, b))
    scale = np.sqrt((times * a * a).sum(1) * (times * b * b).sum(1))
    return np.divide((times * a * b).sum(1), scale, out=np.full(len(times), math.nan), where=scale > 0)


def _ranks(x: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[N] [R, N] -> [R, N]."""
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.diff(x[order], prepend=math.nan) != 0)  # of equal values; NaN differs from all
    counts = np.add.reduceat(times[:, order], starts, axis=1)
    means = np.cumsum(counts, axis=1) - (counts - 1) / 2
    ranks = np.empty(times.shape)
    ranks[:, order] = np.repeat(means, np.diff(starts, append=len(x)), axis=1)
    return ranks


def _bootstrap(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Spearman's correlation and its percentile interval over resampled runs."""
    if len(x) < 3:
        return math.nan, math.nan, math.nan
    drawn = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES).astype(np.float64)
    found = spearman(x, y, drawn)
    known = found[~np.isnan(found)]
    rho = float(spearman(x, y)[0])
    if not len(known):
        return rho, math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return rho, float(low), float(high)
