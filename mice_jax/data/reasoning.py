"""Finds and replaces the reasoning of an assistant's message.

A message holds its reasoning under a key of its own, or at the start of its content: between `<think>` and `</think>`,
or, where the generation prompt has written `<think>` already, before a `</think>` that stands on a line of its own.
Templates take everything before a `</think>` for reasoning, also in a text that only mentions it. So does
`reasoning_of`, since that is what a template may leave out; `without_reasoning` takes out nothing else than reasoning.
"""

import re
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys that templates read
# What happens to reasoning, as in `data.reasoning`.
POLICIES = ("template", "last", "per_turn", "drop")

# In each, group 2 is the reasoning, and groups 1 and 3 are the tags around it.
_OPENED = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)
_MENTIONED = re.compile(r"(\s*)(.*?)(\s*</think>\s*)", re.DOTALL)
_UNOPENED = re.compile(r"(\s*)((?:(?!<think>).)*?)(\n[ \t]*</think>[ \t]*(?:\n\s*|\Z))", re.DOTALL)

Message = dict[str, Any]


def reasoning_of(message: Message) -> str | None:
    """The reasoning of an assistant's message, which may be empty; None where it has none."""
    by_key = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    if by_key is not None or message.get("role") != "assistant":
        return by_key
    found = _before_end_tag(message)
    return found[2] if found else None


def with_reasoning(message: Message, text: str) -> Message:
    """The message with another text in the place of its reasoning."""
    if any(isinstance(message.get(key), str) for key in REASONING):
        return message | {key: text for key in REASONING if isinstance(message.get(key), str)}
    found = _before_end_tag(message)
    assert found, "the message has no reasoning"
    return message | {"content": found[1] + text + found[3] + message["content"][found.end() :]}


def without_reasoning(message: Message) -> Message:
    """The message without its reasoning and the tags around it."""
    found = _inline(message) if message.get("role") == "assistant" else None
    rest = {key: value for key, value in message.items() if key not in REASONING}
    return rest | {"content": message["content"][found.end() :]} if found else rest


def _inline(message: Message) -> re.Match[str] | None:
    """Reasoning at the start of a content."""
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return None
    return _OPENED.match(content) or _UNOPENED.match(content)


def _before_end_tag(message: Message) -> re.Match[str] | None:
    """What templates take for the reasoning in a content."""
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return None
    return _inline(message) or _MENTIONED.match(content)
