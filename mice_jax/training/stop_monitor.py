"""Checks after each step of a run whether a rule stops it. The rules are its own and that of the sweep it belongs to.

A trial gets its place in the sweep through an environment variable and reads its siblings' records from their folders.
Rules that compare siblings decide at fixed fractions of the run, so a decision depends on files alone and is the same
after a kill and a resume.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from mice_jax import config
from mice_jax.storage import jsonl
from mice_jax.storage.workdir import METRICS
from mice_jax.training import stop_rules

TRIAL_VARIABLE = "MICE_JAX_TRIAL"  # This environment variable has the trial's `Trial` as JSON.


@dataclasses.dataclass(frozen=True)
class Trial:
    """The place of a run in its sweep.

    Attributes:
      runs: The folder with the runs of all trials.
      number: The number of the trial.
      storage: The URL of the study's database.
      study: The name of the study.
      rule: The name and the fields of the rule (`rule_fields`); None if the sweep has none.
      metric: The metric by which trials are compared.
      mode: "min" or "max".
    """

    runs: str
    number: int
    storage: str
    study: str
    rule: dict[str, Any] | None
    metric: str
    mode: str

    def to_json(self) -> str:
        """Returns the trial as JSON."""
        return json.dumps(dataclasses.asdict(self))


# ---------------------------------------------------------------------------------------- records on disk
def read_records(folder: Path) -> list[stop_rules.Record]:
    """Returns the complete lines of the steps in a run's metrics.jsonl; empty if there is no such file."""
    return read_run(folder).steps


class RunRecords(NamedTuple):
    """The complete lines of a run's metrics.jsonl.

    Attributes:
      before: The line that was measured before the first step; empty if there is none.
      steps: The lines of the steps.
    """

    before: stop_rules.Record
    steps: list[stop_rules.Record]


def read_run(folder: Path) -> RunRecords:
    """Returns the complete lines of a run's metrics.jsonl; empty if there is no such file."""
    records = jsonl.read(folder / METRICS)
    has_before = bool(records) and records[0]["step"] == 0
    return RunRecords(records[0], records[1:]) if has_before else RunRecords({}, records)


def last_record(folder: Path) -> stop_rules.Record:
    """Returns the complete line of the latest step in a run's metrics.jsonl; empty if there is none."""
    record = jsonl.read_last(folder / METRICS)
    return record if record.get("step") else {}


# ---------------------------------------------------------------------------------------- rules as JSON
def rule_fields(rule: stop_rules.SiblingRule) -> dict[str, Any]:
    """Returns a rule as a dict of its name and its fields, for the environment of a trial."""
    name = next(k for k, v in stop_rules.SIBLING_RULES.items() if isinstance(rule, v))
    return {"name": name} | dataclasses.asdict(rule)


def rule_from_fields(fields: dict[str, Any]) -> stop_rules.SiblingRule:
    """Returns the rule that `rule_fields` described."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "name"}
    return stop_rules.SIBLING_RULES[fields["name"]](**values)


# ---------------------------------------------------------------------------------------- the monitor
class StopMonitor:
    """Decides after each step whether a run stops, and why.

    Args:
        folder: The local folder of the run; records of an earlier process are read from its metrics.jsonl.
        stop: The settings of the rules that every run has.
        vocab_size: The number of token ids of the model.
        total_steps: The number of planned steps of the run.
    """

    def __init__(self, folder: Path, stop: config.Stop, vocab_size: int, total_steps: int):
        self._rules = stop_rules.rules_of_every_run(stop.margin, stop.steps, vocab_size)
        self._records = read_records(folder)
        self._trial = Trial(**json.loads(os.environ[TRIAL_VARIABLE])) if TRIAL_VARIABLE in os.environ else None
        self._decision_steps: set[int] = set()
        if self._trial and self._trial.rule:
            self._sibling_rule = rule_from_fields(self._trial.rule)
            self._decision_steps = stop_rules.decision_steps(self._sibling_rule, total_steps)

    def reason_to_stop(self, record: stop_rules.Record) -> str:
        """Takes the record of the step just done; returns the reason to stop after it, or "" to continue."""
        self._records.append(record)
        own = stop_rules.first_reason(self._rules, self._records)
        if own or record["step"] not in self._decision_steps:
            return own
        return self._reason_among_siblings()

    def _reason_among_siblings(self) -> str:
        trial, rule = self._trial, self._sibling_rule
        assert trial is not None
        objective = stop_rules.Objective(trial.metric, trial.mode)
        if isinstance(rule, stop_rules.HalvingRule):
            return _reason_of_halving(trial, rule, self._records, min(self._decision_steps), objective)
        folders = [f for f in sorted(Path(trial.runs).iterdir()) if f.is_dir() and f.name != str(trial.number)]
        siblings = [read_records(f) for f in folders]
        return stop_rules.reason_among_siblings(rule, self._records, siblings, objective)


def _reason_of_halving(
    trial: Trial,
    rule: stop_rules.HalvingRule,
    records: list[stop_rules.Record],
    first_step: int,
    objective: stop_rules.Objective,
) -> str:
    """Reports the run's value to the study and asks Optuna's pruner."""
    # Optuna belongs to the extra `lab`, and only a trial of a sweep needs it.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first_step, reduction_factor=rule.reduction)
    study = optuna.load_study(study_name=trial.study, storage=trial.storage, pruner=pruner)
    stored = study.get_trials(deepcopy=False)[trial.number]
    live = optuna.trial.Trial(study, stored._trial_id)
    step = records[-1]["step"]
    if step not in stored.intermediate_values:
        live.report(_value_for_study(records, objective), step)
    if not live.should_prune():
        return ""
    return f"not among the best 1 of {rule.reduction} at step {step}, says Optuna's successive halving"


def _value_for_study(records: list[stop_rules.Record], objective: stop_rules.Objective) -> float:
    """Returns the metric, or the training loss before the metric was measured, in the direction of the study."""
    latest = objective.latest(records)
    value = stop_rules.signal(records, "loss") if math.isnan(latest) else latest
    return -value if objective.mode == "max" else value
