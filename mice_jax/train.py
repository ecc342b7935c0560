"""Fine-tune a model, or resume a run that was interrupted.

  mice train --config=configs/demo.py --workdir=runs/demo
  mice train --config=configs/demo.py --config.optim.learning_rate=1e-3 --workdir=runs/demo_1e-3

Running the same command again resumes the run. A run writes metrics.jsonl (one line per step), summary.json,
checkpoints/<step>/ and other files to its workdir; README.md lists those that users read.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("train")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import dataclasses
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from mice_jax import hardware
from mice_jax.checkpoint import Checkpoints
from mice_jax.cli.flags import define_train
from mice_jax.cli.progress_display import Display
from mice_jax.cli.tracker_names import check_trackers
from mice_jax.config import Config, fields_of_all_processes
from mice_jax.config_checks import beta2_of
from mice_jax.data import statistics
from mice_jax.data.loader import load_steps
from mice_jax.errors import StoppedByRule
from mice_jax.evals.run_benchmarks import RunBenchmarks
from mice_jax.model_source import check_weights
from mice_jax.runtime import compile_cache, cpu_devices, distributed, transfers, watchdog, xla_flags
from mice_jax.runtime.devices import split_cpu
from mice_jax.runtime.precision import set_float32_matmul_precision
from mice_jax.sharding import local_shards, num_shards, put_scalar, put_steps
from mice_jax.step import TrainState
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.paths import parse_path
from mice_jax.storage.provenance import code_state
from mice_jax.storage.recorded_config import check_same_config
from mice_jax.storage.workdir import SYNC_EVERY_S, Workdir
from mice_jax.training import averaging, build, first_nonfinite, phases, precompile, run_files, summary, trackers
from mice_jax.training.cadence import make_cadence
from mice_jax.training.evaluator import Evaluator, check_metrics
from mice_jax.training.lifecycle import Run, lifecycle
from mice_jax.training.progress import Deadline, LapTimer, Progress
from mice_jax.training.record import Throughput, all_finite, make_record
from mice_jax.training.start_state import enter_branch, enter_phase, restore_or_start
from mice_jax.training.stop_monitor import StopMonitor
from mice_jax.training.stop_rules import step_at_fraction
from mice_jax.training.stop_signals import StopSignals, paused


class Launch(NamedTuple):
    """The settings of one start of a run that are not in its config: its processes, and command-line options."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    expect_devices: int | None = None  # over all processes; the run fails if it has another number of devices
    debug_nans: bool = False
    provenance: Mapping[str, Any] = types.MappingProxyType({})  # the config file and the command-line overrides


