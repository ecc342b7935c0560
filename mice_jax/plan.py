"""Whether a run fits devices that need not be here, the rows and mesh to give it, and what it would take.

  mice plan --config=configs/paper/recipes.py --topology=v5p:2x2x2
  mice plan --config=configs/demo.py --topology=cpu:8 --json

The functions of the real step are compiled ahead of time for the topology: TPU v4, v5e, v5p, v6e and 7x by libtpu
(pip install 'mice_jax[aot]'), cpu:N, and NVIDIA GPUs (h100:8) with --device_file; without one, those are estimated.
Memory is what XLA says; time and cost are arithmetic. docs/plan.md says how to read it.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax import aot, command, fit, pace
from mice_jax.aot import Need
from mice_jax.config import Config
from mice_jax.data.readers import open_source
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.lab import planned
from mice_jax.models.spec import ModelSpec
from mice_jax.planning import Planned
from mice_jax.start import RANDOM, Origin, find_origin, with_vocabulary

READ_BYTES = 64 * 2**20  # of data: more is not read for a plan
MEAN_LENGTH = 512  # tokens a sample, where nothing is known
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
WIDTH = 160  # of tables in a file or a pipe


def define(values: command.Values, argv: list[str]) -> None:
    command.define_config(values, argv)
    flags.DEFINE_string("topology", None, "cpu:N, v5p:2x2x2, h100:8, ...", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    minutes = "for compiling other rows and meshes; beyond it they are estimated"
    flags.DEFINE_float("compile_minutes", 3.0, minutes, lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("price_per_hour", 0.0, "of one chip, for the cost", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("mean_length", 0.0, "tokens a sample; 0 = of the data", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("num_samples", 0, "of an epoch; 0 = of the data", lower_bound=0, flag_values=values)
    flags.DEFINE_string("device_file", "", "an NVIDIA GPU's *.gpu_target_config.pbtxt", flag_values=values)


def plan(values: command.Values) -> None:
    config = command.config_of(values)
    topology = command.required(values, "topology")
    deadline = time.monotonic() + 60 * values.compile_minutes
    _start_jax(topology)
    target = aot.find_target(topology, values.device_file)
    assumed: list[str] = []
    config_file = Path(values["config"].config_filename)  # type: ignore[attr-defined]  # ml_collections' own kind
    origin = _origin(config, config_file, assumed)
    work = _work(config, values.mean_length, values.num_samples, assumed)
    run = Planned(config, _spec(config, origin, assumed), origin.architecture, target, work.mean_length)
    needs = run.compile(run.layout)
    said = {
        "config": str(config_file),
        "model": origin.architecture,
        "topology": topology,
        "devices": target.count,
        "device_kind": target.kind,
        **_memory(run, needs),
        **_rows(run, needs, deadline),
        **_time(run, work, values.price_per_hour, assumed),
        "suggestions": _suggestions(run, deadline),
        "assumptions": assumed,
    }
    if values.json:
        print(json.dumps(said))
    else:
        _print(said, run, needs)


def _start_jax(topology: str) -> None:
    """Asks JAX for CPU devices alone, as many as the topology has: what is compiled for is not taken, or not here."""
    family, _, count = topology.partition(":")
    with contextlib.suppress(RuntimeError):  # JAX has started, in a process that did more than this
        jax.config.update("jax_platforms", "cpu")
        if family == "cpu" and count.isdigit() and int(count):
            jax.config.update("jax_num_cpu_devices", int(count))


# ---------------------------------------------------------------------------------------- what is planned
@dataclasses.dataclass(frozen=True)
class Work:
    """What a run has to get through, as far as it is known."""

    mean_length: float  # tokens a sample
    steps: float | None


def _origin(config: Config, config_file: Path, assumed: list[str]) -> Origin:
    """What `init_from` names; where that is not here, the shape of its name that lies beside the config."""
    init_from = config.model.init_from
    shape = config_file.parent / "shapes" / Path(init_from).name / "config.json"
    if init_from.startswith(RANDOM) or "://" in init_from or Path(init_from).exists() or not shape.is_file():
        return find_origin(init_from)
    assumed.append(f"{init_from} is not here: the model is that of {shape}")
    return find_origin(RANDOM + str(shape))


def _spec(config: Config, origin: Origin, assumed: list[str]) -> ModelSpec:
    """With the vocabulary that `train` gives it, where the tokenizer is here."""
    folder = config.data.tokenizer or str(origin.folder)
    if not config.data.tokenizer and not any((origin.folder / name).exists() for name in TOKENIZERS):
        assumed.append("there is no tokenizer here: it adds no token to the model's vocabulary")
        return origin.spec
    tokenizer = load_tokenizer(folder, config.data.chat_template)
    return with_vocabulary(origin, tokenizer.get_vocab(), {t.content for t in tokenizer.added_tokens_decoder.values()})


def _work(config: Config, mean_length: float, num_samples: int, assumed: list[str]) -> Work:
    """By the flags; else from the data, where they are here and few; else assumed, and said."""
    phases, batch = config.data.phases, config.optim.batch_size
    if not mean_length and not num_samples and _few_data(config):
        cost = planned.cost(config)
        return Work(cost.tokens / max(1.0, cost.samples), cost.steps)
    if not mean_length:
        mean_length = min(MEAN_LENGTH, config.data.max_length)
        assumed.append(f"samples have {mean_length} tokens on average (--mean_length)")
    if not num_samples and not all(p.num_steps for p in phases):
        if not config.optim.max_steps:
            assumed.append("how long the run is is not known: its data are not here, or many (--num_samples)")
        return Work(mean_length, config.optim.max_steps or None)
    if num_samples and len(phases) > 1:
        assumed.append(f"each of the {len(phases)} phases has the same share of the samples")
    share = num_samples / len(phases)
    steps = sum(p.num_steps or math.ceil(p.num_epochs * share / (p.batch_size or batch)) for p in phases)
    return Work(mean_length, min(steps, config.optim.max_steps or steps))


def _few_data(config: Config) -> bool:
    """Whether all of a run's sources lie on disk and are read in seconds."""
    sources = [s for p in config.data.phases for s in (*p.sources, *p.validation)] + config.data.validation
    if any("://" in s.path or s.path.startswith(("tfds:", "hf:")) for s in sources):
        return False
    try:
        return sum(open_source(s.path).size for s in sources) <= READ_BYTES
    except UserError:  # they are not there yet
        return False


