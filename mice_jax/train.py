"""Fine-tune a model, or resume a run that was interrupted.

  mice train --config=configs/demo.py --workdir=runs/demo
  mice train --config=configs/demo.py --config.optim.learning_rate=1e-3 --workdir=runs/demo_1e-3

The same command again resumes the run. It leaves in the workdir: config.json, data_report.json, metrics.jsonl (a
line a step), TensorBoard events, checkpoints/<step>/, model/ (config.json and tokenizer) and summary.json.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("train")  # --help and wrong flags need none of the imports below, which take seconds

# isort: split
import dataclasses
import datetime
import functools
import math
import os
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

from mice_jax import hardware, metrics, trackers
from mice_jax.checkpoint import Checkpoints
from mice_jax.cli.flags import define_train
from mice_jax.cli.progress_display import Display
from mice_jax.config import Config, differences, identity, nearest, to_dict
from mice_jax.data import statistics
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.loader import StepSource, load_steps
from mice_jax.data.mixture import Mixture
from mice_jax.data.packing import microbatch_shapes
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import AgreedError, Preempted, StoppedByRule, StoreError, UserError, one_line
from mice_jax.evals import benchmarks
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.model_source import ModelSource, load_params, resolve_source, stop_ids, with_vocabulary
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.runtime import compile_cache, distributed, signals, watchdog, xla_flags
from mice_jax.runtime.precision import set_float32_matmul_precision
from mice_jax.sharding import local_shards, make_mesh, num_shards, param_shardings, put_steps
from mice_jax.step import StepFunctions, TrainState
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.provenance import code_state, environment
from mice_jax.storage.workdir import DIRECTIONS, METRICS, SYNC_EVERY_S, Workdir
from mice_jax.training import build, held_out, memory_model, phases, precompile, summary
from mice_jax.training.progress import Alarm, Progress, crosses
from mice_jax.training.stop_monitor import StopMonitor

# The numbers of every line of metrics.jsonl; some are null where they cannot be told.
MEASURED = (
    "loss", "grad_norm", "param_norm", "update_norm", "grad_sq_corrected", "noise_scale", "learning_rate", "epoch",
    "samples", "tokens", "loss_tokens", "num_microbatches", "slot_efficiency", "tokens_per_s", "mfu", "step_time_s",
)  # fmt: skip
SPLIT_EVERY = 8  # of so many steps, one that is a single microbatch is split in two, to measure the gradient's noise


def begin(arguments: Sequence[str], values: command.Values) -> int | None:
    config = command.config_of(values)
    workdir = command.workdir_of(values)
    if watchdog.is_child():
        watchdog.exit_with_parent()
    elif distributed.is_multi_process(values.coordinator_address, values.num_processes, values.process_id):
        return watchdog.run_child("mice_jax.train", arguments, workdir)
    leave = signals.PreemptionHandler()
    try:
        with Workdir(workdir) as run:
            train(config, run, values, leave)
    except (AgreedError, StoppedByRule, Preempted):
        raise
    except BaseException as e:
        if watchdog.is_child():
            if distributed.is_lost_peer_error(e):
                os._exit(watchdog.report_lost_peer(workdir, one_line(e)))
            distributed.exit_immediately(e)
        raise
    finally:
        leave.restore_handlers()


def train(config: Config, run: Workdir, values: command.Values, leave: signals.PreemptionHandler) -> None:
    time_limit = Alarm(config.train.max_minutes)

    # ---- Host and mesh --------------------------------------------------------------------------------------
    xla_flags.set_flags(config.train.deterministic)
    kept = compile_cache.enable(cache_folder(config.data.cache_dir))
    distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
    lead = distributed.is_main_process()
    console = Console(quiet=not lead, highlight=False, soft_wrap=True)

    # ---- Workdir, and what it starts from ---------------------------------------------------------------------
    distributed.assert_same_on_all_processes("config", identity(config))
    with distributed.raise_on_all_processes():
        distributed.check_devices(values.expect_devices)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        trackers.check_trackers(config.log.trackers)
        origin = resolve_source(config.model.init_from)
        remarks: list[str] = []
        tokenizer = load_tokenizer(config.data.tokenizer or str(origin.folder), config.data.chat_template, remarks)
        added = {t.content for t in tokenizer.added_tokens_decoder.values()}
        spec = with_vocabulary(origin, tokenizer.get_vocab(), added)
        device = mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        recorded = _recorded(run, mesh)
        attention = build.attention(config, spec, device.platform, capability, recorded)
        encoder = ChatEncoder(tokenizer, train_on=config.data.train_on, today=_day_of(run))
        settings = _benchmark_settings(config)
        tasks = benchmarks.load_benchmarks(
            config.eval.tasks, config.eval.include_path, settings, tokenizer, GenerationDefaults(), spec.max_positions
        )
        if lead:
            run.lock(Display(console).say)
            _check_same_config(run, config)

    # ---- Data -----------------------------------------------------------------------------------------------
    with distributed.raise_on_all_processes(), Display(console) as display:
        for remark in remarks:
            display.say(remark)
        data = build_dataset(config.data, encoder, display.say, display.watch)
    distributed.assert_same_on_all_processes("data", data.fingerprint)
    distributed.assert_same_on_all_processes("tasks", " ".join(t.fingerprint for t in tasks))
    with distributed.raise_on_all_processes():
        mixture = Mixture(
            data.phases,
            batch_size=config.optim.batch_size,
            seed=config.seed,
            drop_remainder=config.data.drop_remainder,
        )
        total_steps = min(len(mixture), config.optim.max_steps or len(mixture))
        stretches = phases.stretches(config.data.phases, mixture.phase_ends(), total_steps)
        better = {name: high for task in tasks for name, high in task.metrics().items()}
        scored = [f"eval/{name}" for name in better]
        chooses = _check_best_metric(config, stretches, data, scored)
        chooses_by_task = chooses and config.checkpoint.best_metric in scored

    # ---- Model ----------------------------------------------------------------------------------------------
    decoder = make_decoder(spec, mesh.shape["tensor"])
    dtype = build.compute_dtype(config, device.platform)
    set_float32_matmul_precision(dtype, device.platform)
    load = build.memory_inputs(config, decoder, origin.architecture, mesh, dtype, attention)
    memory = memory_model.device_memory_bytes(jax.local_devices()[0])  # another process's device does not tell
    length = statistics.mean_length(data.report)
    rows, remat = build.rows_and_remat(
        config, load, mean_length=length, memory=memory, platform=device.platform, recorded=recorded
    )
    distributed.assert_same_on_all_processes(
        "rows of a microbatch and remat, by their devices' memory", f"{rows} {remat}"
    )
    compute = Compute(jnp.dtype(dtype), attention, remat)
    shapes = microbatch_shapes(config.data.max_length, rows)

    generation = GenerationDefaults(tuple(stop_ids(origin.config, tokenizer)))  # as the run's export will have it
    exams = benchmarks.BenchmarkEvaluator(tasks, settings, decoder, mesh, compute.dtype, tokenizer, generation)
    by_phase = len(config.data.phases) > 1

    def source(mixture: Mixture, loss_reduction: str = "token", split_every: int = 0) -> StepSource:
        shards = num_shards(mesh), local_shards(mesh)
        return StepSource(data.corpus, mixture, shapes, *shards, loss_reduction, config.seed, split_every)

    steps = source(mixture, config.optim.loss_reduction, SPLIT_EVERY)

    # ---- Optimizer ------------------------------------------------------------------------------------------
    schedule = build.schedule(config, stretches, config.optim.max_steps or len(mixture))
    fns = build.step_functions(config, decoder, origin.architecture, mesh, compute, schedule)

    # ---- Restore or start: 1 this workdir's newest checkpoint, 2 what init_from names -------------------------
    warm_start_ranges = [s.saved_steps for i, s in enumerate(stretches) if phases.seeds_by_best(stretches, i)]
    checkpoints = Checkpoints(
        run.path,
        config.checkpoint,
        warm_start_ranges=warm_start_ranges,
        check_ownership=functools.partial(_check_still_ours, run),
    )
    restored = checkpoints.restore_newest(fns.abstract_state, Display(console).say)
    if restored is None:
        shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
        state = fns.from_params(load_params(origin, decoder, shardings, seed=config.seed))
        start, progress = 0, Progress()
    else:
        start, state, carried = restored
        progress = Progress(**carried)
    with distributed.raise_on_all_processes():
        if lead:
            run.truncate_metrics(start)
            resolved = _place(mesh) | {"compute_dtype": dtype, "rows_per_device": rows, "remat": remat}
            run.log_event("resumed" if restored else "started", start)
            resolved |= {"attention": attention, "today": str(encoder.today)}
            made_by = command.config_provenance(values) | code_state()
            run.write_json("config.json", to_dict(config) | {"resolved": resolved, "provenance": made_by})
            whole = statistics.with_steps(data.report, steps, total_steps)
            run.write_json("data_report.json", whole)
            if better:
                known = run.read_json(DIRECTIONS) or {}
                run.write_json(DIRECTIONS, known | benchmarks.directions(better))
            _keep_model(run.local / "model", origin, spec, tokenizer)
            run.sync()
    console.print(summary.table(config, origin, data, steps, stretches, start, compute, load, memory))
    for warning in summary.warnings(config, origin, decoder, data, mixture, mesh):
        console.print(f"[yellow]warning: {escape(warning)}[/yellow]")

    # ---- Train ----------------------------------------------------------------------------------------------
    # The order within a step: enter its phase where it is the first, accumulate, apply, draw the next, await the
    # numbers, stop if they are not finite, evaluate, write the line, save. So a checkpoint never knows of a step whose
    # line is not written.
    writers: list[metrics.Writer] = []
    stop_monitor = StopMonitor(run.local, config.stop, spec.vocab_size, total_steps) if lead else None
    if lead:
        log = config.log
        writers = [
            metrics.JsonlWriter(run.local / METRICS),
            *trackers.make_trackers(
                log.trackers, run, project=log.project, every_steps=log.every_steps, config=to_dict(config)
            ),
            metrics.TerminalWriter(console, start, total_steps, log.every_steps),
        ]
    peak = hardware.peak_flops(jax.local_devices()[0])
    record: dict[str, Any] = {}
    sums = fns.zero_sums()
    ahead = precompile.shapes_to_compile(steps, start, total_steps)
    if ahead:
        held = {
            s for h in held_out.sources(data.validation, source) for s in precompile.shapes_to_compile(h, 0, len(h))
        }
        resets = any(s.phase.optimizer == "reset" for s in stretches if s.first >= max(start, 1))
        seconds = precompile.compile_step_functions(fns, ahead, held, mesh, resets=resets)
        console.print(f"[dim]{len(ahead)} microbatch shapes compiled, or found in {kept}, in {seconds:.0f} s[/dim]")
    distributed.barrier("compiled")
    leave.enable_saving()
    taken_away = checkpoints.preempted_before(start)
    save_alarm = Alarm(config.checkpoint.every_minutes)
    saved = start
    ended = time.perf_counter()

    def end(status: str, reason: str) -> None:
        while writers:
            writers.pop().close()
        if lead:
            run.log_event(status, int(record.get("step", start)))
            run.write_json("summary.json", _summary(status, reason, saved, progress, record, run))

    try:
        loader = put_steps(load_steps(steps, start, config.data.num_workers), mesh)
        drawn = next(loader, None)
        for step in range(start + 1, total_steps + 1):
            here = phases.at(stretches, step - 1)
            stretch = stretches[here]
            if step - 1 == stretch.first > 0:
                state = _enter(stretches, here, state, fns, checkpoints, console)
            assert drawn is not None, "the loader has every step"
            batch = drawn
            for microbatch in batch["microbatches"]:
                sums = fns.accumulate(state.params, sums, microbatch)
            state, sums, on_device = fns.apply(state, sums, progress.spike(config.train.skip_spikes))
            drawn = next(loader, None)  # what is above is queued: the next step goes to the devices while they work
            measured = {name: x.item() for name, x in jax.device_get(on_device).items()}
            if not measured.pop("finite"):
                saved = _save(run, checkpoints, state, progress, None, saved)
                checkpoints.wait()
                raise StoppedByRule(_not_finite(step, measured, checkpoints, saved))
            ended, step_time = time.perf_counter(), time.perf_counter() - ended
            corrected = measured["grad_sq_corrected"]
            after = progress.after(batch, measured["grad_norm"], measured.pop("skipped"), corrected)
            before, progress = progress, after
            measured |= {
                "grad_sq_corrected": corrected if math.isfinite(corrected) else None,
                "noise_scale": progress.noise_scale(),
            }
            record = {"step": step, "phase": stretch.phase.name, "epoch": batch["epoch"]} | progress.counters()
            record |= measured | _rates(spec, batch, step_time, peak)
            if config.train.skip_spikes:
                record["skipped_steps"] = progress.skipped
            if progress.skipped > before.skipped:
                console.print(f"step {step} is skipped: its gradient norm {measured['grad_norm']:.3g} is a spike")
            last, ends_phase = step == total_steps, step == stretch.end
            # What is due by samples is measured, and can be chosen; a save by the clock or on leaving never is, so that
            # a run that was disturbed chooses as one that was not.
            due = last or (ends_phase and phases.seeds_by_best(stretches, here))
            due |= crosses(before.samples, progress.samples, config.checkpoint.every_samples)
            measures = last or crosses(before.samples, progress.samples, config.eval.every_samples)
            if data.validation and (measures or (due and chooses)):
                record |= held_out.evaluate(
                    functools.partial(fns.evaluate, state.params), data.validation, source, mesh, by_phase
                )
            failure: Exception | None = None
            if measures or (due and chooses_by_task):
                try:
                    for found in exams.measure(state.params, Display(console).say):
                        record |= found
                except Exception as e:  # a task's: the step is kept all the same, and then the run ends
                    if distributed.is_lost_peer_error(e):
                        raise
                    failure = e
            for writer in writers:
                writer.write(record)
            run.sync(after_s=SYNC_EVERY_S)
            stop = stop_monitor.reason_to_stop(record) if stop_monitor and not last else ""
            taken_away |= checkpoints.reached_preemption(step)
            asked, taken_away, late, clock, stopped, failed = distributed.any_across_processes(
                leave.signal is not None, taken_away, time_limit.rings(), save_alarm.rings(), bool(stop),
                failure is not None,
            )  # fmt: skip
            ends = last or asked or taken_away or late or stopped or failed
            if due or ends or clock:
                score = record.get(config.checkpoint.best_metric) if due else None
                saved = _save(run, checkpoints, state, progress, score, saved)
                save_alarm.set()
            if ends:
                checkpoints.wait()
            if failed:
                raise _not_evaluated(failure, step, checkpoints)
            if stopped:
                raise StoppedByRule(f"{stop or 'the first process says why'}. Step {step} was the last, and is saved.")
            if ends and not last:
                why = leave.signal or ("train.max_minutes" if late else "another process was asked to leave")
                why = "notice that a machine is to be taken away" if taken_away and not asked else why
                raise Preempted(f"{why} after step {step}; its state is saved, run the same command to go on.")
        end("completed", "")
        with distributed.raise_on_all_processes():
            run.sync()
    except BaseException as e:
        if distributed.is_lost_peer_error(e):  # closing the checkpoints, as below, would wait for it for ever
            if lead:
                run.write_json("summary.json", _summary("failed", watchdog.LOST, saved, progress, record, run))
            run.close()
            os._exit(watchdog.report_lost_peer(run.path, one_line(e)))
        if isinstance(e, StoreError) and (whole := checkpoints.last_committed_step()) is not None:
            e = Preempted(f"{e} Run the same command to go on from {checkpoints.folder / str(whole)}, which is whole.")
        kinds = {StoppedByRule: "stopped", Preempted: "preempted"}
        end(kinds.get(type(e), "failed"), str(e) or type(e).__name__)
        raise e
    finally:
        checkpoints.close()
    console.print(escape(_ending(run, record, start, total_steps)))


def _day_of(run: Workdir) -> datetime.date | None:
    """The day that a run began on, for chat templates that write the date; None for one that begins."""
    day = (run.read_json("config.json") or {}).get("resolved", {}).get("today")
    return datetime.date.fromisoformat(day) if day else None


def _place(mesh: Mesh) -> dict[str, Any]:
    return {"mesh": dict(mesh.shape), "device": mesh.devices.flat[0].device_kind}


def _recorded(run: Workdir, mesh: Mesh) -> dict[str, Any]:
    """What the run chose when it was last on this mesh of such devices."""
    recorded = (run.read_json("config.json") or {}).get("resolved", {})
    return recorded if _place(mesh).items() <= recorded.items() else {}


def _not_finite(step: int, measured: dict[str, Any], checkpoints: Checkpoints, saved: int) -> str:
    good = f"The last good checkpoint is {checkpoints.folder / str(saved)}" if saved else "There is no checkpoint yet"
    return (
        f"the loss ({measured['loss']}) or the gradient norm ({measured['grad_norm']}) of step {step} is not finite; "
        f"the update was not made. {good}."
    )


def _not_evaluated(failure: Exception | None, step: int, checkpoints: Checkpoints) -> Exception:
    """What ends a run of which a task could not be scored, its step saved."""
    if failure and not isinstance(failure, UserError):  # our own
        return failure
    return AgreedError(
        f"{failure or 'another process says why its tasks could not be scored.'} The step is saved in "
        f"{checkpoints.folder / str(step)}, without the scores that are missing: once the task is mended or left out, "
        "run the same command to go on, and `mice evaluate` to score that step."
    )


def _check_same_config(run: Workdir, config: Config) -> None:
    old = run.read_json("config.json")
    if old is None:
        return
    old = {k: v for k, v in old.items() if k not in ("resolved", "provenance")}
    changed = differences(old, to_dict(config))
    if changed:
        raise UserError(
            f"--workdir={run.path} was made with another config, which differs in {'; '.join(changed)} (there -> "
            "here). Run it with the config that made it, or give another --workdir."
        )


def _keep_model(folder: Path, origin: ModelSource, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """config.json, tokenizer and template, with which the run can be exported and asked."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    dtype = origin.stored_dtype()
    stored = origin.config | {"dtype": dtype, "torch_dtype": dtype, "vocab_size": spec.vocab_size}
    Workdir(folder).write_json("config.json", stored)  # last: it says that the folder is whole


