"""Fine-tune a model, or resume a run that was interrupted.

  mice train --config=configs/demo.py --workdir=runs/demo
  mice train --config=configs/demo.py --config.optim.learning_rate=1e-3 --workdir=runs/demo_1e-3

The same command again resumes the run. It leaves in the workdir: config.json, data_report.json, metrics.jsonl (a
line a step), TensorBoard events, checkpoints/<step>/, model/ (config.json and tokenizer) and summary.json.
"""

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from mice_jax import command, distributed, fit, metrics
from mice_jax.checkpoint import Checkpoints
from mice_jax.config import Config, differences, to_dict
from mice_jax.data import report
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.loader import StepSource, empty_rows, load_steps
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.display import Display
from mice_jax.errors import Preempted, StoppedByRule, UserError
from mice_jax.models import hf
from mice_jax.models.attention import choose_backend
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder, make_decoder
from mice_jax.optim import make_optimizer, make_schedule
from mice_jax.sharding import local_shards, make_mesh, num_shards, param_shardings, put_rows, replicated_dims
from mice_jax.start import Origin, find_origin, load_params, with_vocabulary
from mice_jax.step import StepFunctions, Sums, TrainState, make_step
from mice_jax.workdir import METRICS, Workdir, environment

EVAL_SAMPLES = 512  # held-out samples that are packed together
PLANNED_AHEAD = 2_000_000  # samples whose steps are planned before the first, about two seconds


def define(values: command.Values, argv: list[str]) -> None:
    command.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    command.define_distributed(values)


def begin(values: command.Values) -> None:
    config = command.config_of(values)
    with Workdir(Path(command.required(values, "workdir"))) as run:
        train(config, run, values)


