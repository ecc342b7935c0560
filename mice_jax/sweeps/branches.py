"""Branches of a run: a sweep whose trials go on from one of its checkpoints with other settings.

A branch has the run's weights, moments, counters and place in the data. What is copied into a trial's workdir is what
a resumed run reads, so a trial with unchanged settings goes on exactly as the run itself would have.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mice_jax.config import Branch, Config, Sweep, from_dict, holds_data_out, locate, to_dict
from mice_jax.config_checks import OPTIMIZERS_WITH_BETA2, beta2_of, half_life_of_beta2, rate_for_batch
from mice_jax.data.mixture import Mixture, PhasePools, Pool, Trunk
from mice_jax.data.readers import files_of, is_remote
from mice_jax.errors import UserError, did_you_mean
from mice_jax.statistics.registered_claims import NONE
from mice_jax.storage import jsonl
from mice_jax.storage.checkpoint_steps import saved_steps
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import write_atomically
from mice_jax.storage.recorded_config import read_run_config
from mice_jax.storage.workdir import BRANCH, DIRECTIONS, METRICS
from mice_jax.sweeps.branch_results import BATCH_SIZE
from mice_jax.sweeps.trials import fixed_params, settled, trial_config

# Settings that a branch may change: the others decide what the checkpoint holds, or what was trained on before.
AXES = tuple(
    f"optim.{name}"
    for name in (
        "batch_size", "learning_rate", "rate_for_batch", "schedule", "warmup_steps", "warmup_ratio", "final_ratio",
        "decay_ratio", "grad_clip", "loss_reduction", "beta1", "beta2", "beta2_half_life", "eps",
    )
)  # fmt: skip
NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")
SWEEP_FILE = '''"""Branches of {run} after {samples} samples; `mice branch` wrote this file."""

from mice_jax.config import (
    Branch, Checkpoint, Config, Data, Eval, Log, Lora, Mesh, Model, Optim, Phase, Published, Source, Stop, Sweep, Train,
)  # fmt: skip


def get_sweep(arg: str = "") -> Sweep:
    return {sweep!r}
'''


@dataclasses.dataclass(frozen=True)
class Plan:
    """The branches of a run, before anything is written.

    Attributes:
        run: The folder of the run.
        step: The step of the checkpoint from which they branch off.
        samples: The samples that the run had seen by then.
        sweep: The sweep whose trials they are.
        ends: The samples and the steps at the end of each arm, by the arm's parameters.
        noise: The noise scale of the run at the branch, with its interval.
        tolerance: The loss above that of the smallest batch size that does not count.
    """

    run: Path
    step: int
    samples: int
    sweep: Sweep
    ends: list[tuple[dict[str, Any], int]]
    noise: dict[str, float | None]
    tolerance: float


def plan(
    run: Path,
    at: int,
    axes: Sequence[str],
    *,
    samples: int = 0,
    scale: str = "sqrt",
    seeds: Sequence[int] = (),
    tolerance: float = 0.01,
) -> Plan:
    """Plans the branches of a run.

    Args:
        run: The folder of the run.
        at: The number of samples of the checkpoint from which they branch off.
        axes: What they differ in, each as "FIELD=VALUE,VALUE".
        samples: How many samples they train on; 0 for as many as the run had left.
        scale: How the rate follows the batch size: none, sqrt or linear.
        seeds: The seeds of their orders; three by default, of which the first is the run's own.
        tolerance: The loss above that of the smallest batch size that does not count.

    Raises:
        UserError: The run, its data or the checkpoint is missing, an axis is wrong, or the arms would end after
            different numbers of samples.
    """
    config, report = _config_of(run), read_json(run / "data_report.json") or {}
    records = {r["step"]: r for r in jsonl.read(run / METRICS)}
    step = _step_at(run, records, at)
    _check_data(run, config)
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise UserError(f"--tolerance={tolerance} must be a number above 0, in units of the loss.")
    values = _axes(config, axes)
    base = _base(config, step, values, scale, str(report.get("fingerprint", "")))
    _check_warm_starts(base, step, report)
    pools = _pools(base, report, run)
    base.branch.samples = at + samples if samples else _planned_samples(config, pools)
    if base.branch.samples <= at:
        raise UserError(f"--at={at}: the run ends after {base.branch.samples:,} samples, so nothing is left to branch.")
    sweep = Sweep(base=base, axes=values, stop=None, claims=NONE)
    sweep.seeds = list(seeds) or [config.seed + i for i in range(3)]
    if not holds_data_out(base):
        sweep.metric = "loss"
    sweep.validate()
    sweep, _ = settled(sweep)
    noise = {name: records[step].get(name) for name in NOISE}
    return Plan(run, step, at, sweep, _ends(sweep, pools), noise, tolerance)


# ---------------------------------------------------------------------------------------- reading the run
def _config_of(run: Path) -> Config:
    config = from_dict(read_run_config("from", run))
    if config.branch.step:
        raise UserError(f"--from={run} is itself a branch. Give the run that it branches off from.")
    return config


def _step_at(run: Path, records: Mapping[int, Mapping[str, Any]], at: int) -> int:
    """Returns the step of the checkpoint after a number of samples."""
    there = {int(records[step]["samples"]): step for step in saved_steps(run) if step in records}
    if at not in there:
        listed = ", ".join(f"{samples} (step {step})" for samples, step in sorted(there.items())) or "none"
        raise UserError(
            f"--at={at}: {run} has no checkpoint after {at} samples. Its checkpoints are at {listed}. Choose one of "
            "these. A run saves every checkpoint.every_samples and deletes what no checkpoint.keep_ field keeps; "
            f"checkpoint.every_samples={at} with keep_every={at} keeps this one."
        )
    return there[at]


def _check_data(run: Path, config: Config) -> None:
    """Raises UserError where a file that the run was trained on is gone."""
    data = config.data
    sources = [s for p in data.phases for s in (*p.sources, *p.validation)] + data.validation
    for path in dict.fromkeys(s.path for s in sources):
        if is_remote(path) or path.startswith(("hf:", "tfds:")):
            continue
        try:
            files_of(path)
        except UserError:
            raise UserError(
                f"--from={run}: its data is gone. A branch goes on in the order of the run's own samples, and "
                f"{path!r}, which its config.json names, is no file from {os.getcwd()}. Restore it, or start from the "
                "folder that the run was started in."
            ) from None


def _check_warm_starts(base: Config, step: int, report: Mapping[str, Any]) -> None:
    ends = np.cumsum([sum(e["steps"] for e in p["epochs"]) for p in report.get("phases", [])])
    for phase, before in zip(base.data.phases[1:], ends, strict=False):
        if phase.seed_from == "best" and step <= before:
            raise UserError(
                f"the phase {phase.name!r} of the run starts from the best checkpoint of the phase before, and a "
                "branch has the checkpoint at the branch alone. Choose an --at in that phase or after it."
            )


def _pools(base: Config, report: Mapping[str, Any], run: Path) -> list[PhasePools]:
    """Returns phases of as many samples as those of the run."""
    counts = {p["name"]: int(p["samples_per_epoch"]) for p in report.get("phases", [])}
    if any(phase.name not in counts for phase in base.data.phases):
        raise UserError(
            f"--from={run}: data_report.json is missing or damaged, which counts the samples of its phases."
        )
    return [
        PhasePools(p.name, p.num_epochs, (Pool(np.arange(counts[p.name])),), p.num_steps, p.batch_size)
        for p in base.data.phases
    ]


def _planned_samples(config: Config, pools: Sequence[PhasePools]) -> int:
    """Returns after how many samples the run ends where nothing stops it."""
    drop = config.data.drop_remainder
    before = Mixture(pools, batch_size=config.optim.batch_size, seed=0, drop_remainder=drop).samples_before()
    return int(before[min(config.optim.max_steps or len(before) - 1, len(before) - 1)])


# ---------------------------------------------------------------------------------------- the settings
def _axes(config: Config, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parses axes, each as FIELD=VALUE,VALUE; several of them may stand in one text, with semicolons or spaces."""
    axes: dict[str, list[Any]] = {}
    for text in (part for t in texts for part in t.replace(";", " ").split()):
        name, equals, listed = text.partition("=")
        if name not in AXES:
            near = did_you_mean(name, AXES, f"; it can change {', '.join(AXES)}.", cutoff=0.85)
            raise UserError(
                f"--axes: {name!r} is not a setting that a branch can change{near} The other settings decide what the "
                "checkpoint holds, or which samples were trained on before it."
            )
        part, field = locate(config, name)
        if not equals or not listed or name in axes:
            raise UserError(f"--axes: {text!r} must name a field once, with its values, as in {BATCH_SIZE}=16,32,64.")
        axes[name] = [_value(name, type(getattr(part, field)), value) for value in listed.split(",")]
    if not axes:
        raise UserError(
            f"--axes is missing: what do the branches differ in? For instance --axes={BATCH_SIZE}=16,32,64."
        )
    if BATCH_SIZE in axes:
        axes[BATCH_SIZE] = sorted(axes[BATCH_SIZE])
        own = [p.name for p in config.data.phases if p.batch_size]
        if own:
            raise UserError(
                f"--axes has {BATCH_SIZE}, but the phase {own[0]!r} of the run has a batch_size of its own, which that "
                "field does not change."
            )
    return axes


