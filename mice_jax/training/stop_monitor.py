"""The rules that a run is under while it trains: its own, always, and those of the sweep that it is a trial of.

A trial learns of its sweep from its environment. It reads its siblings' numbers from their folders, at decision
points that are fractions of its steps: so what it is told is a function of files, and the same after a kill.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from mice_jax import config
from mice_jax.storage.workdir import METRICS
from mice_jax.training import stop_rules

LONGEST_LINES = 1 << 16  # bytes: two lines at least
TRIAL_VARIABLE = "MICE_JAX_TRIAL"  # in a trial's environment: its `Trial`, as JSON


@dataclasses.dataclass(frozen=True)
class Trial:
    """Where a run stands in its sweep."""

    runs: str  # the folder that its siblings' lie in
    number: int
    storage: str  # of the study
    study: str
    rule: dict[str, Any] | None  # name, and the rule's fields
    metric: str
    mode: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def read_records(folder: Path) -> list[stop_rules.Record]:
    """The whole lines of a run's metrics.jsonl; none where there is none."""
    file = folder / METRICS
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def last_record(folder: Path) -> stop_rules.Record:
    """The last whole line of a run's metrics.jsonl; empty where there is none."""
    file = folder / METRICS
    if not file.exists():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - LONGEST_LINES))
        lines = opened.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else {}


def rule_from_fields(fields: dict[str, Any]) -> stop_rules.SiblingRule:
    """A rule from its name and its fields."""
    rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "name"}
    return stop_rules.SIBLING_RULES[fields["name"]](**rest)


class StopMonitor:
    """Told each step's record, says whether the run is to stop, and why."""

    def __init__(self, folder: Path, stop: config.Stop, vocab_size: int, total_steps: int):
        self._rules = stop_rules.rules_of_every_run(stop.margin, stop.steps, vocab_size)
        self._records = read_records(folder)
        self._trial = Trial(**json.loads(os.environ[TRIAL_VARIABLE])) if TRIAL_VARIABLE in os.environ else None
        self._points: set[int] = set()
        if self._trial and self._trial.rule:
            self._rule = rule_from_fields(self._trial.rule)
            self._points = stop_rules.decision_steps(self._rule, total_steps)

    def reason_to_stop(self, record: stop_rules.Record) -> str:
        """The reason to stop after this step; "" to go on."""
        self._records.append(record)
        own = stop_rules.first_reason(self._rules, self._records)
        return own or (self._among_siblings() if record["step"] in self._points else "")

    def _among_siblings(self) -> str:
        assert self._trial is not None
        objective = stop_rules.Objective(self._trial.metric, self._trial.mode)
        if isinstance(self._rule, stop_rules.HalvingRule):
            return _halved(self._trial, self._rule, self._records, min(self._points), objective)
        runs = Path(self._trial.runs)
        others = [f for f in sorted(runs.iterdir()) if f.is_dir() and f.name != str(self._trial.number)]
        return stop_rules.reason_among_siblings(self._rule, self._records, [read_records(f) for f in others], objective)


def _halved(
    trial: Trial,
    rule: stop_rules.HalvingRule,
    records: list[stop_rules.Record],
    first: int,
    objective: stop_rules.Objective,
) -> str:
    """Reports to the study how good the run is, and asks its pruner."""
    import optuna  # of the extra `lab`: only a trial of a sweep needs it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=rule.reduction)
    study = optuna.load_study(study_name=trial.study, storage=trial.storage, pruner=pruner)
    own = study.get_trials(deepcopy=False)[trial.number]
    seen = objective.latest(records)
    value = stop_rules.signal(records, "loss") if math.isnan(seen) else seen
    value = -value if objective.mode == "max" else value  # the study's own direction
    asking = optuna.trial.Trial(study, own._trial_id)
    step = records[-1]["step"]
    if step not in own.intermediate_values:
        asking.report(value, step)
    if not asking.should_prune():
        return ""
    return f"not among the best 1 of {rule.reduction} at step {step}, says Optuna's successive halving"


def rule_fields(rule: stop_rules.SiblingRule) -> dict[str, Any]:
    """A rule as its name and its fields, for a trial's environment."""
    name = next(k for k, v in stop_rules.SIBLING_RULES.items() if isinstance(rule, v))
    return {"name": name} | dataclasses.asdict(rule)
