"""What runs and sweeps have left in their folders, read as far as it goes.

A run may still be running, or its machine may have died in the middle of a line. What cannot be read is left out and
said in `Run.problems`; nothing here raises for a torn file.
"""

import ast
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from mice_jax.storage.workdir import DIRECTIONS, EVENTS, METRICS, RESULTS, SCORES
from mice_jax.training.stop_rules import ColumnarRecords, Objective

# Of names of which a run does not say it, losses and what older runs have; all else is a score.
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "mae", "brier_score")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number that was measured now and then."""

    steps: list[int]
    samples: list[int]
    values: list[float]

    def best(self, lower: bool) -> int:
        """Where the best value is, the first of equal ones."""
        return int(np.argmin(self.values) if lower else np.argmax(self.values))


@dataclasses.dataclass
class Run:
    """A run's folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    data_report: dict[str, Any]
    records: ColumnarRecords
    evaluations: dict[str, Curve]
    directions: dict[str, str]
    checkpoints: list[int]
    events: list[dict[str, Any]]
    status: str  # completed | stopped | failed | preempted | unknown, and a trial's: running | waiting
    reason: str
    problems: list[str]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a trial: its value on every axis, and seed

    def lower_is_better(self, name: str) -> bool:
        """Of an evaluation, as the run says; where it does not, by the name."""
        said = self.directions.get(name.removeprefix("eval/"))
        guess = name.rpartition("/")[2].partition(",")[0].endswith(LOWER_IS_BETTER)
        return guess if said is None else said == "min"

    def last(self, name: str) -> float | None:
        values = self.records.columns.get(name, np.zeros(0))
        known = values[~np.isnan(values)]
        return float(known[-1]) if len(known) else None

    def planned(self) -> tuple[int, int]:
        """The steps and samples it has when it is not stopped; 0 where it cannot be told."""
        epochs = [e for p in self.data_report.get("phases", []) for e in p.get("epochs", [])]
        return int(self.data_report.get("steps", 0)), sum(int(e.get("samples", 0)) for e in epochs)


@dataclasses.dataclass
class Sweep:
    runs: list[Run]
    axes: list[str]
    objective: Objective
    stop: str  # the rule among siblings, as the sweep's file names it; "" = none
    problems: list[str]


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").exists()


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS, "config.json", "summary.json"))


# ---------------------------------------------------------------------------------------- a sweep
def read_sweep(folder: Path) -> Sweep:
    """Its trials in order: those of results.csv, and those that have a folder only."""
    problems: list[str] = []
    about = _object(folder / "sweep.json", problems).get("sweep", {})
    rows = _rows(folder / RESULTS, problems)
    names = list(rows[0]) if rows else []
    axes = names[names.index("number") + 1 : names.index("seed")] if {"number", "seed"} <= set(names) else []
    by_number = {r["number"]: r for r in rows}
    folders = {f.name for f in (folder / "runs").glob("*") if f.is_dir()}
    runs = []
    for number in sorted(by_number.keys() | folders, key=lambda n: (not n.isdigit(), n.zfill(9))):
        run = read_run(folder / "runs" / number, number)
        row = by_number.get(number, {})
        run.params = {name: _value(row[name]) for name in [*axes, "seed"] if row.get(name)}
        if row:  # a trial whose summary says more has ended since
            known = run.status in ("completed", "stopped", "failed") and row["status"] in ("running", "waiting")
            run.status = run.status if known else row["status"]
            run.reason = row.get("reason", "") or run.reason
            if run.status == "waiting":
                run.problems = []
        runs.append(run)
    metric, mode = (_literal(about.get(k), default) for k, default in (("metric", "eval/loss"), ("mode", "min")))
    stop = "" if about.get("stop") in (None, "None") else str(_literal(about["stop"], about["stop"]))
    return Sweep(runs, axes, Objective(metric, mode), stop, problems)


def _rows(file: Path, problems: list[str]) -> list[dict[str, str]]:
    if not file.exists():
        problems.append(f"there is no {RESULTS} yet: no trial has ended")
        return []
    rows = list(csv.DictReader(io.StringIO(file.read_text(errors="replace"))))
    whole = [{k: v or "" for k, v in r.items() if k} for r in rows if r.get("number") and r.get("status")]
    if len(whole) < len(rows):
        problems.append(f"{len(rows) - len(whole)} lines of {RESULTS} are torn and left out")
    return whole


def _value(text: str) -> Any:
    return _literal(text, text)


def _literal(text: Any, default: Any) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return default


# ---------------------------------------------------------------------------------------- a run
def read_run(folder: Path, name: str = "") -> Run:
    problems: list[str] = []
    if not folder.is_dir():
        problems.append("it has no folder")
    config, summary, data_report = (
        _object(folder / f"{kind}.json", problems) for kind in ("config", "summary", "data_report")
    )
    records = _read_metrics(folder / METRICS, problems)
    evaluations = _evaluations(records)
    for line in _lines(folder / SCORES, problems):
        for key, value in line.items():
            if key not in ("step", "samples") and isinstance(value, int | float) and not isinstance(value, bool):
                curve = evaluations.setdefault(key, Curve([], [], []))
                curve.steps.append(int(line["step"]))
                curve.samples.append(int(line["samples"]))
                curve.values.append(float(value))
    checkpoints = sorted(int(f.name) for f in (folder / "checkpoints").glob("*") if f.name.isdigit())
    status = str(summary.get("status", "unknown"))
    reason = str(summary.get("reason") or "")
    if status == "unknown" and folder.is_dir() and not any("summary.json" in p for p in problems):
        problems.append("it has no summary.json: it is running, or was killed")
    directions, events = _object(folder / DIRECTIONS, problems), _lines(folder / EVENTS, problems)
    return Run(
        name or folder.resolve().name, folder, config, summary, data_report, records, evaluations, directions,
        checkpoints, events, status, reason, problems,
    )  # fmt: skip


