"""A sweep's study: the trials, their state and their results.

An Optuna study holds the trials, their parameters and how they ended. All trials are created when the sweep starts, so
the number of a trial never changes. The same database holds a table of claims (claims.py): the trial of a dead worker
is claimed by another worker, which resumes it from its checkpoint. All workers must be able to reach the folder of the
sweep.
"""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc as sql_exc

from mice_jax.config import Config, Range, Sweep, differences, locate, to_dict
from mice_jax.config_checks import rate_of
from mice_jax.errors import UserError, one_line
from mice_jax.statistics import registered_claims
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import write_atomically
from mice_jax.storage.workdir import CERTIFICATE, RESULTS
from mice_jax.sweeps.claims import HEARTBEAT_S, Claims
from mice_jax.sweeps.live_bracket import LiveBracket
from mice_jax.sweeps.trials import (
    bracket_rule,
    fixed_params,
    label,
    settled,
    sibling_rule,
    trial_config,
    uses_rate_rule,
)
from mice_jax.training import stop_rules
from mice_jax.training.stop_monitor import Trial, read_records, rule_fields

SQLITE_TIMEOUT_S = 60.0  # how long to wait for a SQLite database that other processes have locked
# In sweep.json. These are claims about results; what claims.py keeps are the claims of workers on trials.
REGISTERED = "registered_claims"
UNNEEDED = "unneeded"  # attribute of a trial that the bracket rule has ended; its run neither failed nor diverged
RESOLVED_RATE = "resolved_learning_rate"  # column of results.csv where the rate follows the batch size
STATUS_BY_STATE = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
CONFIG_FILE = '''"""Trial {number} of the sweep in {folder}: {params}."""

from mice_jax.config import (
    Branch, Checkpoint, Config, Data, Eval, Log, Lora, Mesh, Model, Optim, Phase, Published, Source, Stop, Train,
)  # fmt: skip


def get_config(arg: str = "") -> Config:
    return {config!r}
'''


