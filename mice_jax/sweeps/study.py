"""A sweep's trials: which there are, who runs which, and what came of them.

An Optuna study holds the trials, their parameters and their ends. All of them are created when the sweep starts, so a
trial's number never changes. Beside it, in the same database, a table of claims says which worker runs which trial:
a claim is taken and taken over by one conditional statement, so no two workers can hold one, and a dead worker's
trial goes to the next, which resumes it from its checkpoint. The sweep's folder must be reachable by all workers.
"""

import contextlib
import copy
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc as sql_exc

from mice_jax.config import Config, Range, Sweep, differences, locate, to_dict
from mice_jax.errors import UserError, one_line
from mice_jax.storage.paths import write_atomically
from mice_jax.storage.workdir import RESULTS
from mice_jax.training import stop_rules
from mice_jax.training.stop_monitor import Trial, read_records, rule_fields

BEAT_S = 10.0  # how often a worker says that it lives
DEAD_S = 60.0  # a worker of another machine that was not heard of for so long is dead
BUSY_S = 60.0  # how long a SQLite database may be locked by others
ENDS = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
CONFIG_FILE = '''"""Trial {number} of the sweep in {folder}: {params}."""

from mice_jax.config import (
    Checkpoint, Config, Data, Eval, Log, Mesh, Model, Optim, Phase, Published, Source, Stop, Train,
)  # fmt: skip


def get_config(arg: str = "") -> Config:
    return {config!r}
'''


# ---------------------------------------------------------------------------------------- what is tried
def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """The parameters of each trial that are fixed beforehand: all of a grid's, the seeds of a search."""
    seeds = [{"seed": s} for s in sweep.seeds] or [{}]
    if sweep.search != "grid":
        return [seeds[i % len(seeds)] for i in range(sweep.trials)]
    values = [[{name: label(v)} for v in choices] for name, choices in sweep.axes.items()]
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*values, seeds)]


def label(value: Any) -> Any:
    """A value as Optuna keeps it: a plain one as it is, any other as its text."""
    return value if isinstance(value, bool | int | float | str) else repr(value)


def config_of(sweep: Sweep, params: dict[str, Any]) -> Config:
    """A trial's validated config."""
    config = copy.deepcopy(sweep.base)
    for name, value in params.items():
        choices = sweep.seeds if name == "seed" else sweep.axes[name]
        if not isinstance(choices, Range):
            value = next(v for v in choices if label(v) == value)
        part, field = locate(config, name)
        setattr(part, field, copy.deepcopy(value))
    config.validate()
    return config


def rule_of(sweep: Sweep) -> stop_rules.SiblingRule | None:
    """The rule among siblings that a sweep names; UserError where there is none of that name."""
    if sweep.stop is None or sweep.stop == "none":
        return None
    if isinstance(sweep.stop, str) and sweep.stop in stop_rules.SIBLING_RULES:
        return stop_rules.SIBLING_RULES[sweep.stop]()
    if isinstance(sweep.stop, stop_rules.SiblingRule):
        return sweep.stop
    raise UserError(
        f"stop={sweep.stop!r} of the sweep is no rule: give None, one of {', '.join(stop_rules.SIBLING_RULES)}, or a "
        "PaperRule, MedianRule or HalvingRule of mice_jax.training.stop_rules."
    )


# ---------------------------------------------------------------------------------------- claims
class Claims:
    """Which worker runs which trial; a claim is held while its worker lives."""

    def __init__(self, engine: sql.Engine, study: str):
        self._engine, self._study = engine, study
        self.owner = f"{socket.gethostname()}|{os.getpid()}|{_started(os.getpid())}|{uuid.uuid4().hex}"
        self._heard: dict[int, tuple[str, int, float]] = {}
        columns = [
            sql.Column("owner", sql.String(255), nullable=False),
            sql.Column("beat", sql.Integer, nullable=False),
        ]
        keys = [
            sql.Column("study", sql.String(255), primary_key=True),
            sql.Column("trial", sql.Integer, primary_key=True),
        ]
        self._metadata = sql.MetaData()
        self._table = sql.Table("mice_claims", self._metadata, *keys, *columns)

    def create(self) -> None:
        self._metadata.create_all(self._engine)

    def take(self, number: int) -> bool:
        """Takes a trial that nobody holds, or whose holder is dead."""
        t = self._table
        here = sql.and_(t.c.study == self._study, t.c.trial == number)
        with self._engine.begin() as db:
            row = db.execute(sql.select(t.c.owner, t.c.beat).where(here)).first()
        if row is None:
            try:
                with self._engine.begin() as db:
                    db.execute(sql.insert(t).values(study=self._study, trial=number, owner=self.owner, beat=0))
            except sql_exc.IntegrityError:
                return False
            return True
        if not self._is_dead(number, row.owner, row.beat):
            return False
        same = sql.and_(here, t.c.owner == row.owner, t.c.beat == row.beat)
        with self._engine.begin() as db:
            return db.execute(sql.update(t).where(same).values(owner=self.owner, beat=0)).rowcount == 1

    def release(self, number: int) -> None:
        t = self._table
        with self._engine.begin() as db:
            db.execute(sql.delete(t).where(t.c.study == self._study, t.c.trial == number, t.c.owner == self.owner))

    def beat(self, number: int) -> bool:
        """Says that this worker lives; false where its claim was taken over."""
        t = self._table
        mine = sql.and_(t.c.study == self._study, t.c.trial == number, t.c.owner == self.owner)
        with self._engine.begin() as db:
            return db.execute(sql.update(t).where(mine).values(beat=t.c.beat + 1)).rowcount == 1

    def _is_dead(self, number: int, owner: str, beat: int) -> bool:
        host, process, started, _ = owner.split("|")
        if host == socket.gethostname():
            return _started(int(process)) != started
        known = self._heard.get(number)
        if known is None or known[:2] != (owner, beat):  # only whether it changes counts, not the machines' clocks
            self._heard[number] = (owner, beat, time.monotonic())
            return False
        return time.monotonic() - known[2] > DEAD_S