def _object(file: Path, problems: list[str]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(errors="replace"))
    except ValueError:
        problems.append(f"{file.name} is torn and left out")
        return {}
    return found if isinstance(found, dict) else {}


def _read_metrics(file: Path, problems: list[str]) -> ColumnarRecords:
    """The numbers of each line, in the order of their steps; a line that is no whole record is left out."""
    raw = file.read_bytes() if file.exists() else b""
    if not raw:
        problems.append(f"it has no line in {METRICS}")
        return ColumnarRecords({})
    try:
        table = _table(raw)
    except pa.ArrowInvalid:  # some line is torn, or is another kind of thing: the slow way finds which
        lines = _lines(file, problems)
        table = pa.Table.from_pylist([{k: v for k, v in r.items() if _is_plain(k, v)} for r in lines])
    else:
        table = _complete(table, problems)
    if not {"step", "samples"} <= set(table.column_names):
        return ColumnarRecords({})
    step = table["step"].to_numpy(zero_copy_only=False)
    if len(step) and not np.array_equal(step, np.arange(1, len(step) + 1)):
        problems.append(f"the steps of {METRICS} are not 1, 2, 3, ...: lines are missing or there twice")
        table = table.take(np.unique(step, return_index=True)[1])
    kinds = {f.name: f.type for f in table.schema}
    columns = {
        k: table[k].cast(pa.float64()).to_numpy(zero_copy_only=False)
        for k, kind in kinds.items()
        if pa.types.is_floating(kind) or pa.types.is_integer(kind)
    }
    phases = table["phase"].to_pylist() if kinds.get("phase") == pa.string() else []
    return ColumnarRecords(columns, [p or "" for p in phases])


def _table(raw: bytes) -> pa.Table:
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw or b"\0" in whole:
        raise pa.ArrowInvalid("a torn line")
    read = pyarrow.json.ReadOptions(block_size=max(1 << 20, len(raw)))  # a whole file, so that columns keep their types
    return pyarrow.json.read_json(io.BytesIO(raw), read_options=read)


def _complete(table: pa.Table, problems: list[str]) -> pa.Table:
    """The rows that say where they stand."""
    for name in ("step", "samples"):
        kind = table.schema.field(name).type if name in table.column_names else pa.null()
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            problems.append(f"the lines of {METRICS} have no {name}")
            return table.slice(0, 0)
    where = np.stack([table[k].to_numpy(zero_copy_only=False).astype(np.float64) for k in ("step", "samples")])
    lost = np.isnan(where).any(axis=0)
    if np.count_nonzero(lost):
        problems.append(f"{np.count_nonzero(lost)} lines of {METRICS} have no step or samples, and are left out")
    return table.filter(pa.array(np.logical_not(lost)))


def _is_plain(name: str, value: Any) -> bool:
    return isinstance(value, str) if name == "phase" else isinstance(value, int | float) and not isinstance(value, bool)


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of lines that have a step; torn ones are left out."""
    text = file.read_text(errors="replace") if file.exists() else ""
    found, torn = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            int(entry["step"])
            int(entry.get("samples", 0))
            found.append(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            torn.append(number)
    if torn:
        named = ", ".join(map(str, torn[:5])) + ", ..." * (len(torn) > 5)
        problems.append(f"{file.name}: {len(torn)} torn or strange lines are left out (line {named})")
    return found


def _evaluations(records: ColumnarRecords) -> dict[str, Curve]:
    """Every `eval/...` of metrics.jsonl."""
    found = {}
    for name, values in records.columns.items():
        known = np.flatnonzero(~np.isnan(values)) if name.startswith("eval/") else np.zeros(0, int)
        if len(known):
            steps, samples = (records.columns[k][known].astype(int).tolist() for k in ("step", "samples"))
            found[name] = Curve(steps, samples, values[known].tolist())
    return found


# ---------------------------------------------------------------------------------------- what sets runs apart
def differing(configs: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Of flat configs, each field that is not the same in all, with its value in each; None where one lacks it."""
    configs = list(configs)
    names = dict.fromkeys(k for c in configs for k in c)
    told = {name: [c.get(name) for c in configs] for name in names}
    return {name: values for name, values in told.items() if any(repr(v) != repr(values[0]) for v in values)}


def short_names(names: Sequence[str], separator: str = "/") -> list[str]:
    """Each name's last parts, as many as tell it from the others."""
    split = [n.split(separator) for n in names]
    for count in range(1, max((len(s) for s in split), default=0) + 1):
        short = [separator.join(s[-count:]) for s in split]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def published_of(flat: dict[str, Any]) -> dict[str, float]:
    """The numbers that a run's flat config says were published of it, by metric."""
    found, i = {}, 0
    while f"published.{i}.metric" in flat:
        metric, value, where = (flat[f"published.{i}.{k}"] for k in ("metric", "value", "where"))
        field, _, wanted = where.partition("=")
        if not where or str(flat.get(field)) == wanted:
            found[metric] = value
        i += 1
    return found


def finite(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
