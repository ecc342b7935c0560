"""Writes the results of the study at mouse scale, README.md and its plots, from the files of its sweeps.

    python studies/mouse/page.py --workdir=studies/mouse/runs --output=studies/mouse

Every number and every verdict of the page is computed here. While sweeps run, only completed trials count. No sentence
claims more than the interval next to it.
"""

import csv
import dataclasses
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import mice_jax  # noqa: F401  (first, because it silences transformers' advice to install torch)

# isort: split
import jax
import matplotlib
from matplotlib.figure import Figure

from mice_jax.cli import command
from mice_jax.errors import UserError
from mice_jax.model_source import resolve_source
from mice_jax.models.transformer import make_decoder
from mice_jax.report_page import rule_evaluation
from mice_jax.storage.workdir import RESULTS
from mice_jax.training.stop_monitor import read_records
from mice_jax.training.stop_rules import FRACTIONS, HalvingRule, MedianRule, Objective, PaperRule, Record
from welch import Difference, difference

SWEEPS = ("batch", "schedule", "phases")
PAGE = "README.md"
# A file of each run: by phase, how many held-out answers are right word for word, and how many there are.
ANSWERS = "answers.json"
BATCH, RATE = "optim.batch_size", "optim.learning_rate"
WARMUP, SCHEDULE, PHASES = "optim.warmup_steps", "optim.schedule", "data.phases"
EARLY = 0.2  # share of a run's samples at which its early loss is read
COLOURS = ("#0b66a8", "#b5470b", "#00795a", "#7a4fa3")
matplotlib.rcParams |= {"svg.hashsalt": "mouse", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3}

Arm = tuple[float | str, ...]


# ---------------------------------------------------------------------------------------- results of sweeps
@dataclasses.dataclass(frozen=True)
class Trial:
    """A completed trial."""

    number: str
    params: dict[str, str]
    seed: str
    records: list[Record]
    final: float  # held-out loss at the end
    answers: dict[str, list[int]]

    def early(self) -> float:
        """Returns the held-out loss that was measured closest to EARLY of the samples."""
        total = self.records[-1]["samples"]
        return min(self.held_out(), key=lambda e: abs(e[0] - EARLY * total))[1]

    def held_out(self) -> list[tuple[int, float]]:
        """Returns the samples and the held-out loss of each evaluation."""
        return [(r["samples"], r["eval/loss"]) for r in self.records if r.get("eval/loss") is not None]


@dataclasses.dataclass(frozen=True)
class SweepResults:
    """The completed trials of a sweep."""

    trials: list[Trial]
    planned: int
    others: list[str]  # status of each trial that is not completed

    def arms(self, *axes: str, of: Callable[[Trial], float] = lambda t: t.final) -> dict[Arm, list[float]]:
        """Returns a number of each trial, grouped by arm: the trial's values on some axes."""
        arms: dict[Arm, list[float]] = {}
        for t in self.trials:
            arms.setdefault(tuple(plain(a, t.params[a]) for a in axes), []).append(of(t))
        return dict(sorted(arms.items()))


def read_sweep(folder: Path) -> SweepResults:
    """Reads a sweep's results.csv and the folders of its completed trials."""
    if not (folder / RESULTS).exists():
        return SweepResults([], 0, [])
    with (folder / RESULTS).open() as file:
        rows = list(csv.DictReader(file))
    trials, others = [], []
    for row in rows:
        if row["status"] != "completed":
            others.append(row["status"])
            continue
        run = folder / "runs" / row["number"]
        answers = json.loads((run / ANSWERS).read_text()) if (run / ANSWERS).exists() else {}
        trials.append(Trial(row["number"], row, row["seed"], read_records(run), float(row["metric"]), answers))
    return SweepResults(trials, len(rows), others)


def plain(axis: str, value: str) -> float | str:
    """Returns a value of an axis as the page names it."""
    if axis == PHASES:
        return "stacked" if value.count("Phase(") == 1 else "phased"
    return value if axis == SCHEDULE else float(value)


# ---------------------------------------------------------------------------------------- tables
def interval(d: Difference, digits: int = 4) -> str:
    """Formats a difference with its interval."""
    return f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"


VERDICTS = ("replicates", "opposite", "difference", "undecided")


