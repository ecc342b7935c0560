"""Turns samples into token ids and a loss mask.

The ids are those of the tokenizer's chat template over the whole conversation, rendered once. The mask is derived in
characters (`template_spans`) and mapped to tokens by their character offsets: a token that overlaps a trained span by
at least one character gets loss.
"""

import datetime
import enum
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mice_jax.data import template_checks
from mice_jax.data.bad_records import BadRecord, BadRecordError
from mice_jax.data.call_arguments import has_other_text, with_object_arguments, with_text_arguments
from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError, TemplateInputs
from mice_jax.data.reasoning import POLICIES, REASONING, reasoning_of, without_reasoning
from mice_jax.data.sample_notes import NO_NOTES, UNREAD, Note, Notes
from mice_jax.data.sources import Sample
from mice_jax.data.template_spans import PROBE_MESSAGES, NoTurnEndError, TemplateSpans
from mice_jax.data.tokenizer import IdsAndSpans, Span, decode, offset_tokenizer
from mice_jax.errors import UserError

RULES_VERSION = 3  # increased whenever ids or masks change, so that token stores are rebuilt
EXAMPLE_TOKENS = 6  # tokens of a prompt that differs, which the report shows
# The assistant messages that get loss, unless a message's `train` or a sample's `unmask` overrides it.
TRAIN_ON = ("all", "last")


class SampleFlag(enum.IntFlag):
    """Properties of a sample that may be a mistake in the data or the template."""

    SPECIAL_IN_CONTENT = 1  # a message contains the text of a special token, and is encoded as that token
    DOUBLE_BOS = 2  # the ids begin with two bos tokens
    STARTS_WITH_ASSISTANT = 4  # the first message that is not a system message is an assistant message


@dataclass(frozen=True)
class Encoded:
    """An encoded sample of n tokens."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # uint8 [n]; 1 = the model learns to predict this token
    flags: int = 0  # a combination of `SampleFlag`
    notes: Notes = field(default_factory=lambda: NO_NOTES)  # what was left out or changed, and how often


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text."""

    sample: Sample
    messages: list[Message]  # as the template sees them
    text: str
    train_indices: list[int]  # indices of the messages that are trained
    spans: list[Span]  # of `text`, that are trained; mostly one for each message
    notes: dict[str, Note]