def train(config: Config, run: Run, launch: Launch) -> None:
    """Trains a model, starting from the newest checkpoint in the workdir or, in a new run, from `model.init_from`.

    Every process of the run calls this function with the same config, except for the fields in `FIELDS_OF_A_HOST` of
    config.py.

    Args:
      config: the validated config of the run.
      run: the run opened by `lifecycle`, which handles every exception that is raised here.
      launch: the processes of the run, and options of the command line.
    """
    time_limit = Deadline(config.train.max_minutes)  # starts here, so set-up and compilation count
    workdir = run.workdir

    # ---- Processes and devices ----------------------------------------------------------------------------------
    # XLA reads its flags once, when its backend starts, so they are set before anything touches a device.
    xla_flags.set_flags(config.train.deterministic)
    chose_cpu_devices = _choose_cpu_devices(config, launch, workdir)
    cache = compile_cache.enable(cache_folder(config.data.cache_dir))
    distributed.initialize(launch.coordinator_address, launch.num_processes, launch.process_id)
    is_main = distributed.is_main_process()
    console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
    log = Display(console).log

    # ---- Inputs -------------------------------------------------------------------------------------------------
    # Everything that can be checked without reading data or weights is checked here, so that a mistake costs seconds.
    # The workdir is created and locked after these checks, so that a mistake that they find leaves it untouched. Only
    # the comparison with the config of an earlier run in it comes after the lock.
    distributed.assert_same_on_all_processes("config", fields_of_all_processes(config))
    with distributed.raise_on_all_processes():
        distributed.check_devices(launch.expect_devices)
        mesh = build.run_mesh(config)
        check_trackers(config.log.trackers)
        inputs = build.inputs(config, run_files.hub_models(workdir))
        source, spec = inputs.source, inputs.spec()
        # A run that resumes from a checkpoint needs the weights of init_from only with LoRA, where its checkpoints lack
        # the frozen base.
        if config.model.lora.rank or not run_files.has_checkpoint(workdir):
            check_weights(source)
        # The values that were chosen for "auto" when the run last started, if that was on this mesh.
        earlier_choices = run_files.recorded_choices(workdir, mesh)
        attention = build.attention_on_mesh(config, spec, mesh, earlier_choices)
        # This decoder is discarded: making it checks model.lora.targets, which do not depend on the mesh.
        build.run_decoder(config, spec, source.architecture, tensor=1)
        encoder = build.encoder(config, inputs.tokenizer, run_files.start_date(workdir))
        benchmarks = RunBenchmarks(config.eval, inputs.tokenizer, spec)
        if is_main:
            workdir.lock(log)
            check_same_config(workdir.path, config, workdir.local)
    # Two processes may have found different commits, if a repository of the Hub was updated in between.
    distributed.assert_same_on_all_processes("commits of models of the Hub", repr(inputs.hosted))

    # ---- Data ---------------------------------------------------------------------------------------------------
    # Of the processes that share a cache, one builds each token store and the others wait for it. A UserError of any
    # process is raised in all. `data.spans` has the range of steps of each phase (training/phases.py).
    with distributed.raise_on_all_processes(), Display(console) as display:
        for note in inputs.notes:
            display.log(note)
        data = build.data(config, encoder, display.log, display.watch)
        check_metrics(config, data.dataset.validation, data.spans, benchmarks.metric_names())
    distributed.assert_same_on_all_processes("data", data.dataset.fingerprint)
    distributed.assert_same_on_all_processes("tasks", benchmarks.fingerprint())

    # ---- Model --------------------------------------------------------------------------------------------------
    # If the config leaves rows per device or remat open (0, "auto"), a resumed run on the same mesh takes its earlier
    # choice. Any other run chooses them by the memory of a device and the lengths of the samples.
    model = build.model(config, source, spec, mesh, attention, data.mean_length, earlier_choices)
    set_float32_matmul_precision(model.compute.dtype, mesh.devices.flat[0].platform)
    distributed.assert_same_on_all_processes("rows per device and remat", f"{model.rows} {model.compute.remat}")
    step_source = build.step_source(config, data, model.shapes, num_shards(mesh), local_shards(mesh))
    pack_held_out = build.held_out_packer(config, data, model.shapes, mesh)

    # ---- Optimizer and step functions ---------------------------------------------------------------------------
    fns = build.step_functions(config, model.decoder, source.architecture, mesh, model.compute)
    schedule = build.run_schedule(config, data)
    score_benchmarks = benchmarks.scorer(source, model.decoder, mesh, model.compute.dtype, log)

    # ---- State: the newest checkpoint of this workdir, or else init_from ------------------------------------------
    checkpoints = Checkpoints(
        workdir.path,
        config.checkpoint,
        warm_start_ranges=phases.warm_start_ranges(data.spans),
        check_ownership=run.check_lock,
    )
    steps_done, state, base, progress = restore_or_start(checkpoints, source, model.decoder, fns, config.seed, log)
    # A run made by `mice branch` begins from a checkpoint of another run, which was copied into this workdir. This
    # holds until the branch has saved a checkpoint of its own.
    if config.branch.step and steps_done == config.branch.step:
        state = enter_branch(state, config.branch.beta2, beta2_of(config.optim))
    # With LoRA, the state has the adapters alone, and `join` adds the frozen base parameters. Without LoRA, `base` is
    # None, and `join` returns its argument.
    join = functools.partial(model.decoder.join, base=base)
    answerer = build.sample_answerer(config, data, source, model, mesh, inputs.tokenizer)
    evaluator = Evaluator(config, fns, mesh, data.dataset.validation, pack_held_out, score_benchmarks, join, answerer)

    # ---- The workdir before the first step ----------------------------------------------------------------------
    # Lines of metrics.jsonl that are newer than the checkpoint are removed. The other files are written now, so that a
    # killed run can be resumed and exported.
    warnings = summary.warnings(config, source, model.decoder, data, mesh)
    with distributed.raise_on_all_processes():
        if is_main:
            workdir.truncate_metrics(steps_done)
            workdir.log_event("resumed" if steps_done else "started", steps_done)
            run_files.write_config(
                workdir,
                config,
                run_files.choices(mesh, model.compute, model.rows, encoder.today, inputs.hosted),
                {**launch.provenance, **code_state()},
            )
            workdir.write_json(
                "data_report.json", statistics.with_steps(data.dataset.report, step_source, data.total_steps, warnings)
            )
            benchmarks.write_directions(workdir)
            run_files.write_model_folder(workdir.local / "model", source, spec, inputs.tokenizer)
            workdir.sync()
    console.print(summary.table(config, source, data, step_source, steps_done, model))
    if chose_cpu_devices and mesh.devices.flat[0].platform == "cpu":
        console.print(f"[dim]{cpu_devices.describe(mesh.size)}[/dim]")
    summary.print_warnings(console, warnings)

    # ---- Compilation --------------------------------------------------------------------------------------------
    # The programs of the first step are compiled now. A run of one process without GPUs compiles those of the other
    # microbatch shapes in another thread during its first steps; any other run compiles them now too
    # (`precompile.may_compile_later`).
    compiled = precompile.compile_run(fns, step_source, steps_done, data, pack_held_out, mesh, Display(console))
    if compiled.shapes:
        console.print(f"[dim]{compiled.describe(cache)}[/dim]")
    distributed.barrier("compiled")

    # ---- Train --------------------------------------------------------------------------------------------------
    monitor = StopMonitor(workdir.local, config.stop, spec.vocab_size, data.total_steps) if is_main else None
    writers = trackers.make_writers(config, workdir, console, steps_done, data.total_steps) if is_main else []
    # From here on run.progress, run.log and run.save may be used.
    run.begin(steps_done, progress, checkpoints, writers, compiled.stop)
    pause_at = step_at_fraction(config.train.pause_at_share, data.total_steps) if config.train.pause_at_share else 0
    # A run that was paused and is started again without a change of train.pause_at_share pauses again at once.
    if 0 < pause_at <= steps_done < data.total_steps:
        raise paused(steps_done)
    stop_signals = StopSignals(
        run.preemption,
        checkpoints,
        time_limit,
        steps_done=steps_done,
        total_steps=data.total_steps,
        save_every_minutes=config.checkpoint.every_minutes,
        pause_at=pause_at,
        stop_rules=monitor.reason_to_stop if monitor else None,
    )
    cadence = make_cadence(config, data.spans, data.total_steps, benchmarks.metric_names())
    throughput = Throughput(
        spec, hardware.peak_flops_of_all_devices(), model.num_params, config.data.max_length, frozen=base is not None
    )

    if steps_done == 0:
        _measure_before_training(evaluator, state, run)

    timer = LapTimer()
    sums = fns.zero_sums()
    loaded_steps = put_steps(load_steps(step_source, steps_done, config.data.num_workers), mesh)
    next_loaded = next(loaded_steps, None)
    for step in range(steps_done + 1, data.total_steps + 1):
        # A later phase may start from another checkpoint or with a new optimizer state. Spans count steps from 0.
        index = phases.span_index(data.spans, step - 1)
        span = data.spans[index]
        if index > 0 and step - 1 == span.first:
            state = enter_phase(data.spans, index, state, fns, checkpoints, console.print)

        # The update is dispatched, and the next step's data is sent to the devices while they compute. Then the metrics
        # are read, which waits for the update. An implicit transfer, such as a Python number passed to a jitted
        # function, would make the devices wait; the tests disallow them here.
        loaded = next_loaded
        assert loaded is not None, "the loader has every step"
        with transfers.guard():
            for microbatch in loaded["microbatches"]:
                sums = fns.accumulate(join(state.params), sums, microbatch)
            scalars = _scalars_of_update(config, schedule(step - 1), run.progress, loaded["samples"], mesh)
            state, sums, metrics = fns.apply(state, sums, *scalars)
            next_loaded = next(loaded_steps, None)
            metrics = jax.tree.map(lambda value: value.item(), jax.device_get(metrics))

        # A loss or gradient norm that is not finite ends the run before the step is recorded.
        if not metrics["finite"]:
            run.save(state)  # `apply` has left the state as it was before the step.
            checkpoints.wait()
            cause = ""
            if launch.debug_nans:
                cause = first_nonfinite.explain_step(spec, fns, mesh, join(state.params), loaded["microbatches"])
            raise StoppedByRule(summary.not_finite(step, metrics, checkpoints.folder, run.saved_step, cause))
        previous = run.progress
        run.progress = previous.advance(loaded, metrics["grad_norm"], metrics["skipped"], metrics["grad_sq_corrected"])
        if metrics["skipped"]:
            console.print(summary.skipped(step, metrics["grad_norm"], config.train.skip_spikes))

        # The step's record, with any evaluation, is written before its checkpoint, so that metrics.jsonl has a line for
        # every checkpoint.
        record = make_record(
            step, span.phase.name, loaded, metrics, run.progress, timer.lap(), throughput,
            skips_spikes=bool(config.train.skip_spikes),
        )  # fmt: skip
        due = cadence.due(step, previous.samples, run.progress.samples)
        evaluation = evaluator(state, due, run.progress.known_before)
        record |= evaluation.metrics
        run.log(record, evaluation.answers)
        workdir.sync(after_s=SYNC_EVERY_S)

        # The processes agree on whether to save or stop.
        poll = stop_signals.poll(step, record, evaluation.failure)
        # The state is saved before the run stops, also if a benchmark failed. Only a checkpoint that is due gets a
        # score, since its step is the same in every repetition of the run. With scores of checkpoints that are saved by
        # the clock or on a signal, the choice of the best would depend on timing.
        if due.checkpoint or poll.save or poll.stop is not None:
            run.save(state, record.get(config.checkpoint.best_metric) if due.checkpoint else None)
            stop_signals.saved()
        if poll.stop is not None:
            checkpoints.wait()
            raise poll.stop
    checkpoints.wait()