def verdict(claim: int, d: Difference) -> str:
    """Compares a difference with a claim about its sign; 0 is the claim that there is no difference."""
    if not d.sign:
        return "undecided"
    if not claim:
        return "difference"
    return "replicates" if d.sign == claim else "opposite"


def compared(arms: Mapping[Arm, Sequence[float]], plus: Sequence[Arm], minus: Sequence[Arm]) -> Difference | None:
    """Returns the difference between arms; None where an arm has fewer than two seeds so far."""
    known = all(len(arms.get(arm, ())) > 1 for arm in (*plus, *minus))
    return difference(arms, plus, minus) if known else None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A comparison, and the paper's claim about it."""

    what: str
    claim: int  # the sign that the paper claims; 0 where it claims that there is no difference
    difference: Difference | None  # None where it is not measured yet
    digits: int = 4

    @property
    def verdict(self) -> str:
        return verdict(self.claim, self.difference) if self.difference else "not measured yet"

    def row(self) -> str:
        return f"| {self.what} | {interval(self.difference, self.digits) if self.difference else ''} | {self.verdict} |"


def table(findings: Sequence[Finding]) -> list[str]:
    head = ["", "| compared | difference [95 % interval] | verdict on the paper's claim |", "|---|---|---|"]
    return [*head, *(f.row() for f in findings)]


def number(x: float | str) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)


def answers_table(results: SweepResults, axes: Sequence[str]) -> list[str]:
    """Returns a table of right answers by arm; nothing where no trial was asked."""
    answered = [t for t in results.trials if t.answers]
    if not answered:
        return []
    phases = list(answered[0].answers)
    of_answered = SweepResults(answered, 0, [])
    by_phase = {p: of_answered.arms(*axes, of=lambda t, p=p: float(t.answers[p][0])) for p in phases}
    lines = ["", "Held-out answers that are right word for word, mean over seeds:", ""]
    totals = [f"{p}, of {answered[0].answers[p][1]}" for p in phases]
    lines += [f"| {' | '.join([*map(short, axes), *totals])} |", "|---" * (len(axes) + len(phases)) + "|"]
    for arm in by_phase[phases[0]]:
        cells = [f"{statistics.fmean(by_phase[p][arm]):.1f}" for p in phases]
        lines.append(f"| {' | '.join([*map(number, arm), *cells])} |")
    return lines


def short(axis: str) -> str:
    return {BATCH: "batch", RATE: "rate", WARMUP: "warm-up", SCHEDULE: "schedule", PHASES: "data"}[axis]


