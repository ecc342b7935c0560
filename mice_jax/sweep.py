"""Run many trials of a config, and stop the poor ones early.

  mice sweep --config=configs/paper/learning_rate.py --workdir=sweeps/rates --dry_run
  mice sweep --config=configs/paper/learning_rate.py:batch=128 --workdir=sweeps/rates --workers=4

The file defines get_sweep(arg), which returns a mice_jax.config.Sweep. Running the command again continues the sweep.
Workers on other machines that reach the same folder share the work: give each --worker, and to all of them
--storage=postgresql+psycopg://USER@HOST/DB (or $MICE_JAX_STORAGE). A worker may be several processes, whose devices
make up each trial's mesh: give each --coordinator_address, --num_processes and --process_id, as to mice train.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("sweep")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax.cli import early_checks
from mice_jax.cli.config_file import allow_imports_next_to
from mice_jax.cli.flags import define_sweep
from mice_jax.cli.format import format_duration
from mice_jax.config import Config, ConfigError, Sweep
from mice_jax.errors import Preempted, UserError, format_count
from mice_jax.report_page import page, read_runs
from mice_jax.runtime import cluster, watchdog
from mice_jax.statistics import registered_claims
from mice_jax.storage.workdir import RESULTS
from mice_jax.sweeps import branch_results, live_bracket, workers
from mice_jax.sweeps.devices import share_of_devices
from mice_jax.sweeps.process_group import ProcessSpec
from mice_jax.sweeps.progress_table import ProgressTable
from mice_jax.sweeps.study import STATUS_BY_STATE, Study, status_of
from mice_jax.sweeps.trials import bracket_rule, check_metric, fixed_params, settled, sibling_rule, trial_config
from mice_jax.sweeps.worker_pool import WorkerPool

STORAGE_VARIABLE = "MICE_JAX_STORAGE"  # environment variable with the database's URL, which may hold a password
POLL_S = 0.5
DRY_RUN_WIDTH = 160  # columns of the table where the output is not a terminal


def begin(values: command.Values) -> int | None:
    """Runs a sweep, or works on one as a worker of it; returns the exit code."""
    if watchdog.is_child():
        watchdog.exit_when_parent_exits()
    process = _process_of_worker(values)
    sweep, notes = load_sweep(command.required(values, "config"))
    storage = values.storage or os.environ.get(STORAGE_VARIABLE, "")
    configs = [] if values.worker else [_checked_config(sweep, params) for params in fixed_params(sweep)]
    if values.dry_run:
        _dry_run(sweep, notes)
        return 0
    workdir = command.required(values, "workdir")
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir}: the folder of a sweep cannot be in a bucket. Give a folder of a file system that "
            "all workers share."
        )
    folder = Path(workdir)
    if (folder / "config.json").exists() and not (folder / "sweep.json").exists():
        raise UserError(f"--workdir={folder} is the folder of a run. Give the sweep a folder of its own.")
    for config in configs:
        early_checks.check_inputs(config)
    if values.worker:  # The trials of a sweep share one compilation cache, unless the user set one.
        os.environ.setdefault(workers.CACHE_VARIABLE, str(folder.resolve() / "programs"))
    if process and process.process_id:
        return workers.follow_main_process(folder, process)
    study = Study(sweep, folder, storage)
    if values.worker:
        return workers.work_as_main_process(study, process) if process else workers.work(study)
    # The database's URL may hold a password, so workers get it through their environment.
    shares = [share | {STORAGE_VARIABLE: storage} for share in share_of_devices(values.workers)]
    for note in notes:
        print(note)
    _run_workers(study, ["--worker", f"--config={values.config}", f"--workdir={folder}"], shares)
    return 0


def _process_of_worker(values: command.Values) -> ProcessSpec | None:
    """Returns which process of a worker of several processes this is; None for a worker of one process.

    A cluster's environment is not consulted, because its processes may as well be separate workers.
    """
    given = values.coordinator_address, values.num_processes, values.process_id
    if all(g is None for g in (*given, values.expect_devices)):
        return None
    if not values.worker or not cluster.is_multi_process(*given):
        raise UserError(
            "--coordinator_address, --num_processes, --process_id and --expect_devices are for a worker of several "
            "processes: give each of them --worker too."
        )
    process = ProcessSpec(*given, values.expect_devices)
    process.control_address()
    return process


# ---------------------------------------------------------------------------------------- the sweep's file
def load_sweep(config: str) -> tuple[Sweep, list[str]]:
    """Returns the validated sweep that FILE.py[:arg] defines, and sentences about what it leaves to this command.

    Raises:
        UserError: the file fails, at the line that the error names, or the sweep cannot be run.
    """
    file, _, arg = (config, "", "") if Path(config).exists() else config.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config: the file {file} does not exist.")
    sweep = _call_get_sweep(Path(file), arg)
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"get_sweep of {file} returned a {type(sweep).__name__}; it must return a Sweep of mice_jax.config."
        )
    sweep.validate()
    sweep, notes = settled(sweep)
    sibling_rule(sweep)
    if rule := bracket_rule(sweep):
        live_bracket.check(sweep, rule)
    check_metric(sweep)
    claims = registered_claims.find(Path(file), sweep.claims)
    sweep.claims = str(claims.resolve()) if claims else registered_claims.NONE
    if claims:
        registered = registered_claims.read(claims, sweep).claims
        count = sum(c.primary for c in registered)
        notes.append(f"claims: {count} to be judged, and {len(registered) - count} explorations, from {claims}")
    return sweep, notes


def _checked_config(sweep: Sweep, params: dict[str, Any]) -> Config:
    """Returns the config of a trial; raises UserError, with the trial's parameters, where it is not valid."""
    try:
        return trial_config(sweep, params)
    except ConfigError as e:
        values = ", ".join(f"{name}={value!r}" for name, value in params.items())
        raise UserError(f"in the sweep, the trial with {values}: {str(e).removeprefix('in the config, ')}") from None


