"""Collects what the report shows of runs as plain JSON values; one function for each section of the page."""

import dataclasses
import datetime
import functools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax import __version__
from mice_jax.config import Config, Phase, Source, flatten, to_dict
from mice_jax.config_checks import resolved_rate
from mice_jax.report_page import claims_table, downsample, equal_views, frontier, read_runs, rule_evaluation
from mice_jax.report_page.read_runs import Run, finite
from mice_jax.statistics.registered_claims import Registration
from mice_jax.training import stop_rules

# Title of each curve, and what a reader needs to know of it.
SIGNALS = {
    "loss": ("Loss", "training, each step"),
    "token_accuracy": ("Token accuracy", "share of trained tokens that are predicted, weighted as the loss"),
    "entropy": ("Entropy", "of the predictions at trained tokens, in nats"),
    "grad_norm": ("Gradient norm, raw", "of the step's mean gradient, before clipping"),
    "grad_norm_corrected": (
        "Gradient norm, corrected",
        "of the true gradient, without noise; comparable across batches",
    ),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_s": ("Throughput", "tokens per second"),
    "noise_scale": ("Gradient noise scale", "the batch size, in samples, at which noise equals the gradient"),
    "noise_scale_low": (
        "Gradient noise scale, lower end",
        "of its interval of 95 %, also where the scale is too large to tell",
    ),
    "update_norm": ("Update norm", ""),
    "param_norm": ("Parameter norm", ""),
    "slot_efficiency": ("Slot efficiency", "share of computed slots that hold real tokens"),
    "mfu": ("Model FLOPs utilisation", "share of the devices' peak (of a measured one on CPUs)"),
    "mfu_6p": ("Utilisation by 6P + 12LdS", "share of the devices' peak, by the formula that other frameworks use"),
    "device_memory_peak_bytes": ("Peak device memory", "bytes, the most of any device so far"),
}
# Curves that would only clutter a page of several runs.
SINGLE_RUN_ONLY = ("slot_efficiency", "mfu", "mfu_6p", "device_memory_peak_bytes", "noise_scale_low")
# The loss of each source that is trained on, on the page of one run; more curves than that would hide the others.
SOURCE_LOSS = re.compile(r"train/(.+)/loss")
MAX_SOURCES = 12
STEPWISE = ("loss", "grad_norm")  # curves that a page of several runs also shows step by step, without smoothing
MAX_POINTS = 200_000  # points of all curves of a page together; keeps the page below ten megabytes
SIGNIFICANT_DIGITS = 5
MAX_RUNS_SIDE_BY_SIDE = 6  # with more runs, the values of a config field are counted instead of listed
RESOLVED_RATE = "optim.resolved_learning_rate"  # the name of no field: what optim.rate_for_batch makes of the rate
MIN_FINISHED_RUNS = 3  # fewer runs do not allow to measure signals and rules
# Default values of config fields, by a pattern of the field's flat name whose group is the key into the values.
DEFAULTS = [
    (r".*\.(?:sources|validation)\.\d+\.(.+)", flatten(dataclasses.asdict(Source()))),
    (r"data\.phases\.\d+\.(.+)", flatten(dataclasses.asdict(Phase()))),
    (r"(.+)", flatten(to_dict(Config()))),
]


