"""Turns samples into token ids and says which are trained: all that knows roles and templates.

The ids are those of the tokenizer's chat template over the whole conversation, rendered once. The
mask is derived in characters and carried over by the tokens' offsets: a token that overlaps a
trained span by one character is trained. Spans come from the template's `{% generation %}` tags or,
where it has none, from a *skeleton*: the same conversation rendered with sentinels for contents.
Putting the contents back must give the real text, character by character; that is the proof that
the spans are right. Where a template looks into a content, and so fits no skeleton, a turn is what
rendering one message more adds to the text. A turn that none of this can find is an error.

A template that writes today's date (`strftime_now`) is rendered with one day throughout, which is part of what a
token store is known by: neither midnight nor a second run on another day mixes two dates in one store.
"""

import datetime
import enum
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mice_jax.data import templates
from mice_jax.data.sources import REASONING, Sample
from mice_jax.data.tokenizer import Span, decode, locator
from mice_jax.errors import UserError, one_line

RULES = 2  # of this file; counted up when ids or masks change, so that token stores are built anew
MAX_SKELETONS = 4096  # kept for conversations of the same form
TRAIN_ON = ("all", "last")  # messages of the assistant, where neither a message nor its sample says

_TAGS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THOUGHT = re.compile(r"((?:.*<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_SLOT = re.compile(r"MiceSlot([0-9]{6})End")
_WIDTH = len("MiceSlot000000End")

_DATE = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")

_render_jinja: Any = render_jinja_template  # its hints are narrower than what it takes

Message = dict[str, Any]


class Sign(enum.IntFlag):
    """What is unusual about a sample, and may be a mistake in the data or the template."""

    SPECIAL_IN_CONTENT = 1  # a message spells a special token, which is read as that token
    DOUBLE_BOS = 2  # the ids begin with bos twice
    STARTS_WITH_ASSISTANT = 4  # the first message that is not the system's is the assistant's


@dataclass(frozen=True)
class Encoded:
    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # uint8 [n]; 1 = the model learns to predict this token
    signs: int = 0  # of `Sign`


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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        train_on: str = "all",
        today: datetime.date | None = None,
    ) -> None:
        """Args:
        chat_template: a template's text; None or "" takes the tokenizer's own.
        train_on: "all" messages of the assistant, or the "last" of each conversation. A message's own `train` and a
          sample's `unmask` go before it.
        today: the day that the template is told it is, where it asks; None is today. A run that is resumed on another
          day goes on with its first one by giving it here.
        """
        if train_on not in TRAIN_ON:
            raise UserError(f"data.train_on={train_on!r} is not one of {', '.join(TRAIN_ON)}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.today = today or datetime.date.today()
        self._template = chat_template or tokenizer.chat_template
        self._variables = dict(tokenizer.special_tokens_map)
        self._locator = locator(tokenizer)
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        special = [s for s in tokenizer.all_special_tokens if s.strip()]
        self._any_added, self._any_special = _any_of(added + special), _any_of(special)
        flagged = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        is_split = getattr(tokenizer, "split_special_tokens", False)  # what spells a token is then mere text
        self._spells_special = None if is_split else _finder(special + flagged)
        self._bos: Any = tokenizer.bos_token_id
        self._skeletons: dict[str, _Skeleton] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Ids and masks, in order; the ids are those of `apply_chat_template(messages, tools)`."""
        encoded: list[Encoded | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if s.messages[0]["role"] == "pretraining"]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._locator.documents(texts), strict=True):
            encoded[i] = self._document(samples[i], ids)
        chats = [i for i, e in enumerate(encoded) if e is None]
        located = [self._locate(samples[i]) for i in chats]
        tokens = self._locator.located([t for t, _ in located])
        for i, (ids, offsets), (_, spans) in zip(chats, tokens, located, strict=True):
            encoded[i] = Encoded(ids, _mask(offsets, spans), self._signs(samples[i], ids[:2].tolist()))
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

    def show_ids(self, ids: np.ndarray, trained: np.ndarray, color: bool) -> str:
        """A line a token: its id, the token, and a mark where it is trained on."""
        left, right = ("\x1b[32m", "\x1b[0m") if color else ("", "")
        known: Any = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        lines = [
            f"{left}{i:>8}  * {token!r}{right}" if is_trained else f"{i:>8}    {token!r}"
            for i, token, is_trained in zip(ids.tolist(), known, trained.tolist(), strict=True)
        ]
        return "\n".join(lines)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template writes the date, so that ids are those of `today` and others tomorrow."""
        return any("strftime_now" in text for text in self._templates().values())

    def remarks(self) -> list[str]:
        """What the user should know of the template before it is used."""
        if not self.depends_on_date:
            return []
        return [
            f"the chat template writes the date, which is {self.today} throughout; on another day the ids are others"
        ]

    def fingerprint(self) -> str:
        """Changes when ids, masks or signs may: by tokenizer, special tokens, template (and its date) or our rules."""
        special = {k: str(v) for k, v in self._variables.items()}
        parts = [
            RULES,
            self._locator.state(),
            special,
            self.tokenizer.all_special_ids,
            {name: self._dated(text) for name, text in self._templates().items()},
            self.train_on,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _decode(self, ids: np.ndarray) -> str:
        return decode(self.tokenizer, ids.tolist(), skip_special_tokens=False)

    def _document(self, sample: Sample, ids: list[int]) -> Encoded:
        end: Any = self.tokenizer.eos_token_id
        ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.uint8), self._signs(sample, ids[:2]))

    def _signs(self, sample: Sample, first_ids: list[int]) -> int:
        signs = 0
        if self._spells_special and any(map(self._spells_special.search, _texts(sample.messages))):
            signs |= Sign.SPECIAL_IN_CONTENT.value
        if self._bos is not None and first_ids == [self._bos, self._bos]:
            signs |= Sign.DOUBLE_BOS.value
        roles = (m["role"] for m in sample.messages)
        if next((r for r in roles if r != "system"), "") == "assistant":
            signs |= Sign.STARTS_WITH_ASSISTANT.value
        return signs

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
        wanted = self._wanted(sample)
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

    def _wanted(self, sample: Sample) -> list[int]:
        """The messages to train on."""
        roles = [m["role"] for m in sample.messages]
        if sample.unmask:
            default = {i for i, role in enumerate(roles) if role != "system"}
        else:
            default = {i for i, role in enumerate(roles) if role == "assistant"}
            default = {max(default)} if default and self.train_on == "last" else default
        return [i for i, m in enumerate(sample.messages) if m.get("train", i in default)]

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
        if skeleton is None:
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
        elif wanted != assistants:
            raise _Underivable(
                f"the chat template gives {count}, so that `train` and data.train_on cannot choose among them"
            )
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
                "for base models. Set data.chat_template to the name of one that comes with this package "
                f'({templates.NAMES}), such as data.chat_template="chatml", or to the path of a .jinja file'
            )
        if isinstance(self._template, str):
            return self._dated(self._template)
        try:
            template = self.tokenizer.get_chat_template(tools=tools)  # type: ignore[arg-type]
        except ValueError as e:
            raise _Underivable(one_line(e)) from e
        return self._dated(template)

    def _templates(self) -> dict[str, str]:
        """By name, where the tokenizer has several; all of them go through `_dated`."""
        several: Any = self._template or {}
        return {"": several} if isinstance(several, str) else several

    def _dated(self, template: str) -> str:
        """The template with its dates written out."""
        return _with_date(template, self.today) if "strftime_now" in template else template

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
def _mask(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    starts, ends = offsets.T
    ends = np.maximum(ends, starts + 1)  # an added prefix space has no width; it belongs to what follows
    trained = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        trained |= (starts < end) & (ends > start)
    return trained


@functools.cache
def _with_date(template: str, day: datetime.date) -> str:
    midnight = datetime.datetime.combine(day, datetime.time())
    dated = _DATE.sub(lambda m: json.dumps(midnight.strftime(m[1] or m[2] or "")), template)
    rest = re.search(r"strftime_now\s*\(.{0,40}", dated)
    if rest:
        raise UserError(
            f"the chat template writes a date by {rest[0]!r}, whose format is not in plain quotes, so that ids would "
            "change with the clock. Write the format there, or the date, in a copy of the template, and give that file "
            "as data.chat_template."
        )
    return dated


def _texts(messages: list[Message]) -> Iterator[str]:
    """All that messages bring to a chat."""
    for m in messages:
        if m.get("content"):
            yield m["content"]
        yield from (m[k] for k in REASONING if m.get(k))
        if m.get("tool_calls"):
            yield json.dumps(m["tool_calls"], ensure_ascii=False)


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


def _finder(strings: Iterable[str]) -> re.Pattern[str]:
    """Finds whether there is one of them: by their first two characters, since some tokenizers have a thousand."""
    groups = itertools.groupby(sorted(set(strings)), lambda s: s[:2])
    parts = (f"{re.escape(start)}(?:{'|'.join(re.escape(s[2:]) for s in group)})" for start, group in groups)
    return re.compile("|".join(parts) or "(?!)")