def _call_get_sweep(file: Path, arg: str) -> object:
    allow_imports_next_to(file)
    try:
        get_sweep = runpy.run_path(str(file)).get("get_sweep")
        if get_sweep:
            return get_sweep(arg)
    except SyntaxError as e:
        raise UserError(f"{e.filename} line {e.lineno} is not valid Python: {e.msg}.") from None
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(file.name)]
        where = f"{file} line {lines[-1]}: " if lines else ""
        kind = "" if isinstance(e, ConfigError) else f"{type(e).__name__}: "
        raise UserError(f"{where}{kind}{str(e).rstrip('.')}.") from e
    raise UserError(f"{file} does not define get_sweep(arg). Define it and let it return a Sweep of mice_jax.config.")


def _dry_run(sweep: Sweep, notes: Sequence[str]) -> None:
    """Prints the trials, their steps and cost; a search has no values yet, so its trials have the cost of the base."""
    from mice_jax.planning import cost  # It imports jax, which neither the sweep nor its workers need.

    console = Console(highlight=False, width=None if sys.stdout.isatty() else DRY_RUN_WIDTH)
    trials = fixed_params(sweep)
    table = Table("trial", *sweep.axes, "seed", "steps", "samples", "tokens", "FLOPs")
    total = cost.Cost()
    for number, params in enumerate(trials):
        of_trial = cost.run_cost(trial_config(sweep, params))
        total += of_trial
        values = [escape(str(params.get(name, "drawn"))) for name in sweep.axes]
        counts = [f"{n:,.0f}" for n in (of_trial.steps, of_trial.samples, of_trial.tokens)]
        seed = str(params.get("seed", sweep.base.seed))
        table.add_row(str(number), *values, seed, *counts, f"{of_trial.flops:.2e}")
    console.print(table)
    console.print(
        f"{format_count(len(trials), 'trial')}, {total.steps:,.0f} steps, {total.tokens:,.0f} tokens, "
        f"{total.flops:.3g} model FLOPs where none is stopped: {format_duration(total.h100_hours() / 24)} of one "
        "H100 at 40 % of its peak"
    )
    for note in notes:
        console.print(escape(note))


# ---------------------------------------------------------------------------------------- all workers
def _run_workers(study: Study, arguments: Sequence[str], shares: Sequence[dict[str, str]]) -> None:
    """Keeps a worker on each share of the devices, shows their progress, and returns when every trial has ended."""
    console = Console(highlight=False, soft_wrap=True)
    names = read_runs.short_names([*study.sweep.axes, "seed"], ".")
    log_file = study.folder / "workers.txt"
    with log_file.open("a") as log, _collected_signals() as signals:
        pool = WorkerPool(arguments, shares, log, study.num_ended)
        with contextlib.closing(pool), ProgressTable(console, study, names) as table:
            forwarded = 0
            while True:
                for number in signals[forwarded:]:
                    pool.forward(number)
                    forwarded += 1
                has_ended = pool.poll()
                table.update()
                if has_ended:
                    break
                time.sleep(POLL_S)
    study.write_results()
    study.write_certificate()
    critical = branch_results.write(study.folder, study.sweep)
    verdicts = page.write([study.folder], study.folder / page.REPORT).verdicts
    left = len(study.trials()) - study.num_ended()
    if left and signals:
        raise Preempted(f"{format_count(left, 'trial')} left to end; run the same command to continue.")
    if left:
        lines = log_file.read_text().strip().splitlines() or ["they printed nothing"]
        raise UserError(
            f"the workers ended before {format_count(left, 'trial')} did. The last line of {log_file} is: {lines[-1]}"
        )
    console.print(escape("\n".join([_summary(study), *critical, *verdicts])))


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """Collects requests to end, SIGTERM and SIGINT, instead of ending this process."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _summary(study: Study) -> str:
    statuses = [status_of(t) for t in study.trials()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in STATUS_BY_STATE.values())
    lines = [f"done: {counts}", f"results: {study.folder / RESULTS}", f"report: {study.folder / page.REPORT}"]
    if conclusion := study.conclusion():
        lines += conclusion
    elif best := study.best():
        lines.append(f"best: trial {best.number}, {study.sweep.metric} {best.value:.4g}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return command.run(__doc__, define_sweep, begin, arguments)


if __name__ == "__main__":
    sys.exit(main())
