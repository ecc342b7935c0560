"""The claims that a study registers before its first run: `claims.toml` of a sweep.

A claim says beforehand which arms are compared, by which metric, and what would confirm it. The file's hash and what it
says are kept in the sweep's sweep.json, so that the report can tell a claim from a finding.
"""

import dataclasses
import datetime
import hashlib
import itertools
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mice_jax.config import Sweep
from mice_jax.config_checks import nearest
from mice_jax.errors import UserError, one_line
from mice_jax.statistics.paired import LEVEL, MIN_PAIRS

FILE = "claims.toml"
NONE = "none"  # in place of a file, for a sweep without claims
KINDS = ("better", "alike")
FILE_KEYS = ("level", "choose_seeds", "claim")
CLAIM_KEYS = ("name", "kind", "margin", "primary", "metric", "mode", "arms", "against", "best", "over")
POSITION = "index"  # in place of a value that TOML cannot write

Texts = dict[str, list[str]]  # values of axes, as results.csv writes them


@dataclasses.dataclass(frozen=True)
class RegisteredClaim:
    """A claim about the difference between two sides, each the mean of some arms.

    Attributes:
        name: What is claimed, in words.
        kind: better (the arms are better than those they are compared with) or alike (within a margin).
        primary: Whether the claim gets a verdict; any other is an exploration.
        metric: What is compared, from the last step of each run.
        mode: Whether a lower (min) or a higher (max) value is better.
        arms: The values that fix the arms of the first side, by axis.
        against: Those of the other side.
        best: The axes of which each side takes its own best value, chosen by other seeds than are compared.
        over: The axis whose values are independent repetitions of the study, such as base models; "" for none.
        margin: The largest difference that counts as alike; 0 for the kind better.
    """

    name: str
    kind: str
    primary: bool
    metric: str
    mode: str
    arms: Texts
    against: Texts
    best: list[str]
    over: str
    margin: float


@dataclasses.dataclass(frozen=True)
class Registration:
    """What a sweep has registered.

    Attributes:
        file: The name of the file.
        sha256: The hash of its bytes.
        registered: When it was registered, ISO 8601.
        level: The level of the tests of all primary claims together.
        choose_seeds: The seeds that choose the best values; the others are compared. Claims without such values are
            compared by all seeds.
        axes: The values of each axis of the sweep, in its order.
        seeds: The seeds of the sweep.
        claims: The claims.
    """

    file: str
    sha256: str
    registered: str
    level: float
    choose_seeds: list[int]
    axes: Texts
    seeds: list[int]
    claims: list[RegisteredClaim]

    def to_json(self) -> dict[str, Any]:
        """Returns the registration as sweep.json keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Registration":
        """Returns the registration that `to_json` has written."""
        return cls(**{**values, "claims": [RegisteredClaim(**c) for c in values["claims"]]})

    def compared_seeds(self, claim: RegisteredClaim) -> list[int]:
        """Returns the seeds by which a claim is compared."""
        return [s for s in self.seeds if not (claim.best and s in self.choose_seeds)]


def find(sweep_file: Path, claims: str) -> Path | None:
    """Returns the file with a sweep's claims; None where it has none.

    Args:
        sweep_file: The file that defines the sweep.
        claims: The field `claims` of the sweep.
    """
    if claims == NONE:
        return None
    if claims:
        return sweep_file.parent / claims
    beside = sweep_file.parent / FILE
    return beside if beside.exists() else None


def text_of(value: Any) -> str:
    """Returns a value of an axis as results.csv writes it."""
    return str(value) if isinstance(value, bool | int | float | str) else repr(value)


def hash_of(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read(file: Path, sweep: Sweep) -> Registration:
    """Reads and checks the claims of a sweep.

    Args:
        file: The TOML file.
        sweep: The sweep, with its metric settled.

    Raises:
        UserError: The file cannot be read, or a claim cannot be tested by this sweep.
    """
    if not file.is_file():
        raise UserError(f"claims: the file {file} of the sweep does not exist. Name a file, or set claims to none.")
    try:
        text = file.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not TOML: {one_line(e)}. docs/claims.md has an example.") from None
    _refuse_unknown(document, FILE_KEYS, f"{file}")
    if sweep.search != "grid":
        raise UserError(
            f"{file} registers claims, which compare arms of a grid, and the sweep is a {sweep.search} search. Leave "
            "search at its default, or set claims to none."
        )
    choose_seeds = _choose_seeds(document, sweep.seeds, file)
    claims = [_Reader(place, table, sweep, choose_seeds).claim() for place, table in _tables(document, text, file)]
    for a, b in itertools.combinations(claims, 2):
        if a.name == b.name:
            raise UserError(f"{file} has two claims named {a.name!r}. Give each claim a name of its own.")
    return Registration(
        file=file.name,
        sha256=hash_of(file),
        registered=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        level=_level(document, file),
        choose_seeds=choose_seeds,
        axes={name: [text_of(v) for v in values] for name, values in sweep.axes.items()},
        seeds=list(sweep.seeds) or [sweep.base.seed],
        claims=claims,
    )


# ---------------------------------------------------------------------------------------- the file
def _tables(document: Mapping[str, Any], text: str, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the table of each claim, and where it stands."""
    tables = document.get("claim", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"{file} registers no claim. Write each as a table [[claim]]; docs/claims.md has an example.")
    lines = [i for i, line in enumerate(text.splitlines(), 1) if line.strip().startswith("[[claim]]")]
    places = [f"{file} line {i}" for i in lines] if len(lines) == len(tables) else [str(file)] * len(tables)
    return [(f"{place}: claim {t.get('name', '')!r}", t) for place, t in zip(places, tables, strict=True)]


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{place} has the key {key!r}, which nothing reads{nearest(key, known)}")


