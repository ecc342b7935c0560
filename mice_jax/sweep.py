"""Run many trials of a config, and stop the poor ones early.

  mice sweep --config=configs/paper/learning_rate.py --workdir=sweeps/rates --dry_run
  mice sweep --config=configs/paper/learning_rate.py:batch=128 --workdir=sweeps/rates --workers=4

The file defines get_sweep(arg), which returns a mice_jax.config.Sweep. The same command again goes on where it was.
Workers on other machines that reach the same folder share the work: give each --worker, and to all of them
--storage=postgresql+psycopg://USER@HOST/DB (or $MICE_JAX_STORAGE). A worker may be several processes, whose devices
make up each trial's mesh: give each --coordinator_address, --num_processes and --process_id, as to mice train.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("sweep")  # --help and wrong flags need none of the imports below, which take seconds

# isort: split
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import FrozenTrial
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mice_jax.cli.config_file import allow_imports_next_to
from mice_jax.cli.flags import define_sweep
from mice_jax.config import ConfigError, Sweep
from mice_jax.errors import Preempted, UserError
from mice_jax.planning import cost
from mice_jax.report_page import page, read_runs
from mice_jax.runtime import distributed, watchdog
from mice_jax.storage import lock, workdir
from mice_jax.sweeps import workers
from mice_jax.sweeps.devices import share_of_devices
from mice_jax.sweeps.study import ENDS, Study, combinations, config_of, read_summary, rule_of, status_of
from mice_jax.training.stop_monitor import TRIAL_VARIABLE, last_record

STORAGE = "MICE_JAX_STORAGE"  # in the environment: a storage's URL, which may hold a password
LOOK_S = 0.5
FREE_S = 60.0  # how long a dead worker's run may take to let go of its folder
COLOURS = {"completed": "green", "stopped": "yellow", "failed": "red", "running": "cyan"}
ASKED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # the code of a trial that was, before it could answer by saving
TRIES = 3  # starts of a trial's process that get no further than those before


def begin(values: command.Values) -> int | None:
    if watchdog.is_child():
        watchdog.exit_with_parent()
    place = _place(values)
    sweep = load_sweep(command.required(values, "config"))
    storage = values.storage or os.environ.get(STORAGE, "")
    if values.dry_run:
        _dry_run(sweep)
        return 0
    named = command.required(values, "workdir")
    if "://" in named:
        raise UserError(f"--workdir={named}: a sweep's folder is one that its workers share as a file system.")
    folder = Path(named)
    if place and place.process_id:
        return workers.follow(folder, place)
    study = Study(sweep, folder, storage)
    if values.worker:
        return _work_together(study, place) if place else work(study)
    shares = share_of_devices(values.workers)
    # The storage's URL, which may hold a password, goes by the environment.
    own = [f"--config={values.config}", f"--workdir={folder}"]
    return _lead(study, [*own, "--worker"], [share | {STORAGE: storage} for share in shares])


def _place(values: command.Values) -> workers.Place | None:
    """Which process of a worker of several this is; None for a worker of one."""
    given = values.coordinator_address, values.num_processes, values.process_id
    if all(g is None for g in (*given, values.expect_devices)):
        return None  # a cluster's environment is not asked: its processes may as well be workers of their own
    if not values.worker or not distributed.is_multi_process(*given):
        raise UserError(
            "--coordinator_address, --num_processes, --process_id and --expect_devices are for a worker of several "
            "processes: give each of them --worker too."
        )
    place = workers.Place(*given, values.expect_devices)
    place.meeting()
    return place


# ---------------------------------------------------------------------------------------- the sweep's file
def load_sweep(named: str) -> Sweep:
    """The validated sweep that FILE.py[:arg] makes; UserError with the file's line where it fails."""
    file, _, arg = (named, "", "") if Path(named).exists() else named.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config: there is no file {file}.")
    allow_imports_next_to(Path(file))
    try:
        get_sweep = runpy.run_path(file).get("get_sweep")
        made = get_sweep(arg) if get_sweep else None
    except SyntaxError as e:
        raise UserError(f"{e.filename} line {e.lineno} is not Python: {e.msg}.") from None
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(Path(file).name)]
        where = f"{file} line {lines[-1]}: " if lines else ""
        kind = "" if isinstance(e, ConfigError) else f"{type(e).__name__}: "
        raise UserError(f"{where}{kind}{str(e).rstrip('.')}.") from e
    if get_sweep is None:
        raise UserError(f"{file} defines no get_sweep(arg) that returns the sweep.")
    if not isinstance(made, Sweep):
        raise UserError(
            f"get_sweep of {file} returned a {type(made).__name__}; it must return a Sweep of mice_jax.config."
        )
    made.validate()
    rule_of(made)
    return made


