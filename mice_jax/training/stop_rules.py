"""Early signals of a run and the rules that stop it.

A run is represented by its records, the objects of its metrics.jsonl. A rule reads the records of a run and, where it
compares runs, the records of the run's siblings; it returns the reason to stop, or "". Rules are frozen dataclasses of
plain numbers and hold no state of a run, so a run that was killed and resumed gets the same decisions.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload

import numpy as np

Record = dict[str, Any]
Records = Sequence[Record]

# The shares of a run's steps at which rules decide and which results.csv reports.
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)
SIGNALS = (
    "loss", "token_accuracy", "entropy", "grad_norm", "grad_norm_corrected", "noise_scale", "update_norm", "param_norm",
    "eval/loss",
)  # fmt: skip
# The start of a phase is the mean loss of this many samples, because the loss of a single sample is too noisy.
START_SAMPLES = 8
# A signal is averaged over this share of the samples seen so far, the most recent ones.
WINDOW = 0.25


# ---------------------------------------------------------------------------------------- records
class ColumnarRecords(Sequence[Record]):
    """The records of a finished run, stored as one array per metric.

    This takes a tenth of the memory of a list of dicts. Slices and signals are cached, so that hundreds of runs can be
    compared with each other.

    Args:
        columns: The float64 array [N] of each metric by name; NaN where a record has no such number.
        phases: The phase of each record; empty if the records have none.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], phases: Sequence[str] = ()):
        self.columns, self.phases = columns, phases
        self.records: dict[int, Record] = {}  # The key is the index.
        self.prefixes: dict[int, ColumnarRecords] = {}  # The key is the length.
        self.signals: dict[tuple[str, float], float] = {}  # The key is the name and the window.

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "ColumnarRecords": ...

    def __getitem__(self, index: int | slice) -> "Record | ColumnarRecords":
        if isinstance(index, slice):
            return self._slice(index)
        if index not in self.records:
            record = {k: v[index].item() for k, v in self.columns.items() if not math.isnan(v[index])}
            self.records[index] = record | ({"phase": self.phases[index]} if self.phases else {})
        return self.records[index]

    def _slice(self, part: slice) -> "ColumnarRecords":
        start, stop, step = part.indices(len(self))
        if (start, step) != (0, 1):
            return ColumnarRecords({k: v[part] for k, v in self.columns.items()}, self.phases[part])
        if stop not in self.prefixes:
            columns = {k: v[:stop] for k, v in self.columns.items()}
            self.prefixes[stop] = ColumnarRecords(columns, self.phases[:stop])
        return self.prefixes[stop]


def column(records: Records, name: str) -> np.ndarray:
    """Returns one number of each record as a float64 array [N], NaN where a record does not have it."""
    if isinstance(records, ColumnarRecords):
        values = records.columns.get(name)
        return np.full(len(records), math.nan) if values is None else values
    return np.array([math.nan if r.get(name) is None else r[name] for r in records], np.float64)


def first_samples(records: Records, samples: int) -> Records:
    """Returns the records of a run up to a number of samples, inclusive."""
    return records[: int(np.searchsorted(column(records, "samples"), samples, side="right"))]


# ---------------------------------------------------------------------------------------- signals
def signal(records: Records, name: str, window: float = WINDOW) -> float:
    """Computes a signal at the end of some records.

    A signal is the mean of its values over the most recent part of the records. The corrected gradient norm is the root
    of a mean of squares, because only the squares are unbiased, and 0 where that mean is negative. Held-out values are
    not averaged: the latest one counts.

    Args:
        records: The records of a run, up to the point of interest.
        name: One of SIGNALS, or any other number of the records.
        window: The share of the samples so far that counts as recent.

    Returns:
        The signal; NaN where it was never measured.
    """
    if not isinstance(records, ColumnarRecords):
        return _signal(records, name, window)
    if (name, window) not in records.signals:
        records.signals[name, window] = _signal(records, name, window)
    return records.signals[name, window]


def recorded_name(signal: str) -> str:
    """Returns the name of the number in metrics.jsonl from which a signal is computed."""
    return "grad_sq_corrected" if signal == "grad_norm_corrected" else signal


def _signal(records: Records, name: str, window: float) -> float:
    key = recorded_name(name)
    values = column(records, key)
    known = ~np.isnan(values)
    if not known.any():
        return math.nan
    latest = values[known][-1:]
    if name.startswith("eval/"):
        return float(latest[0])
    samples = column(records, "samples")
    recent = values[known & (samples > (1 - window) * samples[-1])]
    # Some signals are measured every few steps only; where the window holds none of them, the latest one counts.
    mean = float(np.mean(recent if len(recent) else latest))
    return math.sqrt(max(0.0, mean)) if key == "grad_sq_corrected" else mean