class Study:
    """The study and the folder of a sweep, opened by each process that works on it.

    Args:
        sweep: the sweep's settings.
        folder: the sweep's folder; created if it does not exist.
        storage: URL of the study's database; a SQLite file in the folder if empty.

    Raises:
        UserError: the folder holds a different sweep or cannot be written, the database cannot be opened, or the config
            of a trial is invalid.
    """

    def __init__(self, sweep: Sweep, folder: Path, storage: str = ""):
        sweep, _ = settled(sweep)
        self.sweep, self.folder, self.rule = sweep, folder, sibling_rule(sweep)
        bracket = bracket_rule(sweep)
        self.bracket = LiveBracket(sweep, bracket, folder / "runs", self.total_steps) if bracket else None
        self._until: dict[int, float] = {}  # the share of its run to which a claimed trial is run
        fixed = fixed_params(sweep)
        for params in fixed if sweep.search == "grid" else fixed[:1]:
            trial_config(sweep, params)
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--workdir={folder} cannot be written: {e.strerror}.") from None
        self.storage = storage or f"sqlite:///{folder.resolve() / 'study.db'}"
        with self._locked():
            settings = self._load_settings()
            claims_changed = self._register_claims(settings)
            self.name = str(settings["study"])
            self._open_database()
            for params in fixed[len(self.trials()) :]:
                self.study.enqueue_trial(params)
            # sweep.json is written last: it marks the study as complete.
            if claims_changed or not (folder / "sweep.json").exists():
                write_atomically(folder / "sweep.json", json.dumps(settings, indent=2) + "\n")

    def _load_settings(self) -> dict[str, Any]:
        """Returns what sweep.json holds, or what it is to hold; raises UserError where it is of a different sweep."""
        current = {"base": to_dict(self.sweep.base), "sweep": _plain_settings(self.sweep)}
        known = read_json(self.folder / "sweep.json")
        if known is None:
            return current | {"study": f"{self.folder.resolve().name}-{uuid.uuid4().hex[:12]}"}
        changed = differences(known["base"], json.loads(json.dumps(current["base"])))
        changed += [f"{k}: {known['sweep'][k]} -> {v}" for k, v in current["sweep"].items() if known["sweep"][k] != v]
        if changed:
            raise UserError(
                f"--workdir={self.folder} holds a different sweep. These settings differ (there -> here): "
                f"{'; '.join(changed)}. Run it with the file that started it, or give another --workdir."
            )
        return known

    def _register_claims(self, settings: dict[str, Any]) -> bool:
        """Puts the sweep's claims into its settings, and a copy of their file into its folder.

        Returns:
            Whether the settings have changed.

        Raises:
            UserError: the claims are not those that were registered, and runs have begun.
        """
        file = None if self.sweep.claims in ("", registered_claims.NONE) else Path(self.sweep.claims)
        known = settings.get(REGISTERED, {}).get("sha256", "")
        current = registered_claims.read(file, self.sweep) if file else None
        if (current.sha256 if current else "") == known:
            return False
        if any((self.folder / "runs").iterdir()):
            was = f"registered the claims with the hash {known[:12]}" if known else "registered no claims"
            found = f"{file} has the hash {current.sha256[:12]}" if current else "it is now given none"
            kept = self.folder / registered_claims.FILE
            mend = f"Restore the file from {kept}" if known else f"Set claims to {registered_claims.NONE}"
            raise UserError(
                f"--workdir={self.folder} {was} before its first run, and {found}. A claim that is written once runs "
                f"have begun is no claim. {mend}, or start a sweep in another --workdir."
            )
        settings.pop(REGISTERED, None)
        if file and current:
            settings[REGISTERED] = current.to_json()
            shutil.copyfile(file, self.folder / registered_claims.FILE)
        return True

    def _open_database(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        is_sqlite = self.storage.startswith("sqlite")
        engine = {"connect_args": {"timeout": SQLITE_TIMEOUT_S}} if is_sqlite else {"pool_pre_ping": True}
        try:
            database = optuna.storages.RDBStorage(self.storage, engine_kwargs=engine)
            self.study = optuna.create_study(
                storage=database,
                study_name=self.name,
                direction="minimize" if self.sweep.mode == "min" else "maximize",
                load_if_exists=True,
            )
        except (sql_exc.SQLAlchemyError, ImportError) as e:
            url = sql.engine.make_url(self.storage).render_as_string(hide_password=True)
            raise UserError(f"the study's database {url} cannot be opened: {one_line(e)}.") from None
        self.claims = Claims(database.engine, self.name)
        self.claims.create_table()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lets one process at a time in, of all that work on the folder."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def num_ended(self) -> int:
        """Returns how many trials have ended, with any status."""
        return sum(t.state.is_finished() for t in self.trials())

    def run_folder(self, number: int) -> Path:
        """Returns the workdir of a trial's run."""
        return self.folder / "runs" / str(number)

    # -------------------------------------------------------------------- from claim to end of a trial
    def claim(self) -> int | None:
        """Claims a trial that is to be run and that no living worker runs; returns None where there is none."""
        for number in self._to_run():
            if not self.claims.take(number):
                continue
            # It may have ended or paused after its state was read.
            until = self._to_run().get(number)
            if until is not None:
                self._until[number] = until
                return number
            self.claims.release(number)
        return None

    def _to_run(self) -> dict[int, float]:
        """Returns the share to which each trial is to be run now, in their order; running trials are among them."""
        if self.bracket:
            return dict(self.bracket.tasks(*self._outcomes()))
        return {t.number: 1.0 for t in self.trials() if not t.state.is_finished()}

    def _outcomes(self) -> tuple[dict[int, float], set[int]]:
        """Returns the metric of completed trials, and the trials that ended otherwise."""
        trials = self.trials()
        finals = {t.number: float(t.value or 0.0) for t in trials if t.state == TrialState.COMPLETE}
        ended = {t.number for t in trials if t.state.is_finished() and UNNEEDED not in t.user_attrs}
        failed = ended - finals.keys()
        return finals, failed

    def end_unneeded(self) -> None:
        """Ends the trials that the bracket rule leaves paused or waiting, once it has nothing left to run."""
        if not self.bracket or self._to_run():
            return
        left = [t.number for t in self.trials() if not t.state.is_finished()]
        claimed = [number for number in left if self.claims.take(number)]
        for number in claimed:
            trial = self.trials()[number]
            if not trial.state.is_finished():  # it may have ended after its state was read
                self._end_unneeded(trial, self.bracket.reason(number))
            self.claims.release(number)
        if claimed:
            self.write_results()

    def _end_unneeded(self, trial: FrozenTrial, reason: str) -> None:
        if trial.state == TrialState.RUNNING:
            self._write_config(trial.number, trial.params, until=1.0)  # so that it can be continued by hand
        storage = self.study._storage
        storage.set_trial_user_attr(trial._trial_id, UNNEEDED, True)
        storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)

    def conclusion(self) -> list[str]:
        """Returns what the bracket rule found, a sentence each; empty for a sweep without it."""
        return self.bracket.conclusion(*self._outcomes()) if self.bracket else []

    def write_certificate(self) -> None:
        """Writes what the bracket rule found and what that rests on; nothing for a sweep without it."""
        found = self.bracket.certificate(*self._outcomes()) if self.bracket else None
        if found:
            write_atomically(self.folder / CERTIFICATE, json.dumps(found.to_json(), indent=2) + "\n")

    def begin(self, number: int) -> Path:
        """Draws the parameters of a claimed trial, or reads those drawn before; returns its config file."""
        trial = self.trials()[number]
        if trial.state == TrialState.WAITING:
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        # The sampler is seeded by the trial's number, so the draw does not depend on the worker.
        sampler = optuna.samplers.TPESampler if self.sweep.search == "tpe" else optuna.samplers.RandomSampler
        self.study.sampler = sampler(seed=(self.sweep.base.seed * 1_000_003 + number) % 2**32)
        params = self._draw(optuna.trial.Trial(self.study, trial._trial_id))
        return self._write_config(number, params, self._until.get(number, 1.0))

    def config(self, number: int) -> Config:
        """Returns the config of a trial that has begun, for the whole run."""
        return trial_config(self.sweep, self.trials()[number].params)

    def _write_config(self, number: int, params: dict[str, Any], until: float) -> Path:
        """Writes the config file of a trial that is to be run up to a share of its steps."""
        config = trial_config(self.sweep, params)
        config.train.pause_at_share = until if until < 1 else 0.0
        folder = self.run_folder(number)
        folder.mkdir(exist_ok=True)
        listed = ", ".join(f"{k}={v}" for k, v in params.items())
        file = folder / "config.py"
        write_atomically(file, CONFIG_FILE.format(number=number, folder=self.folder, params=listed, config=config))
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

    def trial_variable(self, number: int) -> str:
        """Returns the value of the environment variable that tells a trial's process its place in the sweep."""
        trial = Trial(
            runs=str(self.folder.resolve() / "runs"),
            number=number,
            storage=self.storage,
            study=self.name,
            rule=rule_fields(self.rule) if self.rule else None,
            metric=self.sweep.metric,
            mode=self.sweep.mode,
        )
        return trial.to_json()

    @contextlib.contextmanager
    def claim_kept(self, number: int) -> Iterator[None]:
        """Renews a claim in the background; ends this process and its run where another worker has taken it over."""
        done = threading.Event()

        def renew_until_done() -> None:
            while not done.wait(HEARTBEAT_S):
                # After a database error, the next heartbeat tries again.
                with contextlib.suppress(sql_exc.SQLAlchemyError):
                    if not self.claims.renew(number):
                        os._exit(1)

        thread = threading.Thread(target=renew_until_done, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def pauses(self, number: int) -> bool:
        """Returns whether a claimed trial is to be paused before its end."""
        return self._until.get(number, 1.0) < 1

    def pause(self, number: int) -> None:
        """Gives up the claim of a trial that has come to its pause; it stays among the trials that run."""
        self.claims.release(number)
        self.write_results()

    def end(self, number: int, exit_code: int) -> str:
        """Records how a trial ended.

        Args:
            number: the trial.
            exit_code: exit code of its run.

        Returns:
            The status of the trial: completed, stopped or failed.
        """
        folder = self.run_folder(number)
        end = trial_end(read_summary(folder) or {}, exit_code, self.sweep.metric, folder / "log.txt")
        state = {v: k for k, v in STATUS_BY_STATE.items()}[end.status]
        trial_id = self.trials()[number]._trial_id
        self.study._storage.set_trial_user_attr(trial_id, "reason", end.reason)
        self.study._storage.set_trial_state_values(trial_id, state, None if end.value is None else [end.value])
        self.write_results()
        self.claims.release(number)
        return end.status

    # -------------------------------------------------------------------- results
    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of results.csv, one for each trial."""
        return [self._row(t) for t in self.trials()]

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        records = read_records(self.run_folder(trial.number))
        last = records[-1] if records else {}
        row = {"number": trial.number} | self.params(trial) | {"status": self.status(trial)}
        row |= {"steps": last.get("step", 0), "samples": last.get("samples", 0)}
        total = self.total_steps(trial.number)
        for fraction in stop_rules.FRACTIONS:
            step = stop_rules.step_at_fraction(fraction, total) if total else 0
            early = records[:step] if step and len(records) >= step else []
            for name in stop_rules.SIGNALS:
                value = stop_rules.signal(early, name)
                row[f"{name}@{fraction:.0%}"] = "" if math.isnan(value) else value
        row["metric"] = trial.value if trial.state == TrialState.COMPLETE else ""
        row["reason"] = trial.user_attrs.get("reason", "")
        if uses_rate_rule(self.sweep):
            row[RESOLVED_RATE] = self._resolved_rate(row)
        return row

    def _resolved_rate(self, row: dict[str, Any]) -> float | str:
        """Returns the peak learning rate of a trial at its batch size; "" before its parameters are drawn."""
        params = {name: row[name] for name in self.sweep.axes}
        if "" in params.values():
            return ""
        return rate_of(trial_config(self.sweep, params).optim)

    def status(self, trial: FrozenTrial) -> str:
        """Returns the status of a trial as `status_of`, or "paused"."""
        status = status_of(trial)
        if self.bracket and status == "running":
            paused = has_paused(self.run_folder(trial.number))
            return "paused" if paused and not self.claims.held(trial.number) else status
        return status

    def params(self, trial: FrozenTrial) -> dict[str, Any]:
        """Returns a trial's value on every axis and its seed; "" for a value that is not drawn yet."""
        known = trial.params or trial.system_attrs.get("fixed_params", {})
        drawn = {name: known.get(name, "") for name in self.sweep.axes}
        return drawn | {"seed": known.get("seed", self.sweep.base.seed)}

    def best(self) -> FrozenTrial | None:
        """Returns the best completed trial; None if there is none."""
        completed = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        sign = 1 if self.sweep.mode == "min" else -1
        return min(completed, key=lambda t: sign * (t.value or 0.0), default=None)

    def total_steps(self, number: int) -> int:
        """Returns the steps of a trial's run when it is not stopped; 0 before it has started."""
        report = read_json(self.run_folder(number) / "data_report.json")
        return int(report["steps"]) if report else 0

    def write_results(self) -> None:
        """Writes results.csv from the current state of all trials."""
        with self._locked():
            rows = self.rows()
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(self.folder / RESULTS, text.getvalue())


# ---------------------------------------------------------------------------------------- how a trial ended
@dataclasses.dataclass(frozen=True)
class TrialEnd:
    """How a trial ended."""

    status: str  # completed | stopped | failed
    reason: str
    value: float | None  # the metric; None unless the trial is completed, so that no other value looks final


def trial_end(summary: dict[str, Any], exit_code: int, metric: str, log: Path) -> TrialEnd:
    """Derives how a trial ended from what its run left.

    Args:
        summary: the run's summary.json; empty where there is none.
        exit_code: exit code of the run.
        metric: the sweep's metric.
        log: file with the run's output.
    """
    value = (summary.get("last_metrics") or {}).get(metric)
    status = str(summary.get("status")) if exit_code in (0, 3) else "failed"
    if status == "completed" and not isinstance(value, int | float):
        return TrialEnd("failed", f"its last line has no {metric}; hold data out, or name another metric", None)
    if status == "failed":
        return TrialEnd("failed", f"exit code {exit_code}: {_last_line(log)}", None)
    if status == "stopped":
        return TrialEnd("stopped", summary.get("reason", ""), None)
    return TrialEnd(status, "", float(value or 0.0))


def _last_line(log: Path) -> str:
    """Returns the last error or stop message of a log, else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    messages = [line for line in lines if line.startswith(("error:", "stopped:"))]
    return (messages or lines or ["it printed nothing"])[-1]


def status_of(trial: FrozenTrial) -> str:
    """Returns completed, stopped or failed; running or waiting before the end of the trial."""
    return STATUS_BY_STATE.get(trial.state, trial.state.name.lower())


def has_paused(run: Path) -> bool:
    """Returns whether a run has come to its pause."""
    return (read_summary(run) or {}).get("status") == "paused"


def read_summary(run: Path) -> dict[str, Any] | None:
    """Returns the summary.json of a run; None if there is none."""
    return read_json(run / "summary.json")


def _plain_settings(sweep: Sweep) -> dict[str, Any]:
    """Returns the settings of a sweep as text that can be compared with that of another process.

    Its base and its registered claims are compared otherwise.
    """
    fields = {f.name: getattr(sweep, f.name) for f in dataclasses.fields(sweep) if f.name not in ("base", "claims")}
    return {k: repr(v) for k, v in fields.items()}