def _level(document: Mapping[str, Any], file: Path) -> float:
    level = document.get("level", LEVEL)
    if not _is_number(level) or not 0 < level <= 0.5:
        raise UserError(f"{file}: level={level!r} must be a number above 0 and at most 0.5, such as {LEVEL}.")
    return float(level)


def _choose_seeds(document: Mapping[str, Any], seeds: Sequence[int], file: Path) -> list[int]:
    chosen = document.get("choose_seeds", [])
    if not isinstance(chosen, list) or not set(map(repr, chosen)) <= set(map(repr, seeds)):
        raise UserError(f"{file}: choose_seeds={chosen!r} must be a list of seeds of the sweep, which has {seeds}.")
    return list(dict.fromkeys(chosen))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------- one claim
@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one claim; every error names its place."""

    place: str
    table: Mapping[str, Any]
    sweep: Sweep
    choose_seeds: Sequence[int]

    def claim(self) -> RegisteredClaim:
        _refuse_unknown(self.table, CLAIM_KEYS, self.place)
        name, kind = self._get("name", str, ""), self._get("kind", str, "")
        if not name.strip():
            raise UserError(f"{self.place} has no name. Say in its name what is claimed.")
        if kind not in KINDS:
            raise UserError(f"{self.place}: kind={kind!r} is not one of {', '.join(KINDS)}.")
        metric, mode = self._metric()
        arms, against = self._side("arms"), self._side("against")
        best, over = self._repeated(arms, against)
        self._refuse_common_arms(arms, against)
        self._check_number(best, over)
        primary = self._get("primary", bool, True)
        return RegisteredClaim(name, kind, primary, metric, mode, arms, against, best, over, self._margin(kind))

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.table.get(key, default)
        if not isinstance(value, kind):
            expected = {str: "a text", bool: "true or false", dict: "a table", list: "a list"}[kind]
            raise UserError(f"{self.place}: {key}={value!r} must be {expected}.")
        return value

    def _margin(self, kind: str) -> float:
        margin = self.table.get("margin")
        if kind == "better" and margin is None:
            return 0.0
        if kind == "better":
            raise UserError(f"{self.place} has a margin, which only the kind alike has. Remove it, or change the kind.")
        if margin is None or not _is_number(margin) or margin <= 0:
            found = "no margin" if margin is None else f"margin={margin!r}"
            raise UserError(
                f"{self.place} is of the kind alike and has {found}. Give the largest difference of "
                f"{self._metric()[0]} that counts as alike, a number above 0, as in margin = 0.01."
            )
        return float(margin)

    def _metric(self) -> tuple[str, str]:
        """Returns the metric and whether it is better when lower (min) or higher (max)."""
        metric = self._get("metric", str, self.sweep.metric)
        is_sweeps = metric == self.sweep.metric
        if not is_sweeps and not metric.startswith("eval/"):
            raise UserError(
                f"{self.place}: metric={metric!r} is neither that of the sweep, {self.sweep.metric}, nor a held-out "
                "one, whose names start with eval/."
            )
        mode = self._get("mode", str, self.sweep.mode if is_sweeps else "")
        if mode not in ("min", "max"):
            raise UserError(
                f"{self.place}: mode={mode!r} of the metric {metric} must be min, where lower values are better, or "
                "max; only for the metric of the sweep it can be left out."
            )
        return metric, mode

    def _side(self, side: str) -> Texts:
        """Returns the values that fix the arms of one side of the contrast."""
        table = self._get(side, dict, {})
        if not table:
            raise UserError(f"{self.place} has no {side}. Give values of axes, as in {side} = {self._example()}.")
        return {axis: self._values(side, axis, given) for axis, given in table.items()}

    def _values(self, side: str, axis: str, given: Any) -> list[str]:
        if axis not in self.sweep.axes:
            raise UserError(
                f"{self.place}: {side} names {axis!r}, which is not an axis of the sweep"
                f"{nearest(axis, self.sweep.axes)}"
            )
        choices = list(self.sweep.axes[axis])
        values = given if isinstance(given, list) else [given]
        positions = [self._position(v, choices) for v in values]
        if None in positions or not positions:
            raise UserError(
                f"{self.place}: {side} has {axis!r} = {given!r}, and no arm of the sweep has that value. The axis has "
                f"{', '.join(text_of(c)[:40] for c in choices)}; {{{POSITION} = 0}} names the first of them."
            )
        return [text_of(choices[p]) for p in positions if p is not None]

    def _position(self, value: Any, choices: Sequence[Any]) -> int | None:
        if isinstance(value, dict):
            position = value.get(POSITION)
            is_valid = set(value) == {POSITION} and type(position) is int and 0 <= position < len(choices)
            return position if is_valid else None
        same = [i for i, c in enumerate(choices) if c == value and isinstance(c, bool) == isinstance(value, bool)]
        return same[0] if same else None

    def _example(self) -> str:
        axis, values = next(iter(self.sweep.axes.items()), ("optim.batch_size", [8]))
        return f'{{"{axis}" = {text_of(values[0])}}}'

    def _repeated(self, arms: Texts, against: Texts) -> tuple[list[str], str]:
        """Returns the axes of which each side takes its best value, and the axis of repetitions."""
        best, over = self._get("best", list, []), self._get("over", str, "")
        for axis in [*best, *([over] if over else [])]:
            if axis not in self.sweep.axes:
                raise UserError(
                    f"{self.place}: best or over names {axis!r}, which is not an axis of the sweep"
                    f"{nearest(str(axis), self.sweep.axes)}"
                )
            if axis in arms or axis in against or (axis == over and axis in best):
                raise UserError(
                    f"{self.place} names the axis {axis!r} twice. An axis is fixed by arms and against, or chosen "
                    "(best), or repeated (over)."
                )
        return list(dict.fromkeys(best)), over

    def _refuse_common_arms(self, arms: Texts, against: Texts) -> None:
        def overlap(axis: str) -> bool:
            sides = [side.get(axis) for side in (arms, against)]
            return any(s is None for s in sides) or bool(set(sides[0] or ()) & set(sides[1] or ()))

        if all(overlap(axis) for axis in {*arms, *against}):
            raise UserError(f"{self.place}: arms and against have arms in common. Let them differ in an axis' values.")

    def _check_number(self, best: Collection[str], over: str) -> None:
        """Raises UserError where too few seeds or repetitions are left to compare."""
        seeds = self.sweep.seeds or [self.sweep.base.seed]
        if best and not self.choose_seeds:
            raise UserError(
                f"{self.place} takes the best {', '.join(best)}, and the file has no choose_seeds. Name the seeds that "
                "choose, as in choose_seeds = [0, 1] at the top of the file; the others are compared."
            )
        compared = [s for s in seeds if not (best and s in self.choose_seeds)]
        number = len(self.sweep.axes[over]) if over and compared else len(compared)
        if number < MIN_PAIRS:
            unit = f"values of {over}" if over and compared else "seeds"
            raise UserError(
                f"{self.place} would be compared by {number} {unit}, and a comparison needs at least {MIN_PAIRS}. The "
                f"sweep has the seeds {list(seeds)}, of which {list(self.choose_seeds) if best else 'none'} choose."
            )
