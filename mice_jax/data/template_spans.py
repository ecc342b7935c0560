"""Derives which characters of a rendered conversation are trained: each trained turn and the token that ends it.

If the template has `{% generation %}` tags, the spans are those that the tags enclose. Otherwise they come from a
*skeleton*: the same conversation rendered with a sentinel in place of each content. For example, with ChatML,

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Fine"}]

is rendered twice (newlines are left out here):

    text      <|im_start|>user Hi<|im_end|> <|im_start|>assistant Fine<|im_end|>
    skeleton  <|im_start|>user MicePart000000End<|im_end|> <|im_start|>assistant MicePart000002End<|im_end|>

1. In the skeleton, the assistant's turn starts at its sentinel. It ends after `<|im_end|>`, the added token that
   follows the sentinel.
2. Putting "Hi" and "Fine" back into the skeleton must give the text, character by character. This proves that the
   rendering does not depend on the contents, so that positions in the skeleton can be mapped to the text.
3. The trained span of the text is "Fine<|im_end|>".

If the rendering depends on a content, the filled skeleton differs from the text, and a skeleton with sentinels in
fewer messages is tried. The turn of a message without a sentinel is the text that rendering this message adds. It is an
error if that does not give a turn either.
"""

import enum
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError, TemplateInputs
from mice_jax.data.reasoning import REASONING
from mice_jax.data.tokenizer import Span

MAX_SKELETONS = 4096  # of the cache; conversations that differ only in their contents have one skeleton
# The shortest conversation that shows how a template ends an answer.
PROBE_MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine"}]

