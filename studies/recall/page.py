"""Prints the verdicts and tables of the study, and draws its plots, from the results that are kept.

    python studies/recall/page.py                       prints, and writes studies/recall/*.svg
    python studies/recall/page.py --plots=/tmp/plots    writes the plots elsewhere

Everything is computed from results/*.jsonl.gz, so no run is needed. Numbers are of the averaged weights at the end of a
run, where nothing else is said: exact match is the mean over formats, knowledge and skills.
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keep import read
from mice_jax.cli import command
from mice_jax.statistics import verdicts
from mice_jax.statistics.registered_claims import Registration
from recall import PHASES, RATES
from signals import arms_with_signals, explained_line, rank_lines

RESULTS = HERE / "results"
LEARNED, KEPT = "eval/average/macro_exact_match", "eval/average/kept"
LAST_WEIGHTS = "eval/macro_exact_match"
BATCH, RATE, SCHEDULE, MIXTURE = "optim.batch_size", "optim.learning_rate", "optim.schedule", "data.phases"
HALF_LIFE = "optim.beta2_half_life"
AXES = {
    "batch": (BATCH, RATE),
    "final": (BATCH, RATE),
    "control": (BATCH, HALF_LIFE),
    "schedule": (SCHEDULE, RATE),
    "phases": (MIXTURE, RATE),
}
COLOURS = {"8": "#0b66a8", "32": "#00795a", "128": "#b5470b", "512": "#7a4fa3"}
matplotlib.rcParams |= {"svg.hashsalt": "recall", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3}


class Trial(NamedTuple):
    """A trial of a sweep."""

    params: dict[str, str]
    completed: bool
    evaluations: list[dict[str, Any]]

    def end(self, metric: str) -> float:
        """Returns a metric of the last evaluation."""
        return self.evaluations[-1][metric]


Arms = dict[tuple[str, ...], list[Trial]]


def trials_of(name: str, folder: Path = RESULTS) -> list[Trial]:
    """Returns the trials of a sweep."""
    rows = read(folder / f"{name}.jsonl.gz")[1]
    return [
        Trial({a: _arm(a, row[a]) for a in AXES[name]}, row["status"] == "completed", row["evaluations"])
        for row in rows
    ]


def _arm(axis: str, value: str) -> str:
    """Returns a value of an axis as the page names it."""
    if axis != MIXTURE:
        return value
    if value.count("Phase(") == 1:
        return "stacked"
    return "phases, 5 % replay" if "replay=0.05" in value else "phases"


def arms_of(trials: Sequence[Trial], *axes: str) -> Arms:
    """Returns the completed trials by their values on some axes."""
    arms: Arms = defaultdict(list)
    for trial in trials:
        if trial.completed:
            arms[tuple(trial.params[a] for a in axes)].append(trial)
    return arms


# ---------------------------------------------------------------------------------------- text
def verdict_lines(name: str, folder: Path = RESULTS) -> list[str]:
    """Returns a line for each claim of a sweep: the registered ones, then the explorations."""
    sweep, rows = read(folder / f"{name}.jsonl.gz")
    if "registered_claims" not in sweep:
        return []
    registration = Registration.from_json(sweep["registered_claims"])
    results = []
    for row in rows:
        params = {axis: row[axis] for axis in registration.axes}
        ends = {name: value for name, value in row["evaluations"][-1].items() if isinstance(value, float)}
        results.append(verdicts.Result(row["number"], params, int(row["seed"]), row["status"], ends))
    return [_line(v) for v in verdicts.judge(registration, results)]


def signal_lines(folder: Path = RESULTS) -> list[str]:
    """Returns what early signals tell of the end: ranks in the batch sweep, and predictions between sweeps."""
    probes = arms_with_signals(folder / "batch.jsonl.gz", LEARNED, seed=0)
    files = [folder / f"{name}.jsonl.gz" for name in AXES]
    arms = [arm for file in files for arm in arms_with_signals(file, LEARNED) if not math.isnan(arm.end)]
    return [*rank_lines(probes), "", explained_line(arms)]


def _line(v: verdicts.Verdict) -> str:
    interval = f"{v.mean:+.3f} [{v.low:+.3f}, {v.high:+.3f}], {v.confidence:.0%}, {v.pairs} pairs"
    rest = f"adjusted p {v.adjusted:.2g}, detectable {v.detectable:.3f}"
    return f"{v.claim.name}: {v.verdict}; {interval}; {rest}" + (f"; {v.reason}" if v.reason else "")


def table(arms: Arms, metrics: dict[str, str]) -> list[str]:
    """Returns a Markdown table of the mean of each metric over the runs of an arm, with the least and the largest."""
    lines = []
    for arm, trials in arms.items():
        cells = [_mean_and_range([t.end(m) for t in trials]) for m in metrics.values()]
        lines.append(f"| {' | '.join([*arm, *cells, str(len(trials))])} |")
    width = len(next(iter(arms), ()))
    head = f"| {' | '.join(['arm', *['and'] * (width - 1), *metrics, 'runs'])} |"
    return [head, "|---" * (width + len(metrics) + 1) + "|", *lines]


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.2f} to {max(values):.2f})"


# ---------------------------------------------------------------------------------------- plots
def draw_batch(batch: Sequence[Trial], final: Sequence[Trial]) -> Figure:
    """Draws exact match by learning rate, and by samples and by updates at the best rate of each batch size."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    by_rate, by_samples, by_updates = figure.subplots(1, 3, sharey=True)
    best = {}
    for (size,), _ in sorted(arms_of(batch, BATCH).items(), key=lambda arm: int(arm[0][0])):
        of_size = [t for t in batch if t.params[BATCH] == size]
        for trial in of_size:
            if not trial.completed:
                by_rate.plot(float(trial.params[RATE]), trial.end(LEARNED), "x", color=COLOURS[size], alpha=0.35, ms=4)
        arms = sorted(arms_of(of_size, RATE).items(), key=lambda arm: float(arm[0][0]))
        means = [_mean(trials, LEARNED) for _, trials in arms]
        by_rate.plot([float(rate) for (rate,), _ in arms], means, "o-", color=COLOURS[size], label=f"batch {size}")
        best[size] = max(arms, key=lambda arm: _mean(arm[1], LEARNED))[1]
    for (size,), trials in arms_of(final, BATCH).items():
        best[size] = trials
    for size, trials in best.items():
        for trial in trials:
            samples = [e["samples"] for e in trial.evaluations]
            learned = [e.get(LEARNED, e[LAST_WEIGHTS]) for e in trial.evaluations]
            by_samples.plot(samples, learned, color=COLOURS[size], alpha=0.5, lw=1)
            by_updates.plot([s / int(size) for s in samples[1:]], learned[1:], color=COLOURS[size], alpha=0.5, lw=1)
    by_rate.set(xscale="log", xlabel="learning rate at 128 samples", ylabel="exact match of new tasks")
    by_rate.set_xticks([], minor=True)
    by_rate.set_xticks(RATES, [f"{1000 * rate:g}e-3" for rate in RATES])
    figure.legend(loc="outside right upper", title="x: stopped half-way", frameon=False)
    by_samples.set(xlabel="samples (best rates)")
    by_updates.set(xscale="log", xlabel="updates (best rates)")
    return figure


