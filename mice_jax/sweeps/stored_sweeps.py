"""Finished sweeps as arrays: a file format, and how they are read from the folder of a sweep."""

import ast
import dataclasses
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax.errors import UserError
from mice_jax.storage.json_file import read_json
from mice_jax.training import stop_rules
from mice_jax.training.stop_monitor import read_run

SIGNALS = ("loss", "grad_norm", "grad_sq_corrected")  # what rules read besides the metric
SUFFIX = ".npz"
LARGEST_DIFFERENCE = 0.05  # of the samples of two runs that count as equally long
ROUNDING = 1e-9  # of a share of the samples


@dataclasses.dataclass(frozen=True)
class StoredSweep:
    """The curves of a sweep that was run in full.

    Attributes:
        name: What the sweep is called in tables.
        curves: The metric at evenly spaced points of each run, float [seed, *axes, point], lower is better.
        axes: The values of each axis by the axis' name, in the order of the array's dims.
        start: The metric before the first step.
        signals: Other numbers at the same points by name, float [seed, *axes, point] each.
        kind: The group of sweeps that it belongs to.
    """

    name: str
    curves: np.ndarray
    axes: Mapping[str, Sequence[Any]]
    start: float
    signals: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kind: str = "stored"


# ---------------------------------------------------------------------------------------- files
def save(sweep: StoredSweep, file: Path) -> None:
    """Writes a sweep as a compressed numpy archive, its numbers in float32."""
    signals: dict[str, Any] = {f"signals/{k}": np.asarray(v, np.float32) for k, v in sweep.signals.items()}
    np.savez_compressed(
        file,
        curves=np.asarray(sweep.curves, np.float32),
        axes=np.array(json.dumps({name: list(values) for name, values in sweep.axes.items()})),
        start=np.array(sweep.start),
        **signals,
    )


def load(path: Path) -> StoredSweep:
    """Reads a sweep from a file that `save` wrote, or from the folder of a sweep.

    Raises:
        UserError: There is no such sweep, it is damaged, or some of its runs were not run to their end.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise UserError(f"--sweeps: {path} does not exist. Give the folder of a sweep, or a file F{SUFFIX}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ("curves", "axes", "start") if name not in archive]
            if missing:
                raise UserError(
                    f"--sweeps: {path} has no array {missing[0]!r}. It needs curves [seed, *axes, point], axes (JSON: "
                    "the values of each axis by its name) and start, as mice_jax.sweeps.stored_sweeps.save writes them."
                )
            signals = {n.removeprefix("signals/"): archive[n] for n in archive.files if n.startswith("signals/")}
            axes = json.loads(str(archive["axes"]))
            return StoredSweep(path.stem, archive["curves"], axes, float(archive["start"]), signals)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"--sweeps: {path} is not a sweep that can be read: {e}. Write it again with save().") from None


# ---------------------------------------------------------------------------------------- folders
def _from_folder(folder: Path) -> StoredSweep:
    """Reads the curves of a finished grid from its runs' metrics.jsonl."""
    settings = _settings(folder)
    axes, metric = settings["axes"], settings["metric"]
    sign = -1.0 if settings["mode"] == "max" else 1.0
    shape = (*[len(values) for values in axes.values()], max(len(settings["seeds"]), 1))
    runs = [_read_run(folder, number, settings) for number in range(math.prod(shape))]
    whole = [run for run in runs if not run.diverged]
    if not whole:
        raise UserError(f"--sweeps: every run of {folder} has diverged, so there is nothing to replay.")
    samples = max(run.samples for run in whole)
    if min(run.samples for run in whole) < (1 - LARGEST_DIFFERENCE) * samples:
        raise UserError(
            f"--sweeps: the runs of {folder} have {min(run.samples for run in whole):,} to {samples:,} samples. A rule "
            "compares runs at equal shares of one horizon: replay runs of equal length only."
        )
    starts = [run.start for run in runs if not math.isnan(run.start)]
    if not starts:
        raise UserError(
            f"--sweeps: no run of {folder} has measured {metric} before its first step, so the gain of its runs is "
            "unknown. Run the sweep again with data held out, or give a file that has start."
        )
    points = min(run.num_evaluations for run in whole)

    def by_seed(rows: list[np.ndarray]) -> np.ndarray:
        return np.moveaxis(np.stack(rows).reshape(*shape, points), -2, 0)

    curves = by_seed([sign * run.metric_at(points, samples) for run in runs])
    signals = {name: by_seed([run.signal_at(name, points, samples) for run in runs]) for name in SIGNALS}
    known = {name: values for name, values in signals.items() if not np.isnan(values).all()}
    return StoredSweep(folder.resolve().name, curves, axes, sign * float(np.mean(starts)), known)