def _save(
    run: Workdir, checkpoints: Checkpoints, state: TrainState, progress: Progress, score: float | None, saved: int
) -> int:
    """Saves unless this step is saved already, its line first; returns the step."""
    step = int(state.step)
    if step != saved:
        with distributed.raise_on_all_processes():
            run.sync()
        checkpoints.save(state, dataclasses.asdict(progress), score)
    return step


def _check_still_ours(run: Workdir) -> None:
    """UserError in every process where the lead's lock of the folder is another's by now."""
    with distributed.raise_on_all_processes():
        run.check_lock()


def _enter(
    stretches: Sequence[phases.Stretch],
    number: int,
    state: TrainState,
    fns: StepFunctions,
    checkpoints: Checkpoints,
    console: Console,
) -> TrainState:
    """The state with which a phase begins; the count of steps goes on, and the schedule follows it."""
    phase, before = stretches[number].phase, stretches[number - 1]
    if phase.seed_from == "best":
        best = checkpoints.best_step(before.saved_steps)
        if best is None:  # its last step is measured and saved, but some numbers cannot always be told
            raise UserError(
                f"the phase {phase.name!r} starts from the best checkpoint of {before.phase.name!r}, but "
                "checkpoint.best_metric is null at each of them. Choose another, in another --workdir."
            )
        console.print(f"the phase {phase.name!r} starts from step {best}, the best of {before.phase.name!r}")
        if best != before.end:
            jax.tree.map(lambda x: x.delete(), (state.params, state.opt_state))  # two states may not fit
            seeded, _ = checkpoints.restore(best, fns.abstract_state)
            state = TrainState(state.step, seeded.params, seeded.opt_state)
    if phase.optimizer == "reset":
        jax.tree.map(lambda x: x.delete(), state.opt_state)  # two may not fit
        fresh = fns.from_params(state.params)
        state = TrainState(state.step, fresh.params, fresh.opt_state)
    return state