def step_at_fraction(fraction: float, total_steps: int) -> int:
    """Returns the step at which a fraction of a run is done, at least 1."""
    return max(1, math.ceil(round(fraction * total_steps, 6)))


def decision_steps(rule: "SiblingRule", total_steps: int) -> set[int]:
    """Returns the steps after which a rule decides; the last step of the run is never one of them."""
    if isinstance(rule, HalvingRule):
        first = step_at_fraction(rule.first, total_steps)
        steps = {first * rule.reduction**i for i in range(len(rule.fractions))}
    else:
        steps = {step_at_fraction(f, total_steps) for f in rule.fractions}
    return {s for s in steps if s < total_steps}


# ---------------------------------------------------------------------------------------- rules
@dataclasses.dataclass(frozen=True)
class Objective:
    """The metric by which the runs of a study are compared in the end."""

    metric: str = "eval/loss"
    mode: str = "min"  # min | max

    def latest(self, records: Records) -> float:
        """Returns the latest value of the metric, negated where higher is better; NaN where there is none yet."""
        value = signal(records, self.metric)
        return -value if self.mode == "max" else value

    def comparable_values(self, records: Records, siblings: Sequence[Records]) -> tuple[float, list[float]]:
        """Returns the values by which a run and its siblings can be compared at this point; lower is better.

        These are values of the metric where the run and at least one sibling have measured it, and training losses
        otherwise.

        Args:
            records: The records of the run.
            siblings: The records of each sibling, up to the same number of samples.

        Returns:
            The value of the run, and the values of the siblings that have one.
        """
        own = self.latest(records)
        others = [value for s in siblings if not math.isnan(value := self.latest(s))]
        if others and not math.isnan(own):
            return own, others
        losses = [signal(s, "loss") for s in siblings]
        return signal(records, "loss"), [loss for loss in losses if not math.isnan(loss)]

    def is_best(self, records: Records, siblings: Sequence[Records]) -> bool:
        """Returns whether no sibling is better at the same number of samples."""
        own, others = self.comparable_values(records, siblings)
        return all(own <= other for other in others)


