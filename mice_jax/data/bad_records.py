"""Collects the records that cannot be used, so that one error names all of them instead of the first."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mice_jax.errors import UserError, sentence

MAX_LISTED = 20  # records that an error names one by one
MAX_LISTED_CHARACTERS = 240  # of the text of each, where there are several


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used."""

    where: str  # "a.jsonl line 12"
    reason: str  # a few words, by which records are counted
    text: str  # what is wrong, without a full stop
    advice: str = ""  # how to fix it, without a full stop, where that is more than to fix the record

    def sentence(self) -> str:
        """The place, what is wrong, and the advice."""
        return sentence(f"{self.where}: {self.text}{_joined(self.advice)}")


class BadRecordError(UserError):
    """A single record cannot be used."""

    def __init__(self, record: BadRecord) -> None:
        """Keeps the record, so that it can be listed with others."""
        super().__init__(record.sentence())
        self.record = record


class BadRecordsError(UserError):
    """Records of one or more sources cannot be used."""

    def __init__(self, records: "BadRecords", more: str = "") -> None:
        """Keeps the records, so that those of several sources can be listed together; `more` ends the text."""
        super().__init__(records.paragraph() + more)
        self.records, self.more = records, more


@dataclass
class BadRecords:
    """Counts bad records by reason, and keeps the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[BadRecord] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, records: Iterable[BadRecord]) -> None:
        """Adds records."""
        for record in records:
            self.counts[record.reason] += 1
            if len(self.first) < MAX_LISTED:
                self.first.append(record)

    def merge(self, other: "BadRecords") -> None:
        """Adds the records that another collector has seen."""
        self.counts += other.counts
        self.first = [*self.first, *other.first][:MAX_LISTED]

    def paragraph(self) -> str:
        """The error: the first records one by one, all of them by reason, and what can be done."""
        total = self.counts.total()
        if total == 1:
            (one,) = self.first
            return f"{one.sentence()} {_skip('it')}"
        places: dict[str, list[str]] = {}  # by what is wrong there, which is often the same in many records
        for record in self.first:
            places.setdefault(_cut(record.text), []).append(record.where)
        listed = "; ".join(f"({i}) {_places(at)}: {text}" for i, (text, at) in enumerate(places.items(), 1))
        more = f"; and {total - len(self.first):,} more" if total > len(self.first) else ""
        by_reason = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())
        advice = "".join(f" {a[0].upper()}{a[1:]}." for a in dict.fromkeys(r.advice for r in self.first) if a)
        return f"{total:,} records cannot be used: {listed}{more}. By reason: {by_reason}.{advice} {_skip('them')}"


def merged(errors: Sequence[BadRecordsError]) -> BadRecordsError:
    """One error for the bad records of one or more sources."""
    if len(errors) == 1:
        return errors[0]
    every = BadRecords()
    for error in errors:
        every.merge(error.records)
    return BadRecordsError(every, "".join(e.more for e in errors))


def _skip(them: str) -> str:
    return f"Fix {them}, or set data.skip_bad=True to leave such records out and count them."


def _places(where: Sequence[str]) -> str:
    """Names places such as "a.jsonl line 2", those of one file together: "a.jsonl lines 2, 6"."""
    numbers: dict[str, list[str]] = {}
    for place in where:
        begin, _, number = place.rpartition(" ")  # "a.jsonl line" and "2"
        numbers.setdefault(begin, []).append(number)
    return ", ".join(f"{begin}{'s' * (len(n) > 1)} {', '.join(n)}" for begin, n in numbers.items())


def _joined(advice: str) -> str:
    if not advice:
        return ""
    return f"; {advice}" if advice[0].islower() else f". {advice}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LISTED_CHARACTERS else f"{text[: MAX_LISTED_CHARACTERS - 3]}..."