class ChatEncoder:
    """Encodes samples with one tokenizer and one chat template; it can be pickled for worker processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        train_on: str = "all",
        today: datetime.date | None = None,
        reasoning: str = "template",
    ) -> None:
        """Sets up the tokenizer and the template.

        Args:
          tokenizer: a fast or slow tokenizer of transformers.
          chat_template: the text of a template; None or "" takes the tokenizer's template.
          train_on: "all" trains every assistant message, "last" only the last one of each conversation. The `train` of
            a message and the `unmask` of a sample override it.
          today: the date that templates may write; None means today. A resumed run passes the date of its first start.
          reasoning: what happens to reasoning: "template" leaves it to the template; "last" does not train turns whose
            reasoning the template leaves out; "per_turn" makes a sample of each turn, rendered as it is asked for;
            "drop" takes it out.

        Raises:
          UserError: if `train_on` or `reasoning` is unknown.
        """
        if train_on not in TRAIN_ON:
            raise UserError(f"data.train_on={train_on!r} is not one of {', '.join(TRAIN_ON)}.")
        if reasoning not in POLICIES:
            raise UserError(f"data.reasoning={reasoning!r} is not one of {', '.join(POLICIES)}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.reasoning = reasoning
        self.today = today or datetime.date.today()
        self._offset_tokenizer = offset_tokenizer(tokenizer)
        self._template = ChatTemplate(tokenizer, chat_template, self.today)
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        special = [s for s in tokenizer.all_special_tokens if s.strip()]
        self._spans = TemplateSpans(self._template, _longest_match(added + special), _longest_match(special))
        flagged = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        # With split_special_tokens, the text of a special token is encoded like any other text.
        splits_special = getattr(tokenizer, "split_special_tokens", False)
        self._special_token_pattern = None if splits_special else _compile_search(special + flagged)
        self._bos: Any = tokenizer.bos_token_id

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encodes samples.

        The ids of a chat equal those of `apply_chat_template(messages, tools)`. A document, whose only message has the
        role "pretraining", is encoded as its text followed by eos.

        Args:
          samples: conversations and documents.

        Returns:
          One `Encoded` for each sample, in order.

        Raises:
          UserError: if the template raises an error or leaves out calls, or trained spans cannot be derived.
        """
        encoded: list[Encoded] = []
        for one in self.encode_each(samples):
            if isinstance(one, BadRecord):
                raise BadRecordError(one)
            encoded.append(one)
        return encoded

    def encode_each(self, samples: Sequence[Sample], compare: int = 0) -> list[Encoded | BadRecord]:
        """Encodes samples as `encode` does; what cannot be encoded is returned as a bad record.

        Args:
          samples: conversations and documents.
          compare: the number of conversations whose turns are compared with the prompts for them.

        Returns:
          An `Encoded` or a `BadRecord` for each sample, in order.
        """
        found: list[Encoded | BadRecord | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if _is_document(s)]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._offset_tokenizer.encode_documents(texts), strict=True):
            found[i] = self._encode_document(samples[i], ids)
        rendered: dict[int, _Rendered] = {}
        for i in (i for i, one in enumerate(found) if one is None):
            one = self._rendered(samples[i])
            if isinstance(one, BadRecord):
                found[i] = one
            else:
                rendered[i] = one
        tokens = self._offset_tokenizer.encode_with_offsets([one.text for one in rendered.values()])
        for number, ((i, one), located) in enumerate(zip(rendered.items(), tokens, strict=True)):
            ids, offsets = located
            notes = one.notes | (self._compared(one, located) if number < compare else {})
            found[i] = Encoded(ids, _mask(offsets, one.spans), self._flags(samples[i], ids[:2].tolist()), notes)
        return found  # type: ignore[return-value]

    def check(self, samples: Sequence[Sample]) -> list[BadRecord]:
        """The samples that cannot be encoded, found without tokenising any."""
        rendered = (self._rendered(s) for s in samples if not _is_document(s))
        return [one for one in rendered if isinstance(one, BadRecord)]

    def split_by_turn(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples to encode: with the policy "per_turn", one for each trained turn, else those that are given.

        The sample of a turn ends with it, so that the template renders it as it does when the turn is generated.
        Trained messages of other roles are trained in the sample of the assistant's next turn.
        """
        for sample in samples:
            turns = [] if self.reasoning != "per_turn" or _is_document(sample) else self._turns(sample)
            if not turns:
                yield sample
            for trained in turns:
                messages = [m | {"train": i in trained} for i, m in enumerate(sample.messages[: trained[-1] + 1])]
                yield replace(sample, messages=messages, conversation=sample.conversation or sample)

    def _turns(self, sample: Sample) -> list[list[int]]:
        """The trained messages in groups, each of which ends with one of the assistant's."""
        turns: list[list[int]] = []
        ended = True
        for i in self._messages_to_train(sample):
            if ended:
                turns.append([])
            turns[-1].append(i)
            ended = sample.messages[i]["role"] == "assistant"
        return turns

    def prompt_ids(
        self,
        messages: list[Message],
        tools: list[Message] | None = None,
        documents: list[Message] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation, followed by the header after which the model writes the next turn.

        Args:
          messages: the conversation.
          tools: the JSON schemas of the tools.
          documents: the documents, for templates that write them.
          template_kwargs: further variables of the template.

        Returns:
          The ids.

        Raises:
          UserError: if the template cannot render the conversation.
        """
        inputs = TemplateInputs(tools, documents, template_kwargs or {})
        try:
            text = self._template.render(self._as_template_sees(messages), inputs, add_generation_prompt=True)
        except TemplateError as e:
            raise UserError(f"the prompt {json.dumps(messages)[:200]}: {e}.") from e
        return self._offset_tokenizer.encode(text)

    def stop_ids(self) -> list[int]:
        """Returns a list of the one token that ends an assistant's turn: the last trained token of a short example."""
        sample = Sample(PROBE_MESSAGES, None, False, "an example conversation that shows which token ends a turn")
        (probe,) = self.encode([sample])
        return [int(probe.ids[probe.trained.nonzero()[0][-1]])]

    def show(self, ids: np.ndarray, trained: np.ndarray, color: bool) -> str:
        """Returns the decoded text with the trained parts marked.

        Args:
          ids: int [n].
          trained: uint8 [n]; 1 where the token is trained.
          color: whether trained parts are marked in green; otherwise they are put in brackets.

        Returns:
          The text.
        """
        left, right = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        shown = before = ""
        for start, end in itertools.pairwise(edges):
            # The text is decoded from its start each time, since a part decoded alone would lose its first space.
            text = self._decode(ids[:end])
            part = text[len(before) :] if text.startswith(before) else self._decode(ids[start:end])
            shown += f"{left}{part}{right}" if end > start and trained[start] else part
            before = text
        return shown

    def show_ids(self, ids: np.ndarray, trained: np.ndarray, color: bool) -> str:
        """Returns one line for each token: its id, a star if it is trained, and the token.

        Args:
          ids: int [n].
          trained: uint8 [n]; 1 where the token is trained.
          color: whether trained lines are green.

        Returns:
          The lines.
        """
        left, right = ("\x1b[32m", "\x1b[0m") if color else ("", "")
        tokens: Any = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        lines = [
            f"{left}{i:>8}  * {token!r}{right}" if is_trained else f"{i:>8}    {token!r}"
            for i, token, is_trained in zip(ids.tolist(), tokens, trained.tolist(), strict=True)
        ]
        return "\n".join(lines)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template writes the date, so that the ids change from day to day."""
        return self._template.depends_on_date

    def notes(self) -> list[str]:
        """Returns what the user should know about the template, as sentences."""
        if not self.depends_on_date:
            return []
        return [
            f"the chat template writes the date; this run uses {self.today} throughout. A run that starts on "
            "another day gets different ids"
        ]

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines ids, masks and flags, including the date and RULES_VERSION."""
        parts = [
            RULES_VERSION,
            self._offset_tokenizer.state(),
            {k: str(v) for k, v in self._template.special_tokens.items()},
            self.tokenizer.all_special_ids,
            self._template.dated_texts(),
            self.train_on,
            self.reasoning,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------------------------------ rendering
    def _decode(self, ids: np.ndarray) -> str:
        return decode(self.tokenizer, ids.tolist(), skip_special_tokens=False)

    def _encode_document(self, sample: Sample, ids: list[int]) -> Encoded:
        eos: Any = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.uint8), self._flags(sample, ids[:2]))

    def _flags(self, sample: Sample, first_ids: list[int]) -> int:
        flags = SampleFlag(0)
        if self._special_token_pattern and any(map(self._special_token_pattern.search, _texts(sample.messages))):
            flags |= SampleFlag.SPECIAL_IN_CONTENT
        if self._bos is not None and first_ids == [self._bos, self._bos]:
            flags |= SampleFlag.DOUBLE_BOS
        roles = (m["role"] for m in sample.messages)
        if next((r for r in roles if r != "system"), "") == "assistant":
            flags |= SampleFlag.STARTS_WITH_ASSISTANT
        return flags.value

    def _rendered(self, sample: Sample) -> _Rendered | BadRecord:
        """The conversation's text and its trained spans, or why it cannot be used."""
        try:
            return self._render(sample)
        except BadRecordError as e:
            return e.record
        except NoTurnEndError as e:
            text = f"{e}, so a model trained on it would never stop"
            advice = "Let the template write a token (such as the eos token) after each assistant message"
            return BadRecord(sample.where, "turn without an end", text, advice)
        except TemplateError as e:
            return self._refused(sample, "refused by the chat template", str(e))

    def _render(self, sample: Sample) -> _Rendered:
        notes: dict[str, Note] = {}
        if self.reasoning == "drop":
            sample = _drop_reasoning(sample, notes)
        messages, inputs = self._as_template_sees(sample.messages), _inputs_of(sample)
        train_indices = self._messages_to_train(sample)
        # The tags of a template enclose the assistant's messages only.
        tagged: list[Span] | None = None
        if all(messages[i]["role"] == "assistant" for i in train_indices) and self._template.is_tagged(inputs.tools):
            text, tagged = self._template.render_with_spans(messages, inputs)
        else:
            text = self._template.render(messages, inputs)
        lost = template_checks.left_out(self._template, messages, inputs, text)
        if lost.tools or lost.calls:
            parts = [
                *(["its `tools`"] if lost.tools else []),
                *(f"the `tool_calls` of messages[{i}]" for i in lost.calls),
            ]
            raise BadRecordError(
                self._refused(
                    sample, "tools left out by the chat template", f"the chat template leaves out {' and '.join(parts)}"
                )
            )
        untold = [i for i in train_indices if i in lost.reasoning]
        if untold and self.reasoning == "last":
            train_indices = [i for i in train_indices if i not in untold]
            notes["reasoning_untrained"] = Note(len(untold))
        elif untold:
            notes["reasoning_left_out"] = Note(len(untold))
        if lost.contents:
            notes["content_left_out"] = Note(len(lost.contents))
        spans = self._spans_of(sample, messages, inputs, text, tagged, train_indices) if train_indices else []
        self._note_oddities(sample, messages, train_indices, notes)
        return _Rendered(sample, messages, text, train_indices, spans, notes)

    def _spans_of(
        self,
        sample: Sample,
        messages: list[Message],
        inputs: TemplateInputs,
        text: str,
        tagged: list[Span] | None,
        train_indices: list[int],
    ) -> list[Span]:
        """The trained spans of a rendered conversation."""
        if tagged is not None:
            return self._spans.from_tags(messages, text, tagged, train_indices)
        try:
            return self._spans.derive(messages, inputs, text, train_indices)
        except TemplateError as e:
            told = f"the trained tokens cannot be derived from the chat template: {e}"
            advice = (
                "Put {% generation %} before and {% endgeneration %} after the assistant's turn (its content and the "
                "token that ends it) in a copy of the template, and give that file as data.chat_template"
            )
            raise BadRecordError(BadRecord(sample.where, "trained tokens unknown", told, advice)) from e

    def _refused(self, sample: Sample, reason: str, text: str) -> BadRecord:
        """A conversation that the template cannot render whole, with the built-in templates that can."""
        messages, inputs = self._as_template_sees(sample.messages), _inputs_of(sample)
        advice = []
        if self._renders_without_nulls(messages, inputs):
            nulls = [f"messages[{i}]" for i, m in enumerate(messages) if "content" not in m]
            text += f". It fails where `content` is null ({', '.join(nulls)})"
            advice.append('give such messages "content": "", or write (message.content or \'\') in the template')
        special = any(m["role"] == "tool" or m.get("tool_calls") or reasoning_of(m) for m in messages)
        if inputs.tools or special or advice:
            names = template_checks.built_in_that_render(self._template, messages, inputs)
            renders = "renders it" if len(names) == 1 else "render it"
            if names:
                advice.append(f"take {template_checks.any_of(names)}, which {renders}, as data.chat_template")
            else:
                advice.append("take it out of the data, since no built-in template renders it")
        return BadRecord(sample.where, reason, text, ", or ".join(advice))

    def _renders_without_nulls(self, messages: list[Message], inputs: TemplateInputs) -> bool:
        """Whether the template fails for these messages, and would not if their missing contents were empty texts."""
        if all("content" in m for m in messages):
            return False
        try:
            self._template.render(messages, inputs)
        except TemplateError:
            try:
                self._template.render([{"content": ""} | m for m in messages], inputs)
            except TemplateError:
                return False
            return True
        return False

    # ------------------------------------------------------------------------------------ notes
    def _note_oddities(
        self, sample: Sample, messages: list[Message], train_indices: list[int], notes: dict[str, Note]
    ) -> None:
        """Counts what is odd about a conversation and no error."""
        for key in template_checks.unread_keys(self._template, sample):
            notes[UNREAD + key] = Note(1)
        answers = [messages[i] for i in train_indices if messages[i]["role"] == "assistant"]
        empty = sum(not (m.get("content") or m.get("tool_calls") or reasoning_of(m)) for m in answers)
        if empty:
            notes["empty_answer"] = Note(empty)
        thoughtless = sum("</think>" in (m.get("content") or "") and reasoning_of(m) == "" for m in answers)
        if thoughtless:
            notes["empty_think"] = Note(thoughtless)
        texts = sum(has_other_text(call) for m in sample.messages for call in m.get("tool_calls") or [])
        if texts:
            notes["arguments_not_json"] = Note(texts)

    def _compared(self, one: _Rendered, located: IdsAndSpans) -> dict[str, Note]:
        """Compares what precedes each trained turn with the prompt that asks for it, token by token."""
        if len(one.spans) != len(one.train_indices):
            return {}
        ids, offsets = located
        compared, differing, example = 0, 0, ""
        for i, span in zip(one.train_indices, one.spans, strict=True):
            if one.messages[i]["role"] != "assistant" or not i:
                continue
            inputs = _inputs_of(one.sample)
            try:
                prompt = self._offset_tokenizer.encode(
                    self._template.render(one.messages[:i], inputs, add_generation_prompt=True)
                )
            except TemplateError:  # the template does not render a conversation that ends there
                continue
            before = ids[: int(_mask(offsets, [span]).argmax())].tolist()
            compared += 1
            if before != prompt:
                differing += 1
                example = example or self._difference(before, prompt, i)
        notes = {"prompts_compared": Note(compared)} if compared else {}
        return notes | ({"prompts_differ": Note(differing, example)} if differing else {})

    def _difference(self, before: list[int], prompt: list[int], i: int) -> str:
        """Where the tokens before a turn and those of its prompt part, in words."""
        pairs = zip(before, prompt, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(prompt)))
        trained, asked = (
            decode(self.tokenizer, ids[same : same + EXAMPLE_TOKENS], skip_special_tokens=False)
            for ids in (before, prompt)
        )
        return f"before messages[{i}] stands {trained!r} in training and {asked!r} in a prompt"

    # ------------------------------------------------------------------------------------ messages
    def _as_template_sees(self, messages: list[Message]) -> list[Message]:
        """The messages as a template sees them.

        They are without nulls, as in transformers, and without our key `train`. Arguments of calls that are the text of
        a JSON object are that object, which templates write as JSON, unless the template needs texts.
        """
        seen = [{k: v for k, v in m.items() if v is not None and k != "train"} for m in messages]
        for i, message in enumerate(seen):
            if message.get("tool_calls"):
                form = with_text_arguments if self._needs_text_arguments else with_object_arguments
                seen[i] = message | {"tool_calls": [form(call) for call in message["tool_calls"]]}
        return seen

    @functools.cached_property
    def _needs_text_arguments(self) -> bool:
        """Whether the template fails for arguments that are objects, and not for their texts."""
        works = []
        for arguments in ({"a": 1}, '{"a": 1}'):
            call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
            try:
                self._template.render([PROBE_MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}])
                works.append(True)
            except TemplateError:
                works.append(False)
        return works == [False, True]

    def _messages_to_train(self, sample: Sample) -> list[int]:
        """Returns the indices of the messages to train on."""
        roles = [m["role"] for m in sample.messages]
        if sample.unmask:
            default = {i for i, role in enumerate(roles) if role != "system"}
        else:
            default = {i for i, role in enumerate(roles) if role == "assistant"}
            if default and self.train_on == "last":
                default = {max(default)}
        return [i for i, m in enumerate(sample.messages) if m.get("train", i in default)]


