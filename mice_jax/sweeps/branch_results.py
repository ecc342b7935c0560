"""What the branches of a run show about the critical batch size."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax.config import Sweep
from mice_jax.statistics.critical_batch import LEVEL, CriticalBatch, critical_batch
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import write_atomically
from mice_jax.storage.workdir import BRANCH, CRITICAL_BATCH
from mice_jax.sweeps.trials import fixed_params
from mice_jax.training.stop_monitor import read_records

BATCH_SIZE = "optim.batch_size"
WINDOW = 0.25  # the share of the branch's samples, its last, over which the training loss is averaged
TRAINING = "training loss"


def of_folder(folder: Path, sweep: Sweep) -> dict[str, Any] | None:
    """Returns the critical batch size that finished branches show, as plain JSON values.

    Args:
        folder: The folder of the branches.
        sweep: Their settings.

    Returns:
        None where the folder holds no branches, they do not differ in their batch size, or some have not ended.
    """
    trunk, batch_sizes = read_json(folder / BRANCH), list(sweep.axes.get(BATCH_SIZE, []))
    if trunk is None or len(batch_sizes) < 2:
        return None
    values = _values(folder, sweep, int(trunk["samples"]))
    if values is None:
        return None
    found = critical_batch(values, batch_sizes, trunk["tolerance"])
    told = {"sentences": sentences(found, trunk), "trunk": trunk, "seeds": len(sweep.seeds), "level": LEVEL}
    return _plain(found) | told


def write(folder: Path, sweep: Sweep) -> list[str]:
    """Writes what the branches in a folder show, if it has any; returns it in sentences."""
    found = of_folder(folder, sweep)
    if found is None:
        return []
    write_atomically(folder / CRITICAL_BATCH, json.dumps(found, indent=2) + "\n")
    return found["sentences"]


def _values(folder: Path, sweep: Sweep, at: int) -> dict[str, np.ndarray] | None:
    """Returns each metric by batch size and seed, float64 [B, S]: for each batch size, that of its best arm."""
    arms: dict[int, list[list[tuple[float, float]]]] = {}
    by_arm: dict[str, tuple[int, list[tuple[float, float]]]] = {}
    for number, params in enumerate(fixed_params(sweep)):
        run = folder / "runs" / str(number)
        summary = read_json(run / "summary.json") or {}
        if summary.get("status") not in ("completed", "stopped"):
            return None
        arm = repr({k: v for k, v in params.items() if k != "seed"})
        whole = summary["status"] == "completed"
        measured = _of_run(run, sweep.metric, at) if whole else (math.inf, math.inf)
        by_arm.setdefault(arm, (int(params[BATCH_SIZE]), []))[1].append(measured)
    for batch_size, of_seeds in by_arm.values():
        arms.setdefault(batch_size, []).append(of_seeds)
    best = [np.array(min(arms[b], key=lambda of: float(np.mean(of, axis=0)[0]))) for b in sweep.axes[BATCH_SIZE]]
    values = {TRAINING: np.stack([a[:, 1] for a in best])}
    return values if sweep.metric == "loss" else {sweep.metric: np.stack([a[:, 0] for a in best])} | values


def _of_run(run: Path, metric: str, at: int) -> tuple[float, float]:
    """Returns the metric at the end of a run, and the training loss over the last part of its branch."""
    records = read_records(run)
    end = records[-1]["samples"]
    recent = [r for r in records if r["samples"] > end - WINDOW * (end - at)]
    before = [at, *(r["samples"] for r in records if r["samples"] <= recent[0]["samples"])][-2]
    sizes = np.diff([before, *(r["samples"] for r in recent)])
    loss = float(np.average([r["loss"] for r in recent], weights=sizes))
    return float(records[-1].get(metric, math.nan)), loss


def sentences(found: CriticalBatch, trunk: Mapping[str, Any]) -> list[str]:
    """Returns the critical batch size and the noise scale at the branch in sentences."""
    largest = found.batch_sizes[-1]
    estimate = f"{found.estimate:.0f}" if math.isfinite(found.estimate) else f"at least {largest}"
    if found.low is None or found.high is None:
        interval = "no interval: it needs three seeds"
    elif math.isinf(found.high):
        interval = f"interval {found.low} or more" if found.low > found.batch_sizes[0] else "interval: cannot be told"
    else:
        interval = f"interval {found.low} to {found.high:.0f}"
    lines = [
        f"critical batch size after {trunk['samples']:,} samples, within {found.tolerance:g} of the loss of "
        f"{found.batch_sizes[0]}: {estimate} ({interval})"
    ]
    scale, low, high = (trunk.get(name) for name in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    if scale is not None or low is not None:
        shown = f"{scale:.0f}" if scale is not None else f"at least {low:.0f}"
        ends = "" if low is None else f" ({low:.0f} to {high:.0f})" if high is not None else f" ({low:.0f} or more)"
        lines.append(f"gradient noise scale there: {shown}{ends} samples")
    return lines


def _plain(found: CriticalBatch) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    plain = finite(dataclasses.asdict(found))
    assert isinstance(plain, dict)
    return plain
