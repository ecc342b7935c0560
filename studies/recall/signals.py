"""What early signals of training tell of the end of a run, and whether they add to the held-out loss.

A signal is the mean of the last quarter of the first tenth of a run, the held-out loss that of the first evaluation
after the start, which is then. An arm is the mean of its seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keep import EARLY, read
from mice_jax.statistics import rank_correlation
from mice_jax.statistics.multiplicity import benjamini_hochberg

HELD_OUT = f"eval/loss{EARLY}"
HALF_SAMPLES = 8_190  # after the first of two epochs
SIGNALS = tuple(f"{name}{EARLY}" for name in ("loss", "entropy", "grad_norm", "grad_norm_corrected"))


class Arm(NamedTuple):
    """A run, or the means over the seeds of an arm."""

    sweep: str
    batch_size: int
    learning_rate: float
    early: Mapping[str, float]  # by the names of the columns
    half: float  # exact match of what was to be learned at half of the run
    end: float  # and at its end; NaN if it was stopped


def arms_with_signals(file: Path, metric: str, seed: int | None = None) -> list[Arm]:
    """Returns the arms of a sweep.

    Args:
        file: What is kept of the sweep.
        metric: The name of exact match.
        seed: The seed that counts; None for all.
    """
    sweep, rows = read(file)
    runs: dict[tuple[str, ...], list[Arm]] = defaultdict(list)
    for row in rows:
        if seed in (None, int(row["seed"])):
            axes = tuple(value for name, value in row.items() if "." in name)
            runs[axes].append(_run(file.name.partition(".")[0], sweep["base"]["optim"], row, metric))
    return [_mean(of_arm) for of_arm in runs.values()]


def _run(sweep: str, base: Mapping[str, float], row: Mapping, metric: str) -> Arm:
    batch_size, rate = (row.get(f"optim.{name}", base[name]) for name in ("batch_size", "learning_rate"))
    ends = {e["samples"]: e.get(metric, math.nan) for e in row["evaluations"]}
    half = next(value for samples, value in ends.items() if samples >= HALF_SAMPLES)
    early = {name: float(row[name]) for name in (HELD_OUT, *SIGNALS)}
    end = ends[max(ends)] if row["status"] == "completed" else math.nan
    return Arm(sweep, int(batch_size), float(rate), early, half, end)


def _mean(runs: Sequence[Arm]) -> Arm:
    early = {name: statistics.fmean(run.early[name] for run in runs) for name in runs[0].early}
    half, end = (statistics.fmean(getattr(run, name) for run in runs) for name in ("half", "end"))
    return runs[0]._replace(early=early, half=half, end=end)


def rank_lines(arms: Sequence[Arm]) -> list[str]:
    """Returns a Markdown table of the rank correlations of signals with exact match at half of the run.

    Arms are ranked within their batch size. The last two columns are of what is left where the rate and its distance
    from the middle are taken out, and the held-out loss too; q-values are by Benjamini and Hochberg over a column.
    """
    batches = [arm.batch_size for arm in arms]
    half = [arm.half for arm in arms]
    log_rate = np.log([arm.learning_rate for arm in arms])
    rate = [log_rate, (log_rate - log_rate.mean()) ** 2]  # a relation with one valley
    held_out = [arm.early[HELD_OUT] for arm in arms]
    columns = []
    for names, taken_out in (
        ((HELD_OUT, *SIGNALS), []),
        ((HELD_OUT, *SIGNALS), rate),
        (SIGNALS, [*rate, held_out]),
    ):
        found = {
            name: rank_correlation.over_arms([arm.early[name] for arm in arms], half, batches, taken_out)
            for name in names
        }
        q = dict(zip(found, benjamini_hochberg([c.p for c in found.values()]), strict=True))
        columns.append({name: f"{c.rho:+.2f} (q {q[name]:.2g})" for name, c in found.items()})
    lines = [f"| {name} | {' | '.join(c.get(name, '') for c in columns)} |" for name in (HELD_OUT, *SIGNALS)]
    return ["| signal | rank correlation | given the rate | given rate and held-out loss |", "|---" * 4 + "|", *lines]


def explained_line(arms: Sequence[Arm]) -> str:
    """Returns what arms of other sweeps explain of the ends, without and with each signal."""
    shares = ", ".join(f"{name} {explained(arms, name):.2f}" for name in SIGNALS)
    return f"Explained of the ends of {len(arms)} arms by other sweeps: {explained(arms):.2f}; with {shares}"


def explained(arms: Sequence[Arm], signal: str | None = None) -> float:
    """Returns the share of the variance of the ends that arms of other sweeps explain.

    Each sweep is predicted by least squares from the arms of the others, by the logarithms of batch size, rate and
    held-out loss, and by a signal, which can be 0. The variance is that about the mean of the other sweeps.

    Args:
        arms: Arms that were not stopped, of several sweeps.
        signal: The name of the signal; None for none.
    """
    by_sweep: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        by_sweep[arm.sweep].append(arm)
    squares = total = 0.0
    for left_out, own in by_sweep.items():
        others = [arm for arm in arms if arm.sweep != left_out]
        weights = np.linalg.lstsq(_design(others, signal), np.array([a.end for a in others]), rcond=None)[0]
        ends = np.array([arm.end for arm in own])
        squares += float(((ends - _design(own, signal) @ weights) ** 2).sum())
        total += float(((ends - statistics.fmean(a.end for a in others)) ** 2).sum())
    return 1 - squares / total


def _design(arms: Sequence[Arm], signal: str | None) -> np.ndarray:
    logarithms = [np.log([arm.batch_size, arm.learning_rate, arm.early[HELD_OUT]]) for arm in arms]
    signals = [[arm.early[signal]] if signal else [] for arm in arms]
    return np.array([[1.0, *logs, *own] for logs, own in zip(logarithms, signals, strict=True)])