# ---------------------------------------------------------------------------------------- helpers
def _is_document(sample: Sample) -> bool:
    return sample.messages[0]["role"] == "pretraining"


def _inputs_of(sample: Sample) -> TemplateInputs:
    return TemplateInputs(sample.tools, sample.documents, sample.template_kwargs)


def _drop_reasoning(sample: Sample, notes: dict[str, Note]) -> Sample:
    messages = [without_reasoning(m) for m in sample.messages]
    dropped = sum(m != before for m, before in zip(messages, sample.messages, strict=True))
    if dropped:
        notes["reasoning_dropped"] = Note(dropped)
    return replace(sample, messages=messages)


def _mask(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Returns a mask of the tokens that overlap a span.

    Args:
      offsets: int [n 2], start and end of each token in the text, in characters.
      spans: the trained spans of the text.

    Returns:
      uint8 [n].
    """
    starts, ends = offsets.T
    # An empty token, such as an added prefix space, counts as one character, so it is trained if the next one is.
    ends = np.maximum(ends, starts + 1)
    trained = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        trained |= (starts < end) & (ends > start)
    return trained


def _texts(messages: list[Message]) -> Iterator[str]:
    """Yields every text of a conversation that comes from the data and not from the template."""
    for m in messages:
        if m.get("content"):
            yield m["content"]
        yield from (m[k] for k in REASONING if m.get(k))
        if m.get("tool_calls"):
            yield json.dumps(m["tool_calls"], ensure_ascii=False)


def _longest_match(strings: Iterable[str]) -> str:
    """Returns a pattern that matches the longest of the strings at a position; without strings it matches nothing."""
    longest_first = sorted(set(strings), key=lambda s: (-len(s), s))
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _compile_search(strings: Iterable[str]) -> re.Pattern[str]:
    """Returns a compiled pattern that finds any of the strings.

    The strings are grouped by their first two characters, because an alternation of the thousand special tokens that
    some tokenizers have would be slow.
    """
    groups = itertools.groupby(sorted(set(strings)), lambda s: s[:2])
    parts = (f"{re.escape(start)}(?:{'|'.join(re.escape(s[2:]) for s in group)})" for start, group in groups)
    return re.compile("|".join(parts) or "(?!)")
