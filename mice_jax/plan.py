"""Compute whether a run fits on devices that this machine need not have, and its rows, mesh, time and cost.

  mice plan --config=configs/paper/recipes.py --topology=v5p:2x2x2
  mice plan --config=configs/demo.py --topology=cpu:8 --json

The functions of the training step are compiled ahead of time for the topology: TPU v4, v5e, v5p, v6e and 7x by libtpu
(the extra `aot`), cpu:N, and NVIDIA GPUs (h100:8) with --device_file; without it, GPUs are estimated.
The memory is what XLA reports; time and cost are estimates. docs/plan.md explains the output.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("plan")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax.cli.flags import define_plan
from mice_jax.cli.format import format_bytes, format_duration
from mice_jax.cli.topology_names import parse_topology
from mice_jax.config import Config
from mice_jax.data.readers import open_source
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError, format_count
from mice_jax.hardware import CHIPS, GPU_MEMORY_FRACTION_VARIABLE, gpu_memory_fraction
from mice_jax.model_source import ModelSource, resolve_source, with_vocabulary
from mice_jax.models.spec import ModelSpec
from mice_jax.planning import ahead_of_time, cost, step_time
from mice_jax.planning.ahead_of_time import CompiledMemory
from mice_jax.planning.planner import Layout, RunPlan
from mice_jax.planning.settings import fitting_settings
from mice_jax.runtime import watchdog, xla_flags
from mice_jax.runtime.precision import set_float32_matmul_precision
from mice_jax.sharding import replicated_dims
from mice_jax.storage.model_names import RANDOM
from mice_jax.training import memory_model

READ_BYTES = 16 * 2**20  # a plan reads the run's data only if they are at most this large
MEAN_LENGTH = 512  # the assumed mean tokens of a sample, if neither the data nor --mean_length give it
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
AMPLE = 16  # other layouts of a run that needs less than 1/16 of the memory are estimated, not compiled
COMPILE_ATTEMPTS = 4  # for TPUs with SparseCores; about one compilation in three crashes
WIDTH = 160  # columns of a table if the output is not a terminal


def plan(values: command.Values) -> None:
    """Plans the run of a config on a topology and prints the plan."""
    config = command.config_of(values)
    topology = command.required(values, "topology")
    deadline = time.monotonic() + 60 * values.compile_minutes
    xla_flags.set_flags(config.train.deterministic)
    _start_jax(topology)
    target = ahead_of_time.find_topology(topology, values.device_file)

    # ---- Inputs of the plan -----------------------------------------------------------------------------------
    assumed: list[str] = []
    config_file = Path(values["config"].config_filename)  # type: ignore[attr-defined]  # a flag of ml_collections
    origin = _origin(config, config_file, assumed)
    tokenized = bool(config.data.tokenizer) or any((origin.folder / name).exists() for name in TOKENIZERS)
    work = _work(config, values.mean_length, tokenized, assumed)
    spec = _spec(config, origin, tokenized, assumed)
    run = RunPlan(
        config, spec, origin.architecture, target,
        samples=work.samples, mean_length=work.mean_length, deadline=deadline,
    )  # fmt: skip
    set_float32_matmul_precision(run.dtype, target.chip.platform)

    # ---- Results ----------------------------------------------------------------------------------------------
    host = _host_memory(run)
    began = time.perf_counter()
    needs = run.compile(run.layout)
    compile_s = time.perf_counter() - began
    ample = needs and AMPLE * max(n.total for n in needs) <= target.chip.memory
    if ample and not values["compile_minutes"].present:
        run.stop_compiling()  # Nobody needs to know to the byte by how much more would fit.
    rows, rows_known_by = run.largest_rows(needs)
    result = {
        "config": str(config_file),
        "model": origin.architecture,
        "topology": topology,
        "devices": target.count,
        "device_kind": target.chip.kinds[0],
        "planned": _layout(run, run.layout) | {"attention": run.attention, "compute_dtype": run.dtype},
        "replicated": _replicated(run),
        **(memory := _memory(run, needs)),
        **host,
        "compile_s": compile_s,
        "rows_per_device": rows,
        "rows_known_by": rows_known_by,
        **_time(run, work, values.price_per_hour, assumed),
        "suggestions": _suggestions(run, needs),
        "fitting_settings": [] if memory["fits"] else [dataclasses.asdict(s) for s in fitting_settings(run)],
        "assumptions": assumed,
    }
    if values.json:
        print(json.dumps(result))
    else:
        _print(result)


def _start_jax(topology: str) -> None:
    """Makes JAX use CPU devices only, as many as a cpu:N topology has, so that a plan never occupies an accelerator."""
    family, count = parse_topology(topology)
    with contextlib.suppress(RuntimeError):  # raised if this process has already initialized JAX
        jax.config.update("jax_platforms", "cpu")
        if family == "cpu":
            jax.config.update("jax_num_cpu_devices", int(count))


# ---------------------------------------------------------------------------------------- what is planned
@dataclasses.dataclass(frozen=True)
class Workload:
    """The amount of data that a run processes."""

    mean_length: float  # mean tokens of a sample
    samples: float  # mean samples of a step, since phases may have different batch sizes
    steps: int | None  # None if the number of steps is not known


def _origin(config: Config, config_file: Path, assumed: list[str]) -> ModelSource:
    """Returns the model of `init_from` or, if that is not on this machine, its shape from the config's folder.

    Args:
      config: the config of the run.
      config_file: the file of the config, whose folder may contain shapes/<model>/config.json.
      assumed: a list to which the assumption is appended if the shape is used.
    """
    init_from = config.model.init_from
    shape = config_file.parent / "shapes" / Path(init_from).name / "config.json"
    if init_from.startswith(RANDOM) or "://" in init_from or Path(init_from).exists() or not shape.is_file():
        return resolve_source(init_from, weights=False)
    assumed.append(f"{init_from} is not on this machine: the model's shape is taken from {shape}")
    return resolve_source(RANDOM + str(shape))


def _spec(config: Config, origin: ModelSource, tokenized: bool, assumed: list[str]) -> ModelSpec:
    """Returns the model's shape, with the vocabulary that `mice train` would use if the tokenizer is available.

    Args:
      config: the config of the run.
      origin: the model that the run starts from.
      tokenized: whether the tokenizer is available.
      assumed: a list to which the assumption is appended if it is not.
    """
    if not tokenized:
        assumed.append("the tokenizer is not on this machine: it adds no token to the model's vocabulary")
        return origin.spec
    tokenizer = load_tokenizer(config.data.tokenizer or str(origin.folder), config.data.chat_template)
    return with_vocabulary(origin, tokenizer.get_vocab(), {t.content for t in tokenizer.added_tokens_decoder.values()})


def _work(config: Config, mean_length: float, tokenized: bool, assumed: list[str]) -> Workload:
    """Returns the workload, from the data if they are local and small, else from the flags, the config or defaults.

    Args:
      config: the config of the run.
      mean_length: the mean tokens of a sample; 0 takes it from the data.
      tokenized: whether the tokenizer is available.
      assumed: a list to which each assumption is appended.
    """
    if tokenized and _few_data(config):
        data = cost.open_data(config)
        samples = sum(e.samples for e in data.mixture.epochs(data.total_steps)) / data.total_steps
        return Workload(mean_length or data.mean_length, samples, data.total_steps)
    if not mean_length:
        mean_length = min(MEAN_LENGTH, config.data.max_length)
        assumed.append(f"samples have {mean_length} tokens on average (--mean_length)")
    by_phase = [p.num_steps for p in config.data.phases]
    steps = config.optim.max_steps or (sum(by_phase) if all(by_phase) else None)
    if not steps:
        assumed.append("the number of steps is unknown, because the data were not read (--config.optim.max_steps)")
    sizes = [p.batch_size or config.optim.batch_size for p in config.data.phases]
    if len(set(sizes)) > 1 and not all(by_phase):
        assumed.append(f"phases have batch sizes of {', '.join(map(str, sizes))} samples: their mean is used")
    weights = by_phase if all(by_phase) else [1] * len(sizes)
    return Workload(mean_length, sum(s * w for s, w in zip(sizes, weights, strict=True)) / sum(weights), steps)


def _few_data(config: Config) -> bool:
    """Returns whether all of a run's sources are on disk and small enough to be read in seconds."""
    sources = [s for p in config.data.phases for s in (*p.sources, *p.validation)] + config.data.validation
    if any("://" in s.path or s.path.startswith(("tfds:", "hf:")) for s in sources):
        return False
    try:
        return sum(open_source(s.path).size for s in sources) <= READ_BYTES
    except UserError:  # a source does not exist yet
        return False