def train(config: Config, run: Workdir, values: command.Values) -> None:
    # ---- What it starts from --------------------------------------------------------------------------------
    attention = choose_backend(config.model.attention)
    origin = find_origin(config.model.init_from)
    remarks: list[str] = []
    tokenizer = load_tokenizer(config.data.tokenizer or str(origin.folder), config.data.chat_template, remarks)
    spec = with_vocabulary(origin, tokenizer.get_vocab(), {t.content for t in tokenizer.added_tokens_decoder.values()})
    encoder = ChatEncoder(tokenizer, train_on=config.data.train_on, today=_day_of(run))

    # ---- Host and mesh --------------------------------------------------------------------------------------
    if config.train.deterministic:
        distributed.ask_for_determinism()
    distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
    distributed.check_devices(values.expect_devices)
    lead = distributed.is_lead()
    console = Console(quiet=not lead, highlight=False, soft_wrap=True)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if lead:
        run.lock()
        _check_same_config(run, config)

    # ---- Data -----------------------------------------------------------------------------------------------
    with Display(console) as display:
        for remark in remarks:
            display.say(remark)
        data = build_dataset(config.data, encoder, display.say, display.watch)
    distributed.check_same("data", data.fingerprint)
    mixture = Mixture(
        data.phases,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        drop_remainder=config.data.drop_remainder,
    )
    if not len(mixture):
        raise UserError(
            f"there is no step to take: optim.batch_size={config.optim.batch_size} is more than any epoch has, and "
            "data.drop_remainder=True leaves short steps out. Take a smaller batch, or keep the remainder."
        )
    total_steps = min(len(mixture), config.optim.max_steps or len(mixture))

    # ---- Model ----------------------------------------------------------------------------------------------
    decoder = make_decoder(spec, mesh.shape["tensor"])
    num_params = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract))
    resolved = _resolve(config, origin, mesh, data, num_params, run)
    rows = resolved["rows_per_device"]
    compute = Compute(jnp.dtype(resolved["compute_dtype"]), attention, resolved["remat"])
    shapes = microbatch_shapes(config.data.max_length, rows)

    def source(mixture: Mixture, loss_reduction: str) -> StepSource:
        return StepSource(
            data.corpus, mixture, shapes, num_shards(mesh), local_shards(mesh), loss_reduction, config.seed
        )

    steps = source(mixture, config.optim.loss_reduction)

    # ---- Optimizer ------------------------------------------------------------------------------------------
    o = config.optim
    schedule = make_schedule(
        o.schedule,
        o.learning_rate,
        o.max_steps or len(mixture),
        warmup_steps=o.warmup_steps,
        warmup_ratio=o.warmup_ratio,
        final_ratio=o.final_ratio,
        decay_ratio=o.decay_ratio,
    )
    optimizer = make_optimizer(
        schedule, grad_clip=o.grad_clip, beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=o.weight_decay
    )
    fns = make_step(decoder, optimizer, schedule, mesh, compute)

    # ---- Restore or start: 1 this workdir's newest checkpoint, 2 what init_from names -------------------------
    checkpoints = Checkpoints(run.path, config.checkpoint.keep_last)
    start = checkpoints.latest()
    if start is None:
        shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
        state = fns.start(load_params(origin, decoder, shardings, seed=config.seed))
        progress: dict[str, Any] = {"samples": 0, "tokens": 0, "loss_tokens": 0}
    else:
        state, progress = checkpoints.restore(start, fns.abstract_state)
    start = start or 0
    if lead:
        run.cut_metrics(start)
        run.write_json(
            "config.json",
            to_dict(config) | {"resolved": resolved | {"attention": attention, "today": str(encoder.today)}},
        )
        run.write_json(
            "data_report.json", report.with_steps(data.report, data.corpus, mixture, steps.plan, total_steps)
        )
        _keep_model(run.path / "model", origin, spec, tokenizer)
    _say_plan(console, config, origin, mesh, data, mixture, total_steps, start, num_params, rows, compute)
    for said in [*_added_rows(origin, spec), *_uneven(decoder, mesh)]:
        console.print(f"[yellow]{said}[/yellow]")

    # ---- Train ----------------------------------------------------------------------------------------------
    # The order within a step: draw, accumulate, apply, await the numbers, stop if they are not finite, evaluate,
    # write the line, save. So a checkpoint never knows of a step whose line is not written.
    writers: list[metrics.Writer] = []
    if lead:
        writers = [
            metrics.JsonlWriter(run.path / METRICS),
            metrics.TensorBoardWriter(run.path / "tensorboard", config.log.every_steps),
            metrics.TerminalWriter(console, start, total_steps, config.log.every_steps),
        ]
    peak = metrics.peak_flops(jax.local_devices()[0])
    record: dict[str, Any] = {}
    saved = start
    status, reason = "completed", ""
    sums = _compile(fns, state, steps, start, total_steps, mesh, console)
    leave = distributed.LeaveRequest()
    ended = time.perf_counter()
    try:
        loader = load_steps(steps, start, config.data.num_workers)
        for step in range(start + 1, total_steps + 1):
            batch = next(loader)
            for rows_of_microbatch in batch["microbatches"]:
                sums = fns.accumulate(state.params, sums, put_rows(rows_of_microbatch, mesh))
            state, sums, on_device = fns.apply(state, sums)
            measured = {name: x.item() for name, x in jax.device_get(on_device).items()}
            if not measured.pop("finite"):
                saved = _save(checkpoints, state, progress, saved)
                raise StoppedByRule(_not_finite(step, measured, checkpoints, saved))
            ended, step_time = time.perf_counter(), time.perf_counter() - ended
            before, progress = progress, {k: progress[k] + batch[k] for k in progress}
            phase = data.phases[batch["phase"]].name
            record = {"step": step, "phase": phase, "epoch": batch["epoch"]} | progress | measured
            record |= _rates(spec, batch, step_time, peak)
            last = step == total_steps
            if data.validation and (last or _crosses(before, progress, config.eval.every_samples)):
                record |= _evaluate(fns, state, data, source, mesh)
            for writer in writers:
                writer.write(record)
            leaving = distributed.any_process(leave.signal is not None)
            if last or leaving or _crosses(before, progress, config.checkpoint.every_samples):
                saved = _save(checkpoints, state, progress, saved)
            if leaving and not last:
                asked = leave.signal or "another process was asked to leave"
                raise Preempted(f"{asked} after step {step}; its state is saved, run the same command to go on.")
    except BaseException as e:
        kinds = {StoppedByRule: "stopped", Preempted: "preempted"}
        status, reason = kinds.get(type(e), "failed"), str(e) or type(e).__name__
        raise
    finally:
        leave.forget()
        for writer in writers:
            writer.close()
        checkpoints.wait()
        if lead:
            run.write_json("summary.json", _summary(status, reason, saved, progress, record, run))
        checkpoints.close()
    console.print(escape(_ending(run, record, start, total_steps)))