@dataclasses.dataclass
class _Subject:
    """The runs of a page, and what is derived from their configs."""

    kind: str  # run | runs | sweep
    title: str
    runs: list[Run]
    objective: stop_rules.Objective
    axes: list[str] = dataclasses.field(default_factory=list)  # of a sweep
    stop: str = ""  # a sweep's rule among siblings
    problems: list[str] = dataclasses.field(default_factory=list)
    claims: Registration | None = None  # what a sweep has registered
    certificate: dict[str, Any] = dataclasses.field(default_factory=dict)  # what its bracket rule found
    critical: dict[str, Any] = dataclasses.field(default_factory=dict)  # the critical batch size that branches found

    @functools.cached_property
    def flat_configs(self) -> list[dict[str, Any]]:
        return [_flat_config(r) for r in self.runs]

    @functools.cached_property
    def differing(self) -> dict[str, list[Any]]:
        """The config fields that are not equal in all runs, with the value of each run."""
        differing = read_runs.differing(self.flat_configs)
        return {k: v for k, v in differing.items() if not k.startswith("published.")}

    @functools.cached_property
    def fields(self) -> list[str]:
        """The config fields that distinguish runs: the axes of a sweep, else all fields that differ except the seed."""
        return self.axes or [k for k in self.differing if k != "seed"]

    @property
    def shown_fields(self) -> list[str]:
        """The fields that the table of runs shows: those that distinguish runs, and the rate that a rule resolves."""
        follows = any(c.get("optim.rate_for_batch", "none") != "none" for c in self.flat_configs)
        return [*self.fields, RESOLVED_RATE] if follows and len(self.runs) > 1 else self.fields

    @property
    def signals(self) -> list[str]:
        """The names of the curves of each run."""
        if len(self.runs) != 1:
            return [n for n in SIGNALS if n not in SINGLE_RUN_ONLY]
        by_source = [n for n in self.runs[0].records.columns if SOURCE_LOSS.fullmatch(n)]
        return [*SIGNALS, *(by_source[:MAX_SOURCES] if len(by_source) > 1 else [])]

    @property
    def points_per_curve(self) -> int:
        fitting = MAX_POINTS // max(1, len(self.runs) * len(self.signals))
        return max(40, min(1000 if len(self.runs) == 1 else 400, fitting))