def _dry_run(sweep: Sweep) -> None:
    """The trials, their steps and what they cost; those of a search at its base, since they are drawn later."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    fixed = combinations(sweep)
    table = Table("trial", *sweep.axes, "seed", "steps", "samples", "tokens", "FLOPs")
    whole = cost.Cost()
    for number, params in enumerate(fixed):
        one = cost.run_cost(config_of(sweep, params))
        whole += one
        drawn = [str(params.get(name, "drawn")) for name in sweep.axes]
        counts = [f"{n:,.0f}" for n in (one.steps, one.samples, one.tokens)]
        table.add_row(
            str(number), *map(escape, drawn), str(params.get("seed", sweep.base.seed)), *counts, f"{one.flops:.2e}"
        )
    console.print(table)
    console.print(
        f"{len(fixed)} trials, {whole.steps:,.0f} steps, {whole.tokens:,.0f} tokens, {whole.flops:.3g} model FLOPs "
        f"where none is stopped: {whole.h100_hours():.3g} hours of one H100 at 40 % of its peak"
    )


# ---------------------------------------------------------------------------------------- a worker
def work(study: Study, others: workers.Lead | None = None) -> int:
    """Runs trials until every one has ended."""
    while True:
        number = study.claim()
        if number is None:
            if all(t.state.is_finished() for t in study.trials()):
                return 0
            time.sleep(LOOK_S)  # others run the rest; should one of them die, its trial is resumed here
            continue
        with study.beating(number):
            try:
                code = _run(study, number, others)
            except Preempted:
                study.claims.release(number)
                raise
            study.end(number, code)


def _work_together(study: Study, place: workers.Place) -> int:
    """The same by several processes, of which this is the first."""
    others = workers.Lead(place)
    code = 1
    try:
        code = work(study, others)
    except Preempted as e:
        code = e.exit_code
        raise
    finally:
        others.end(code)
    return code


def _run(study: Study, number: int, others: workers.Lead | None) -> int:
    """Runs or resumes a trial until its process has said how it ended; returns the exit code."""
    folder = study.run_of(number)
    done = {"completed": 0, "stopped": 3}.get((read_summary(folder) or {}).get("status", ""))
    if done is not None:  # its worker was killed before it could tell
        return done
    config = study.begin(number)
    environment = {TRIAL_VARIABLE: study.environment_of(number)} | workers.programs_of(study.folder)
    furthest, tries = -1, 0
    while True:
        _await_free(folder)
        with (folder / "log.txt").open("a") as log:
            arguments = [f"--config={config}", f"--workdir={folder}"]
            if others:
                others.begin(number)
                arguments += others.place.flags()
            code = watchdog.run_child("mice_jax.train", arguments, folder, environment, log)
        if others:
            others.await_all()
        if code == Preempted.exit_code:
            raise Preempted(f"trial {number} has saved its state; run the same command to go on.")
        if code in ASKED:
            raise Preempted(f"trial {number} was asked to leave before its first step; run the same command to go on.")
        if code in (0, UserError.exit_code, 3):
            return code
        reached = last_record(folder).get("step", 0)
        tries = 1 if reached > furthest else tries + 1
        furthest = max(furthest, reached)
        if tries >= TRIES:
            return code


def _await_free(folder: Path) -> None:
    """Returns once no process has a run's folder: a killed worker's run may live a moment longer."""
    until = time.monotonic() + FREE_S
    while True:
        try:
            lock.FolderLock(folder).release()
            return
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_S)


# ---------------------------------------------------------------------------------------- all of it
@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    pipe: int  # closed with this process, it ends the worker and the worker's run
    begun_with: int  # trials that had ended when it started
    futile: int = 0  # starts in a row that ended by themselves, and no trial with them


def _lead(study: Study, arguments: list[str], shares: list[dict[str, str]]) -> int:
    """Keeps a worker on each share of the devices, shows how far they are, and ends when every trial has."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda n, _: asked.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    log = (study.folder / "workers.txt").open("a")

    def ended() -> int:
        return sum(t.state.is_finished() for t in study.trials())

    def start(share: dict[str, str], futile: int = 0) -> _Worker:
        process, pipe = watchdog.start_child("mice_jax.sweep", arguments, share, log)
        return _Worker(process, pipe, ended(), futile)

    workers = [start(share) for share in shares]
    passed_on = 0
    console = Console(highlight=False, soft_wrap=True)
    try:
        with _Screen(console, study) as screen:
            while True:
                for number in asked[passed_on:]:
                    for w in workers:
                        w.process.send_signal(number)
                passed_on = len(asked)
                for i, w in enumerate(workers):
                    code = w.process.poll()
                    futile = w.futile + 1 if code and code > 0 and ended() == w.begun_with else 0
                    if code in (None, 0, UserError.exit_code) or asked or futile >= TRIES:
                        continue
                    os.close(w.pipe)
                    workers[i] = start(shares[i], futile)
                screen.update()
                codes = [w.process.poll() for w in workers]
                if all(code is not None and (asked or code >= 0) for code in codes):
                    break  # a killed one, which nobody asked to leave, is started anew above
                time.sleep(LOOK_S)
    finally:
        for w in workers:
            os.close(w.pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        log.close()
    study.write_results()
    page.write([study.folder], study.folder / page.REPORT)
    left = len(study.trials()) - ended()
    if asked and left:
        raise Preempted(f"{left} trials have not ended; run the same command to go on.")
    if left:
        said = (study.folder / "workers.txt").read_text().strip().splitlines()
        raise UserError(f"the workers have ended before {left} trials had: {(said or ['nothing was said'])[-1]}")
    console.print(_ending(study))
    return 0


def _ending(study: Study) -> str:
    ends = [status_of(t) for t in study.trials()]
    said = (
        f"done: {', '.join(f'{ends.count(s)} {s}' for s in ENDS.values())}\nresults: {study.folder / workdir.RESULTS}"
    )
    said += f"\nreport: {study.folder / page.REPORT}"
    best = study.best()
    return f"{said}\nbest: trial {best.number}, {study.sweep.metric} {best.value:.4g}" if best else said


class _Screen:
    """A table that is redrawn on a terminal; elsewhere a line when a trial ends."""

    def __init__(self, console: Console, study: Study):
        self._console, self._study, self._began = console, study, time.monotonic()
        self._first: int | None = None  # steps that were done when this process began
        self._said = {t.number for t in study.trials() if t.state.is_finished()}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "_Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def update(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            return
        for trial in self._study.trials():
            if trial.state.is_finished() and trial.number not in self._said:
                self._said.add(trial.number)
                how = f"{ENDS[trial.state]} {trial.user_attrs.get('reason', '')}".strip()
                value = f", {self._study.sweep.metric} {trial.value:.4g}" if trial.value is not None else ""
                total = len(self._study.trials())
                self._console.print(escape(f"trial {trial.number}: {how}{value}  ({len(self._said)} of {total} ended)"))

    def _table(self) -> Group:
        study, trials = self._study, self._study.trials()
        names = read_runs.short_names([*study.sweep.axes, "seed"], ".")
        numbers = dict.fromkeys(["loss", study.sweep.metric])
        table = Table("trial", *names, "", "step", *numbers, "status", box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[-1].min_width = len("completed (best)")
        for column in table.columns[:-1]:
            column.no_wrap = True  # only what is said of a status gives way to a narrow terminal
        best, shown = study.best(), self._shown(trials)
        totals = [study.total_steps(t.number) for t in trials]
        known = [n for n in totals if n] or [0]
        done = left = 0
        for trial, total in zip(trials, totals, strict=True):
            last = last_record(study.run_of(trial.number))
            step = last.get("step", 0)
            done += step
            left += 0 if trial.state.is_finished() else max(0, (total or sum(known) // len(known)) - step)
            if trial.number not in shown:
                continue
            is_best = best is not None and trial.number == best.number
            status = Text(f"{status_of(trial)}{' (best)' * is_best}", COLOURS.get(status_of(trial), "dim"))
            status.no_wrap, status.overflow = True, "ellipsis"
            status.append(f" {trial.user_attrs.get('reason', '')}".rstrip(), "dim")
            ended = f"{trial.value:.4g}" if trial.value is not None else ""
            values = [f"{last['loss']:.4f}" if last else "", ended][: len(numbers)]
            bar = ProgressBar(total=total or 1, completed=step, width=12)
            cells = [escape(str(v)) for v in study.params(trial).values()]
            table.add_row(str(trial.number), *cells, bar, str(step), *values, status, style="bold" if is_best else "")
        counts = Counter(map(status_of, trials))
        lines = [", ".join(f"{n} {status}" for status, n in counts.items())]
        if best:
            lines.append(f"best: trial {best.number}, {study.sweep.metric} {best.value:.4g}")
        return Group(table, Text("  ·  ".join([*lines, self._left(done, left)])))

    def _shown(self, trials: Sequence[FrozenTrial]) -> set[int]:
        """The trials that there is room for: those that run, the best, the latest that ended, the next that wait."""
        room, best = max(4, self._console.height - 6), self._study.best()
        first = [t.number for t in trials if status_of(t) == "running"] + ([best.number] if best else [])
        ended = [t.number for t in trials if t.state.is_finished()]
        waiting = [t.number for t in trials if status_of(t) == "waiting"]
        ordered = dict.fromkeys([*first, *ended[: -room // 2 - 1 : -1], *waiting, *ended[::-1]])
        return set(list(ordered)[:room])

    def _left(self, done: int, left: int) -> str:
        self._first = done if self._first is None else self._first
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._began)
        return f"{done:,} steps done" + (f", at most {left / rate:,.0f} s left" if rate and left else "")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    return command.run(__doc__, define_sweep, begin, arguments)


if __name__ == "__main__":
    sys.exit(main())