# ---------------------------------------------------------------------------------------- results
def _memory(run: RunPlan, needs: list[CompiledMemory]) -> dict[str, Any]:
    """Returns the memory of one device: the peak over the functions of the step, and its parts."""
    estimate, memory = run.estimate(run.layout), int(run.topology.chip.memory)
    parts = {
        "hbm_bytes": memory,
        "params_bytes": estimate.params,
        "optimizer_bytes": estimate.optimizer,
        "average_bytes": estimate.average,
        "sums_bytes": estimate.sums,
        "estimate": dataclasses.asdict(estimate) | {"total": estimate.total},
        "functions": {n.function: dataclasses.asdict(n) | {"total": n.total} for n in needs},
    }
    if not needs:
        return parts | {
            "fits": estimate.total <= memory_model.USABLE_FRACTION * memory,
            "compiled": False,
            "bytes_per_device": estimate.total,
            "arguments_bytes": estimate.resident,
            "temp_bytes": estimate.total - estimate.resident,
            "peak_function": "accumulate",
        }
    peak = max(needs, key=lambda n: n.total)
    return parts | {
        "fits": peak.total <= memory,
        "compiled": True,
        "bytes_per_device": peak.total,
        "arguments_bytes": peak.arguments,
        "temp_bytes": peak.temporary,
        "peak_function": peak.function,
    }