def _choose_cpu_devices(config: Config, launch: Launch, workdir: Workdir) -> bool:
    """Sets the number of devices into which JAX divides a CPU, unless the user has set it; returns whether it did.

    With --num_processes or --expect_devices, the user counts on a certain number, and it is not changed. The number
    has no effect on GPUs and TPUs.
    """
    if launch.num_processes is not None or launch.expect_devices is not None:
        return False
    return split_cpu(cpu_devices.count_of_run(config, run_files.recorded_cpu_devices(workdir)))


def _measure_before_training(evaluator: Evaluator, state: TrainState, run: Run) -> None:
    """Records the held-out metrics before the first step, which are the baseline of the run.

    Nothing is recorded if one of them is not finite. The metrics of the sources in eval.retain are also kept in the
    run's progress, and so in its checkpoints, because later evaluations are divided by them to measure forgetting.
    """
    before, known = evaluator.before_training(state)
    run.progress = dataclasses.replace(run.progress, known_before=known)
    if before.metrics and all_finite(before.metrics):
        run.log({"step": 0, "samples": 0} | before.metrics, before.answers)


def _scalars_of_update(
    config: Config, learning_rate: float, progress: Progress, samples: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes the scalar inputs of an update on the host, and copies them to the devices.

    Args:
      config: the run's config.
      learning_rate: the learning rate of the step.
      progress: the counters before the step.
      samples: the number of samples of the step.
      mesh: the devices.

    Returns:
      The learning rate, the gradient norm above which the update is skipped (infinity if none is), and the weight of
      the new parameters in their running average (None if the run keeps no average).
    """
    threshold = progress.spike_threshold(config.train.skip_spikes)
    average_weight = averaging.newest_weight(config.train.ema_half_life, samples, progress.samples + samples)
    average = None if average_weight is None else put_scalar(average_weight, mesh)
    return put_scalar(learning_rate, mesh), put_scalar(threshold, mesh), average


# ---------------------------------------------------------------------------------------- the command
def train_from_flags(values: command.Values) -> None:
    """Trains as the flags of `mice train` say.

    In a run of several processes, the command that the user starts on a host only watches. It starts itself again as a
    child, which is the process that trains (runtime/watchdog.py).
    """
    config = command.config_of(values)
    workdir = command.workdir_of(values)
    if watchdog.is_child():
        watchdog.exit_when_parent_exits()
    launch = Launch(
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        values.expect_devices,
        values.debug_nans,
        command.config_provenance(values),
    )
    with lifecycle(workdir) as run:
        train(config, run, launch)
    if distributed.is_main_process():
        print(summary.final_message(run))


def train_in_python(config: Config, workdir: str) -> dict[str, Any]:
    """Trains a model from Python; `mice_jax.train(config, workdir)` calls this function.

    Args:
      config: the config of the run.
      workdir: the folder of the run, on disk or in a bucket. If it holds a run already, that run is resumed.

    Returns:
      The content of summary.json.

    Raises:
      ConfigError: if `config.validate` finds a problem.
      UserError: if the config, the data or the workdir cannot be used.
      StoppedByRule: if a stop rule ended the run.
      Preempted: if the run ended early with its state saved: after a signal, a preemption notice, a time limit, a
        planned pause, or a failure of the storage.
      KeyboardInterrupt: if Ctrl-C, or the stop button of a notebook, was pressed before the first step, or was pressed
        again before the run had ended.
    """
    config.validate()
    with lifecycle(parse_path(str(workdir)), owns_process=False) as run:
        train(config, run, Launch())
    return run.workdir.read_json("summary.json")


# `mice_jax.train` is this module. It is made callable, so that `mice_jax.train(config, workdir)` works.
command.make_module_callable(__name__, train_in_python)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mice train`; returns its exit code."""
    return command.run(__doc__, define_train, train_from_flags, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