_INLINE_REASONING = re.compile(r"((?:.*<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_SENTINEL = re.compile(r"MicePart([0-9]{6})End")
_SENTINEL_WIDTH = len("MicePart000000End")


class NoTurnEndError(Exception):
    """The template writes nothing after a turn, so a model cannot learn to stop."""


class Kind(enum.IntEnum):
    """The kinds of parts of a message that a sentinel can stand for."""

    CONTENT = 0
    REASONING = 1


class Part(NamedTuple):
    """A part of a message, and the sentinel that stands for it."""

    message: int  # index in the conversation
    kind: Kind

    @property
    def sentinel(self) -> str:
        """The text that stands for this part in a skeleton."""
        return f"MicePart{2 * self.message + self.kind:06d}End"


class _FoundPart(NamedTuple):
    start: int  # position of the sentinel in the skeleton's text
    part: Part


@dataclass(frozen=True)
class _Rendered:
    """A conversation whose contents may be sentinels, and its text."""

    messages: list[Message]
    inputs: TemplateInputs
    text: str
    parts: list[_FoundPart]

    def name(self, i: int) -> str:
        """Returns the name of message i for error messages."""
        return f"messages[{i}] ({self.messages[i]['role']})"


@dataclass(frozen=True)
class _Skeleton:
    text: str
    parts: list[_FoundPart]
    turns: list[Span]  # spans of `text`, one for each trained message


class TemplateSpans:
    """Trained spans of conversations rendered by one template."""

    def __init__(self, template: ChatTemplate, added_tokens: str, special_tokens: str) -> None:
        """Stores the template and the patterns of its tokens.

        Args:
          template: the chat template.
          added_tokens: a regular expression that matches any token added to the vocabulary.
          special_tokens: a regular expression that matches any special token.
        """
        self._template = template
        self._added_tokens = added_tokens
        self._special_tokens = special_tokens
        self._skeletons: dict[str, _Skeleton] = {}

    # ------------------------------------------------------------------------------------ tags
    def from_tags(self, messages: list[Message], text: str, tagged: list[Span], train_indices: list[int]) -> list[Span]:
        """Returns the spans that the template's tags enclose, each extended by the token that ends its turn.

        Args:
          messages: the conversation.
          text: the rendered conversation.
          tagged: the spans of `text` that the tags enclose.
          train_indices: indices of the messages to train on, all of them assistant messages.

        Returns:
          Spans of `text` in characters.

        Raises:
          TemplateError: if the tags do not enclose the messages to train on.
          NoTurnEndError: if the template writes nothing after the last assistant message.
        """
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        answers = [_answer_text(messages[i]) for i in train_indices]
        count = f"{len(tagged)} {{% generation %}} spans for {len(assistants)} assistant messages"
        if len(tagged) == len(assistants):
            by_message = dict(zip(assistants, tagged, strict=True))
            tagged = [by_message[i] for i in train_indices]
            found = [answer in text[s:e] for answer, (s, e) in zip(answers, tagged, strict=True)]
        elif train_indices != assistants:
            raise TemplateError(
                f"the chat template renders {count}, so `train` and data.train_on cannot choose among the messages"
            )
        else:
            found = [any(answer in text[s:e] for s, e in tagged) for answer in answers]
        for i, is_found in zip(train_indices, found, strict=True):
            if not is_found:
                raise TemplateError(
                    f"the chat template renders {count}, and messages[{i}] is not inside one; put the "
                    "tags around the assistant's content and the token that ends the turn, and not "
                    "inside a macro or a {% set %} block"
                )
        return [(s, self._with_turn_end(text, s, e)) for s, e in tagged]

    def _with_turn_end(self, text: str, start: int, end: int) -> int:
        """Returns where a tagged span ends, including the token that ends the turn if it follows the tags."""
        if self._turn_end and text.startswith(self._turn_end, end):
            return end + len(self._turn_end)
        if end == len(text) and not re.search(rf"(?:{self._added_tokens})\s*\Z|\s\Z", text[start:end]):
            raise NoTurnEndError("the chat template writes nothing after the last assistant message")
        return end

    # ------------------------------------------------------------------------------------ skeletons
    def derive(
        self, messages: list[Message], inputs: TemplateInputs, text: str, train_indices: list[int]
    ) -> list[Span]:
        """Derives the spans of the messages to train on from a template without tags.

        Args:
          messages: the conversation.
          inputs: what else it is rendered with.
          text: the rendered conversation.
          train_indices: indices of the messages to train on.

        Returns:
          Spans of `text` in characters.

        Raises:
          TemplateError: if the spans cannot be derived; the message says why the first attempt failed.
          NoTurnEndError: if the template writes nothing after a turn.
        """
        first_error: TemplateError | None = None
        # Most renderings depend on no content, some only on messages that are not trained, and few on the trained ones.
        for with_sentinels in (range(len(messages)), train_indices, ()):
            try:
                return self._derive_with(with_sentinels, messages, inputs, text, train_indices)
            except TemplateError as e:
                first_error = first_error or e
        assert first_error is not None
        raise first_error

    def _derive_with(
        self,
        with_sentinels: Iterable[int],
        messages: list[Message],
        inputs: TemplateInputs,
        text: str,
        train_indices: list[int],
    ) -> list[Span]:
        """Derives spans as `derive` does, from a skeleton with sentinels in the given messages only."""
        blank, values = _replace_by_sentinels(messages, with_sentinels)
        skeleton = self._cached_skeleton(blank, inputs, train_indices, values)
        lengths = _fit(skeleton, values, text)
        if lengths is None:
            raise TemplateError("it changes contents, or the text around them depends on the contents")
        shown = {part for _, part in skeleton.parts}
        for i in train_indices:
            content = Part(i, Kind.CONTENT)
            if values.get(content, "").strip() and content not in shown:
                raise TemplateError(f"it leaves out the content of messages[{i}], which should be trained on")
        return [(_map_position(s, skeleton, lengths), _map_position(e, skeleton, lengths)) for s, e in skeleton.turns]

    def _cached_skeleton(
        self, blank: list[Message], inputs: TemplateInputs, train_indices: list[int], values: dict[Part, str]
    ) -> _Skeleton:
        """Returns the skeleton of a conversation with sentinels, from the cache if it has been rendered before."""
        key = json.dumps([blank, inputs.tools, inputs.documents, dict(inputs.kwargs), train_indices])
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            text = self._template.render(blank, inputs)
            parts = [_FoundPart(m.start(), _part_of(int(m[1]))) for m in _SENTINEL.finditer(text)]
            rendered = _Rendered(blank, inputs, text, parts)
            turns = [self._turn(rendered, i, Part(i, Kind.CONTENT) in values) for i in train_indices]
            self._skeletons[key] = _Skeleton(text, parts, turns)
        return self._skeletons[key]

    def _turn(self, rendered: _Rendered, i: int, has_sentinel: bool) -> Span:
        """Returns the span of the turn of message i in a text with sentinels."""
        name, text = rendered.name(i), rendered.text
        starts = [start for start, part in rendered.parts if part == (i, Kind.CONTENT)]
        has_calls = bool(rendered.messages[i].get("tool_calls"))
        if len(starts) > 1:
            raise TemplateError(f"it writes the content of {name} more than once")
        if has_sentinel and not starts and not has_calls:
            raise TemplateError(f"it leaves out the content of {name}, which should be trained on")
        if not has_sentinel or has_calls:
            return self._turn_from_added_text(rendered, i)
        # Reasoning is trained too, so a turn with reasoning starts where the generation prompt ends.
        has_reasoning = any(part == (i, Kind.REASONING) for _, part in rendered.parts)
        start = self._turn_start(rendered, i) if has_reasoning else starts[0]
        end = starts[0] + _SENTINEL_WIDTH
        tail = self._tail(rendered, i) if i + 1 < len(rendered.messages) else text[end:]
        return start, end + self._end_length(tail, text[end:], rendered.messages[i]["role"], name)

    def _turn_from_added_text(self, rendered: _Rendered, i: int) -> Span:
        """Returns the span of the turn of message i, which is the text that rendering this message adds."""
        name, text, message = rendered.name(i), rendered.text, rendered.messages[i]
        start = self._turn_start(rendered, i)
        after = self._template.render(rendered.messages[: i + 1], rendered.inputs)
        is_prefix = text.startswith(after)
        following = [s for s, part in rendered.parts if part.message > i and s >= start]
        body = text[start : len(after) if is_prefix else min(following, default=len(text))]
        if message.get("tool_calls"):
            return start, start + self._calls_end(body, is_prefix, name)
        content = message["content"].strip()
        at = body.find(content)
        tail = body[at + len(content) :].lstrip()
        if not is_prefix or at < 0 or not tail.startswith(self._turn_end.strip()):
            raise TemplateError(f"it changes the content of {name}, or renders it differently if other messages follow")
        if content and content in body[at + 1 :]:
            raise TemplateError(f"it writes the content of {name} more than once")
        end = start + at + len(content)
        length = self._end_length(text[end : len(after)], text[end:], "assistant", name)
        has_reasoning = any(message.get(k) for k in REASONING)
        return start if has_reasoning else start + at, end + length

    def _turn_start(self, rendered: _Rendered, i: int) -> int:
        """Returns where the model starts to generate turn i, which is the length of the prompt before it."""
        prompt = self._template.render(rendered.messages[:i], rendered.inputs, add_generation_prompt=True)
        # A header that is only white space precedes contents, but not tool calls.
        if self._header.strip() or rendered.text.startswith(prompt + self._header):
            prompt += self._header
        if rendered.messages[i]["role"] != "assistant" or not rendered.text.startswith(prompt):
            raise TemplateError(f"it renders the text before {rendered.name(i)} differently if that message follows")
        return len(prompt)

    def _tail(self, rendered: _Rendered, i: int) -> str:
        """Returns the text that follows content i in a conversation that ends with message i."""
        after = self._template.render(rendered.messages[: i + 1], rendered.inputs)
        at = after.rfind(Part(i, Kind.CONTENT).sentinel)
        if at < 0:
            raise TemplateError(f"it leaves out the content of messages[{i}] if that is the last message")
        return after[at + _SENTINEL_WIDTH :]

    # ------------------------------------------------------------------------------------ ends of turns
    def _end_length(self, tail: str, text: str, role: str, name: str) -> int:
        """Returns the number of characters of the token that ends a turn.

        If no added token follows the content, the first character after the content ends the turn.

        Args:
          tail: the text that follows the content if the conversation ends there, so that it contains no header.
          text: the text that follows the content in this conversation.
          role: the role of the message.
          name: the name of the message, for the error.

        Returns:
          The number of characters, which is 0 if this conversation does not contain the token.

        Raises:
          NoTurnEndError: if nothing follows the content of an assistant message.
        """
        token = re.compile(rf"\s*(?:{self._added_tokens})").match(tail)
        end = token[0] if token else tail[:1]
        if not end and role == "assistant":
            raise NoTurnEndError(f"the chat template writes nothing after {name}")
        return len(end) if text.startswith(end) else 0

    def _calls_end(self, body: str, is_prefix: bool, name: str) -> int:
        """Returns where a turn with tool calls ends, which is after the first of the tokens at the end of its text.

        Args:
          body: the text from the start of the turn to the end of the message, or beyond it.
          is_prefix: whether `body` ends with the message.
          name: the name of the message, for the error.

        Returns:
          A position in `body`.

        Raises:
          TemplateError: if the end of the turn is not found.
          NoTurnEndError: if the template writes nothing after the turn.
        """
        if not is_prefix:
            at = body.find(self._turn_end) if self._turn_end else -1
            if at < 0:
                raise TemplateError(f"it renders {name} differently if other messages follow")
            return at + len(self._turn_end)
        closing = re.search(rf"(?:(?:{self._added_tokens})\s*)+\Z", body)
        if closing:
            at = closing[0].find(self._turn_end) if self._turn_end else -1
            if at >= 0:
                return closing.start() + at + len(self._turn_end)
            first = re.search(self._special_tokens, closing[0])
            return closing.start() + (first.end() if first else len(closing[0].rstrip()))
        length = len(body.rstrip())
        if length == len(body):
            raise NoTurnEndError(f"the chat template writes nothing after {name}")
        return length + 1

    @property
    def _turn_end(self) -> str:
        """The text that ends an assistant's turn, or "" if it is unknown or only white space."""
        return self._probe[0]

    @property
    def _header(self) -> str:
        """The header of an assistant's turn if the template has no generation prompt, else ""."""
        return self._probe[1]

    @functools.cached_property
    def _probe(self) -> tuple[str, str]:
        """`_turn_end` and `_header`, from the rendering of a short conversation."""
        user, part = PROBE_MESSAGES[0], Part(1, Kind.CONTENT)
        try:
            text = self._template.render([user, {"role": "assistant", "content": part.sentinel}])
            at = text.index(part.sentinel)
            tail = text[at + _SENTINEL_WIDTH :]
            end = tail[: self._end_length(tail, tail, "user", "")]
            without_prompt = self._template.render([user])
            with_prompt = self._template.render([user], add_generation_prompt=True)
        except (TemplateError, ValueError):  # the template does not render such a short conversation
            return "", ""
        lacks_prompt = without_prompt == with_prompt and text.startswith(without_prompt)
        header = text[len(without_prompt) : at] if lacks_prompt else ""
        return (end if end.strip() else ""), header


# ---------------------------------------------------------------------------------------- sentinels
def _part_of(number: int) -> Part:
    message, kind = divmod(number, 2)
    return Part(message, Kind(kind))


def _replace_by_sentinels(messages: list[Message], chosen: Iterable[int]) -> tuple[list[Message], dict[Part, str]]:
    """Returns the messages with sentinels in place of the texts of the chosen ones, and the replaced texts by part."""
    blank = [dict(m) for m in messages]
    values: dict[Part, str] = {}
    for i in chosen:
        message = blank[i]
        content = message.get("content")
        content_part, reasoning_part = Part(i, Kind.CONTENT), Part(i, Kind.REASONING)
        reasoning = next((message[k] for k in REASONING if message.get(k)), None)
        inline = None
        if message["role"] == "assistant" and content and "</think>" in content:
            inline = _INLINE_REASONING.fullmatch(content)
        if reasoning is not None:
            values[reasoning_part] = reasoning
            message.update({k: reasoning_part.sentinel for k in REASONING if message.get(k) == reasoning})
        elif inline and inline[4]:  # some templates split a content at </think>, so both are parts
            head, values[reasoning_part], middle, values[content_part] = inline.groups()
            message["content"] = head + reasoning_part.sentinel + middle + content_part.sentinel
            continue
        if content or (content is not None and not message.get("tool_calls")):
            values[content_part] = content
            message["content"] = content_part.sentinel
    return blank, values


def _fit(skeleton: _Skeleton, values: dict[Part, str], text: str) -> list[int] | None:
    """Finds the parts of the messages in a rendered conversation.

    A template may strip the contents of some roles and not of others, so each value is also tried stripped.

    Args:
      skeleton: the skeleton of the conversation.
      values: the text of each part.
      text: the rendered conversation.

    Returns:
      The number of characters of each part in `text`, or None if the filled skeleton differs from `text`.
    """
    edges = [0, *(start + _SENTINEL_WIDTH for start, _ in skeleton.parts)]
    starts = [*(start for start, _ in skeleton.parts), len(skeleton.text)]
    literals = [skeleton.text[e:s] for e, s in zip(edges, starts, strict=True)]
    if not text.startswith(literals[0]):
        return None
    seen = set()
    # This is a depth-first search. A stack entry holds the index of the next part, a position in `text`, and a linked
    # list of the lengths of the parts before.
    stack: list[tuple[int, int, Any]] = [(0, len(literals[0]), None)]
    while stack:
        k, at, path = stack.pop()
        if k == len(skeleton.parts):
            if at < len(text):
                continue
            lengths = []
            while path:
                length, path = path
                lengths.append(length)
            return lengths[::-1]
        if (k, at) in seen:
            continue
        seen.add((k, at))
        for value in reversed(_stripped(values[skeleton.parts[k].part])):  # the stack pops the unchanged value first
            end = at + len(value)
            if text.startswith(value, at) and text.startswith(literals[k + 1], end):
                stack.append((k + 1, end + len(literals[k + 1]), (len(value), path)))
    return None


def _stripped(text: str) -> list[str]:
    """Returns the text, and the text stripped in each of the ways that templates use."""
    if text == text.strip():
        return [text]
    lines = (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    return list(dict.fromkeys((text, text.strip(), text.lstrip(), text.rstrip(), *lines)))


def _map_position(position: int, skeleton: _Skeleton, lengths: list[int]) -> int:
    """Maps a position in the skeleton's text to the rendered conversation, whose parts have the given lengths."""
    parts = zip(skeleton.parts, lengths, strict=True)
    return position + sum(n - _SENTINEL_WIDTH for (start, _), n in parts if start + _SENTINEL_WIDTH <= position)


def _answer_text(message: Message) -> str:
    """Returns the content of a message without inline reasoning, which some templates leave out."""
    return (message.get("content") or "").rpartition("</think>")[2].strip()