def loss_table(arms: Mapping[Arm, Sequence[float]], axes: Sequence[str]) -> list[str]:
    head = [*map(short, axes), "seeds", "held-out loss, mean", "least to most"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, values in arms.items():
        cells = [str(len(values)), f"{statistics.fmean(values):.4f}", f"{min(values):.4f} to {max(values):.4f}"]
        lines.append(f"| {' | '.join([*map(number, arm), *cells])} |")
    return lines


# ---------------------------------------------------------------------------------------- the questions
Section = tuple[list[str], list[Finding]]
NOTHING: Section = (["Not measured yet."], [])


def batch_section(results: SweepResults) -> Section:
    axes = (BATCH, RATE)
    arms, early = results.arms(*axes), results.arms(*axes, of=Trial.early)
    if len({a[0] for a in arms}) < 2:
        return NOTHING
    small, large = min(arms)[0], max(arms)[0]
    best = {b: min((a for a in arms if a[0] == b), key=lambda a: statistics.fmean(arms[a])) for b in (small, large)}
    what = f"batch {large:g} minus batch {small:g}"
    sizes = [
        Finding(f"{what}, at the end, both at {rate:g}", -1, compared(arms, [(large, rate)], [(small, rate)]))
        for rate in sorted({a[1] for a in arms})
    ]
    own = f"each at its best rate ({best[large][1]:g} and {best[small][1]:g})"
    sizes.append(Finding(f"{what}, at the end, {own}", -1, compared(arms, [best[large]], [best[small]])))
    sizes.append(Finding(f"{what}, at a fifth of the run, {own}", 1, compared(early, [best[large]], [best[small]])))
    rates = []
    for b in (small, large):
        lowest = min(a for a in arms if a[0] == b)
        for other in [a for a in arms if a[0] == b and a != lowest]:
            d = compared(arms, [lowest], [other])
            rates.append(Finding(f"batch {b:g}, lowest rate ({lowest[1]:g}) minus {other[1]:g}", -1, d))
    lines = [*loss_table(arms, axes), "", "![Held-out loss by rate](mouse_batch.svg)", ""]
    lines += ["The paper: the large batch ends better, and the small one is ahead early.", *table(sizes)]
    lines += ["", "The paper: a low rate is the better one.", *table(rates)]
    return lines + answers_table(results, axes), sizes + rates


def schedule_section(results: SweepResults) -> Section:
    axes = (WARMUP, SCHEDULE)
    arms = results.arms(*axes)
    if not arms:
        return NOTHING
    warmups = sorted({a[0] for a in arms})
    both = ("constant", "cosine")
    findings = []
    for w in warmups[1:]:
        d = compared(arms, [(w, s) for s in both], [(warmups[0], s) for s in both])
        findings.append(Finding(f"warm-up of {w:g} steps minus {warmups[0]:g}, over both schedules", 0, d))
    d = compared(arms, [(w, "cosine") for w in warmups], [(w, "constant") for w in warmups])
    findings.append(Finding("cosine minus constant, over all warm-ups", 0, d))
    lines = [*loss_table(arms, axes), "", "![Held-out loss by warm-up](mouse_schedule.svg)", ""]
    lines += [
        "The paper: neither warm-up nor decay is needed; results with and without them are alike.",
        *table(findings),
    ]
    return lines + answers_table(results, axes), findings


def phases_section(results: SweepResults) -> Section:
    axes = (PHASES, BATCH)
    arms, best = results.arms(*axes), results.arms(*axes, of=best_on_the_way)
    if not arms:
        return NOTHING
    findings = []
    for batch in sorted({a[1] for a in arms}):
        pair = [("stacked", batch)], [("phased", batch)]
        findings.append(Finding(f"stacked minus phased, at the end, batch {batch:g}", -1, compared(arms, *pair)))
        what = f"stacked minus phased, each at its best checkpoint, batch {batch:g}"
        findings.append(Finding(what, -1, compared(best, *pair)))
    lines = [*loss_table(arms, axes), "", "![Held-out loss by samples](mouse_phases.svg)", ""]
    lines += [
        "The paper: stacked data ends at least as well as phased data. The loss is over the held-out data of all three",
        "phases. A phase may lose what an earlier one taught, so the best checkpoints are compared too.",
        *table(findings),
    ]
    return lines + answers_table(results, axes), findings


def best_on_the_way(trial: Trial) -> float:
    return min(loss for _, loss in trial.held_out())


# The sign of each signal's correlation with the final loss that the paper claims.
CLAIMS = {"grad_norm": 1, "grad_norm_corrected": 1, "loss": -1}
RULES = {
    "paper's": PaperRule(),
    "paper's, raw norm": PaperRule(norm="grad_norm"),
    "median": MedianRule(),
    "halving": HalvingRule(),
}


def signals_section(
    runs: Sequence[rule_evaluation.FinishedRun], correlations: Sequence[rule_evaluation.Correlation]
) -> Section:
    if not correlations:
        return NOTHING
    findings = [
        Finding(f"{c.signal} at {c.fraction:.0%}, {c.group}", CLAIMS[c.signal], Difference(c.rho, c.low, c.high), 2)
        for c in correlations
    ]
    lines = [
        "Spearman's correlation of a signal with the held-out loss at the end, over the arms of the first sweep,",
        "ranked within their batch size, with its interval. The paper: a run ends better that has a lower gradient",
        "norm early (a correlation above 0) and a higher loss early (a correlation below 0).",
        "",
        "![Correlations](mouse_signals.svg)",
        *table(findings),
        "",
        "What each stop rule would have done at one point of the runs, had all been trained side by side. Regret is by",
        "how much the best remaining run is worse than the best of all.",
        "",
        "| rule | among | at | stopped | samples saved | regret | winner stopped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        for v in rule_evaluation.verdicts(runs, [rule], Objective()):
            regret = "no run remains" if math.isnan(v.regret) else f"{v.regret:.4f}"
            cells = [name, v.group, f"{v.fraction:.0%}", f"{len(v.stopped)} of {v.runs}", f"{v.saved:.0%}", regret]
            lines.append(f"| {' | '.join([*cells, 'yes' if v.winner_killed else 'no'])} |")
    return lines, findings


def correlated(runs: Sequence[rule_evaluation.FinishedRun]) -> list[rule_evaluation.Correlation]:
    """Returns the correlations that are defined: those of three or more runs that differ."""
    correlations = rule_evaluation.correlations(runs, names=tuple(CLAIMS))
    return [c for c in correlations if not math.isnan(c.rho + c.low + c.high)]


# ---------------------------------------------------------------------------------------- plots
def dots(results: SweepResults, axes: tuple[str, str], file: Path) -> None:
    """Plots the final metric over the second axis: dots for seeds, a line of means for each value of the first axis."""
    figure = Figure((6.4, 3.2), layout="constrained")
    plot = figure.subplots()
    arms = results.arms(*axes)
    places = {v: i for i, v in enumerate(sorted({a[1] for a in arms}))}
    for colour, first in zip(COLOURS, dict.fromkeys(a[0] for a in arms), strict=False):
        mine = {places[a[1]]: values for a, values in arms.items() if a[0] == first}
        means = [statistics.fmean(v) for v in mine.values()]
        plot.plot(list(mine), means, color=colour, label=f"{short(axes[0])} {number(first)}")
        plot.plot([x for x, v in mine.items() for _ in v], [y for v in mine.values() for y in v], ".", color=colour)
    plot.set_xticks(list(places.values()), [number(v) for v in places])
    plot.set_xlabel(short(axes[1]))
    plot.set_ylabel("held-out loss at the end")
    plot.legend(frameon=False)
    save(figure, file)


def curves(results: SweepResults, axes: tuple[str, str], file: Path) -> None:
    """Plots the held-out loss over samples: the mean of the seeds, and their range as a band."""
    figure = Figure((6.4, 3.2), layout="constrained")
    plot = figure.subplots()
    for colour, (arm, points) in zip(COLOURS, curves_by_arm(results, axes).items(), strict=False):
        ys = list(zip(*[[y for _, y in own] for own in points], strict=True))
        xs = [x for x, _ in points[0]]
        plot.plot(xs, [statistics.fmean(y) for y in ys], color=colour, label=", ".join(map(number, arm)))
        plot.fill_between(xs, [min(y) for y in ys], [max(y) for y in ys], color=colour, alpha=0.2, linewidth=0)
    plot.set_xlabel("samples")
    plot.set_ylabel("held-out loss")
    plot.legend(frameon=False)
    save(figure, file)


def curves_by_arm(results: SweepResults, axes: tuple[str, str]) -> dict[Arm, list[list[tuple[int, float]]]]:
    """Returns the curves of held-out loss of each arm, one for each seed."""
    by_arm: dict[Arm, list[list[tuple[int, float]]]] = {}
    for t in results.trials:
        by_arm.setdefault(tuple(plain(a, t.params[a]) for a in axes), []).append(t.held_out())
    return dict(sorted(by_arm.items()))


def signals(correlations: Sequence[rule_evaluation.Correlation], file: Path) -> None:
    """Plots the correlations with the final loss over the point of the run at which a signal is read."""
    groups = list(dict.fromkeys(c.group for c in correlations))
    figure = Figure((8.6, 3.0), layout="constrained")
    for plot, group in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True):
        for i, (colour, name) in enumerate(zip(COLOURS, CLAIMS, strict=False)):
            mine = [c for c in correlations if c.group == group and c.signal == name]
            xs = [FRACTIONS.index(c.fraction) + 0.12 * (i - 1) for c in mine]
            spans = [[c.rho - c.low for c in mine], [c.high - c.rho for c in mine]]
            plot.errorbar(xs, [c.rho for c in mine], spans, color=colour, fmt="o", markersize=3, label=name)
        plot.axhline(0, color="black", linewidth=0.6)
        plot.set_xticks(range(len(FRACTIONS)), [f"{f:.0%}" for f in FRACTIONS])
        plot.set_title(group)
        plot.set_ylim(-1.05, 1.05)
    figure.axes[0].set_ylabel("correlation with the end")
    figure.axes[0].legend(frameon=False, fontsize=7)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})


