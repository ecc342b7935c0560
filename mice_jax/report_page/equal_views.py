"""The same curves compared by what is equal: samples, updates, FLOPs, or the value that is reached."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from mice_jax.report_page.read_runs import Run
from mice_jax.training import stop_rules

UNITS = ("samples", "steps", "flops")


@dataclasses.dataclass(frozen=True)
class Views:
    """A metric of some runs, compared by each unit.

    Attributes:
        budget: In each unit, how much the run with the least of it has had; every run is compared there.
        target: The value whose first crossing is looked for.
        runs: The names of the runs.
        at_budget: In each unit, the metric of each run at that budget.
        to_target: In each unit, how much each run needed to the target; None where it has not reached it.
    """

    budget: dict[str, float]
    target: float
    runs: list[str]
    at_budget: dict[str, list[float]]
    to_target: dict[str, list[float | None]]


def of_runs(runs: Sequence[Run], metric: str, mode: str) -> Views | None:
    """Compares finished runs by equal samples, updates and FLOPs, and by what they need to one value.

    Between two evaluations the metric is taken to be on a line. The target is the median of the values at the end, so
    that half of the runs reach it.

    Args:
        runs: The runs; those that did not complete, or have fewer than two evaluations, are left out.
        metric: A metric of their evaluations.
        mode: min or max, whether less or more of it is better.

    Returns:
        None where fewer than two runs are left. FLOPs are left out where a run has not recorded them.
    """
    compared = [r for r in runs if r.status == "completed" and len(_values(r, metric)) > 1]
    if len(compared) < 2:
        return None
    sign = -1.0 if mode == "max" else 1.0
    places = [_places(r, metric) for r in compared]
    units = [u for u in UNITS if all(u in p for p in places)]
    values = [sign * _values(r, metric) for r in compared]
    budget = {u: float(min(p[u][-1] for p in places)) for u in units}
    target = statistics.median(float(v[-1]) for v in values)
    return Views(
        budget=budget,
        target=sign * target,
        runs=[r.name for r in compared],
        at_budget={
            u: [sign * float(np.interp(budget[u], p[u], v)) for p, v in zip(places, values, strict=True)] for u in units
        },
        to_target={u: [_crossing(p[u], v, target) for p, v in zip(places, values, strict=True)] for u in units},
    )


def _values(run: Run, metric: str) -> np.ndarray:
    curve = run.evaluations.get(metric)
    return np.asarray(curve.values if curve else [], np.float64)


def _places(run: Run, metric: str) -> dict[str, np.ndarray]:
    """Returns where the evaluations of a metric lie in each unit, float64 [evaluations]."""
    curve = run.evaluations[metric]
    found = {"samples": np.asarray(curve.samples, np.float64), "steps": np.asarray(curve.steps, np.float64)}
    flops = stop_rules.column(run.records, "flops")
    if len(flops) and not np.isnan(flops).any():
        found["flops"] = np.concatenate([[0.0], np.cumsum(flops)])[np.minimum(curve.steps, len(flops))]
    return found


def _crossing(places: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Returns where values first come down to a target; None where they stay above it."""
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(places[0])
    share = (values[at - 1] - target) / (values[at - 1] - values[at])
    return float(places[at - 1] + share * (places[at] - places[at - 1]))