def _day_of(run: Workdir) -> datetime.date | None:
    """The day that a run began on, for chat templates that write the date; None for one that begins."""
    day = (run.read_json("config.json") or {}).get("resolved", {}).get("today")
    return datetime.date.fromisoformat(day) if day else None


def _resolve(
    config: Config, origin: Origin, mesh: Mesh, data: Dataset, num_params: int, run: Workdir
) -> dict[str, Any]:
    """What "auto" and 0 stand for on this mesh: as recorded where the run has been on it before."""
    recorded = (run.read_json("config.json") or {}).get("resolved", {})
    if recorded.get("mesh") != dict(mesh.shape):
        recorded = {}
    device = mesh.devices.flat[0]
    dtype = config.model.compute_dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    sources = data.report["sources"].values()
    mean = sum(s["tokens"] for s in sources) / sum(s["kept"] for s in sources)
    wanted = mean * config.optim.batch_size / (config.data.max_length * num_shards(mesh))
    rows, remat = fit.choose(
        origin.spec,
        num_params=num_params,
        ways=mesh.shape["fsdp"] * mesh.shape["tensor"],
        itemsize=jnp.dtype(dtype).itemsize,
        max_length=config.data.max_length,
        rows=config.train.rows_per_device or recorded.get("rows_per_device", 0),
        remat=config.model.remat if config.model.remat != "auto" else recorded.get("remat", "auto"),
        rows_wanted=max(1, round(wanted)),
        device=device,
    )
    return {"mesh": dict(mesh.shape), "compute_dtype": dtype, "rows_per_device": rows, "remat": remat}


def _compile(
    fns: StepFunctions, state: TrainState, steps: StepSource, start: int, stop: int, mesh: Mesh, console: Console
) -> Sums:
    """Compiles each microbatch shape that the run will need, on rows of padding; returns the sums, still zero.

    So no step later in the run waits for a compilation. Only the steps of the first PLANNED_AHEAD samples are
    looked at: beyond them, a shape that none of them needed may still come up.
    """
    began = time.perf_counter()
    shapes: set[Shape] = set()
    samples = 0
    for i in range(start, stop):
        if samples > PLANNED_AHEAD:
            break
        plan = steps.plan(i)
        shapes |= {m.shape for m in plan}
        samples += sum(len(row) for m in plan for row in m.rows)
    sums = fns.zero_sums()
    for shape in sorted(shapes, key=steps.shapes.index):
        rows = empty_rows(shape.rows * len(steps.shards), shape.slots)
        sums = fns.accumulate(state.params, sums, put_rows(rows, mesh))
    jax.block_until_ready(sums)
    if shapes:
        console.print(f"[dim]compiled {len(shapes)} microbatch shapes in {time.perf_counter() - began:.0f} s[/dim]")
    return sums


def _not_finite(step: int, measured: dict[str, Any], checkpoints: Checkpoints, saved: int) -> str:
    good = f"The last good checkpoint is {checkpoints.folder / str(saved)}" if saved else "There is no checkpoint yet"
    return (
        f"the loss ({measured['loss']}) or the gradient norm ({measured['grad_norm']}) of step {step} is not finite; "
        f"the update was not made. {good}."
    )


