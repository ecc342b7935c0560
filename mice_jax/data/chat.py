"""Turns samples into token ids and says which are trained: all that knows roles and templates.

The ids are those of the tokenizer's chat template over the whole conversation, rendered once. The
mask is derived in characters and carried over by the tokens' offsets: a token that overlaps a
trained span by one character is trained. Spans come from the template's `{% generation %}` tags or,
where it has none, from a *skeleton*: the same conversation rendered with sentinels for contents.
Putting the contents back must give the real text, character by character; that is the proof that
the spans are right. Where a template looks into a content, and so fits no skeleton, a turn is what
rendering one message more adds to the text. A turn that none of this can find is an error.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mice_jax.data.sources import REASONING, Sample
from mice_jax.data.tokenizer import Span, decode, locator, one_line
from mice_jax.errors import UserError

RULES = 1  # of this file; counted up when ids or masks change, so that token stores are built anew
MAX_SKELETONS = 4096  # kept for conversations of the same form

_TAGS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THOUGHT = re.compile(r"((?:.*<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_SLOT = re.compile(r"MiceSlot([0-9]{6})End")
_WIDTH = len("MiceSlot000000End")

_render_jinja: Any = render_jinja_template  # its hints are narrower than what it takes

Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # uint8 [n]; 1 = the model learns to predict this token


@dataclass(frozen=True)
class _Skeleton:
    """A rendering with sentinels; message i's content is slot 2 * i, its reasoning 2 * i + 1."""

    text: str
    slots: list[tuple[int, int]]  # where a sentinel starts, and its number
    turns: list[Span]  # in this text, one for each message that is trained


class _Underivable(Exception):
    """Why a turn was not found in this way; another way may find it."""


class _NoEnd(Exception):
    """Nothing follows the turn that a model could learn to stop with; no other way finds one."""


