"""Early signals and rules: what a run's first steps tell, and when that is enough to stop it.

A run is known by its records, the objects of metrics.jsonl. A rule reads those of a run and, where it compares, those
of its siblings, up to the same number of samples; it returns the reason to stop, or "". Rules are frozen dataclasses
of plain numbers: nothing of a run is kept in them, so a run that was killed is judged again as before.
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

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)  # of a run's steps: where it is judged, and what results.csv shows
SIGNALS = ("loss", "grad_norm", "grad_norm_corrected", "noise_scale", "update_norm", "param_norm", "eval/loss")
START_SAMPLES = 8  # of which a start is the mean: one sample's loss says little of what the others' will be
WINDOW = 0.25  # of the samples seen so far: the latest part, over which a signal is averaged


# ---------------------------------------------------------------------------------------- records
class ColumnarRecords(Sequence[Record]):
    """A finished run's records in a column a name, a tenth of the room of objects; NaN is what a record lacks.

    What is cut from them or read off them is remembered, so hundreds of runs can be compared with each other.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], phases: Sequence[str] = ()):
        self.columns, self.phases = columns, phases
        self.records: dict[int, Record] = {}  # by where they stand
        self.cuts: dict[int, ColumnarRecords] = {}  # by length
        self.signals: dict[tuple[str, float], float] = {}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @overload
    def __getitem__(self, at: int) -> Record: ...

    @overload
    def __getitem__(self, at: slice) -> "ColumnarRecords": ...

    def __getitem__(self, at: int | slice) -> "Record | ColumnarRecords":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if (start, step) != (0, 1):
                return ColumnarRecords({k: v[at] for k, v in self.columns.items()}, self.phases[at])
            if stop not in self.cuts:
                self.cuts[stop] = ColumnarRecords({k: v[:stop] for k, v in self.columns.items()}, self.phases[:stop])
            return self.cuts[stop]
        if at not in self.records:
            known = {k: v[at].item() for k, v in self.columns.items() if not math.isnan(v[at])}
            self.records[at] = known | ({"phase": self.phases[at]} if self.phases else {})
        return self.records[at]


def column(records: Records, name: str) -> np.ndarray:
    """A number of each record, float64; NaN where it has none."""
    if isinstance(records, ColumnarRecords):
        found = records.columns.get(name)
        return np.full(len(records), math.nan) if found is None else found
    return np.array([math.nan if r.get(name) is None else r[name] for r in records], np.float64)


def first_samples(records: Records, samples: int) -> Records:
    """The records of the first `samples` samples."""
    return records[: int(np.searchsorted(column(records, "samples"), samples, side="right"))]


# ---------------------------------------------------------------------------------------- signals


def signal(records: Records, name: str, window: float = WINDOW) -> float:
    """A signal at the end of some records: its mean over the latest part of them; NaN where it was never measured.

    The corrected gradient norm is the root of a mean of squares, since only the squares are unbiased, and 0 where
    noise leaves none. Held-out values are not averaged: the latest is taken.
    """
    if not isinstance(records, ColumnarRecords):
        return _signal(records, name, window)
    if (name, window) not in records.signals:
        records.signals[name, window] = _signal(records, name, window)
    return records.signals[name, window]


def _signal(records: Records, name: str, window: float) -> float:
    key = "grad_sq_corrected" if name == "grad_norm_corrected" else name
    values = column(records, key)
    known = ~np.isnan(values)
    if not known.any():
        return math.nan
    latest = values[known][-1:]
    if name.startswith("eval/"):
        return float(latest[0])
    samples = column(records, "samples")
    recent = values[known & (samples > (1 - window) * samples[-1])]
    mean = float(np.mean(recent if len(recent) else latest))  # measured now and then: the latest there is
    return math.sqrt(max(0.0, mean)) if key == "grad_sq_corrected" else mean