class Rule(Protocol):
    """A rule that decides from records whether a run is stopped."""

    def reason_to_stop(self, records: Records, siblings: Sequence[Records], objective: Objective) -> str:
        """Decides on a run after its latest step.

        Args:
            records: The records of the run so far.
            siblings: The records of each sibling, up to the same number of samples.
            objective: The metric by which the runs are compared.

        Returns:
            The reason to stop the run; "" to continue.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DivergenceRule:
    """Stops a run whose loss has been more than `margin` above its start for `steps` steps in a row.

    The comparison starts again with each phase, because other data may have another loss. The start is the mean loss
    of the phase's first START_SAMPLES samples, or of its first step where that step has more samples.
    """

    margin: float = 1.0  # The unit is nats.
    steps: int = 10

    def reason_to_stop(
        self, records: Records, siblings: Sequence[Records] = (), objective: Objective = Objective()
    ) -> str:
        """Returns the reason to stop the run, or "" to continue; see `Rule`."""
        if len(records) <= self.steps or records[-self.steps - 1]["phase"] != records[-1]["phase"]:
            return ""
        start = _start_of_phase(records)
        latest = [r["loss"] for r in records[-self.steps :]]
        if min(latest) <= start + self.margin:
            return ""
        return (
            f"diverged: for {self.steps} steps the loss has been more than {self.margin:g} above its start of "
            f"{start:.4g}; it is {latest[-1]:.4g}"
        )


def _start_of_phase(records: Records) -> float:
    """Returns the mean loss of the first samples of the phase that the last record belongs to."""
    first = next(i for i, r in enumerate(records) if r["phase"] == records[-1]["phase"])
    samples_before = records[first - 1]["samples"] if first else 0
    of_phase = itertools.islice(records, first, None)
    start = itertools.takewhile(lambda r: r["samples"] - samples_before <= START_SAMPLES, of_phase)
    return statistics.fmean([r["loss"] for r in start] or [records[first]["loss"]])


@dataclasses.dataclass(frozen=True)
class DeadModelRule:
    """Stops a run whose loss stays at the logarithm of the vocabulary size while its gradient has vanished.

    A learning rate that is far too high leads there: the model then predicts the same distribution for every input and
    cannot recover.
    """

    vocab_size: int
    near: float = 0.05  # The largest distance of the loss from ln(vocab_size), as a share of it.
    vanished: float = 1e-3  # The largest gradient norm, as a share of the first step's.
    steps: int = 10

    def reason_to_stop(
        self, records: Records, siblings: Sequence[Records] = (), objective: Objective = Objective()
    ) -> str:
        """Returns the reason to stop the run, or "" to continue; see `Rule`."""
        if len(records) <= self.steps:
            return ""
        level, first_norm = math.log(self.vocab_size), records[0]["grad_norm"]
        dead = all(
            abs(r["loss"] - level) <= self.near * level and r["grad_norm"] <= self.vanished * first_norm
            for r in records[-self.steps :]
        )
        if not dead:
            return ""
        return (
            f"dead: for {self.steps} steps the loss has been at ln({self.vocab_size}) = {level:.4g} with a gradient "
            f"norm below {self.vanished:g} of its start of {first_norm:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class PaperRule:
    """Stops a run if a sibling has both a lower gradient norm and a higher loss at the same number of samples.

    According to the paper (arXiv 2412.13337), such a sibling ends better.
    """

    fractions: tuple[float, ...] = FRACTIONS
    window: float = WINDOW
    margin: float = 0.0  # Both must differ by more than this share of their values.
    norm: str = "grad_norm_corrected"  # The alternative, grad_norm, is comparable among runs of one batch size only.

    def reason_to_stop(self, records: Records, siblings: Sequence[Records], objective: Objective) -> str:
        """Returns the reason to stop the run, or "" to continue; see `Rule`."""
        norm, loss = signal(records, self.norm, self.window), signal(records, "loss", self.window)
        for sibling in siblings:
            its_norm, its_loss = signal(sibling, self.norm, self.window), signal(sibling, "loss", self.window)
            if its_norm * (1 + self.margin) < norm and its_loss > loss * (1 + self.margin):
                return (
                    f"a sibling has the lower {self.norm} ({its_norm:.4g} to {norm:.4g}) and the higher loss "
                    f"({its_loss:.4g} to {loss:.4g}) at {records[-1]['samples']:,} samples"
                )
        return ""


@dataclasses.dataclass(frozen=True)
class MedianRule:
    """Stops a run that is worse than the median of its siblings at the same number of samples."""

    fractions: tuple[float, ...] = FRACTIONS
    min_siblings: int = 2

    def reason_to_stop(self, records: Records, siblings: Sequence[Records], objective: Objective) -> str:
        """Returns the reason to stop the run, or "" to continue; see `Rule`."""
        own, others = objective.comparable_values(records, siblings)
        if len(others) < self.min_siblings or own <= statistics.median(others):
            return ""
        return (
            f"worse than the median of {len(others)} siblings ({own:.4g} to {statistics.median(others):.4g}) at "
            f"{records[-1]['samples']:,} samples"
        )


@dataclasses.dataclass(frozen=True)
class HalvingRule:
    """Asynchronous successive halving: at each rung, the best one of `reduction` runs continues.

    Optuna's pruner decides. The first rung is at the fraction `first` of the run; each further rung is at `reduction`
    times the one before.
    """

    first: float = 0.05
    reduction: int = 4

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fraction of the run at which each rung is."""
        rungs = int(math.log(1 / self.first, self.reduction) + 1e-9) + 1
        return tuple(f for i in range(rungs) if (f := self.first * self.reduction**i) < 1)


SiblingRule = PaperRule | MedianRule | HalvingRule
SIBLING_RULES: dict[str, type[SiblingRule]] = {"paper": PaperRule, "median": MedianRule, "halving": HalvingRule}


# ---------------------------------------------------------------------------------------- decisions
def rules_of_every_run(margin: float, steps: int, vocab_size: int) -> list[Rule]:
    """Returns the rules that apply to every run, whether it is part of a sweep or not.

    Args:
        margin: The distance from the start of its phase above which a loss counts as diverged, in nats.
        steps: The number of steps in a row for which a condition must hold; 0 turns both rules off.
        vocab_size: The number of token ids of the model.
    """
    return [DivergenceRule(margin, steps), DeadModelRule(vocab_size, steps=steps)] if steps else []


def first_reason(rules: Sequence[Rule], records: Records) -> str:
    """Returns the reason of the first rule that stops a run by its own records; "" if none does."""
    reasons = (rule.reason_to_stop(records, (), Objective()) for rule in rules)
    return next(filter(None, reasons), "")


def reason_among_siblings(
    rule: PaperRule | MedianRule, records: Records, siblings: Sequence[Records], objective: Objective
) -> str:
    """Compares a run with its siblings at the run's number of samples; the best run so far is never stopped.

    Args:
        rule: The rule of the sweep.
        records: The records of the run so far.
        siblings: All records of each sibling; those that have not come as far are left out.
        objective: The metric by which the runs are compared.

    Returns:
        The reason to stop the run; "" to continue.
    """
    samples = records[-1]["samples"]
    comparable = [cut for s in siblings if (cut := first_samples(s, samples)) and s[-1]["samples"] >= samples]
    if not comparable or objective.is_best(records, comparable):
        return ""
    return rule.reason_to_stop(records, comparable, objective)