def _host_memory(run: RunPlan) -> dict[str, Any]:
    """Returns what a device keeps in host memory, and checks that the hosts have so much."""
    chip, layout = run.topology.chip, run.layout
    inputs, devices = run.memory_inputs(layout.sizes), min(run.topology.count, chip.host_devices)
    memory_model.check_host_memory(inputs, layout.rows, layout.remat, devices, devices * chip.host_memory)
    needed = memory_model.estimate_host_memory(inputs, layout.rows, layout.remat)
    return {
        "host_bytes_per_device": needed,
        "host_bytes_per_host": devices * needed,
        "host_memory_bytes": int(devices * chip.host_memory),
    }


def _layout(run: RunPlan, layout: Layout) -> dict[str, Any]:
    """Returns the fields of the output that describe a layout."""
    mesh = dict(run.memory_inputs(layout.sizes).mesh.shape)
    return {"mesh": mesh, "remat": layout.remat, "rows_per_device": layout.rows, "flags": layout.flags()}


def _replicated(run: RunPlan) -> list[str]:
    """Returns the dims of parameters that the planned mesh does not divide."""
    inputs = run.memory_inputs(run.layout.sizes)
    return replicated_dims(inputs.decoder.abstract, inputs.decoder.axes, inputs.mesh)


def _time(run: RunPlan, work: Workload, price: float, assumed: list[str]) -> dict[str, Any]:
    """Returns the duration of a step, and the duration and cost of the whole run.

    Args:
      run: the planned run.
      work: the amount of data of the run.
      price: the price of one chip per hour; 0 means that it is unknown.
      assumed: a list to which each assumption is appended.
    """
    estimate, chip = run.step_time_of(run.layout), run.topology.chip
    assumed.append(step_time.describe_assumptions(chip, run.overlap))
    if chip.platform == "gpu":
        assumed.append(
            f"JAX takes {gpu_memory_fraction():.0%} of a GPU's memory ({GPU_MEMORY_FRACTION_VARIABLE} of this process)"
        )
    if run.config.eval.tasks:
        assumed.append("the time and memory of benchmarks during training (eval.tasks) are left out")
    chips = run.topology.count / chip.devices
    days = work.steps * estimate.seconds / 86400 if work.steps else None
    if days and not price:
        assumed.append("the cost is unknown without the price of a chip (--price_per_hour)")
    return {
        "mean_length": work.mean_length,
        "steps": work.steps,
        "step_time_s": estimate.seconds,
        "tokens_per_s": estimate.tokens / estimate.seconds,
        "mfu": estimate.mfu,
        "compute_s": estimate.compute_s,
        "network_s": estimate.network_s,
        "exposed_s": estimate.exposed_s,
        "update_s": estimate.update_s,
        "host_s": estimate.host_s,
        "num_microbatches": estimate.microbatches,
        "days": days,
        "chips": chips,
        "cost": days * 24 * chips * price if days and price else None,
    }


def _suggestions(run: RunPlan, needs: list[CompiledMemory]) -> list[dict[str, Any]]:
    """Returns the suggested layouts, with the memory and step time of each."""
    return [
        {
            "for": name,
            "bytes_per_device": total,
            "known_by": known_by,
            "step_time_s": run.step_time_of(layout).seconds,
            "is_planned": layout == run.layout,
            **_layout(run, layout),
        }
        for name, layout, total, known_by in run.suggestions(needs)
    ]