# ---------------------------------------------------------------------------------------- what is said
def _memory(run: Planned, needs: list[Need]) -> dict[str, Any]:
    """Of one device: the peak over the functions of the step, and what it is made of."""
    estimate, memory = run.estimate(run.layout), run.target.memory
    peak = max(needs, key=lambda n: n.total, default=None)
    resident = estimate.resident
    total = peak.total if peak else estimate.total
    return {
        "fits": total <= memory if peak else total <= fit.USABLE * memory,
        "compiled": bool(needs),
        "bytes_per_device": total,
        "hbm_bytes": memory,
        "arguments_bytes": peak.arguments if peak else resident,
        "temp_bytes": peak.temporary if peak else estimate.total - resident,
        "compile_s": sum(n.compile_s for n in needs),
        "params_bytes": estimate.params,
        "optimizer_bytes": estimate.optimizer,
        "sums_bytes": estimate.sums,
        "peak_function": peak.function if peak else "accumulate",
        "functions": {n.function: dataclasses.asdict(n) | {"total": n.total} for n in needs},
        "estimate": dataclasses.asdict(estimate) | {"total": estimate.total},
        "planned": _layout(run, run.layout) | {"attention": run.attention, "compute_dtype": run.dtype},
    }


def _layout(run: Planned, layout: Any) -> dict[str, Any]:
    mesh = dict(run.load(layout.sizes).mesh.shape)
    return {"mesh": mesh, "remat": layout.remat, "rows_per_device": layout.rows, "flags": layout.flags()}


def _rows(run: Planned, needs: list[Need], deadline: float) -> dict[str, Any]:
    rows, known_by = run.largest_rows(needs, deadline)
    return {"rows_per_device": rows, "rows_known_by": known_by}