def _value(name: str, kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--axes: {name}={text!r} must be a value of type {kind.__name__}.") from None


def _base(config: Config, step: int, axes: Mapping[str, Any], scale: str, fingerprint: str) -> Config:
    """Returns the config of a branch with unchanged settings."""
    base = from_dict(to_dict(config))
    o = base.optim
    base.branch = Branch(
        step=step,
        batch_size=o.batch_size,
        seed=base.seed,
        beta2=beta2_of(o),
        max_steps=o.max_steps,
        data=fingerprint,
    )
    o.max_steps, base.train.pause_at_share = 0, 0.0
    if BATCH_SIZE not in axes:
        return base
    # Adam's memory stays the same in samples.
    chosen = o.beta2_half_life or {"optim.beta2", "optim.beta2_half_life"} & {*axes}
    if o.name in OPTIMIZERS_WITH_BETA2 and o.beta2 and not chosen:
        o.beta2_half_life, o.beta2 = half_life_of_beta2(o.beta2, o.batch_size), type(o)().beta2
    # The rates that the run trained with, which may have followed a rule themselves, belong to its batch size.
    for part in (o, *base.data.phases):
        part.learning_rate = rate_for_batch(part.learning_rate, o.rate_for_batch, o.batch_size, o.rate_batch_size)
    o.rate_for_batch, o.rate_batch_size = scale, o.batch_size if scale != "none" else 0
    if "optim.rate_for_batch" in axes:
        o.rate_batch_size = o.batch_size
    return base


def _ends(sweep: Sweep, pools: Sequence[PhasePools]) -> list[tuple[dict[str, Any], int]]:
    """Returns the parameters of each arm with its steps after the branch; raises UserError where their ends differ."""
    found, branch = [], sweep.base.branch
    arms = [p for p in fixed_params(sweep) if p["seed"] == sweep.seeds[0]]
    for params in arms:
        config = trial_config(sweep, params)
        before = Mixture(
            pools,
            batch_size=config.optim.batch_size,
            seed=config.seed,
            drop_remainder=config.data.drop_remainder,
            trunk=Trunk(branch.step, branch.batch_size, branch.seed),
        ).samples_before()
        last = int(np.searchsorted(before, branch.samples))
        if last == len(before) or before[last] != branch.samples:
            _raise_unequal(config, int(before[min(last, len(before) - 1)]))
        found.append(({k: v for k, v in params.items() if k != "seed"}, last - branch.step))
    return found


def _raise_unequal(config: Config, end: int) -> None:
    branch, batch_size = config.branch, config.optim.batch_size
    raise UserError(
        f"the branches would have unequal horizons: they end after {branch.samples:,} samples, and steps of "
        f"{batch_size} samples end at {end:,} instead. Choose --for so that all batch sizes divide it and no epoch "
        "ends before, or leave it out to run to the end of the data."
    )


# ---------------------------------------------------------------------------------------- writing the branches
def write(made: Plan, workdir: Path) -> Path:
    """Writes the file of the sweep and the workdirs of its trials, unless they are there; returns that file.

    Raises:
        UserError: The folder holds something else.
    """
    record = {
        "run": str(made.run.resolve()),
        "step": made.step,
        "samples": made.samples,
        "batch_size": made.sweep.base.branch.batch_size,
        "tolerance": made.tolerance,
        **made.noise,
    }
    file = workdir / BRANCH
    if (known := read_json(file)) is not None and known != record:
        raise UserError(f"--workdir={workdir} holds other branches ({file}). Give another --workdir.")
    if not file.exists() and workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} is not empty and holds no branches. Give another --workdir.")
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(record, indent=2) + "\n")
    for number, params in enumerate(fixed_params(made.sweep)):
        if not (workdir / "runs" / str(number)).exists():
            partial = workdir / f"runs.{number}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            copy_state(made.run, made.step, trial_config(made.sweep, params), partial)
            partial.rename(workdir / "runs" / str(number))
    sweep_file = workdir / "branch.py"
    text = SWEEP_FILE.format(run=made.run, samples=made.samples, sweep=made.sweep)
    write_atomically(sweep_file, text)
    return sweep_file


def copy_state(run: Path, step: int, config: Config, workdir: Path) -> None:
    """Copies into a new workdir what a run needs to go on from a checkpoint of another run.

    Args:
        run: The folder of the other run.
        step: The step of its checkpoint.
        config: The config of the run that goes on.
        workdir: Its folder.
    """
    (workdir / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / str(step), workdir / "checkpoints" / str(step), copy_function=_link_or_copy)
    shutil.copytree(run / "model", workdir / "model")
    if (run / DIRECTIONS).exists():
        shutil.copyfile(run / DIRECTIONS, workdir / DIRECTIONS)
    lines = [line for line in (run / METRICS).read_text().splitlines() if json.loads(line)["step"] <= step]
    (workdir / METRICS).write_text("".join(line + "\n" for line in lines))
    # What "auto" chose for the run is chosen again, as in a resumed run.
    whole = to_dict(config) | {"resolved": (read_json(run / "config.json") or {}).get("resolved", {}), "provenance": {}}
    write_atomically(workdir / "config.json", json.dumps(whole, indent=2) + "\n")


def _link_or_copy(source: str, target: str) -> None:
    """Links a file of a checkpoint, which is never written again, where the file system can; else copies it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