def _benchmark_settings(config: Config) -> benchmarks.Settings:
    e = config.eval
    return benchmarks.Settings(
        num_fewshot=None if e.num_fewshot < 0 else e.num_fewshot,
        limit=e.limit or None,
        apply_chat_template=e.apply_chat_template,
        fewshot_as_multiturn=e.apply_chat_template,
        system_instruction=e.system_instruction or None,
    )


def _check_best_metric(
    config: Config, stretches: Sequence[phases.Stretch], data: Dataset, scored: Sequence[str]
) -> bool:
    """Whether checkpoints are chosen by a metric; UserError where no line of the run will have it."""
    chosen = config.checkpoint.keep_best or any(s.phase.seed_from == "best" for s in stretches)
    known = [*MEASURED, *["skipped_steps"] * bool(config.train.skip_spikes), *scored]
    known += held_out.metric_names(data.validation, len(config.data.phases) > 1)
    name = config.checkpoint.best_metric
    if chosen and name not in known:
        more = "" if data.validation else " Held-out losses are measured where data is held out (data.validation)."
        raise UserError(
            f"checkpoint.best_metric={name!r} chooses among checkpoints, but no line of metrics.jsonl will have it"
            f"{nearest(name, known)}{more}"
        )
    return bool(chosen)


def _rates(spec: ModelSpec, batch: dict[str, Any], seconds: float, peak: float | None) -> dict[str, Any]:
    flops = hardware.train_flops(spec, batch["lengths"])
    return {
        "num_microbatches": len(batch["microbatches"]),
        "slot_efficiency": batch["tokens"] / batch["slots"],
        "tokens_per_s": batch["tokens"] / seconds,
        "mfu": flops / (seconds * peak * jax.device_count()) if peak else None,
        "step_time_s": seconds,
    }


def _summary(
    status: str, reason: str, step: int, progress: Progress, record: dict[str, Any], run: Workdir
) -> dict[str, Any]:
    last = record or (run.read_json("summary.json") or {}).get("last_metrics", {})
    return {
        "status": status,
        "reason": reason,
        "step": step,
        "samples": progress.samples,
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


def _refuse(arguments: Sequence[str], error: Exception) -> None:
    """What this process refuses before it joins the others of its run, they must hear: they would wait for it."""
    if watchdog.is_child():  # it has joined them
        return
    try:
        place = command.processes_of(arguments)
        others = distributed.is_multi_process(*place)
    except (UserError, flags.Error):  # it cannot be told where they are
        return
    if others:
        watchdog.broadcast_startup_error(place, str(error))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return command.run(
        __doc__, define_train, functools.partial(begin, arguments), arguments, functools.partial(_refuse, arguments)
    )


if __name__ == "__main__":
    sys.exit(main())
