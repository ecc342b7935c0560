"""Counts what a sample's encoding left out, changed or found unusual, by name, with the place of the first sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNREAD = "unread key "  # what the name of a key that nothing reads begins with

# What each note counts, as a sentence about a source. {n} is the count, {first} the place of the first.
MESSAGES = {
    "empty_answer": "trained assistant messages that are empty: {n} (the first in {first}), so that only the token "
    "that ends the turn is trained; fill them, or set their `train` to false",
    "content_left_out": "{n} messages are left out by the chat template (the first in {first}); take a template that "
    "renders their roles, or take them out of the data",
    "reasoning_left_out": "{n} trained assistant messages have reasoning that the chat template leaves out (the first "
    "in {first}), which teaches the model not to reason there; data.reasoning says what else to do",
    "reasoning_untrained": "{n} assistant messages are not trained, since the chat template leaves out their reasoning "
    "(the first in {first}) and data.reasoning is 'last'",
    "reasoning_dropped": "the reasoning of {n} assistant messages is taken out (the first in {first}), as "
    "data.reasoning='drop' says",
    "empty_think": "{n} assistant messages hold an empty <think></think> of their own (the first in {first}), which "
    "the model learns to write; take it out, and leave empty ones to the chat template",
    "arguments_not_json": "{n} calls have arguments that are no JSON object (the first in {first}), so that the "
    "template may write them as a quoted text",
    "prompts_differ": "before {n} of the {compared} trained turns that were compared stand other tokens than in a "
    "prompt for them (the first in {first}: {example}); if reasoning is the cause, set data.reasoning='per_turn' or a "
    "variable in data.template_kwargs, else fix what the template writes for add_generation_prompt",
}


@dataclass(frozen=True)
class Note:
    """How often something was found in one sample."""

    count: int
    example: str = ""


Notes = Mapping[str, Note]
NO_NOTES: Notes = {}


@dataclass
class NoteCounter:
    """The notes of many samples: for each name the count, and the place and example of the first sample."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, notes: Notes, place: int, number: int) -> None:
        """Adds the notes of one sample, which is record `number` of a place."""
        for name, note in notes.items():
            self._add(name, {"count": note.count, "place": place, "number": number, "example": note.example})

    def merge(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what another counter found in later samples."""
        for name, one in found.items():
            self._add(name, one)

    def _add(self, name: str, one: Mapping[str, Any]) -> None:
        if name in self.found:
            self.found[name]["count"] += one["count"]
        else:
            self.found[name] = dict(one)


def sentences(notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each note of a source, and one for all of its unread keys.

    Args:
      notes: by name, with the keys `count`, `first` (a place) and `example`.
    """
    found = []
    unread = {name.removeprefix(UNREAD): one for name, one in notes.items() if name.startswith(UNREAD)}
    if unread:
        listed = ", ".join(f"{key} ({one['count']:,}, the first in {one['first']})" for key, one in unread.items())
        found.append(f"nothing reads these keys: {listed}; take them out, or use what docs/data.md lists")
    compared = f"{notes['prompts_compared']['count']:,}" if "prompts_compared" in notes else "0"
    for name, message in MESSAGES.items():
        if name in notes:
            one = notes[name]
            found.append(
                message.format(n=f"{one['count']:,}", first=one["first"], example=one["example"], compared=compared)
            )
    return found
