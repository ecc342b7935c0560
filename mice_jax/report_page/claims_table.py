"""What the report shows of the claims that a sweep has registered: a verdict on each, and explorations without one."""

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax.report_page import read_runs
from mice_jax.report_page.read_runs import Run, finite
from mice_jax.statistics import registered_claims, verdicts
from mice_jax.statistics.registered_claims import Registration, Texts
from mice_jax.statistics.verdicts import Result, Verdict
from mice_jax.training import stop_rules

CLOCKS_S = 60.0  # by which the clocks of two machines may differ
MAX_VALUE = 40  # characters of a value of an axis
SIGNIFICANT_DIGITS = 4


def registration_of(folder: Path, settings: Mapping[str, Any], runs: Sequence[Run]) -> tuple[Registration | None, str]:
    """Returns what a sweep has registered before its first run, and a sentence where that does not hold.

    Args:
        folder: The folder of the sweep.
        settings: What its sweep.json holds.
        runs: Its runs.
    """
    stored, file = settings.get("registered_claims"), folder / registered_claims.FILE
    if not stored:
        return None, ""
    try:
        registration = Registration.from_json(stored)
        registered = datetime.datetime.fromisoformat(registration.registered).timestamp()
    except (TypeError, KeyError, ValueError):
        return None, "the registered claims in sweep.json are damaged, so no claim is judged"
    if not file.exists() or registered_claims.hash_of(file) != registration.sha256:
        return None, f"{file.name} is not the file that was registered before the first run, so no claim is judged"
    begun = [float(e["time"]) for r in runs for e in r.events if finite(e.get("time")) is not None]
    if begun and min(begun) < registered - CLOCKS_S:
        return None, f"{file.name} was registered after the first run had begun, so no claim is judged"
    return registration, ""


def of_runs(registration: Registration, runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the verdicts on registered claims as plain JSON values."""
    judged = verdicts.judge(registration, [_result(registration, r) for r in runs])
    rows = [_row(registration, v) for v in judged]
    return {
        "registered": registration.registered,
        "sha256": registration.sha256,
        "level": registration.level,
        "judged": [r for r in rows if r["verdict"] != verdicts.EXPLORATION],
        "explored": [r for r in rows if r["verdict"] == verdicts.EXPLORATION],
    }


def _result(registration: Registration, run: Run) -> Result:
    last = run.summary.get("last_metrics")
    values = {name: v for name, value in (last or {}).items() if (v := finite(value)) is not None}
    params = {axis: registered_claims.text_of(run.params.get(axis, "")) for axis in registration.axes}
    seed = run.params.get("seed", registration.seeds[0])
    return Result(run.name, params, seed if isinstance(seed, int) else -1, run.status, values, device_hours(run))


def device_hours(run: Run) -> float:
    """Returns the time of a run's steps, in hours of one device; NaN where it is unknown."""
    if not len(run.records):
        return 0.0
    mesh = run.config.get("resolved", {}).get("mesh", {})
    devices = math.prod(mesh.values()) if mesh else math.nan
    seconds = stop_rules.column(run.records, "step_time_s")
    return float(np.nansum(seconds)) * devices / 3600


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Returns the verdict on each claim that is judged as one line, from `of_runs`."""
    lines = []
    for row in found["judged"]:
        parts = [f"claim {row['name']!r}: {row['verdict']}"]
        if row["mean"] is not None:
            interval = f" [{row['low']:+.4g}, {row['high']:+.4g}]" if row["low"] is not None else ""
            parts.append(f"difference {row['mean']:+.4g}{interval}")
        parts += [f"adjusted p {row['adjusted']:.2g}"] if row["adjusted"] is not None else []
        parts += [f"detectable {row['detectable']:.3g}"] if row["detectable"] is not None else []
        parts += [f"{row['device_hours']:.3g} device hours"] if row["device_hours"] is not None else []
        lines.append("; ".join([*parts, *([row["reason"]] if row["reason"] else [])]))
    return lines


def _row(registration: Registration, v: Verdict) -> dict[str, Any]:
    claim, short = v.claim, _Names(registration)
    return {
        "name": claim.name,
        "kind": claim.kind,
        "metric": claim.metric,
        "mode": claim.mode,
        "margin": claim.margin or None,
        "contrast": _contrast(registration, v, short),
        "verdict": v.verdict,
        "reason": v.reason,
        "pairs": v.pairs,
        "unit": f"values of {short[claim.over]}" if claim.over else "seeds",
        "method": v.method,
        "notes": v.notes,
        **{
            name: _rounded(getattr(v, name))
            for name in ("mean", "low", "high", "confidence", "p", "adjusted", "detectable", "device_hours")
        },
    }


class _Names(dict[str, str]):
    """The axes of a sweep by as much of their names as tells them apart."""

    def __init__(self, registration: Registration) -> None:
        axes = list(registration.axes)
        super().__init__(zip(axes, read_runs.short_names(axes, "."), strict=True))

    def side(self, values: Texts) -> str:
        """Returns values of axes in words."""
        return ", ".join(f"{self[axis]} {' and '.join(_cut(t) for t in texts)}" for axis, texts in values.items())


def _contrast(registration: Registration, v: Verdict, short: _Names) -> str:
    """Returns in words what a claim compares."""
    claim = v.claim
    parts = [f"{short.side(claim.arms)} minus {short.side(claim.against)}"]
    if claim.best:
        of_sides = " and ".join(short.side({a: [value] for a, value in c.items()}) for c in v.chosen)
        chosen = f": {of_sides}" if of_sides else ""
        seeds = ", ".join(map(str, registration.choose_seeds))
        parts.append(f"each at its best {', '.join(short[a] for a in claim.best)} by seeds {seeds}{chosen}")
    fixed = {a for a in registration.axes if a in claim.arms and a in claim.against}
    averaged = [short[a] for a in registration.axes if a not in (*claim.best, claim.over, *fixed)]
    if averaged:
        parts.append(f"mean over {', '.join(averaged)}")
    if claim.over:
        parts.append(f"one difference for each {short[claim.over]}")
    return "; ".join(parts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"


def _rounded(value: float) -> float | None:
    known = finite(value)
    return None if known is None else float(f"{known:.{SIGNIFICANT_DIGITS}g}")