def _started(process: int) -> str:
    """When a process of this machine started, in the system's ticks; "" where it is gone or only waits to be buried."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


# ---------------------------------------------------------------------------------------- the study
class Study:
    """A sweep's study and folder, opened by each process that works on it."""

    def __init__(self, sweep: Sweep, folder: Path, storage: str = ""):
        self.sweep, self.folder, self.rule = sweep, folder, rule_of(sweep)
        self.objective = stop_rules.Objective(sweep.metric, sweep.mode)
        fixed = combinations(sweep)
        for params in fixed if sweep.search == "grid" else fixed[:1]:
            config_of(sweep, params)
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--workdir={folder} cannot be written: {e.strerror}.") from None
        self.storage = storage or f"sqlite:///{folder.resolve() / 'study.db'}"
        with self._locked():
            self._open(fixed)

    def _open(self, fixed: list[dict[str, Any]]) -> None:
        sweep = self.sweep
        about = {"base": to_dict(sweep.base), "sweep": _plain(sweep)}
        file = self.folder / "sweep.json"
        if file.exists():
            known = json.loads(file.read_text())
            changed = differences(known["base"], json.loads(json.dumps(about["base"])))
            changed += [f"{k}: {known['sweep'][k]} -> {v}" for k, v in about["sweep"].items() if known["sweep"][k] != v]
            if changed:
                raise UserError(
                    f"--workdir={self.folder} holds another sweep, which differs in {'; '.join(changed)} (there -> "
                    "here). Run it with the file that made it, or give another --workdir."
                )
        else:
            known = about | {"study": f"{self.folder.resolve().name}-{uuid.uuid4().hex[:12]}"}
        self.name = str(known["study"])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        lite = self.storage.startswith("sqlite")
        try:
            engine = {"connect_args": {"timeout": BUSY_S}} if lite else {"pool_pre_ping": True}
            store = optuna.storages.RDBStorage(self.storage, engine_kwargs=engine)
            self.study = optuna.create_study(
                storage=store,
                study_name=self.name,
                direction="minimize" if sweep.mode == "min" else "maximize",
                load_if_exists=True,
            )
        except (sql_exc.SQLAlchemyError, ImportError) as e:
            hidden = sql.engine.make_url(self.storage).render_as_string(hide_password=True)
            raise UserError(f"the study's storage {hidden} cannot be opened: {one_line(e)}.") from None
        self.claims = Claims(store.engine, self.name)
        self.claims.create()
        for params in fixed[len(self.trials()) :]:
            self.study.enqueue_trial(params)
        if not file.exists():
            write_atomically(file, json.dumps(known, indent=2) + "\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, of those that work on the folder."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def run_of(self, number: int) -> Path:
        return self.folder / "runs" / str(number)

    # -------------------------------------------------------------------- a worker's way through a trial
    def claim(self) -> int | None:
        """A trial that has not ended and that nobody alive runs; None where there is none now."""
        for trial in self.trials():
            if trial.state.is_finished() or not self.claims.take(trial.number):
                continue
            if not self.trials()[trial.number].state.is_finished():
                return trial.number
            self.claims.release(trial.number)  # it ended between the look and the claim
        return None

    def begin(self, number: int) -> Path:
        """Draws a claimed trial's parameters, or reads those that it has; returns its config file."""
        trial = self.trials()[number]
        if trial.state == TrialState.WAITING:
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        # By its number, so that which worker draws a trial does not matter.
        kind = optuna.samplers.TPESampler if self.sweep.search == "tpe" else optuna.samplers.RandomSampler
        self.study.sampler = kind(seed=(self.sweep.base.seed * 1_000_003 + number) % 2**32)
        drawn = optuna.trial.Trial(self.study, trial._trial_id)
        params = self._draw(drawn)
        folder = self.run_of(number)
        folder.mkdir(exist_ok=True)
        file = folder / "config.py"
        named = ", ".join(f"{k}={v}" for k, v in params.items())
        made = config_of(self.sweep, params)
        write_atomically(file, CONFIG_FILE.format(number=number, folder=self.folder, params=named, config=made))
        return file

    def _draw(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for name, choices in self.sweep.axes.items():
            if not isinstance(choices, Range):
                params[name] = trial.suggest_categorical(name, [label(v) for v in choices])
                continue
            part, field = locate(self.sweep.base, name)
            if isinstance(getattr(part, field), int):
                params[name] = trial.suggest_int(name, int(choices.low), int(choices.high), log=choices.log)
            else:
                params[name] = trial.suggest_float(name, choices.low, choices.high, log=choices.log)
        if self.sweep.seeds:
            params["seed"] = trial.suggest_categorical("seed", self.sweep.seeds)
        return params

    def environment_of(self, number: int) -> str:
        """What a trial's process is told of its sweep."""
        rule = rule_fields(self.rule) if self.rule else None
        sweep = self.sweep
        return Trial(
            str(self.folder.resolve() / "runs"), number, self.storage, self.name, rule, sweep.metric, sweep.mode
        ).to_json()

    def end(self, number: int, code: int) -> str:
        """Tells the study how a trial ended, from what its run left; returns the status."""
        summary = read_summary(self.run_of(number)) or {}
        value = (summary.get("last_metrics") or {}).get(self.sweep.metric)
        status = summary.get("status") if code in (0, 3) else "failed"
        reason = summary.get("reason", "") if status == "stopped" else ""
        if status == "completed" and not isinstance(value, int | float):
            status, reason = (
                "failed",
                f"its last line has no {self.sweep.metric}; hold data out, or name another metric",
            )
        if status == "failed":
            reason = reason or f"exit code {code}: {_last_line(self.run_of(number) / 'log.txt')}"
        state = {v: k for k, v in ENDS.items()}[str(status)]
        frozen = self.trials()[number]
        self.study._storage.set_trial_user_attr(frozen._trial_id, "reason", reason)
        values = (
            [float(value or 0.0)] if state == TrialState.COMPLETE else None
        )  # of a stopped one, none that looks final
        self.study._storage.set_trial_state_values(frozen._trial_id, state, values)
        self.write_results()
        self.claims.release(number)
        return str(status)

    @contextlib.contextmanager
    def beating(self, number: int) -> Iterator[None]:
        """Keeps a claim alive; where another worker has taken it over, this process ends, and its run with it."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_S):
                with contextlib.suppress(sql_exc.SQLAlchemyError):  # the next beat tries again
                    if not self.claims.beat(number):
                        os._exit(1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # -------------------------------------------------------------------- what came of it
    def rows(self) -> list[dict[str, Any]]:
        """Of results.csv."""
        return [self._row(t) for t in self.trials()]

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        records = read_records(self.run_of(trial.number))
        last = records[-1] if records else {}
        row = {"number": trial.number} | self.params(trial) | {"status": status_of(trial)}
        row |= {"steps": last.get("step", 0), "samples": last.get("samples", 0)}
        total = self.total_steps(trial.number)
        for fraction in stop_rules.FRACTIONS:
            step = stop_rules.step_at_fraction(fraction, total) if total else 0
            until = records[:step] if step and len(records) >= step else []
            for name in stop_rules.SIGNALS:
                value = stop_rules.signal(until, name)
                row[f"{name}@{fraction:.0%}"] = "" if math.isnan(value) else value
        row["metric"] = trial.value if trial.state == TrialState.COMPLETE else ""
        row["reason"] = trial.user_attrs.get("reason", "")
        return row

    def params(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial's value on every axis, and its seed; "" for what is not drawn yet."""
        known = trial.params or trial.system_attrs.get("fixed_params", {})
        drawn = {name: known.get(name, "") for name in self.sweep.axes}
        return drawn | {"seed": known.get("seed", self.sweep.base.seed)}

    def best(self) -> FrozenTrial | None:
        """Of the completed trials."""
        done = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        sign = 1 if self.sweep.mode == "min" else -1
        return min(done, key=lambda t: sign * (t.value or 0.0), default=None)

    def total_steps(self, number: int) -> int:
        """The steps that a trial's run has when it is not stopped; 0 before it has started."""
        report = self.run_of(number) / "data_report.json"
        return int(json.loads(report.read_text())["steps"]) if report.exists() else 0

    def write_results(self) -> None:
        with self._locked():
            rows = self.rows()
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(self.folder / RESULTS, text.getvalue())


def status_of(trial: FrozenTrial) -> str:
    """completed, stopped, failed; running or waiting before its end."""
    return ENDS.get(trial.state, trial.state.name.lower())


def read_summary(run: Path) -> dict[str, Any] | None:
    file = run / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def _plain(sweep: Sweep) -> dict[str, Any]:
    """A sweep without its base, to be compared with one of another process."""
    fields = {f.name: getattr(sweep, f.name) for f in dataclasses.fields(sweep) if f.name != "base"}
    return {k: repr(v) for k, v in fields.items()}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith(("error:", "stopped:"))]
    return (said or lines or ["it said nothing"])[-1]
