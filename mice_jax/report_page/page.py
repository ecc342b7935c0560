"""The report: one HTML page of a run, of several or of a sweep, with all that it needs inside it.

Python gathers and thins the numbers and says what is known of each run; the page's own script (assets/page.js) draws
them with Plotly. Every text of data or configs reaches the page through a JSON block and is put in as text.
"""

import dataclasses
import datetime
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mice_jax import __version__
from mice_jax.config import Config, Phase, Source, flatten, to_dict
from mice_jax.errors import UserError
from mice_jax.report_page import downsample, read_runs, rule_evaluation
from mice_jax.report_page.read_runs import Run, finite
from mice_jax.storage.paths import write_atomically
from mice_jax.training import stop_rules

REPORT = "report.html"
ASSETS = Path(__file__).parent / "assets"
# Name, title, and what a reader needs to know of it.
SIGNALS = {
    "loss": ("Loss", "training, each step"),
    "grad_norm": ("Gradient norm, raw", "of the step's mean gradient, before clipping"),
    "grad_norm_corrected": ("Gradient norm, corrected", "the true gradient's, its noise taken out: batches compare"),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_s": ("Throughput", "tokens a second"),
    "noise_scale": ("Gradient noise scale", "the batch, in samples, whose noise equals the gradient"),
    "update_norm": ("Update norm", ""),
    "param_norm": ("Parameter norm", ""),
    "slot_efficiency": ("Slot efficiency", "real tokens of all slots computed"),
    "mfu": ("Model FLOPs utilisation", "of the devices' peak"),
}
OF_ONE_ONLY = ("slot_efficiency", "mfu")  # of several runs they would only fill the page
STEPWISE = ("loss", "grad_norm")  # of several runs, drawn step by step too, where nothing is smoothed
POINTS = 200_000  # of all curves of a page together: what keeps it below ten megabytes
DIGITS = 5
MANY_RUNS = 6  # beyond so many, values of a field are counted and not shown run by run
DEFAULTS = [
    (r".*\.(?:sources|validation)\.\d+\.(.+)", flatten(dataclasses.asdict(Source()))),
    (r"data\.phases\.\d+\.(.+)", flatten(dataclasses.asdict(Phase()))),
    (r"(.+)", flatten(to_dict(Config()))),
]


def write(folders: Sequence[Path], output: Path) -> list[str]:
    """Writes the page of a run, a sweep or several runs; returns what could not be read."""
    data = of_sweep(folders[0]) if len(folders) == 1 and read_runs.is_sweep(folders[0]) else of_runs(folders)
    write_atomically(output, render(data, output))
    return [f"{p['run']}: {p['text']}" if p["run"] else p["text"] for p in data["problems"]]


def render(data: dict[str, Any], output: Path) -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a report needs plotly: pip install 'mice_jax[lab]'.") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    parts = {kind: (ASSETS / f"page.{kind}").read_text() for kind in ("css", "js")}
    return environment.get_template("page.html.jinja").render(data=data, plotly=get_plotlyjs(), **parts)


# ---------------------------------------------------------------------------------------- what is on it
def of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    names = read_runs.short_names([str(f.resolve()) for f in folders])
    runs = [read_runs.read_run(f, n) for f, n in zip(folders, names, strict=True)]
    measured = any("eval/loss" in r.evaluations for r in runs)
    objective = stop_rules.Objective("eval/loss" if measured else "loss")
    kind = "run" if len(runs) == 1 else "runs"
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return _page(kind, title, runs, [], objective, "", [])


def of_sweep(folder: Path) -> dict[str, Any]:
    s = read_runs.read_sweep(folder)
    return _page("sweep", folder.resolve().name, s.runs, s.axes, s.objective, s.stop, s.problems)


