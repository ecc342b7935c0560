"""Reads the files of runs and sweeps for the report, as far as they can be read.

A run may still be running, or its machine may have died in the middle of a line. What cannot be read is left out and
listed in `Run.problems`; a damaged file never raises.
"""

import ast
import csv
import dataclasses
import io
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from mice_jax.errors import format_count
from mice_jax.storage.checkpoint_steps import saved_steps
from mice_jax.storage.recorded_config import CONFIG, is_run_config
from mice_jax.storage.workdir import (
    ANSWERS,
    CERTIFICATE,
    CRITICAL_BATCH,
    DIRECTIONS,
    EVENTS,
    LOCK,
    METRICS,
    RESULTS,
    SCORES,
)
from mice_jax.training.stop_rules import ColumnarRecords, Objective

# Where a run does not record the direction of a metric, a metric whose name ends so is better when lower.
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "mae", "brier_score")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric that was measured at some steps of a run."""

    steps: list[int]
    samples: list[int]
    values: list[float]

    def best(self, lower: bool) -> int:
        """Returns the index of the best value, the first one among equals."""
        return int(np.argmin(self.values) if lower else np.argmax(self.values))


@dataclasses.dataclass
class Run:
    """What the folder of a run holds."""

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
    answers: list[dict[str, Any]]  # to held-out prompts, in the order of the steps
    status: str  # completed | stopped | failed | preempted | paused | running | unknown; of a trial also waiting
    reason: str
    problems: list[str]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)  # a trial's value on every axis, and its seed

    @property
    def warnings(self) -> list[str]:
        """What the run was warned of before its first step."""
        warnings = self.data_report.get("warnings", [])
        return [str(w) for w in warnings] if isinstance(warnings, list) else []

    def lower_is_better(self, name: str) -> bool:
        """Whether lower values of a metric are better, as the run records it or else as its name suggests."""
        recorded = self.directions.get(name.removeprefix("eval/"))
        if recorded is not None:
            return recorded == "min"
        return name.rpartition("/")[2].partition(",")[0].endswith(LOWER_IS_BETTER)

    def last(self, name: str) -> float | None:
        """Returns the last measured value of a metric; None if there is none."""
        values = self.records.columns.get(name, np.zeros(0))
        known = values[~np.isnan(values)]
        return float(known[-1]) if len(known) else None

    def planned(self) -> tuple[int, int]:
        """Returns the steps and samples of the run when it is not stopped; 0 where they are unknown."""
        epochs = [e for p in self.data_report.get("phases", []) for e in p.get("epochs", [])]
        return int(self.data_report.get("steps", 0)), sum(int(e.get("samples", 0)) for e in epochs)


@dataclasses.dataclass
class Sweep:
    """What the folder of a sweep holds."""

    runs: list[Run]
    axes: list[str]
    objective: Objective
    stop: str  # the rule among siblings as the sweep's file names it; "" for none
    problems: list[str]
    settings: dict[str, Any]  # all that sweep.json holds
    certificate: dict[str, Any]  # what the bracket rule found; empty where there is none
    critical: dict[str, Any]  # the critical batch size that branches found; empty where there is none


def is_sweep(folder: Path) -> bool:
    """Whether a folder is the workdir of a sweep."""
    return (folder / "sweep.json").exists()


def is_run(folder: Path) -> bool:
    """Whether a folder is the workdir of a run, and not that of a model, which has a config.json too."""
    if any((folder / name).exists() for name in (METRICS, "summary.json")):
        return True
    try:
        return is_run_config(json.loads((folder / CONFIG).read_text()))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # a run whose config.json is damaged: what else it holds is shown


# ---------------------------------------------------------------------------------------- a sweep
def read_sweep(folder: Path) -> Sweep:
    """Reads the trials of results.csv, and those that have a folder only, in the order of their numbers."""
    problems: list[str] = []
    whole = _object(folder / "sweep.json", problems)
    settings = whole.get("sweep", {})
    rows = _rows(folder / RESULTS, problems)
    names = list(rows[0]) if rows else []
    axes = names[names.index("number") + 1 : names.index("seed")] if {"number", "seed"} <= set(names) else []
    by_number = {r["number"]: r for r in rows}
    with_folder = {f.name for f in (folder / "runs").glob("*") if f.is_dir()}
    numbers = sorted(by_number.keys() | with_folder, key=lambda n: (not n.isdigit(), n.zfill(9)))
    runs = [_read_trial(folder / "runs" / n, by_number.get(n, {}), axes) for n in numbers]
    objective = Objective(_literal(settings.get("metric"), "eval/loss"), _literal(settings.get("mode"), "min"))
    stop = settings.get("stop")
    stop_name = "" if stop in (None, "None") else str(_literal(stop, stop))
    certificate, critical = (_object(folder / name, problems) for name in (CERTIFICATE, CRITICAL_BATCH))
    return Sweep(runs, axes, objective, stop_name, problems, whole, certificate, critical)


def _read_trial(folder: Path, row: dict[str, str], axes: Sequence[str]) -> Run:
    """Reads the run of a trial, and its line of results.csv where it has one."""
    run = read_run(folder, folder.name)
    run.params = {name: _literal(row[name], row[name]) for name in [*axes, "seed"] if row.get(name)}
    if not row:
        return run
    # A trial may have ended after results.csv was written: then its own summary is the newer of the two.
    ended_since = run.status in ("completed", "stopped", "failed") and row["status"] in ("running", "waiting")
    run.status = run.status if ended_since else row["status"]
    run.reason = row.get("reason", "") or run.reason
    if run.status == "waiting":
        run.problems = []
    return run


def _rows(file: Path, problems: list[str]) -> list[dict[str, str]]:
    if not file.exists():
        problems.append(f"there is no {RESULTS} yet: no trial has ended")
        return []
    rows = list(csv.DictReader(io.StringIO(file.read_text(errors="replace"))))
    whole = [{k: v or "" for k, v in r.items() if k} for r in rows if r.get("number") and r.get("status")]
    if len(whole) < len(rows):
        problems.append(f"{RESULTS}: {format_count(len(rows) - len(whole), 'damaged line')} left out")
    return whole


def _literal(text: Any, default: Any) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return default


# ---------------------------------------------------------------------------------------- a run
def read_run(folder: Path, name: str = "") -> Run:
    """Reads the folder of a run, named as its folder by default."""
    problems: list[str] = []
    if not folder.is_dir():
        problems.append("it has no folder")
    config, summary, data_report = (
        _object(folder / f"{kind}.json", problems) for kind in ("config", "summary", "data_report")
    )
    lines = _read_metrics(folder / METRICS, problems)
    evaluations = _evaluations(lines)
    records = _steps_alone(lines)
    _add_scores(evaluations, folder / SCORES, problems)
    checkpoints = saved_steps(folder)
    events = _lines(folder / EVENTS, problems)
    is_running = _is_running(folder, events)
    status = "running" if is_running else str(summary.get("status", "unknown"))
    if status == "unknown" and folder.is_dir() and not any("summary.json" in p for p in problems):
        problems.append("it has no summary.json: it is running, or was killed")
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        config=config,
        summary=summary,
        data_report=data_report,
        records=records,
        evaluations=evaluations,
        directions=_object(folder / DIRECTIONS, problems),
        checkpoints=checkpoints,
        events=events,
        answers=_answers(folder, problems),
        status=status,
        reason="" if is_running else str(summary.get("reason") or ""),
        problems=problems,
    )


def _answers(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Reads the answers to held-out prompts; those that a resumed run gave again are there once."""
    texts = ("source", "prompt", "expected", "answer")
    whole = [a for a in _lines(folder / ANSWERS, problems) if all(isinstance(a.get(k), str) for k in texts)]
    by_place = {(int(a["step"]), a["source"], a["prompt"], a["expected"]): a for a in whole}
    return [by_place[place] for place in sorted(by_place, key=lambda place: place[0])]