def step_at_fraction(fraction: float, total_steps: int) -> int:
    """The step at which a fraction of a run is done."""
    return max(1, math.ceil(round(fraction * total_steps, 6)))


def decision_steps(rule: "SiblingRule", total_steps: int) -> set[int]:
    """After which steps a rule is asked; never after the last."""
    if isinstance(rule, HalvingRule):
        first, times = step_at_fraction(rule.first, total_steps), len(rule.fractions)
        steps = {first * rule.reduction**i for i in range(times)}
    else:
        steps = {step_at_fraction(f, total_steps) for f in rule.fractions}
    return {s for s in steps if s < total_steps}


# ---------------------------------------------------------------------------------------- rules
class Rule(Protocol):
    def reason_to_stop(self, mine: Records, siblings: Sequence[Records], objective: "Objective") -> str: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the runs of a study are compared by in the end."""

    metric: str = "eval/loss"
    mode: str = "min"  # min | max

    def latest(self, records: Records) -> float:
        """The metric so far, better when smaller; NaN where it has not been measured yet."""
        value = signal(records, self.metric)
        return -value if self.mode == "max" else value

    def comparable_values(self, mine: Records, siblings: Sequence[Records]) -> tuple[float, list[float]]:
        """Of a run and those siblings that can be compared with it, better when smaller.

        By the metric where the run has seen it and a sibling has by then, by the training loss before that.
        """
        others = [v for s in siblings if not math.isnan(v := self.latest(s))]
        own = self.latest(mine)
        if others and not math.isnan(own):
            return own, others
        losses = [signal(s, "loss") for s in siblings]
        return signal(mine, "loss"), [v for v in losses if not math.isnan(v)]

    def is_best(self, mine: Records, siblings: Sequence[Records]) -> bool:
        """Whether no sibling is better at the same samples."""
        own, others = self.comparable_values(mine, siblings)
        return all(own <= other for other in others)


@dataclasses.dataclass(frozen=True)
class DivergenceRule:
    """The loss is above its start by `margin` for `steps` steps in a row.

    It starts with each phase: other data may have another loss, and that is no divergence. The start is the mean of the
    phase's first START_SAMPLES samples, or of its first step where that has more.
    """

    margin: float = 1.0  # nats
    steps: int = 10

    def reason_to_stop(
        self, mine: Records, siblings: Sequence[Records] = (), objective: Objective = Objective()
    ) -> str:
        if len(mine) <= self.steps or mine[-self.steps - 1]["phase"] != mine[-1]["phase"]:
            return ""
        first = next(i for i, r in enumerate(mine) if r["phase"] == mine[-1]["phase"])
        before = mine[first - 1]["samples"] if first else 0
        own = itertools.islice(mine, first, None)
        counted = itertools.takewhile(lambda r: r["samples"] - before <= START_SAMPLES, own)
        start = statistics.fmean([r["loss"] for r in counted] or [mine[first]["loss"]])
        latest = [r["loss"] for r in mine[-self.steps :]]
        if min(latest) <= start + self.margin:
            return ""
        return (
            f"diverged: for {self.steps} steps the loss has been more than {self.margin:g} above its start of "
            f"{start:.4g}; it is {latest[-1]:.4g}"
        )


@dataclasses.dataclass(frozen=True)
class DeadModelRule:
    """The loss is stuck at the logarithm of the vocabulary, and the gradient has vanished: what a huge rate does.

    The model then gives every token the same odds whatever the input, and nothing leads back.
    """

    vocab_size: int
    near: float = 0.05  # of ln(vocab_size)
    vanished: float = 1e-3  # of the first step's gradient norm
    steps: int = 10

    def reason_to_stop(
        self, mine: Records, siblings: Sequence[Records] = (), objective: Objective = Objective()
    ) -> str:
        if len(mine) <= self.steps:
            return ""
        level, start = math.log(self.vocab_size), mine[0]["grad_norm"]
        stuck = all(
            abs(r["loss"] - level) <= self.near * level and r["grad_norm"] <= self.vanished * start
            for r in mine[-self.steps :]
        )
        if not stuck:
            return ""
        return (
            f"dead: for {self.steps} steps the loss has been at ln({self.vocab_size}) = {level:.4g} with a gradient "
            f"norm below {self.vanished:g} of its start of {start:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class PaperRule:
    """Among runs at the same samples, the lower gradient norm and the higher loss promise the better end.

    A run is stopped where a sibling has both, by `margin` of their values, in the latest `window` of the samples.
    """

    fractions: tuple[float, ...] = FRACTIONS
    window: float = WINDOW
    margin: float = 0.0
    norm: str = "grad_norm_corrected"  # | grad_norm: which compares runs of one batch size only

    def reason_to_stop(self, mine: Records, siblings: Sequence[Records], objective: Objective) -> str:
        norm, loss = signal(mine, self.norm, self.window), signal(mine, "loss", self.window)
        for sibling in siblings:
            its_norm, its_loss = signal(sibling, self.norm, self.window), signal(sibling, "loss", self.window)
            if its_norm * (1 + self.margin) < norm and its_loss > loss * (1 + self.margin):
                return (
                    f"a sibling has the lower {self.norm} ({its_norm:.4g} to {norm:.4g}) and the higher loss "
                    f"({its_loss:.4g} to {loss:.4g}) at {mine[-1]['samples']:,} samples"
                )
        return ""


@dataclasses.dataclass(frozen=True)
class MedianRule:
    """A run is stopped where it is worse than the median of its siblings at the same samples."""

    fractions: tuple[float, ...] = FRACTIONS
    min_siblings: int = 2

    def reason_to_stop(self, mine: Records, siblings: Sequence[Records], objective: Objective) -> str:
        own, others = objective.comparable_values(mine, siblings)
        if len(others) < self.min_siblings or own <= statistics.median(others):
            return ""
        return (
            f"worse than the median of {len(others)} siblings ({own:.4g} to {statistics.median(others):.4g}) at "
            f"{mine[-1]['samples']:,} samples"
        )


@dataclasses.dataclass(frozen=True)
class HalvingRule:
    """Asynchronous successive halving, which Optuna's pruner decides: one of `reduction` goes on at each rung.

    Rungs lie at `first` of the run and at each `reduction` times it.
    """

    first: float = 0.05
    reduction: int = 4

    @property
    def fractions(self) -> tuple[float, ...]:
        rungs = int(math.log(1 / self.first, self.reduction) + 1e-9) + 1
        return tuple(f for i in range(rungs) if (f := self.first * self.reduction**i) < 1)


SiblingRule = PaperRule | MedianRule | HalvingRule
SIBLING_RULES: dict[str, type[SiblingRule]] = {"paper": PaperRule, "median": MedianRule, "halving": HalvingRule}


def rules_of_every_run(margin: float, steps: int, vocab_size: int) -> list[Rule]:
    """The rules of every run; 0 steps = none."""
    return [DivergenceRule(margin, steps), DeadModelRule(vocab_size, steps=steps)] if steps else []


def first_reason(
    rules: Sequence[Rule], mine: Records, siblings: Sequence[Records] = (), objective: Objective | None = None
) -> str:
    """Of the first rule that stops the run; "" where none does."""
    return next((r for rule in rules if (r := rule.reason_to_stop(mine, siblings, objective or Objective()))), "")


def reason_among_siblings(
    rule: PaperRule | MedianRule, mine: Records, siblings: Sequence[Records], objective: Objective
) -> str:
    """What a rule says of a run among siblings, each cut at the run's samples; never against the best so far."""
    samples = mine[-1]["samples"]
    comparable = [cut for s in siblings if (cut := first_samples(s, samples)) and s[-1]["samples"] >= samples]
    if not comparable or objective.is_best(mine, comparable):
        return ""
    return rule.reason_to_stop(mine, comparable, objective)
