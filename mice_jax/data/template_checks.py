"""Finds what a chat template leaves out of a conversation, by rendering it with marks in the place of its parts.

A template that does not know calls renders an assistant's message with calls as an empty one, without an error. Each
part that may be lost (a call, a reasoning, a content that is not in the text as it is) is replaced by a mark of its
own; the parts whose marks are missing in the rendered text are left out. Tools are rendered with and without.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mice_jax.data import templates
from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError, TemplateInputs
from mice_jax.data.reasoning import REASONING, reasoning_of, with_reasoning, without_reasoning
from mice_jax.data.sources import Sample
from mice_jax.data.template_spans import PROBE_MESSAGES

# Keys of a message that every template is taken to know, or that are checked in another way.
# `tool_call_id` is in every tool message of OpenAI's format, and most templates do without it.
KNOWN_KEYS = {"role", "content", "train", "tool_calls", "tool_call_id", *REASONING}


@dataclass(frozen=True)
class LeftOut:
    """The parts of a conversation that its rendering lacks, by the indices of their messages."""

    tools: bool = False
    calls: list[int] = field(default_factory=list)
    reasoning: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)


NOTHING = LeftOut()


class _Marks:
    """Texts that a template cannot contain, each for one part of one message."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int, str]] = []  # kind, index of the message, mark

    def make(self, kind: str, message: int) -> str:
        mark = f"MiceMark{len(self.parts):06d}End"
        self.parts.append((kind, message, mark))
        return mark

    def missing(self, text: str) -> LeftOut:
        lost: dict[str, list[int]] = {"calls": [], "reasoning": [], "contents": []}
        for kind, i, mark in self.parts:
            if mark not in text and i not in lost[kind]:
                lost[kind].append(i)
        return LeftOut(**lost)  # type: ignore[arg-type]


def left_out(template: ChatTemplate, messages: list[Message], inputs: TemplateInputs, text: str) -> LeftOut:
    """Finds the parts of a conversation that its rendering lacks.

    Args:
      template: the chat template.
      messages: the conversation.
      inputs: what else it is rendered with.
      text: the conversation as rendered.

    Returns:
      What is left out.
    """
    marks = _Marks()
    marked = [_marked(m, i, marks, text) for i, m in enumerate(messages)]
    found = NOTHING
    if marks.parts:
        try:
            found = marks.missing(template.render(marked, inputs))
        except TemplateError:  # it looks into what was replaced
            found = _by_removal(template, messages, inputs, text)
    return replace(found, tools=True) if inputs.tools and _ignores_tools(template, messages, inputs, text) else found


def _marked(message: Message, i: int, marks: _Marks, text: str) -> Message:
    """The message with marks in the place of parts that the text may lack."""
    if reasoning_of(message):
        message = with_reasoning(message, marks.make("reasoning", i))
    if message.get("tool_calls"):
        message = message | {"tool_calls": [_marked_call(call, i, marks) for call in message["tool_calls"]]}
    answer = (message.get("content") or "").rpartition("</think>")[2].strip()
    if answer and answer not in text:
        message = message | {"content": message["content"].replace(answer, marks.make("contents", i))}
    return message


def _marked_call(call: Message, i: int, marks: _Marks) -> Message:
    if isinstance(call.get("function"), dict):
        return call | {"function": _marked_call(call["function"], i, marks)}
    given: dict[str, Any] = {}
    if isinstance(call.get("name"), str):
        given["name"] = marks.make("calls", i)
    arguments = call.get("arguments")
    if isinstance(arguments, dict) and arguments:
        given["arguments"] = {marks.make("calls", i): 1}
    elif isinstance(arguments, str) and arguments:
        given["arguments"] = marks.make("calls", i)
    return call | given


def _by_removal(template: ChatTemplate, messages: list[Message], inputs: TemplateInputs, text: str) -> LeftOut:
    """As `left_out`, by rendering the conversation without each part."""
    calls, reasoning = [], []
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            without = {"content": ""} | {k: v for k, v in message.items() if k != "tool_calls"}
            if _renders_equally(template, [*messages[:i], without, *messages[i + 1 :]], inputs, text):
                calls.append(i)
        if reasoning_of(message):
            without = without_reasoning(message)
            if _renders_equally(template, [*messages[:i], without, *messages[i + 1 :]], inputs, text):
                reasoning.append(i)
    return LeftOut(calls=calls, reasoning=reasoning)


def _ignores_tools(template: ChatTemplate, messages: list[Message], inputs: TemplateInputs, text: str) -> bool:
    return _renders_equally(template, messages, replace(inputs, tools=None), text)


def _renders_equally(template: ChatTemplate, messages: list[Message], inputs: TemplateInputs, text: str) -> bool:
    try:
        return template.render(messages, inputs) == text
    except TemplateError:
        return False


def unread_keys(template: ChatTemplate, sample: Sample) -> list[str]:
    """The keys of a conversation that neither this package nor the template reads.

    Args:
      template: the chat template.
      sample: the conversation.

    Returns:
      The keys of the record, and those of its messages as `messages.KEY`.
    """
    keys = {key for m in sample.messages for key, value in m.items() if key not in KNOWN_KEYS and value is not None}
    if not (keys or sample.unread or sample.documents or sample.template_kwargs):
        return []
    names = template.names(sample.tools)
    unread = list(sample.unread)
    if sample.documents and "documents" not in names.variables:
        unread.append("documents")
    unread += [f"chat_template_kwargs.{k}" for k in sample.template_kwargs if k not in names.variables]
    unnamed = sorted(keys - names.keys)
    return unread if not unnamed or _writes_whole_messages(template) else [*unread, *(f"messages.{k}" for k in unnamed)]


def _writes_whole_messages(template: ChatTemplate) -> bool:
    """Whether the template writes messages with all their keys, whatever these are called."""
    try:
        return "MiceProbe" in template.render([m | {"mice_probe": "MiceProbe"} for m in PROBE_MESSAGES])
    except TemplateError:
        return False


def built_in_that_render(template: ChatTemplate, messages: list[Message], inputs: TemplateInputs) -> list[str]:
    """The names of the built-in templates that render a conversation whole.

    Args:
      template: the template in use, whose special tokens are taken.
      messages: the conversation.
      inputs: what else it is rendered with.
    """
    found = []
    for name in sorted(templates.TOKENS):
        other = template.with_text(templates.text_of(name))
        try:
            text = other.render(messages, inputs)
        except TemplateError:
            continue
        if left_out(other, messages, inputs, text) == NOTHING:
            found.append(name)
    return found


def any_of(names: Iterable[str]) -> str:
    """`a`, `a or b`, or `a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