def _is_running(folder: Path, events: Sequence[dict[str, Any]]) -> bool:
    """Whether a process of this machine that has begun or resumed a run, and not ended it, is alive."""
    if not events or events[-1].get("event") not in ("started", "resumed"):
        return False
    file = folder / LOCK
    holder = re.fullmatch(r"process (\d+) on (.+)\n", file.read_text(errors="replace") if file.is_file() else "")
    if holder is None or holder[2] != socket.gethostname():
        return False
    try:
        os.kill(int(holder[1]), 0)  # It sends nothing.
    except ProcessLookupError:
        return False
    except PermissionError:  # It is another user's.
        return True
    return True


def _add_scores(evaluations: dict[str, Curve], file: Path, problems: list[str]) -> None:
    """Adds the scores of checkpoints that `mice evaluate` has left."""
    for line in _lines(file, problems):
        for key, value in line.items():
            if key not in ("step", "samples") and isinstance(value, int | float) and not isinstance(value, bool):
                curve = evaluations.setdefault(key, Curve([], [], []))
                curve.steps.append(int(line["step"]))
                curve.samples.append(int(line["samples"]))
                curve.values.append(float(value))


def _object(file: Path, problems: list[str]) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is none that can be read."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(errors="replace"))
    except ValueError:
        problems.append(f"{file.name} is damaged and left out")
        return {}
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------- metrics and other lines
def _read_metrics(file: Path, problems: list[str]) -> ColumnarRecords:
    """Reads the numbers of each line in the order of the steps; lines that are not whole records are left out."""
    raw = file.read_bytes() if file.exists() else b""
    if not raw:
        problems.append(f"it has no line in {METRICS}")
        return ColumnarRecords({})
    try:
        table = _parse_table(raw)
    except pa.ArrowInvalid:
        # Some line is damaged or is not a record. Reading line by line is slower, but finds out which.
        lines = _lines(file, problems)
        table = pa.Table.from_pylist([{k: v for k, v in line.items() if _is_plain(k, v)} for line in lines])
    else:
        table = _drop_unplaced(table, problems)
    if not {"step", "samples"} <= set(table.column_names):
        return ColumnarRecords({})
    table = _drop_repeated(table, problems)
    types = {f.name: f.type for f in table.schema}
    columns = {
        k: table[k].cast(pa.float64()).to_numpy(zero_copy_only=False) for k, kind in types.items() if _is_number(kind)
    }
    phases = table["phase"].to_pylist() if types.get("phase") == pa.string() else []
    return ColumnarRecords(columns, [p or "" for p in phases])