def draw_frontier(sweeps: Mapping[str, Sequence[Trial]]) -> Figure:
    """Draws what each completed run has learned against what it has kept."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, trials in sweeps.items():
        ended = [t for t in trials if t.completed]
        axes.scatter([t.end(LEARNED) for t in ended], [t.end(KEPT) for t in ended], s=14, alpha=0.6, label=name)
    axes.set(xlabel="exact match of new tasks", ylabel="kept of what the base knew")
    figure.legend(loc="outside right upper", title="sweep", frameon=False)
    return figure


def draw_arms(trials: Sequence[Trial], axis: str, metrics: dict[str, str]) -> Figure:
    """Draws each run and the mean of each arm, a panel for each metric; the arms are an axis and the learning rate."""
    figure = Figure(figsize=(3.2 * len(metrics), 3.4), layout="constrained")
    arms = arms_of(trials, axis, RATE)
    for axes, (label, metric) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        _draw_points(axes, arms, lambda t, metric=metric: t.end(metric))
        axes.set_title(label, fontsize=9)
    return figure


def _draw_points(axes: Axes, arms: Arms, value: Callable[[Trial], float]) -> None:
    for place, trials in enumerate(arms.values()):
        values = [value(t) for t in trials]
        axes.plot([place] * len(values), values, "o", color="#0b66a8", alpha=0.4, ms=4)
        axes.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color="black", lw=1.5)
    labels = [f"{arm}, {float(rate):.2g}" for arm, rate in arms]
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")


def _mean(trials: Sequence[Trial], metric: str) -> float:
    return statistics.fmean(t.end(metric) for t in trials)


# ---------------------------------------------------------------------------------------- command
def define(values: command.Values, argv: list[str]) -> None:
    flags.DEFINE_string("plots", str(HERE), "folder to write the plots to", flag_values=values)


def begin(values: command.Values) -> None:
    sweeps = {name: trials_of(name) for name in AXES}
    scores = {"exact match": LEARNED, "last weights": LAST_WEIGHTS, "kept": KEPT}
    parts = scores | {name: f"eval/average/{name}/exact_match" for name in PHASES}
    for name, trials in sweeps.items():
        print(f"\n## {name}\n", *verdict_lines(name), "", sep="\n")
        print("\n".join(table(arms_of(trials, *AXES[name]), parts)))
    print("\n## signals\n", *signal_lines(), sep="\n")
    folder = Path(values.plots)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "frontier": draw_frontier(sweeps),
        "batch": draw_batch(sweeps["batch"], sweeps["final"]),
        "schedule": draw_arms(sweeps["schedule"], SCHEDULE, scores),
        "phases": draw_arms(sweeps["phases"], MIXTURE, parts),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(command.run(__doc__, define, begin, sys.argv[1:]))