@dataclasses.dataclass(frozen=True)
class _FinishedRun:
    """A run that came to its end, or that has diverged."""

    records: Sequence[stop_rules.Record]
    metric: str
    diverged: bool
    start: float  # the metric before the first step; NaN where it was not measured

    @property
    def samples(self) -> int:
        return int(self.records[-1]["samples"])

    @property
    def evaluations(self) -> np.ndarray:
        """The number of samples and the metric at each evaluation, float64 [evaluation, 2]."""
        measured = [(r["samples"], r[self.metric]) for r in self.records if self.metric in r]
        return np.array(measured, np.float64).reshape(-1, 2)

    @property
    def num_evaluations(self) -> int:
        return len(self.evaluations)

    def metric_at(self, points: int, samples: int) -> np.ndarray:
        """Returns the metric at the first evaluation at or past each of the points; NaN once the run has diverged.

        Args:
            points: How many evenly spaced points a run has.
            samples: How many samples a whole run has.
        """
        at, values = self.evaluations.T
        end = samples if self.diverged else self.samples
        index = np.searchsorted(at, end * np.arange(1, points + 1) / points * (1 - ROUNDING))
        return np.append(values, math.nan)[np.minimum(index, len(values))]

    def signal_at(self, name: str, points: int, samples: int) -> np.ndarray:
        """Returns the mean of a number of the records over the stretch before each point; NaN where unmeasured."""
        values = stop_rules.column(self.records, name)
        end = samples if self.diverged else self.samples
        stretch = np.ceil(stop_rules.column(self.records, "samples") / end * points * (1 - ROUNDING)) - 1
        known = [values[(stretch == i) & ~np.isnan(values)] for i in range(points)]
        return np.array([v.mean() if len(v) else math.nan for v in known])


def _settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a sweep that is a grid of plain values."""
    stored = (read_json(folder / "sweep.json") or {}).get("sweep")
    if stored is None:
        raise UserError(f"--sweeps: {folder} is not the folder of a sweep, which would hold sweep.json.")
    try:
        settings = {name: ast.literal_eval(stored[name]) for name in ("axes", "seeds", "metric", "mode", "search")}
    except (ValueError, SyntaxError):
        raise UserError(
            f"--sweeps: an axis of {folder} has values that are neither numbers nor texts, or is a Range. Only grids "
            "of plain values can be replayed."
        ) from None
    if settings["search"] != "grid":
        raise UserError(f"--sweeps: {folder} is a {settings['search']} search. Only grids can be replayed.")
    return settings | {"stop": stored["stop"]}


def _read_run(folder: Path, number: int, settings: Mapping[str, Any]) -> _FinishedRun:
    """Reads the run of a trial that has ended by itself."""
    run, metric = folder / "runs" / str(number), settings["metric"]
    (before, records), summary = read_run(run), read_json(run / "summary.json") or {}
    status, reason = summary.get("status", "it has no summary.json"), summary.get("reason") or ""
    # In a sweep without a rule among siblings, only the rules of every run stop one: it has diverged.
    diverged = status == "stopped" and settings["stop"] in (None, "None", "'none'")
    if not records or not (status == "completed" or diverged):
        raise UserError(
            f"--sweeps: trial {number} of {folder} was not run to its end ({status}{reason and ': ' + reason}). A rule "
            "can be replayed only on a sweep that was run in full; run it with stop=None."
        )
    if not diverged and not any(metric in r for r in records):
        raise UserError(f"--sweeps: trial {number} of {folder} has no {metric} in its metrics.jsonl. Hold data out.")
    return _FinishedRun(records, metric, diverged, float(before.get(metric, math.nan)))