# ---------------------------------------------------------------------------------------- the page
def of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the content of the page of one run or of several runs."""
    names = read_runs.short_names([str(f.resolve()) for f in folders])
    runs = [read_runs.read_run(f, n) for f, n in zip(folders, names, strict=True)]
    held_out = any("eval/loss" in r.evaluations for r in runs)
    objective = stop_rules.Objective("eval/loss" if held_out else "loss")
    single = len(runs) == 1
    title = runs[0].name if single else f"{len(runs)} runs"
    return _page(_Subject("run" if single else "runs", title, runs, objective))


def of_sweep(folder: Path) -> dict[str, Any]:
    """Returns the content of the page of a sweep."""
    s = read_runs.read_sweep(folder)
    claims, problem = claims_table.registration_of(folder, s.settings, s.runs)
    problems = [*s.problems, *([problem] if problem else [])]
    found = {"claims": claims, "certificate": s.certificate, "critical": s.critical}
    return _page(_Subject("sweep", folder.resolve().name, s.runs, s.objective, s.axes, s.stop, problems, **found))


def _page(subject: _Subject) -> dict[str, Any]:
    runs, objective = subject.runs, subject.objective
    is_single = subject.kind == "run"
    return {
        "kind": subject.kind,
        "title": subject.title,
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "metric": objective.metric,
        "mode": objective.mode,
        "stop": subject.stop,
        "fields": dict(zip(subject.shown_fields, read_runs.short_names(subject.shown_fields, "."), strict=True)),
        "signals": {n: dict(zip(("title", "note"), _title_and_note(n), strict=True)) for n in subject.signals},
        "lower": sorted({n for r in runs for n in r.evaluations if r.lower_is_better(n)}),
        "runs": _rows(subject),
        "saved": _saved(runs),
        "problems": _problems(subject),
        "warnings": _warnings(subject),
        "certificate": subject.certificate or None,
        "critical": subject.critical or None,
        "views": _views(subject),
        "device_hours": _rounded(_device_hours(runs)),
        "claims": claims_table.of_runs(subject.claims, runs) if subject.claims else None,
        "evidence": _evidence(subject),
        "config": _config(subject),
        "answers": _answers(runs[0]) if is_single else [],
        "data": [_data_tables(r) for r in runs[:1]] if is_single else [],
        "provenance": _provenance(runs[0]) if is_single else [],
    }


def _title_and_note(signal: str) -> tuple[str, str]:
    """Returns the title of a curve, and what a reader needs to know of it."""
    if of_source := SOURCE_LOSS.fullmatch(signal):
        return f"Loss of {of_source[1]}", "training, each step, on this source alone"
    return SIGNALS[signal]


def _problems(subject: _Subject) -> list[dict[str, str]]:
    problems = [{"run": "", "text": p} for p in subject.problems]
    for run in subject.runs:
        name = "" if subject.kind == "run" else run.name
        problems += [{"run": name, "text": p} for p in run.problems]
    return problems


def _warnings(subject: _Subject) -> list[dict[str, Any]]:
    """Returns what each run was warned of before its first step; a warning of several runs is listed once."""
    runs_of: dict[str, list[str]] = {}
    for run in subject.runs:
        for text in run.warnings:
            runs_of.setdefault(text, []).append(run.name)
    total = len(subject.runs)
    return [{"text": t, "runs": "" if len(r) == total else _listed(r)} for t, r in runs_of.items()]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_RUNS_SIDE_BY_SIDE])
    more = len(names) - MAX_RUNS_SIDE_BY_SIDE
    return f"{shown} and {more} more" if more > 0 else shown


# ---------------------------------------------------------------------------------------- the runs
def _rows(subject: _Subject) -> list[dict[str, Any]]:
    best = _best(subject.runs, subject.objective)
    return [
        _row(subject, run, flat, is_best=i == best) | _curves(run, subject)
        for i, (run, flat) in enumerate(zip(subject.runs, subject.flat_configs, strict=True))
    ]


def _row(subject: _Subject, run: Run, flat_config: dict[str, Any], is_best: bool) -> dict[str, Any]:
    known = flat_config | {RESOLVED_RATE: _rounded(resolved_rate(flat_config))} | run.params
    values = {f: known.get(f) for f in subject.shown_fields}
    return {
        "name": run.name,
        "status": run.status,
        "reason": run.reason,
        "folder": str(run.folder),
        "fields": {f: _shown(v) for f, v in values.items()},
        "seed": run.params.get("seed", flat_config.get("seed")),
        "group": _arm(subject, run, flat_config),
        "best": is_best,
        "planned": run.planned(),
        "step": run.last("step") or 0,
        "samples": run.last("samples") or 0,
        "signals": {n: _rounded(stop_rules.signal(run.records, n)) for n in (*stop_rules.SIGNALS, "tokens_per_s")},
        "metric": _rounded(_final(run, subject.objective)),
        "published": read_runs.published_of(flat_config),
        "evaluations": {k: _evaluation(c) for k, c in run.evaluations.items()},
        "phases": _phases(run),
        "frontier": _frontier(run),
        "memory": run.last("device_memory_peak_bytes"),
        "checkpoints": run.checkpoints,
        "events": run.events,
    }


def _evaluation(curve: read_runs.Curve) -> list[list[Any]]:
    return [curve.steps, curve.samples, [_rounded(v) for v in curve.values]]


def _frontier(run: Run) -> dict[str, Any] | None:
    found = frontier.of_run(run)
    if found is None:
        return None
    rounded = {k: [_rounded(v) for v in getattr(found, k)] for k in ("learned", "kept")}
    return {"metric": found.metric, "samples": found.samples} | rounded


def _final(run: Run, objective: stop_rules.Objective) -> float | None:
    """Returns the metric of a completed run; None for any other."""
    if run.status != "completed":
        return None
    if not run.summary:
        return run.last(objective.metric)
    return finite(run.summary.get("last_metrics", {}).get(objective.metric))


def _best(runs: Sequence[Run], objective: stop_rules.Objective) -> int:
    """Returns the index of the best completed run; -1 where there is none."""
    sign = 1 if objective.mode == "min" else -1
    finals = [_final(r, objective) for r in runs]
    return min([(sign * v, i) for i, v in enumerate(finals) if v is not None], default=(0, -1))[1]


def _views(subject: _Subject) -> dict[str, Any] | None:
    """Returns the metric at equal samples, updates and FLOPs, and what each run needed to one value."""
    found = equal_views.of_runs(subject.runs, subject.objective.metric, subject.objective.mode)
    if found is None:
        return None
    rounded = {
        name: {unit: [_rounded(v) for v in values] for unit, values in getattr(found, name).items()}
        for name in ("at_budget", "to_target")
    }
    return rounded | {"budget": found.budget, "target": _rounded(found.target), "runs": found.runs}


def _device_hours(runs: Sequence[Run]) -> float | None:
    """Returns what all runs took, in hours of one device; None where that of one is unknown."""
    hours = sum(claims_table.device_hours(r) for r in runs)
    return hours if math.isfinite(hours) else None


def _saved(runs: Sequence[Run]) -> float | None:
    """Returns the share of the samples of all ended runs that was not trained on; None if it is unknown."""
    ended = [r for r in runs if r.status in ("completed", "stopped", "failed") and r.planned()[1]]
    planned = sum(r.planned()[1] for r in ended)
    return 1 - sum(r.last("samples") or 0 for r in ended) / planned if planned else None


def _phases(run: Run) -> list[list[Any]]:
    """Returns name, first and last step of each uninterrupted span of one phase."""
    spans: list[list[Any]] = []
    for step, name in zip(run.records.columns.get("step", ()), run.records.phases, strict=False):
        if not spans or spans[-1][0] != name:
            spans.append([name, int(step), int(step)])
        spans[-1][2] = int(step)
    return spans


# ---------------------------------------------------------------------------------------- curves
def _curves(run: Run, subject: _Subject) -> dict[str, Any]:
    """Returns `grid`, the positions of the averaged curves `means`, and `stepwise`, single steps and their values."""
    if not len(run.records):
        return {"grid": [[], [], [], []], "means": {}, "stepwise": {}}
    steps, samples = (run.records.columns[k] for k in ("step", "samples"))
    time = np.nancumsum(stop_rules.column(run.records, "step_time_s"))
    points, is_single = subject.points_per_curve, len(subject.runs) == 1
    flops = np.nancumsum(stop_rules.column(run.records, "flops"))
    grid: list[list[Any]] = [[_one_decimal(v) for v in downsample.means(x, points)] for x in (steps, samples, time)]
    grid.append([_rounded(v) for v in downsample.means(flops, points)])
    means, stepwise = {}, {}
    for name in subject.signals:
        values = stop_rules.column(run.records, stop_rules.recorded_name(name))
        if np.isnan(values).all():
            continue
        means[name] = [_rounded(v) for v in downsample.means(values, points)]
        shown_stepwise = name != "grad_norm_corrected" and (is_single or name in STEPWISE)
        if shown_stepwise and len(values) > points:
            kept = downsample.extremes(values, 2 * points)
            stepwise[name] = [steps[kept].astype(int).tolist(), [_rounded(v) for v in values[kept]]]
    return {"grid": grid, "means": means, "stepwise": stepwise}


# ---------------------------------------------------------------------------------------- early termination
def _evidence(subject: _Subject) -> dict[str, Any] | None:
    """Returns how signals and rules do on the completed runs; None if there are too few of them."""
    runs, objective = subject.runs, subject.objective
    finished = _finished(subject)
    if len(finished) < MIN_FINISHED_RUNS:
        return None
    groups: dict[str, Any] = {}
    for c in rule_evaluation.correlations(finished):
        if not math.isnan(c.rho):
            group = groups.setdefault(c.group, {"runs": 0, "signals": {}, "rules": {}})
            numbers = ("rho", "low", "high", "p", "q", "given_rate", "q_given_rate")
            cell = {"arms": c.arms} | {k: _rounded(getattr(c, k)) for k in numbers}
            group["signals"].setdefault(c.signal, {})[f"{c.fraction:.0%}"] = cell
    rules: list[stop_rules.SiblingRule] = [rule() for rule in stop_rules.SIBLING_RULES.values()]
    for v in rule_evaluation.verdicts(finished, rules, objective):
        group = groups.setdefault(v.group, {"runs": 0, "signals": {}, "rules": {}})
        group["runs"] = v.runs
        cell = dataclasses.asdict(v) | {"saved": _rounded(v.saved), "regret": _rounded(v.regret)}
        cell["stopped"] = len(v.stopped)
        group["rules"].setdefault(v.rule, {})[f"{v.fraction:.0%}"] = cell
    return {
        "fractions": [f"{f:.0%}" for f in stop_rules.FRACTIONS],
        "groups": groups,
        "left_out": len(runs) - len(finished),
        "level": rule_evaluation.LEVEL,
        "median": _rounded(statistics.median(f.final for f in finished)),
    }


def _finished(subject: _Subject) -> list[rule_evaluation.FinishedRun]:
    finished = []
    for run, flat in zip(subject.runs, subject.flat_configs, strict=True):
        final = _final(run, subject.objective)
        if final is not None and len(run.records):
            batch_size, rate = int(flat.get("optim.batch_size", 0)), resolved_rate(flat)
            arm = _arm(subject, run, flat)
            finished.append(rule_evaluation.FinishedRun(run.name, batch_size, run.records, final, arm, rate))
    return finished


def _arm(subject: _Subject, run: Run, flat_config: dict[str, Any]) -> str:
    """Returns what a run shares with those that differ from it in their seed alone."""
    return json.dumps([repr(run.params.get(f, flat_config.get(f))) for f in subject.fields])


# ---------------------------------------------------------------------------------------- config and data
def _config(subject: _Subject) -> dict[str, Any]:
    """Returns the fields that are equal in all runs, with their defaults, and those that differ."""
    runs, differing = subject.runs, subject.differing
    first = subject.flat_configs[0] if runs else {}
    shared = {k: v for k, v in first.items() if k not in differing and not k.startswith("published.")}
    fields = [
        {"name": k, "value": _shown(v), "changed": repr(v) != repr(_default(k)), "default": _shown(_default(k))}
        for k, v in shared.items()
    ]
    if len(runs) <= MAX_RUNS_SIDE_BY_SIDE:
        listed = [{"name": k, "values": [_shown(v) for v in values]} for k, values in differing.items()]
        return {"fields": fields, "runs": [r.name for r in runs], "differing": listed}
    counted = [
        {"name": k, "counts": [[v, n] for v, n in Counter(map(_shown, values)).items()]}
        for k, values in differing.items()
    ]
    return {"fields": fields, "runs": [], "differing": counted}


def _flat_config(run: Run) -> dict[str, Any]:
    return flatten({k: v for k, v in run.config.items() if k not in ("resolved", "provenance")})


def _default(name: str) -> Any:
    """Returns the default of a field of a flat config; None if it has none."""
    return next(defaults.get(m[1]) for pattern, defaults in DEFAULTS if (m := re.fullmatch(pattern, name)))


def _answers(run: Run) -> list[dict[str, Any]]:
    """Returns each held-out prompt that the model was asked, with its first and its last answer."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in run.answers:
        key = ("source", "prompt", "expected")
        entry = found.setdefault(tuple(line[k] for k in key), {k: line[k] for k in key})
        given = {"step": line["step"], "text": line["answer"]}
        entry |= {"first": entry.get("first", given), "last": given}
    return list(found.values())