def _page(
    kind: str,
    title: str,
    runs: list[Run],
    axes: list[str],
    objective: stop_rules.Objective,
    stop: str,
    problems: list[str],
) -> dict[str, Any]:
    flats = [flatten(_plain(r.config)) for r in runs]
    differing = {k: v for k, v in read_runs.differing(flats).items() if not k.startswith("published.")}
    fields = axes or [k for k in differing if k != "seed"]
    labels = dict(zip(fields, read_runs.short_names(fields, "."), strict=True))
    values = [{f: r.params.get(f, flat.get(f)) for f in fields} for r, flat in zip(runs, flats, strict=True)]
    seeds = [r.params.get("seed", flat.get("seed")) for r, flat in zip(runs, flats, strict=True)]
    best = _best(runs, objective)
    names = [n for n in SIGNALS if len(runs) == 1 or n not in OF_ONE_ONLY]
    points = max(40, min(1000 if len(runs) == 1 else 400, POINTS // max(1, len(runs) * len(names))))
    rows = [
        {
            "name": r.name,
            "status": r.status,
            "reason": r.reason,
            "folder": str(r.folder),
            "fields": {f: _shown(v) for f, v in values[i].items()},
            "seed": seeds[i],
            "group": json.dumps([repr(values[i][f]) for f in fields]),
            "best": i == best,
            "planned": r.planned(),
            "step": r.last("step") or 0,
            "samples": r.last("samples") or 0,
            "signals": {n: _rounded(stop_rules.signal(r.records, n)) for n in (*stop_rules.SIGNALS, "tokens_per_s")},
            "metric": _rounded(_final(r, objective)),
            "published": read_runs.published_of(flats[i]),
            "evaluations": {k: _evaluation(c) for k, c in r.evaluations.items()},
            "phases": _phases(r),
            "checkpoints": r.checkpoints,
            "events": r.events,
        }
        | _curves(r, names, points, len(runs) == 1)
        for i, r in enumerate(runs)
    ]
    said = [{"run": "", "text": p} for p in problems]
    said += [{"run": "" if kind == "run" else r.name, "text": p} for r in runs for p in r.problems]
    return {
        "kind": kind,
        "title": title,
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "metric": objective.metric,
        "mode": objective.mode,
        "stop": stop,
        "fields": labels,
        "signals": {n: {"title": SIGNALS[n][0], "note": SIGNALS[n][1]} for n in names},
        "lower": sorted({n for r in runs for n in r.evaluations if r.lower_is_better(n)}),
        "runs": rows,
        "saved": _saved(runs),
        "problems": said,
        "evidence": _evidence(runs, objective),
        "config": _config(runs, flats, differing),
        "data": [_data_table(r) for r in runs[:1]] if kind == "run" else [],
        "provenance": _provenance(runs[0]) if kind == "run" else [],
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("resolved", "provenance")}


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) or value is None else json.dumps(value, default=repr)


def _rounded(value: float | None) -> float | None:
    known = finite(value)
    return None if known is None else float(f"{known:.{DIGITS}g}")


def _evaluation(curve: read_runs.Curve) -> list[list[Any]]:
    return [curve.steps, curve.samples, [_rounded(v) for v in curve.values]]


def _final(run: Run, objective: stop_rules.Objective) -> float | None:
    """The metric of a run that has come to its end."""
    if run.status != "completed":
        return None
    return (
        finite(run.summary.get("last_metrics", {}).get(objective.metric)) if run.summary else run.last(objective.metric)
    )


def _best(runs: Sequence[Run], objective: stop_rules.Objective) -> int:
    """Of those that have come to their end; -1 where there is none."""
    sign = 1 if objective.mode == "min" else -1
    known = [(sign * v, i) for i, r in enumerate(runs) if (v := _final(r, objective)) is not None]
    return min(known)[1] if known else -1


def _saved(runs: Sequence[Run]) -> float | None:
    """Of the samples of all trials that have ended, the share that was not trained on; None where it is not known."""
    ended = [r for r in runs if r.status in ("completed", "stopped", "failed") and r.planned()[1]]
    planned = sum(r.planned()[1] for r in ended)
    return 1 - sum(r.last("samples") or 0 for r in ended) / planned if planned else None


def _phases(run: Run) -> list[list[Any]]:
    """Name, first and last step of each stretch of one phase."""
    found: list[list[Any]] = []
    for step, name in zip(run.records.columns.get("step", ()), run.records.phases, strict=False):
        if not found or found[-1][0] != name:
            found.append([name, int(step), int(step)])
        found[-1][2] = int(step)
    return found


# ---------------------------------------------------------------------------------------- curves
def _curves(run: Run, names: Sequence[str], points: int, alone: bool) -> dict[str, Any]:
    """`grid`: where the means of `means` stand; `stepwise`: single steps and their values."""
    if not len(run.records):
        return {"grid": [[], [], []], "means": {}, "stepwise": {}}
    steps, samples = (run.records.columns[k] for k in ("step", "samples"))
    time = np.nancumsum(stop_rules.column(run.records, "step_time_s"))
    grid = [[_rounded_to(v, 1) for v in downsample.means(x, points)] for x in (steps, samples, time)]
    means, stepwise = {}, {}
    for name in names:
        values = stop_rules.column(run.records, "grad_sq_corrected" if name == "grad_norm_corrected" else name)
        if np.isnan(values).all():
            continue
        means[name] = [_rounded(v) for v in downsample.means(values, points)]
        if name != "grad_norm_corrected" and (alone or name in STEPWISE) and len(values) > points:
            kept = downsample.extremes(values, 2 * points)
            stepwise[name] = [steps[kept].astype(int).tolist(), [_rounded(v) for v in values[kept]]]
    return {"grid": grid, "means": means, "stepwise": stepwise}


def _rounded_to(value: float, places: int) -> float | int:
    rounded = round(float(value), places)
    return int(rounded) if rounded.is_integer() else rounded


# ---------------------------------------------------------------------------------------- early termination
def _evidence(runs: Sequence[Run], objective: stop_rules.Objective) -> dict[str, Any] | None:
    """Measured on the runs that went to their end; None where they are fewer than three."""
    finished = []
    for r in runs:
        final = _final(r, objective)
        batch = flatten(_plain(r.config)).get("optim.batch_size", 0)
        if final is not None and len(r.records):
            finished.append(rule_evaluation.Finished(r.name, int(batch), r.records, final))
    if len(finished) < 3:
        return None
    rules: list[stop_rules.SiblingRule] = [rule() for rule in stop_rules.SIBLING_RULES.values()]
    correlations = rule_evaluation.correlations(finished)
    verdicts = rule_evaluation.verdicts(finished, rules, objective)
    groups: dict[str, Any] = {}
    for c in correlations:
        if not math.isnan(c.rho):
            told = {"runs": c.runs} | {k: _rounded(getattr(c, k)) for k in ("rho", "low", "high")}
            group = groups.setdefault(c.group, {"runs": 0, "signals": {}, "rules": {}})
            group["signals"].setdefault(c.signal, {})[f"{c.fraction:.0%}"] = told
    for v in verdicts:
        group = groups.setdefault(v.group, {"runs": 0, "signals": {}, "rules": {}})
        group["runs"] = v.runs
        told = dataclasses.asdict(v) | {"saved": _rounded(v.saved), "regret": _rounded(v.regret)}
        told["stopped"] = len(v.stopped)
        group["rules"].setdefault(v.rule, {})[f"{v.fraction:.0%}"] = told
    return {
        "fractions": [f"{f:.0%}" for f in stop_rules.FRACTIONS],
        "groups": groups,
        "left_out": len(runs) - len(finished),
        "level": rule_evaluation.LEVEL,
        "resamples": rule_evaluation.RESAMPLES,
        "median": _rounded(statistics.median(f.final for f in finished)),
    }


# ---------------------------------------------------------------------------------------- config and data
def _config(runs: Sequence[Run], flats: Sequence[dict[str, Any]], differing: dict[str, list[Any]]) -> dict[str, Any]:
    """Of one run each field, with its default; of several those that differ, and those that are the same in all."""
    whole = flats[0] if flats else {}
    same = {k: v for k, v in whole.items() if k not in differing and not k.startswith("published.")}
    fields = [
        {"name": k, "value": _shown(v), "changed": repr(v) != repr(_default(k)), "default": _shown(_default(k))}
        for k, v in same.items()
    ]
    if len(runs) <= MANY_RUNS:
        apart = [{"name": k, "values": [_shown(v) for v in told]} for k, told in differing.items()]
        return {"fields": fields, "runs": [r.name for r in runs], "differing": apart}
    counted = []
    for name, told in differing.items():
        counts: dict[Any, int] = {}
        for v in map(_shown, told):
            counts[v] = counts.get(v, 0) + 1
        counted.append({"name": name, "counts": [[v, n] for v, n in counts.items()]})
    return {"fields": fields, "runs": [], "differing": counted}


def _default(name: str) -> Any:
    """Of a field of a flat config; None where it has none."""
    return next(known.get(m[1]) for pattern, known in DEFAULTS if (m := re.fullmatch(pattern, name)))


def _data_table(run: Run) -> dict[str, Any]:
    """What was read, kept and left out of each source, and what each phase draws."""
    report = run.data_report
    sources = []
    for kind in ("sources", "validation"):
        entries = report.get(kind, {})
        for name, s in entries.items() if isinstance(entries, dict) else ():
            left_out = s.get("dropped", {}) | s.get("set_aside", {})
            lengths = s.get("length_percentiles", {})
            sources.append(
                {
                    "source": name if kind == "sources" else f"{name} (held out)",
                    "read": s.get("read"),
                    "kept": s.get("kept"),
                    "left out": ", ".join(f"{n:,} {why}" for why, n in left_out.items()) or "0",
                    "truncated": s.get("truncated"),
                    "duplicates": s.get("duplicates"),
                    "tokens": s.get("tokens"),
                    "trained": f"{s.get('loss_tokens', 0) / max(1, s.get('tokens', 0)):.0%}",
                    "median length": lengths.get("50"),
                    "longest": lengths.get("100"),
                }
            )
    phases = [
        {
            "phase": p.get("name"),
            "epochs": len(p.get("epochs", [])),
            "steps": sum(e.get("steps", 0) for e in p.get("epochs", [])),
            "samples": sum(e.get("samples", 0) for e in p.get("epochs", [])),
        }
        for p in report.get("phases", [])
    ]
    return {"sources": sources, "phases": phases, "packing": report.get("packing_efficiency_of_first_steps")}


def _provenance(run: Run) -> list[list[str]]:
    told = dict(run.config.get("provenance", {})) | {"resolved": run.config.get("resolved", {})}
    told |= {k: run.summary[k] for k in ("command", "versions") if k in run.summary}
    flat = flatten(told | {"command": " ".join(map(str, told["command"]))} if "command" in told else told)
    return [[k, str(v)] for k, v in flat.items() if v not in (None, "")]
