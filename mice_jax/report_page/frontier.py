"""What a run has learned against what it has kept of what its base model knew."""

import dataclasses
import statistics

from mice_jax.report_page.read_runs import Run

AVERAGE = "average"  # in place of a source: metrics of averaged weights
METRICS = ("exact_match", "token_accuracy")  # the first that was measured of all held-out sources is taken


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The evaluations of a run, from the one before its first step on.

    Attributes:
        metric: The metric of each source, exact_match or token_accuracy.
        samples: The number of samples at each evaluation.
        learned: The mean of the metric over the sources that the run is to learn.
        kept: The mean over the sources in eval.retain of the metric as a share of that before the first step.
    """

    metric: str
    samples: list[int]
    learned: list[float]
    kept: list[float]


def of_run(run: Run) -> Frontier | None:
    """Returns the frontier of a run; None if it retains nothing, or the base model knew nothing of what it retains."""
    retain = (run.config.get("eval") or {}).get("retain") or []
    # Benchmarks have no loss, and that of a phase has a longer name.
    parts = [n.split("/") for n in run.evaluations]
    sources = [p[1] for p in parts if len(p) == 3 and p[0] == "eval" and p[2] == "loss" and p[1] != AVERAGE]
    for metric in METRICS:
        curves = {
            source: run.evaluations[f"eval/{source}/{metric}"]
            for source in sources
            if f"eval/{source}/{metric}" in run.evaluations
        }
        learned = [c for source, c in curves.items() if source not in retain]
        kept = [curves[name] for name in retain if name in curves and curves[name].values[0] > 0]
        if not learned or not retain or len(kept) < len(retain):
            continue
        first, all_curves = learned[0], [*learned, *kept]
        if first.samples[0] or any(c.samples != first.samples for c in all_curves):
            continue  # the evaluation before the first step is missing, or one of another time
        places = range(len(first.samples))
        return Frontier(
            metric=metric,
            samples=first.samples,
            learned=[statistics.fmean(c.values[i] for c in learned) for i in places],
            kept=[statistics.fmean(c.values[i] / c.values[0] for c in kept) for i in places],
        )
    return None