def _time(run: Planned, work: Work, price: float, assumed: list[str]) -> dict[str, Any]:
    """Of a step and of the whole run, for chips that the table has."""
    made, chip = run.pace(run.layout), run.target.chip
    if made is None or chip is None:
        return {"mean_length": work.mean_length, "steps": work.steps}
    assumed.append(pace.ASSUMED)
    days = work.steps * made.seconds / 86400 if work.steps else None
    chips = run.target.count / chip.devices
    cost = days * 24 * chips * price if days and price else None
    return {
        "mean_length": work.mean_length,
        "steps": work.steps,
        "step_time_s": made.seconds,
        "tokens_per_s": made.tokens / made.seconds,
        "mfu": made.mfu,
        "compute_s": made.compute_s,
        "network_s": made.network_s,
        "update_s": made.update_s,
        "num_microbatches": made.microbatches,
        "days": days,
        "chips": chips,
        "cost": cost,
    }


def _suggestions(run: Planned, deadline: float) -> list[dict[str, Any]]:
    said = []
    for name, layout, total, known_by in run.suggestions(deadline):
        made = run.pace(layout)
        seconds = made.seconds if made else None
        more = {"for": name, "bytes_per_device": total, "known_by": known_by, "step_time_s": seconds}
        said.append(more | _layout(run, layout) | {"is_planned": layout == run.layout})
    return said


def _print(said: dict[str, Any], run: Planned, needs: list[Need]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(show_header=False, box=box.SIMPLE, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in _lines(said, needs).items():
        table.add_row(name, escape(line))
    console.print(table)
    for suggestion in said["suggestions"]:
        step = f", a step in about {suggestion['step_time_s']:.3g} s" if suggestion["step_time_s"] else ""
        what = f"{suggestion['for']}: {_size(suggestion['bytes_per_device'])} ({suggestion['known_by']}){step}"
        flags_of = "as planned" if suggestion["is_planned"] else suggestion["flags"]
        console.print(escape(f"{what}: {flags_of}"), soft_wrap=True)
    for assumption in said["assumptions"]:
        console.print(escape(f"assumed: {assumption}"), soft_wrap=True)


def _lines(said: dict[str, Any], needs: list[Need]) -> dict[str, str]:
    planned, estimate = said["planned"], said["estimate"]
    mesh = ", ".join(f"{k} {v}" for k, v in planned["mesh"].items())
    how = f"compiled in {said['compile_s']:.0f} s" if said["compiled"] else "an estimate: nothing was compiled"
    verdict = "fits" if said["fits"] else "does not fit"
    lines = {
        "run": f"{said['model']}, {mesh} on {said['devices']} x {said['device_kind']}; "
        f"{planned['rows_per_device']} rows a device, remat {planned['remat']}, {planned['attention']} attention, {planned['compute_dtype']}",
        "parameters": _size(said["params_bytes"]),
        "optimizer": _size(said["optimizer_bytes"]),
        "gradient sums": _size(said["sums_bytes"]),
        "activations": f"{_size(said['temp_bytes'])}, all that comes and goes in {said['peak_function']}; by "
        f"arithmetic {_size(estimate['total'] - said['params_bytes'] - said['optimizer_bytes'] - said['sums_bytes'])}",
        "peak": f"{_size(said['bytes_per_device'])} of {_size(said['hbm_bytes'])} a device: {verdict} ({how})",
        "by function": ", ".join(f"{n.function} {_size(n.total)}" + " (refused)" * n.refused for n in needs),
        "most rows": f"{said['rows_per_device']} a device ({said['rows_known_by']})",
    }
    if "step_time_s" in said:
        lines["a step"] = (
            f"about {said['step_time_s']:.3g} s in {said['num_microbatches']} microbatches, "
            f"{said['tokens_per_s']:,.0f} tokens/s, {said['mfu']:.0%} of the peak: an estimate"
        )
        if said["days"]:
            cost = f", {said['cost']:,.0f} at the price given" if said["cost"] else ""
            lines["the run"] = (
                f"{said['steps']:,.0f} steps, about {said['days']:.3g} days on {said['chips']:g} chips{cost}"
            )
    return {name: line for name, line in lines.items() if line}


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define, plan, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