# ---------------------------------------------------------------------------------------- the page
OPENING = """# The study at mouse scale

Written by `python studies/mouse/page.py` from the files that `python studies/mouse/run.py` leaves; do not edit it.

This study asks the four questions of arXiv 2412.13337 of a Llama of {weights:,} parameters, which was first pretrained
on Python's documentation (held-out loss {base:.2f}) and is then trained on three phases of chats: {seen:,} samples a
run, each sample twice. All arms see the same samples, so a large batch makes fewer updates. A seed is an order of the
samples; all runs start from the same base model. No run was stopped early. What holds for such a model need not hold
for one of ten thousand times its size.

A difference has Welch's 95 % interval over seeds (`studies/mouse/welch.py`). Where the interval contains zero, the
difference is undecided, which is not the same as no difference. There is no correction for the number of comparisons:
of twenty comparisons without a difference, one is expected to be decided. The best rate of a batch size is picked by
the same runs that are then compared.

{counts}
"""


def write_page(folder: Path, output: Path) -> Path:
    """Writes the page and its plots; raises UserError where no trial has completed."""
    results = {name: read_sweep(folder / name) for name in SWEEPS}
    if not any(s.trials for s in results.values()):
        raise UserError(f"--workdir={folder} has no completed trial of {', '.join(SWEEPS)} yet.")
    output.mkdir(parents=True, exist_ok=True)
    batch, schedule, phases = (results[name] for name in SWEEPS)
    if batch.trials:
        dots(batch, (BATCH, RATE), output / "mouse_batch.svg")
    if schedule.trials:
        dots(schedule, (SCHEDULE, WARMUP), output / "mouse_schedule.svg")
    if phases.trials:
        curves(phases, (PHASES, BATCH), output / "mouse_phases.svg")
    runs = [
        rule_evaluation.FinishedRun(
            t.number, int(t.params[BATCH]), t.records, t.final, t.params[RATE], float(t.params[RATE])
        )
        for t in batch.trials
    ]
    if correlations := correlated(runs):
        signals(correlations, output / "mouse_signals.svg")
    sections = {
        "Batch by learning rate": batch_section(batch),
        "Warm-up and schedule": schedule_section(schedule),
        "Stacked or phased": phases_section(phases),
        "Do early signals predict the end?": signals_section(runs, correlations),
    }
    text = [OPENING.format(counts=trial_counts(results), **base_of(folder, results))]
    *compared_arms, (_, of_correlations) = sections.values()
    text += ["## Summary", *summary([f for _, findings in compared_arms for f in findings], of_correlations), ""]
    for title, (lines, _) in sections.items():
        text += [f"## {title}", *lines, ""]
    page = output / PAGE
    page.write_text("\n".join(text), encoding="utf-8")
    return page