def _data_tables(run: Run) -> dict[str, Any]:
    """Returns what was read, kept and left out of each source, and what each phase draws."""
    report = run.data_report
    sources = []
    for kind in ("sources", "validation"):
        entries = report.get(kind, {})
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            sources.append(_source_row(name if kind == "sources" else f"{name} (held out)", entry))
    phases = [_phase_row(p) for p in report.get("phases", [])]
    return {"sources": sources, "phases": phases, "packing": report.get("packing_efficiency_of_first_steps")}


def _source_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    left_out = entry.get("dropped", {}) | entry.get("set_aside", {})
    lengths = entry.get("length_percentiles", {})
    return {
        "source": name,
        "read": entry.get("read"),
        "kept": entry.get("kept"),
        "left out": ", ".join(f"{n:,} {why}" for why, n in left_out.items()) or "0",
        "truncated": entry.get("truncated"),
        "duplicates": entry.get("duplicates"),
        "tokens": entry.get("tokens"),
        "trained": f"{entry.get('loss_tokens', 0) / max(1, entry.get('tokens', 0)):.0%}",
        "median length": lengths.get("50"),
        "longest": lengths.get("100"),
    }


def _phase_row(phase: dict[str, Any]) -> dict[str, Any]:
    epochs = phase.get("epochs", [])
    return {
        "phase": phase.get("name"),
        "epochs": len(epochs),
        "steps": sum(e.get("steps", 0) for e in epochs),
        "samples": sum(e.get("samples", 0) for e in epochs),
    }


def _provenance(run: Run) -> list[list[str]]:
    """Returns names and values of what is known of a run's environment."""
    known = dict(run.config.get("provenance", {})) | {"resolved": run.config.get("resolved", {})}
    known |= {k: run.summary[k] for k in ("command", "versions") if k in run.summary}
    if "command" in known:
        known["command"] = " ".join(map(str, known["command"]))
    return [[k, str(v)] for k, v in flatten(known).items() if v not in (None, "")]


# ---------------------------------------------------------------------------------------- values
def _shown(value: Any) -> Any:
    """Returns a value of a config as JSON can hold it."""
    return value if isinstance(value, int | float | str | bool) or value is None else json.dumps(value, default=repr)


def _rounded(value: float | None) -> float | None:
    known = finite(value)
    return None if known is None else float(f"{known:.{SIGNIFICANT_DIGITS}g}")


def _one_decimal(value: float) -> float | int:
    rounded = round(float(value), 1)
    return int(rounded) if rounded.is_integer() else rounded