# ---------------------------------------------------------------------------------------- printing
def _print(result: dict[str, Any]) -> None:
    """Prints the plan as a table, followed by the suggestions and the assumptions."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(show_header=False, box=box.SIMPLE, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in _lines(result).items():
        table.add_row(name, escape(line))
    console.print(table)
    for s in result["suggestions"]:
        memory = f"{format_bytes(s['bytes_per_device'])} ({s['known_by']})"
        suggestion = f"{s['for']}: {memory}, a step in about {s['step_time_s']:.3g} s"
        console.print(escape(f"{suggestion}: {'as planned' if s['is_planned'] else s['flags']}"), soft_wrap=True)
    for setting in result["fitting_settings"]:
        memory = f"{format_bytes(setting['bytes_per_device'])}, a step in about {setting['step_time_s']:.3g} s"
        cost = f" ({setting['cost']})" if setting["cost"] else ""
        console.print(escape(f"would fit, by estimate: {memory}: {setting['flags']}{cost}"), soft_wrap=True)
    for assumption in result["assumptions"]:
        console.print(escape(f"assumed: {assumption}"), soft_wrap=True)


def _lines(result: dict[str, Any]) -> dict[str, str]:
    """Returns the lines of the table by their names."""
    planned, estimate = result["planned"], result["estimate"]
    mesh = ", ".join(f"{k} {v}" for k, v in planned["mesh"].items())
    rows = f"{format_count(planned['rows_per_device'], 'row')} per device, remat {planned['remat']}"
    resident = sum(result[f"{part}_bytes"] for part in ("params", "optimizer", "average", "sums"))
    estimated = estimate["total"] - resident
    verdict = "fits" if result["fits"] else "does not fit"
    how = f"compiled in {result['compile_s']:.0f} s" if result["compiled"] else "an estimate: nothing was compiled"
    functions = [
        f"{n} {format_bytes(f['total'])}{' (out of memory)' if f['out_of_memory'] else ''}"
        for n, f in result["functions"].items()
    ]
    lines = {
        "model": f"{result['model']}, {planned['compute_dtype']}, {planned['attention']} attention",
        "mesh": f"{mesh} on {result['devices']} x {result['device_kind']}; {rows}",
        "replicated": f"{', '.join(result['replicated'])} on every device" if result["replicated"] else "",
        "parameters": format_bytes(result["params_bytes"]),
        "optimizer": format_bytes(result["optimizer_bytes"]),
        "average": format_bytes(result["average_bytes"]) if result["average_bytes"] else "",
        "gradient sums": format_bytes(result["sums_bytes"]),
        "host memory": f"{format_bytes(result['host_bytes_per_device'])} per device, "
        f"{format_bytes(result['host_bytes_per_host'])} of {format_bytes(result['host_memory_bytes'])} per host, "
        f"moved in about {result['host_s']:.3g} s of a step"
        if result["host_bytes_per_device"]
        else "",
        "activations": f"{format_bytes(result['temp_bytes'])}, with all other temporary memory of "
        f"{result['peak_function']}; estimated {format_bytes(estimated)}",
        "peak": f"{format_bytes(result['bytes_per_device'])} of {format_bytes(result['hbm_bytes'])} per device: "
        f"{verdict} ({how})",
        "by function": ", ".join(functions),
        "most rows": f"{format_count(result['rows_per_device'], 'row')} per device ({result['rows_known_by']})",
        "a step": f"about {result['step_time_s']:.3g} s in {result['num_microbatches']} microbatches, "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['mfu']:.0%} of the peak: an estimate",
    }
    if result["days"]:
        what = "device" if result["device_kind"] == "cpu" else "chip"
        devices = f"{result['chips']:g} {what}{'s' * (result['chips'] != 1)}"
        cost = f", {result['cost']:,.0f} at the price given" if result["cost"] else ""
        steps, time_needed = format_count(round(result["steps"]), "step"), format_duration(result["days"])
        lines["the run"] = f"{steps}, about {time_needed} on {devices}{cost}"
    return {name: line for name, line in lines.items() if line}


def begin(arguments: Sequence[str], values: command.Values) -> int | None:
    """Plans in this process or, where the compiler may crash, in a child that is started again if it does."""
    if watchdog.is_child():
        watchdog.exit_when_parent_exits()
    elif _may_crash(command.required(values, "topology")):
        return _plan_in_child(arguments)
    plan(values)
    return None


def _may_crash(topology: str) -> bool:
    """Whether libtpu compiles for SparseCores, which sometimes overflows a stack of its compiler (BUILD_NOTES.md)."""
    family, _ = parse_topology(topology)
    return family in CHIPS and CHIPS[family].sparse_cores


def _plan_in_child(arguments: Sequence[str]) -> int:
    """Runs this command as a child, again if the compiler crashes; returns the exit code."""
    for attempt in range(1, COMPILE_ATTEMPTS + 1):
        child, pipe = watchdog.start_child("mice_jax.plan", arguments)
        try:
            code = child.wait()
        finally:
            os.close(pipe)  # Ends the child where this process was interrupted.
        if code != -signal.SIGSEGV:
            return code if code >= 0 else 128 - code
        print(f"libtpu's compiler crashed in attempt {attempt} of {COMPILE_ATTEMPTS}", file=sys.stderr, flush=True)
    raise UserError(
        f"libtpu's compiler crashed {COMPILE_ATTEMPTS} times, which it does at random when it compiles for "
        "SparseCores. Run the command again, or install another version of libtpu."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return command.run(__doc__, define_plan, functools.partial(begin, arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