# ---------------------------------------------------------------------------------------- encoding
class ChatEncoder:
    """Samples to ids and masks by one tokenizer and template; picklable, for worker processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """`chat_template` is a template's text; None or "" takes the tokenizer's own."""
        self.tokenizer = tokenizer
        self._template = chat_template or tokenizer.chat_template
        self._variables = dict(tokenizer.special_tokens_map)
        self._locator = locator(tokenizer)
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        special = [s for s in tokenizer.all_special_tokens if s.strip()]
        self._any_added, self._any_special = _any_of(added + special), _any_of(special)
        self._skeletons: dict[str, _Skeleton] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Ids and masks, in order; the ids are those of `apply_chat_template(messages, tools)`."""
        encoded: list[Encoded | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if s.messages[0]["role"] == "pretraining"]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._locator.documents(texts), strict=True):
            encoded[i] = self._document(ids)
        chats = [i for i, e in enumerate(encoded) if e is None]
        located = [self._locate(samples[i]) for i in chats]
        tokens = self._locator.located([t for t, _ in located])
        for i, (ids, offsets), (_, spans) in zip(chats, tokens, located, strict=True):
            encoded[i] = Encoded(np.array(ids, np.int32), _mask(offsets, spans))
        return encoded  # type: ignore[return-value]

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
        """The ids after which the model writes the assistant's next turn."""
        try:
            text, _ = self._render(_cleaned(messages), tools, prompt=True)
        except _Underivable as e:
            raise UserError(f"the prompt {json.dumps(messages)[:200]}: {e}.") from e
        return self._locator.ids(text)

    def stop_ids(self) -> list[int]:
        """The tokens that end an assistant's turn in this template."""
        sample = Sample(_PROBE, None, False, "a conversation made up to find what ends a turn")
        (probe,) = self.encode([sample])
        return [int(probe.ids[probe.trained.nonzero()[0][-1]])]

    def show(self, ids: np.ndarray, trained: np.ndarray, color: bool) -> str:
        """The text, with what is trained in green, or in brackets without colour."""
        left, right = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        shown = before = ""
        for start, end in itertools.pairwise(edges):
            # Decoded from the start: alone, a run would lose the space that its first token has.
            text = self._decode(ids[:end])
            run = text[len(before) :] if text.startswith(before) else self._decode(ids[start:end])
            shown += f"{left}{run}{right}" if end > start and trained[start] else run
            before = text
        return shown

    def fingerprint(self) -> str:
        """Changes when ids or masks may: by tokenizer, special tokens, template or our rules."""
        special = {k: str(v) for k, v in self._variables.items()}
        parts = [
            RULES,
            self._locator.state(),
            special,
            self.tokenizer.all_special_ids,
            self._template,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _decode(self, ids: np.ndarray) -> str:
        return decode(self.tokenizer, ids.tolist(), skip_special_tokens=False)

    def _document(self, ids: list[int]) -> Encoded:
        end: Any = self.tokenizer.eos_token_id
        ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.uint8))

    # ------------------------------------------------------------------------------------ spans
    def _locate(self, sample: Sample) -> tuple[str, list[Span]]:
        """The conversation's text, and the spans of it that are trained."""
        try:
            return self._located(sample)
        except _NoEnd as e:
            raise UserError(
                f"{sample.where}: {e}, so that a model trained on it would never stop. Let the "
                "template write a token (such as the eos token) after each assistant message."
            ) from e

    def _located(self, sample: Sample) -> tuple[str, list[Span]]:
        messages = _cleaned(sample.messages)
        wanted = [i for i, m in enumerate(sample.messages) if _is_trained(m, sample.unmask)]
        by_assistant = all(messages[i]["role"] == "assistant" for i in wanted)
        tagged = by_assistant and self._is_tagged(sample.tools)
        try:
            text, marks = self._render(messages, sample.tools, marks=tagged)
            if not wanted:
                return text, []
            if tagged:
                return text, self._tagged_spans(sample, text, marks, wanted)
        except _Underivable as e:
            raise UserError(f"{sample.where}: {e}.") from e
        return text, self._derived_spans(sample, messages, text, wanted)

    def _derived_spans(self, sample: Sample, messages: list[Message], text: str, wanted: list[int]) -> list[Span]:
        """The spans of the wanted messages, from a template that does not mark them."""
        reason = ""
        # Most templates look at no content; some look at the user's; few at the assistant's.
        for chosen in (range(len(messages)), wanted, ()):
            try:
                return self._spans(messages, sample.tools, text, wanted, chosen)
            except _Underivable as e:
                reason = reason or str(e)
        raise UserError(
            f"{sample.where}: which tokens to train cannot be told from the chat template: {reason}."
            " Put {% generation %} before and {% endgeneration %} after the assistant's turn (its "
            "content and the token that ends it) in a copy of the template, and give that file as "
            "data.chat_template."
        )

    def _spans(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        text: str,
        wanted: list[int],
        chosen: Iterable[int],
    ) -> list[Span]:
        """The spans of the wanted messages, by a skeleton with sentinels in the chosen ones."""
        blank, values = _blanked(messages, chosen)
        key = json.dumps([blank, tools, wanted])
        skeleton = self._skeletons.get(key)
        lengths = skeleton and _fit(skeleton, values, text)
        if skeleton is None or lengths is None:  # a kept one fits no more where a template writes the date
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            skeleton = self._skeletons[key] = self._skeleton(blank, tools, wanted, values)
            lengths = _fit(skeleton, values, text)
        if lengths is None:
            raise _Underivable("it changes contents, or writes other text around them, as their words decide")
        shown = {number for _, number in skeleton.slots}
        for i in wanted:
            if values.get(2 * i, "").strip() and 2 * i not in shown:
                raise _Underivable(f"it leaves out the content of messages[{i}], which is to be trained on")
        return [(_moved(s, skeleton, lengths), _moved(e, skeleton, lengths)) for s, e in skeleton.turns]

    def _skeleton(
        self,
        blank: list[Message],
        tools: list[Message] | None,
        wanted: list[int],
        values: dict[int, str],
    ) -> _Skeleton:
        text, _ = self._render(blank, tools)
        slots = [(m.start(), int(m[1])) for m in _SLOT.finditer(text)]
        turns = [self._turn(blank, tools, text, slots, i, 2 * i in values) for i in wanted]
        return _Skeleton(text, slots, turns)

    def _turn(
        self,
        blank: list[Message],
        tools: list[Message] | None,
        text: str,
        slots: list[tuple[int, int]],
        i: int,
        is_blanked: bool,
    ) -> Span:
        """What is trained of message i, in the skeleton's text."""
        name = f"messages[{i}] ({blank[i]['role']})"
        contents = [start for start, number in slots if number == 2 * i]
        thought = any(number == 2 * i + 1 for _, number in slots)
        calls = bool(blank[i].get("tool_calls"))
        if len(contents) > 1:
            raise _Underivable(f"it writes the content of {name} more than once")
        if is_blanked and not contents and not calls:
            raise _Underivable(f"it leaves out the content of {name}, which is to be trained on")
        plain = is_blanked and not calls
        start = contents[0] if plain and not thought else self._body(blank, tools, text, i, name)
        if plain:
            end = contents[0] + _WIDTH
            tail = self._tail(blank, tools, i) if i + 1 < len(blank) else text[end:]
            return start, end + self._end_length(tail, text[end:], blank[i]["role"], name)
        after, _ = self._render(blank[: i + 1], tools)
        is_prefix = text.startswith(after)
        following = [s for s, number in slots if number // 2 > i and s >= start]
        body = text[start : len(after) if is_prefix else min(following, default=len(text))]
        if calls:
            return start, start + self._calls_end(body, is_prefix, name)
        content = blank[i]["content"].strip()
        at = body.find(content)
        tail = body[at + len(content) :].lstrip()
        if not is_prefix or at < 0 or not tail.startswith(self._probe[0].strip()):
            raise _Underivable(f"it changes the content of {name}, or writes it anew once others follow")
        if content and content in body[at + 1 :]:
            raise _Underivable(f"it writes the content of {name} more than once")
        end = start + at + len(content)
        thought = any(blank[i].get(k) for k in REASONING)
        length = self._end_length(text[end : len(after)], text[end:], "assistant", name)
        return start if thought else start + at, end + length

    def _body(self, blank: list[Message], tools: list[Message] | None, text: str, i: int, name: str) -> int:
        """Where the model takes over: what comes before is the prompt for this turn."""
        before, _ = self._render(blank[:i], tools, prompt=True)
        header = self._probe[1]
        if header.strip() or text.startswith(before + header):  # a mere space is before contents alone
            before += header
        if blank[i]["role"] != "assistant" or not text.startswith(before):
            raise _Underivable(f"it renders what comes before {name} differently once that follows")
        return len(before)

    def _tail(self, blank: list[Message], tools: list[Message] | None, i: int) -> str:
        """What follows content i in a conversation that ends there."""
        after, _ = self._render(blank[: i + 1], tools)
        at = after.rfind(_slot(2 * i))
        if at < 0:
            raise _Underivable(f"it leaves out the content of messages[{i}] where that is the last")
        return after[at + _WIDTH :]

    def _end_length(self, tail: str, text: str, role: str, name: str) -> int:
        """Characters of the token that ends a turn, given what follows its content.

        `tail` follows it in a conversation that ends there, and so holds no header; `text`
        follows it here. A template without added tokens ends a turn by the first token of its tail.
        """
        mark = re.compile(rf"\s*(?:{self._any_added})").match(tail)
        end = mark[0] if mark else tail[:1]
        if not end and role == "assistant":
            raise _NoEnd(f"the chat template writes nothing after {name}")
        return len(end) if text.startswith(end) else 0

    def _calls_end(self, body: str, is_prefix: bool, name: str) -> int:
        """Where a turn with tool calls ends: past the first of the tokens that close its text."""
        stop = self._probe[0]
        if not is_prefix:
            at = body.find(stop) if stop else -1
            if at < 0:
                raise _Underivable(f"it renders {name} differently once other messages follow")
            return at + len(stop)
        closing = re.search(rf"(?:(?:{self._any_added})\s*)+\Z", body)
        if closing:
            at = closing[0].find(stop) if stop else -1
            if at >= 0:
                return closing.start() + at + len(stop)
            first = re.search(self._any_special, closing[0])
            return closing.start() + (first.end() if first else len(closing[0].rstrip()))
        bare = len(body.rstrip())
        if bare == len(body):
            raise _NoEnd(f"the chat template writes nothing after {name}")
        return bare + 1

    @functools.cached_property
    def _probe(self) -> tuple[str, str]:
        """What ends an assistant's turn, and the header that the generation prompt leaves out."""
        user = _PROBE[0]
        blank = [user, {"role": "assistant", "content": _slot(2)}]
        try:
            text, _ = self._render(blank, None)
            at = text.index(_slot(2))
            tail = text[at + _WIDTH :]
            end = tail[: self._end_length(tail, tail, "user", "")]
            (bare, _), (asked, _) = (self._render([user], None, prompt=p) for p in (False, True))
            header = text[len(bare) : at] if bare == asked and text.startswith(bare) else ""
        except (_Underivable, ValueError):  # a template that refuses so short a conversation
            return "", ""
        return (end if end.strip() else ""), header

    # ------------------------------------------------------------------------------------ tags
    def _is_tagged(self, tools: list[Message] | None) -> bool:
        return bool(self._template and _TAGS.search(self._template_for(tools)))

    def _tagged_spans(self, sample: Sample, text: str, marks: list[Span], wanted: list[int]) -> list[Span]:
        """The template's own spans, each with the token that ends its turn."""
        assistants = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
        needles = [_needle(sample.messages[i]) for i in wanted]
        count = f"{len(marks)} of its {{% generation %}} spans for {len(assistants)} assistant messages"
        if len(marks) == len(assistants):
            by_message = dict(zip(assistants, marks, strict=True))
            marks = [by_message[i] for i in wanted]
            found = [needle in text[s:e] for needle, (s, e) in zip(needles, marks, strict=True)]
        elif any("train" in m for m in sample.messages):
            raise _Underivable(f"the chat template gives {count}, so that `train` cannot choose among them")
        else:
            found = [any(needle in text[s:e] for s, e in marks) for needle in needles]
        for i, is_there in zip(wanted, found, strict=True):
            if not is_there:
                raise _Underivable(
                    f"the chat template gives {count}, and messages[{i}] is not inside; put the "
                    "tags around the assistant's content and the token that ends the turn, outside "
                    "of any macro or block set"
                )
        return [(s, self._tagged_end(text, s, e)) for s, e in marks]

    def _tagged_end(self, text: str, start: int, end: int) -> int:
        """Tags may stop short of the token that ends the turn: it is trained all the same."""
        stop = self._probe[0]
        if stop and text.startswith(stop, end):
            return end + len(stop)
        if end == len(text) and not re.search(rf"(?:{self._any_added})\s*\Z|\s\Z", text[start:end]):
            raise _NoEnd("the chat template writes nothing after the last assistant message")
        return end

    # ------------------------------------------------------------------------------------ template
    def _template_for(self, tools: list[Message] | None) -> str:
        if not self._template:
            raise _Underivable(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, as is usual "
                "for base models; give one as data.chat_template=path.jinja"
            )
        if isinstance(self._template, str):
            return self._template
        try:
            return self.tokenizer.get_chat_template(tools=tools)  # type: ignore[arg-type]
        except ValueError as e:
            raise _Underivable(one_line(e)) from e

    def _render(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        template = self._template_for(tools)
        try:
            texts, spans = _render_jinja(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as e:  # a template is a program: it raises what it likes
            raise _Underivable(f"the chat template refuses these messages: {one_line(e)}") from e
        return texts[0], spans[0] if marks else []


_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine"}]


# ---------------------------------------------------------------------------------------- parts
def _mask(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    flat = np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2], flat[1::2]
    ends = np.maximum(ends, starts + 1)  # an added prefix space has no width; it belongs to what follows
    trained = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        trained |= (starts < end) & (ends > start)
    return trained


def _is_trained(message: Message, unmask: bool) -> bool:
    default = message["role"] != "system" if unmask else message["role"] == "assistant"
    return message.get("train", default)


def _cleaned(messages: list[Message]) -> list[Message]:
    """What the template sees: transformers drops nulls too, and `train` is for us alone."""
    return [{k: v for k, v in m.items() if v is not None and k != "train"} for m in messages]


def _slot(number: int) -> str:
    return f"MiceSlot{number:06d}End"


def _blanked(messages: list[Message], chosen: Iterable[int]) -> tuple[list[Message], dict[int, str]]:
    """The messages with sentinels for the texts of the chosen ones, and those texts by slot."""
    blank = [dict(m) for m in messages]
    values: dict[int, str] = {}
    for i in chosen:
        message = blank[i]
        content, said, thought = message.get("content"), _slot(2 * i), _slot(2 * i + 1)
        reasoning = next((message[k] for k in REASONING if message.get(k)), None)
        inline = None
        if message["role"] == "assistant" and content and "</think>" in content:
            inline = _THOUGHT.fullmatch(content)
        if reasoning is not None:
            values[2 * i + 1] = reasoning
            message.update({k: thought for k in REASONING if message.get(k) == reasoning})
        elif inline and inline[4]:  # some templates take it apart, so both parts get a slot
            head, values[2 * i + 1], middle, values[2 * i] = inline.groups()
            message["content"] = head + thought + middle + said
            continue
        if content or (content is not None and not message.get("tool_calls")):
            values[2 * i], message["content"] = content, said
    return blank, values


def _fit(skeleton: _Skeleton, values: dict[int, str], text: str) -> list[int] | None:
    """How long each slot's text is in `text`, where the skeleton with all of them in is that text.

    A template may strip what it puts in, some roles' and not others', so stripped is tried too.
    """
    edges = [0, *(start + _WIDTH for start, _ in skeleton.slots)]
    starts = [*(start for start, _ in skeleton.slots), len(skeleton.text)]
    literals = [skeleton.text[e:s] for e, s in zip(edges, starts, strict=True)]
    if not text.startswith(literals[0]):
        return None
    seen = set()
    stack: list[tuple[int, int, Any]] = [(0, len(literals[0]), None)]
    while stack:
        k, at, path = stack.pop()
        if k == len(skeleton.slots):
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
        for value in reversed(_stripped(values[skeleton.slots[k][1]])):  # as it is goes first
            end = at + len(value)
            if text.startswith(value, at) and text.startswith(literals[k + 1], end):
                stack.append((k + 1, end + len(literals[k + 1]), (len(value), path)))
    return None


def _stripped(text: str) -> list[str]:
    if text == text.strip():
        return [text]
    lines = (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    return list(dict.fromkeys((text, text.strip(), text.lstrip(), text.rstrip(), *lines)))


def _moved(position: int, skeleton: _Skeleton, lengths: list[int]) -> int:
    """A position of the skeleton's text, in the real one."""
    slots = zip(skeleton.slots, lengths, strict=True)
    return position + sum(n - _WIDTH for (start, _), n in slots if start + _WIDTH <= position)


def _needle(message: Message) -> str:
    """Of a message's content, what every template keeps."""
    return (message.get("content") or "").rpartition("</think>")[2].strip()


def _any_of(strings: Iterable[str]) -> str:
    """A pattern for the longest of them; for nothing where there is none."""
    longest_first = sorted(set(strings), key=lambda s: (-len(s), s))
    return "|".join(map(re.escape, longest_first)) or "(?!)"