def summary(findings: Sequence[Finding], correlations: Sequence[Finding]) -> list[str]:
    """Lists the findings by verdict, and counts the verdicts on correlations."""
    lines = []
    for name in dict.fromkeys([*VERDICTS, *(f.verdict for f in findings)]):
        compared_so = [f.what for f in findings if f.verdict == name]
        if compared_so:
            title = f"**{name[0].upper()}{name[1:]}** ({len(compared_so)}):"
            lines += ["", title, *(f"- {what}" for what in compared_so)]
    counts = Counter(f.verdict for f in correlations)
    counted = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    return [*lines, "", f"Verdicts on the {len(correlations)} correlations of early signals with the end: {counted}."]


def trial_counts(results: Mapping[str, SweepResults]) -> str:
    """Returns how many trials of each sweep have completed, and the status of the others."""
    parts = []
    for name, s in results.items():
        rest = ", ".join(f"{s.others.count(o)} {o}" for o in sorted(set(s.others)))
        parts.append(f"{name} {len(s.trials)} of {s.planned}" + (f" ({rest})" if rest else ""))
    return f"Completed runs: {'; '.join(parts)}."


def base_of(folder: Path, results: Mapping[str, SweepResults]) -> dict[str, float]:
    """Returns the base model's size and held-out loss, and the samples that a run sees."""
    last = json.loads((folder / "base" / "summary.json").read_text())["last_metrics"]
    decoder = make_decoder(resolve_source(str(folder / "base")).spec)
    weights = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract))
    seen = max(t.records[-1]["samples"] for s in results.values() for t in s.trials)
    return {"weights": weights, "base": last["eval/loss"], "seen": seen}


def define(values: command.Values, argv: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "folder of the study", flag_values=values)
    flags.DEFINE_string("output", str(HERE), "folder of the page and its plots", flag_values=values)


def begin(values: command.Values) -> None:
    print(write_page(Path(command.required(values, "workdir")), Path(values.output)))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
