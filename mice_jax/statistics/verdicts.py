"""Verdicts on registered claims, from the results of a sweep.

A primary claim is supported, refuted, or cannot be told. Its p-value is adjusted by Holm's procedure to the number of
primary claims, those that have no result yet among them. All other claims are explorations: they get a q-value by the
procedure of Benjamini and Hochberg, and no verdict.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mice_jax.statistics import multiplicity, paired, power
from mice_jax.statistics.registered_claims import RegisteredClaim, Registration, Texts

SUPPORTED, REFUTED, UNKNOWN, EXPLORATION = "supported", "refuted", "cannot be told", "exploration"
HOLM, BENJAMINI_HOCHBERG = "Holm", "Benjamini-Hochberg"
MAX_NAMED = 3  # runs that a reason names


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of a sweep.

    Attributes:
        name: The name of its trial.
        params: Its value on each axis, as results.csv writes it.
        seed: Its seed.
        status: How it ended; only a completed run is compared.
        values: Its metrics at the last step, by name.
        device_hours: The time that it took its devices; NaN where that is unknown.
    """

    name: str
    params: Mapping[str, str]
    seed: int
    status: str
    values: Mapping[str, float]
    device_hours: float = math.nan


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the results say about a claim. Numbers are NaN where there are none.

    Attributes:
        claim: The claim.
        verdict: supported, refuted, cannot be told; or exploration, which is no verdict.
        reason: Why it cannot be told, where that is not for want of evidence.
        pairs: How many differences are compared: seeds, or values of the axis of repetitions.
        mean: The mean of the arms less that of those they are compared with.
        low: The lower end of its interval.
        high: Its upper end.
        confidence: What the interval covers: 1 - level, and 1 - 2 level for the kind alike.
        p: The p-value of the claim alone.
        adjusted: The p-value adjusted to how many claims there are.
        method: How it was adjusted.
        detectable: The true difference that is found with a power of 80 %; for the kind alike, the margin within which
            equal arms are found alike.
        chosen: The value of each axis that was chosen, for the arms and for those they are compared with.
        notes: Sentences on how far the numbers can be trusted.
        device_hours: What the runs took that it rests on, in hours of one device; NaN where that is unknown.
    """

    claim: RegisteredClaim
    verdict: str
    reason: str = ""
    pairs: int = 0
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    confidence: float = math.nan
    p: float = math.nan
    adjusted: float = math.nan
    method: str = ""
    detectable: float = math.nan
    chosen: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    device_hours: float = math.nan


def judge(registration: Registration, results: Sequence[Result]) -> list[Verdict]:
    """Returns the verdict on each registered claim, in the order of the file.

    Args:
        registration: What was registered before the first run.
        results: The runs so far.
    """
    num_primary = sum(c.primary for c in registration.claims)
    places = _places(registration, results)
    tested = [_tested(registration, c, results, places, num_primary if c.primary else 1) for c in registration.claims]
    judged = list(tested)
    for primary, method, adjust in (
        (True, HOLM, multiplicity.holm),
        (False, BENJAMINI_HOCHBERG, multiplicity.benjamini_hochberg),
    ):
        group = [i for i, v in enumerate(tested) if v.claim.primary == primary]
        # A claim without a result counts as one that found nothing.
        p = adjust([1.0 if math.isnan(tested[i].p) else tested[i].p for i in group])
        for i, value in zip(group, p.tolist(), strict=True):
            shown = math.nan if math.isnan(tested[i].p) else value
            judged[i] = dataclasses.replace(
                tested[i], adjusted=shown, method=method, verdict=_word(tested[i], value, registration.level)
            )
    return judged


def _word(v: Verdict, adjusted: float, level: float) -> str:
    if not v.claim.primary:
        return EXPLORATION
    if math.isnan(v.p) or adjusted > level:
        return UNKNOWN
    if v.claim.kind == "alike":
        return SUPPORTED if abs(v.mean) <= v.claim.margin else REFUTED
    return SUPPORTED if (v.mean < 0) == (v.claim.mode == "min") else REFUTED


def _places(registration: Registration, results: Sequence[Result]) -> np.ndarray:
    """Returns the position of each run in the results, int [*axes, seed]; -1 where there is none."""
    axes, seeds = registration.axes, registration.seeds
    places = np.full([*(len(v) for v in axes.values()), len(seeds)], -1)
    for number, run in enumerate(results):
        if run.seed in seeds and all(run.params.get(a) in v for a, v in axes.items()):
            places[(*(v.index(run.params[a]) for a, v in axes.items()), seeds.index(run.seed))] = number
    return places


def _tested(
    registration: Registration, claim: RegisteredClaim, results: Sequence[Result], places: np.ndarray, tests: int
) -> Verdict:
    """Returns the test of one claim, without its verdict."""
    sides = [
        _Side(registration, claim, results, _arranged(registration, claim, fixed, places))
        for fixed in (claim.arms, claim.against)
    ]
    hours = sum(r.device_hours for r in {r.name: r for side in sides for r in side.runs}.values())
    missing = next((why for side in sides if (why := side.missing())), "")
    chosen = [side.label for side in sides] if claim.best and all(side.chosen is not None for side in sides) else []
    if missing:
        return Verdict(claim, "", missing, chosen=chosen, device_hours=hours)
    plus, minus = (side.means[side.chosen or 0][:, side.compared_seeds] for side in sides)
    differences, notes = plus - minus, [note for side in sides for note in side.notes()]
    if claim.over:
        differences, parts = paired.base_means(list(differences))
        notes.append(
            f"Differences vary by {parts.between:.2g} over {claim.over} and by {parts.within:.2g} over seeds "
            "(standard deviations)."
        )
    else:
        differences = differences[0]
    found = _numbers(claim, differences, registration.level, tests)
    notes += _notes_on(claim, differences, registration.level)
    return dataclasses.replace(found, chosen=chosen, notes=notes, device_hours=hours)


def _numbers(claim: RegisteredClaim, differences: np.ndarray, level: float, tests: int) -> Verdict:
    """Returns the numbers of a claim's test. Power is at the first level of Holm's procedure, the strictest one."""
    n = len(differences)
    if claim.kind == "better":
        c = paired.compare(differences, level)
        p, confidence, factor = float(c.p), 1 - level, power.detectable_difference(n, level / tests)
    else:
        c = paired.equivalence(differences, claim.margin, level)
        p, confidence, factor = (
            min(float(c.p), float(c.p_beyond)),
            1 - 2 * level,
            power.detectable_margin(n, level / tests),
        )
    return Verdict(
        claim=claim,
        verdict="",
        pairs=n,
        mean=float(c.mean),
        low=float(c.low),
        high=float(c.high),
        confidence=confidence,
        p=p,
        detectable=factor * float(c.deviation),
    )


def _notes_on(claim: RegisteredClaim, differences: np.ndarray, level: float) -> list[str]:
    notes = []
    if len(differences) < paired.FEW_PAIRS:
        notes.append(f"{len(differences)} pairs are few: only differences of several standard deviations are found.")
    if not differences.std():
        notes.append("The differences do not vary, so no noise is seen that they could be due to.")
    if claim.kind == "alike" and float(paired.compare(differences, level).p) <= level:
        notes.append("There is a difference, whether or not it is within the margin.")
    return notes


@dataclasses.dataclass(frozen=True)
class _Side:
    """One side of a contrast. Letters: C settings that can be chosen, R repetitions, S seeds, M arms of the mean.

    Attributes:
        registration: What was registered.
        claim: The claim.
        results: The runs of the sweep.
        places: The position of each of the side's runs in the results, int [C, R, S, M]; -1 where there is none.
    """

    registration: Registration
    claim: RegisteredClaim
    results: Sequence[Result]
    places: np.ndarray

    @functools.cached_property
    def means(self) -> np.ndarray:
        """The mean of the metric over the side's arms, float64 [C, R, S]; NaN where a run is missing."""
        return np.asarray(self._values.mean(axis=-1))

    @functools.cached_property
    def _values(self) -> np.ndarray:
        """The metric of each run, float64 [C, R, S, M]."""
        known = [
            r.values.get(self.claim.metric, math.nan) if r.status == "completed" else math.nan for r in self.results
        ]
        values = np.array([*known, math.nan])[self.places]
        return np.where(np.isfinite(values), values, math.nan)

    @property
    def runs(self) -> list[Result]:
        """The runs of the side, those of all settings that can be chosen among them."""
        return [self.results[i] for i in np.unique(self.places) if i >= 0]

    @functools.cached_property
    def chosen(self) -> int | None:
        """The setting with the best mean over the seeds that choose; None where none was run with all of them."""
        if not self.claim.best:
            return 0
        sign = 1.0 if self.claim.mode == "min" else -1.0
        seeds = [self.registration.seeds.index(s) for s in self.registration.choose_seeds]
        return paired.choose(sign * self.means.mean(axis=1), seeds)

    @property
    def compared_seeds(self) -> list[int]:
        """The positions of the seeds that are compared."""
        return [self.registration.seeds.index(s) for s in self.registration.compared_seeds(self.claim)]

    def missing(self) -> str:
        """Returns which runs are missing that the comparison needs; "" where none is."""
        if self.chosen is None:
            return f"No {' and '.join(self.claim.best)} was run with every seed that chooses."
        needed = (self.chosen, slice(None), self.compared_seeds)
        lacking = self.places[needed][np.isnan(self._values[needed])]
        if not len(lacking):
            return ""
        named = [f"trial {self.results[i].name} is {self.results[i].status}" for i in lacking if i >= 0]
        named += ["a seed of an arm was not run"] * bool((lacking < 0).any())
        shown = named[:MAX_NAMED] + ["..."] * (len(named) > MAX_NAMED)
        total = self._values[needed].size
        return f"{len(lacking)} of {total} runs of one side have no {self.claim.metric}: {'; '.join(shown)}."

    @property
    def label(self) -> dict[str, str]:
        """The value of each axis that was chosen."""
        sizes = [len(self.registration.axes[a]) for a in self.claim.best]
        index = np.unravel_index(self.chosen or 0, sizes) if sizes else ()
        return {a: self.registration.axes[a][i] for a, i in zip(self.claim.best, index, strict=True)}

    def notes(self) -> list[str]:
        """Returns sentences about chosen values that lie at the end of their axis."""
        return [
            f"The best {axis} of one side, {value}, is at the end of its axis: a better one may lie beyond."
            for axis, value in self.label.items()
            if value in _ends(self.registration.axes[axis])
        ]


def _arranged(registration: Registration, claim: RegisteredClaim, fixed: Texts, places: np.ndarray) -> np.ndarray:
    """Returns the part of places [*axes, seed] whose arms have the `fixed` values, as int [C, R, S, M]."""
    axes = registration.axes
    kept = [[v.index(text) for text in fixed.get(a, v)] for a, v in axes.items()]
    part = places[np.ix_(*kept, range(len(registration.seeds)))]
    dim = {name: i for i, name in enumerate(axes)}
    repeated = [dim[claim.over]] if claim.over else []
    mean = [i for name, i in dim.items() if name not in (*claim.best, claim.over)]
    order = [[dim[name] for name in claim.best], repeated, [len(axes)], mean]
    shape = [math.prod(part.shape[i] for i in dims) for dims in order]
    return part.transpose([i for dims in order for i in dims]).reshape(shape)


def _ends(texts: Sequence[str]) -> list[str]:
    """Returns the lowest and the highest of some numbers; nothing where one is not a number, or all are the same."""
    try:
        ordered = sorted(texts, key=float)
    except ValueError:
        return []
    return [ordered[0], ordered[-1]] if len(ordered) > 1 else []