def _check_same_config(run: Workdir, config: Config) -> None:
    old = run.read_json("config.json")
    if old is None:
        return
    old.pop("resolved", None)
    changed = differences(old, to_dict(config))
    if changed:
        raise UserError(
            f"--workdir={run.path} was made with another config, which differs in {'; '.join(changed)} (there -> "
            "here). Run it with the config that made it, or give another --workdir."
        )


def _keep_model(folder: Path, origin: Origin, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """config.json, tokenizer and template, with which the run can be exported and asked."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    dtype = origin.stored_dtype()
    stored = origin.config | {"dtype": dtype, "torch_dtype": dtype, "vocab_size": spec.vocab_size}
    Workdir(folder).write_json("config.json", stored)  # last: it says that the folder is whole


def _crosses(before: dict[str, int], after: dict[str, int], every: int) -> bool:
    """Whether this step is the first at or past a multiple of `every` samples; 0 = never."""
    return bool(every) and after["samples"] // every > before["samples"] // every


def _save(checkpoints: Checkpoints, state: TrainState, progress: dict[str, int], saved: int) -> int:
    """Saves unless this step is saved already; returns the step."""
    step = int(state.step)
    if step != saved:
        checkpoints.save(state, progress)
    return step


def _rates(spec: ModelSpec, batch: dict[str, Any], seconds: float, peak: float | None) -> dict[str, Any]:
    flops = metrics.train_flops(spec, batch["lengths"])
    return {
        "num_microbatches": len(batch["microbatches"]),
        "slot_efficiency": batch["tokens"] / batch["slots"],
        "tokens_per_s": batch["tokens"] / seconds,
        "mfu": flops / (seconds * peak * jax.device_count()) if peak else None,
        "step_time_s": seconds,
    }


def _evaluate(fns: StepFunctions, state: TrainState, data: Dataset, source: Any, mesh: Mesh) -> dict[str, float]:
    """Held-out loss by source, and over all of them as `eval/loss`: each one ratio of sums over all their tokens.

    Token-weighted whatever the training's reduction, so that runs can be compared.
    """
    total_loss = total_weight = 0.0
    values = {}
    for name, ids in data.validation.items():
        held_out = Mixture([PhasePools(name, 1.0, (Pool(ids),))], batch_size=EVAL_SAMPLES, seed=0)
        loss_sum = weight_sum = 0.0
        batches = source(held_out, "token")
        for i in range(len(batches)):
            for rows in batches[i]["microbatches"]:
                sums = jax.device_get(fns.evaluate(state.params, put_rows(rows, mesh)))
                loss_sum, weight_sum = loss_sum + float(sums[0]), weight_sum + float(sums[1])
        values[f"eval/{name}/loss"] = loss_sum / weight_sum
        total_loss, total_weight = total_loss + loss_sum, total_weight + weight_sum
    return {"eval/loss": total_loss / total_weight} | values


def _say_plan(
    console: Console, config: Config, origin: Origin, mesh: Mesh, data: Dataset, mixture: Mixture,
    total_steps: int, start: int, num_params: int, rows: int, compute: Compute,
) -> None:  # fmt: skip
    """What will be done, and what the user would want to know before it is."""
    o = config.optim
    sources = data.report["sources"]
    tokens = sum(s["tokens"] * s["weight"] for s in sources.values())
    loss_tokens = sum(s["loss_tokens"] * s["weight"] for s in sources.values())
    lines = {
        "model": f"{origin.architecture}, {num_params:,} parameters, from {config.model.init_from}",
        "mesh": ", ".join(f"{k} {v}" for k, v in mesh.shape.items()) + f" on {mesh.devices.flat[0].device_kind}",
        "data": f"{sum(s['kept'] for s in sources.values()):,} samples, {tokens:,.0f} tokens, "
        f"{loss_tokens / max(1, tokens):.0%} of them trained on",
        "step": f"{o.batch_size:,} samples, microbatches of {rows} rows a device by {config.data.max_length} slots, "
        f"{jnp.dtype(compute.dtype).name}, {compute.attention} attention, remat {compute.remat}",
        "run": f"{total_steps:,} steps, {o.schedule} learning rate {o.learning_rate:g}"
        + (f", resumed after step {start:,}" if start else ""),
    }
    for name, line in lines.items():
        console.print(f"[bold]{name:<6}[/bold] {escape(line)}")
    warnings = report.regrets(data.report)
    if o.batch_size > mixture.shortest_epoch():
        warnings.append(
            f"optim.batch_size={o.batch_size} is larger than an epoch of {mixture.shortest_epoch()} samples: each of "
            "its steps is a whole epoch"
        )
    warnings += [
        f"{key}={chance} in the model's config.json is not applied: training goes without dropout"
        for key, chance in hf.dropouts(origin.config).items()
    ]
    if config.data.validation_fraction and not data.validation:
        warnings.append(f"data.validation_fraction={config.data.validation_fraction} holds out no sample of these few")
    if mixture.samples_left_out:
        warnings.append(f"{mixture.samples_left_out:,} samples left out by data.drop_remainder")
    if config.data.max_length > origin.spec.max_positions:
        warnings.append(
            f"data.max_length={config.data.max_length} is beyond the max_position_embeddings="
            f"{origin.spec.max_positions} that the model was made for"
        )
    if o.max_steps > len(mixture):
        warnings.append(f"optim.max_steps={o.max_steps} is beyond the {len(mixture)} steps that the phases have")
    for warning in warnings:
        console.print(f"[yellow]warning: {escape(warning)}[/yellow]")


def _added_rows(origin: Origin, spec: ModelSpec) -> list[str]:
    """What is said where the tokenizer has more tokens than the model has embeddings."""
    rows = origin.spec.vocab_size
    if spec.vocab_size == rows:
        return []
    made = "drawn like the rest" if origin.kind == "random" else f"each the mean of the {rows:,} there are"
    return [
        f"the tokenizer has added tokens beyond the model's {rows:,} embedding rows: {spec.vocab_size - rows:,} rows "
        f"are added, {made}; the export has {spec.vocab_size:,}"
    ]


def _uneven(decoder: Decoder, mesh: Mesh) -> list[str]:
    """What the mesh does not divide, and what is done about it."""
    tensor, heads = mesh.shape["tensor"], decoder.spec.num_heads
    said = [
        f"held whole on every device, since the mesh does not divide it: {dim}"
        for dim in replicated_dims(decoder.abstract, decoder.axes, mesh)
    ]
    if heads % tensor:
        said.append(
            f"attention works on {-(-heads // tensor) * tensor} heads, of which {heads} are the model's: mesh.tensor="
            f"{tensor} does not divide them"
        )
    return said


def _summary(
    status: str, reason: str, step: int, progress: dict[str, int], record: dict[str, Any], run: Workdir
) -> dict[str, Any]:
    last = record or (run.read_json("summary.json") or {}).get("last_metrics", {})
    return {
        "status": status,
        "reason": reason,
        "step": step,
        "samples": progress["samples"],
        "last_metrics": last,
    } | environment()


def _ending(run: Workdir, record: dict[str, Any], start: int, total_steps: int) -> str:
    if not record:
        return f"the run in {run.path} was complete already, at step {start} of {total_steps}"
    held_out = f", held-out loss {record['eval/loss']:.4f}" if "eval/loss" in record else ""
    return (
        f"done: step {record['step']}, {record['samples']:,} samples, loss {record['loss']:.4f}{held_out}\n"
        f"next: mice export --workdir={run.path} --output=HF_DIR"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