def _steps_alone(lines: ColumnarRecords) -> ColumnarRecords:
    """Returns the lines without that of the evaluation before the first step."""
    return lines[1:] if len(lines) and lines.columns["step"][0] == 0 else lines


def _parse_table(raw: bytes) -> pa.Table:
    """Parses the lines of metrics.jsonl at once; raises ArrowInvalid where one is damaged."""
    if not raw.endswith(b"\n") or b"\0" in raw:
        raise pa.ArrowInvalid("a damaged line")
    # One block holds the whole file, so that the type of a column cannot change from block to block.
    options = pyarrow.json.ReadOptions(block_size=max(1 << 20, len(raw)))
    return pyarrow.json.read_json(io.BytesIO(raw), read_options=options)


def _drop_unplaced(table: pa.Table, problems: list[str]) -> pa.Table:
    """Leaves out the rows that have no step or no number of samples."""
    for name in ("step", "samples"):
        if name not in table.column_names or not _is_number(table.schema.field(name).type):
            problems.append(f"the lines of {METRICS} have no {name}")
            return table.slice(0, 0)
    places = np.stack([table[k].to_numpy(zero_copy_only=False).astype(np.float64) for k in ("step", "samples")])
    unplaced = np.isnan(places).any(axis=0)
    if count := np.count_nonzero(unplaced):
        problems.append(f"{METRICS}: {format_count(int(count), 'line')} without step or samples left out")
    return table.filter(pa.array(np.logical_not(unplaced)))


def _drop_repeated(table: pa.Table, problems: list[str]) -> pa.Table:
    """Sorts the rows by step and leaves out repeated ones where the steps are not 1, 2, 3, ..."""
    step = table["step"].to_numpy(zero_copy_only=False)
    first = 0 if len(step) and step[0] == 0 else 1  # an evaluation before the first step has a line too
    if not len(step) or np.array_equal(step, np.arange(first, first + len(step))):
        return table
    problems.append(f"the steps of {METRICS} are not 1, 2, 3, ...: lines are missing or repeated")
    return table.take(np.unique(step, return_index=True)[1])


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_plain(name: str, value: Any) -> bool:
    if name == "phase":
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Reads the JSON objects that have a step, one per line; damaged lines are left out."""
    text = file.read_text(errors="replace") if file.exists() else ""
    entries, damaged = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            int(entry["step"])
            int(entry.get("samples", 0))
            entries.append(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        problems.append(f"{file.name}: {format_count(len(damaged), 'damaged line')} left out (line {numbers})")
    return entries


def _evaluations(records: ColumnarRecords) -> dict[str, Curve]:
    """Returns the curve of every `eval/...` metric."""
    curves = {}
    for name, values in records.columns.items():
        measured = np.flatnonzero(~np.isnan(values)) if name.startswith("eval/") else np.zeros(0, int)
        if len(measured):
            steps, samples = (records.columns[k][measured].astype(int).tolist() for k in ("step", "samples"))
            curves[name] = Curve(steps, samples, values[measured].tolist())
    return curves


# ---------------------------------------------------------------------------------------- how runs differ
def differing(configs: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Returns each field of flat configs that is not equal in all, with its value in each; None if it is absent."""
    configs = list(configs)
    names = dict.fromkeys(k for c in configs for k in c)
    values_by_name = {name: [c.get(name) for c in configs] for name in names}
    return {k: values for k, values in values_by_name.items() if any(repr(v) != repr(values[0]) for v in values)}


def short_names(names: Sequence[str], separator: str = "/") -> list[str]:
    """Returns as many of the last parts of each name as are needed to tell the names apart."""
    split = [n.split(separator) for n in names]
    for count in range(1, max((len(s) for s in split), default=0) + 1):
        short = [separator.join(s[-count:]) for s in split]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def published_of(flat: dict[str, Any]) -> dict[str, float]:
    """Returns by metric the published numbers that apply to a run with this flat config."""
    numbers, i = {}, 0
    while f"published.{i}.metric" in flat:
        metric, value, where = (flat[f"published.{i}.{k}"] for k in ("metric", "value", "where"))
        field, _, wanted = where.partition("=")
        if not where or str(flat.get(field)) == wanted:
            numbers[metric] = value
        i += 1
    return numbers


def finite(value: Any) -> float | None:
    """Returns a value as a float where it is a finite number, else None."""
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_finite else None
