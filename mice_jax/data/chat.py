"""Turns samples into token ids and a loss mask.

A conversation is rendered with the chat template as a whole (module `conversation`), and that text is tokenised.
Module `template_spans` finds the ranges of characters to train on (spans). A token is trained, that is, has a loss
weight, if it overlaps a span by at least one character.
"""

import datetime
import enum
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mice_jax.data.bad_records import BadRecord, BadRecordError
from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError, TemplateInputs
from mice_jax.data.conversation import ConversationRenderer, Rendered, inputs_of
from mice_jax.data.reasoning import POLICIES, REASONING
from mice_jax.data.sample_notes import NO_NOTES, Note, Notes
from mice_jax.data.sources import Sample
from mice_jax.data.template_spans import PROBE_MESSAGES, TemplateSpans
from mice_jax.data.tokenizer import Span, decode, offset_tokenizer
from mice_jax.errors import UserError

RULES_VERSION = 3  # increased whenever ids or masks change, so that token stores are rebuilt
MATCHES_NOTHING = "(?!)"  # a regular expression
EXAMPLE_TOKENS = 6  # the number of tokens that describe the first difference between a sample and a prompt
# Which assistant messages are trained. A sample's `unmask` trains the messages of all roles but `system` instead, and a
# message's `train` overrides both.
TRAIN_ON = ("all", "last")


class SampleFlag(enum.IntFlag):
    """Properties of a sample that may be a mistake in the data or the template."""

    SPECIAL_IN_CONTENT = 1  # a message, tool or document has the text of a special token, which is encoded as it
    DOUBLE_BOS = 2  # the ids begin with two bos tokens
    STARTS_WITH_ASSISTANT = 4  # the first message that is not a system message is an assistant message


@dataclass(frozen=True)
class Encoded:
    """An encoded sample of n tokens."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # uint8 [n]; 1 = the model learns to predict this token; not used for the first token
    flags: int = 0  # a combination of `SampleFlag`
    notes: Notes = field(default_factory=lambda: NO_NOTES)  # what is left out, changed or unusual, and how often


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
            reasoning the template leaves out (usually all but the last turn); "per_turn" makes a sample of each trained
            turn, rendered as in inference (the caller passes samples through `split_by_turn` before `encode`); "drop"
            removes reasoning.

        Raises:
          UserError: if `train_on` or `reasoning` is unknown, or the kind of tokenizer is not supported.
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
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        named = [s for s in tokenizer.all_special_tokens if s.strip()]  # bos, eos and so on, added or not
        spans = TemplateSpans(
            self._template,
            added_tokens=_longest_of([*(t.content for t in added), *named]),
            special_tokens=_longest_of(named),
        )
        self._renderer = ConversationRenderer(self._template, spans, train_on, reasoning)
        # With split_special_tokens, the text of a special token is encoded like any other text.
        splits_special = getattr(tokenizer, "split_special_tokens", False)
        special = [*named, *(t.content for t in added if t.special)]
        self._special_token_pattern = None if splits_special else _any_of(special)
        self._bos: Any = tokenizer.bos_token_id

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encodes samples.

        The ids of a conversation equal those of `apply_chat_template`, called with its tools, documents and
        template_kwargs, and with its messages as `ConversationRenderer.as_template_sees` returns them. If `reasoning`
        is "drop", reasoning is removed from the messages first. A document is encoded as its text, followed by eos if
        the tokenizer has an eos token and has not added it.

        Args:
          samples: conversations, and documents, whose only message has the role "pretraining".

        Returns:
          One `Encoded` for each sample, in order.

        Raises:
          BadRecordError: for the first sample that cannot be encoded; `encode_each` finds all.
        """
        encoded: list[Encoded] = []
        for result in self.encode_each(samples):
            if isinstance(result, BadRecord):
                raise BadRecordError(result)
            encoded.append(result)
        return encoded

    def encode_each(self, samples: Sequence[Sample], compare: int = 0) -> list[Encoded | BadRecord]:
        """Encodes samples as `encode` does; what cannot be encoded is returned as a bad record.

        Args:
          samples: conversations and documents.
          compare: the number of conversations, from the first on, in which the tokens before each trained turn are
            compared with the generation prompt for that turn. Differences are counted in `Encoded.notes`.

        Returns:
          An `Encoded` or a `BadRecord` for each sample, in order.
        """
        encoded: list[Encoded | BadRecord | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if _is_document(s)]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._offset_tokenizer.encode_documents(texts), strict=True):
            encoded[i] = self._encode_document(samples[i], ids)
        conversations: dict[int, Rendered] = {}
        for i, sample in enumerate(samples):
            if _is_document(sample):
                continue
            rendered = self._renderer.render(sample)
            if isinstance(rendered, BadRecord):
                encoded[i] = rendered
            else:
                conversations[i] = rendered
        tokens = self._offset_tokenizer.encode_with_offsets([c.text for c in conversations.values()])
        for number, ((i, conversation), (ids, offsets)) in enumerate(zip(conversations.items(), tokens, strict=True)):
            notes = conversation.notes
            if number < compare:
                notes = notes | self._compare_with_prompts(conversation, ids, offsets)
            flags = self._flags(conversation.sample, ids[:2].tolist())
            encoded[i] = Encoded(ids, _mask(offsets, conversation.spans), flags, notes)
        return encoded  # type: ignore[return-value]

    def bad_records(self, samples: Sequence[Sample]) -> list[BadRecord]:
        """Returns the samples that cannot be encoded. It only renders them, which is faster than `encode_each`."""
        rendered = (self._renderer.render(s) for s in samples if not _is_document(s))
        return [r for r in rendered if isinstance(r, BadRecord)]

    def split_by_turn(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yields a sample for each trained turn if `reasoning` is "per_turn", and the given samples otherwise.

        The sample of a turn ends with that turn, so that the template renders it as in inference. A trained message of
        another role belongs to the assistant's next trained turn. A sample without trained turns is yielded as it is.
        """
        for sample in samples:
            splits = self.reasoning == "per_turn" and not _is_document(sample)
            turns = self._turns(sample) if splits else []
            if not turns:
                yield sample
                continue
            for turn in turns:
                messages = [m | {"train": i in turn} for i, m in enumerate(sample.messages[: turn[-1] + 1])]
                yield replace(sample, messages=messages, conversation=sample.conversation or sample)

    def _turns(self, sample: Sample) -> list[list[int]]:
        """Returns the indices of the trained messages, grouped by turn.

        Each group ends with a trained assistant message; trained messages after the last of these form a group too.
        """
        turns: list[list[int]] = []
        ended = True
        for i in self._renderer.messages_to_train(sample):
            if ended:
                turns.append([])
            turns[-1].append(i)
            ended = sample.messages[i]["role"] == "assistant"
        return turns

    def prompt_ids(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation, followed by the generation prompt.

        Args:
          messages: the conversation.
          tools: the JSON schemas of the tools.
          documents: retrieved documents (RAG), for templates that write them; not samples.
          template_kwargs: further variables of the template.

        Raises:
          UserError: if the template cannot render the conversation.
        """
        inputs = TemplateInputs(tools, documents, template_kwargs or {})
        try:
            text = self._template.render(self._renderer.as_template_sees(messages), inputs, add_generation_prompt=True)
        except TemplateError as e:
            raise UserError(
                f"the chat template cannot render this prompt: {e}. Change its messages or the chat template. The "
                f"prompt begins with {json.dumps(messages)[:200]}"
            ) from e
        return self._offset_tokenizer.encode(text)

    def stop_ids(self) -> list[int]:
        """Returns a list of the one token id that ends an assistant's turn: the last trained token of a short chat."""
        where = "the token that ends a turn is not known"
        sample = Sample(PROBE_MESSAGES, tools=None, unmask=False, where=where)
        (probe,) = self.encode([sample])
        return [int(probe.ids[probe.trained.nonzero()[0][-1]])]

    def show(self, ids: np.ndarray, trained: np.ndarray, color: bool) -> str:
        """Decodes a sample, and marks the parts of the text that are trained.

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
            # All ids up to the end of the part are decoded, since a part decoded alone may lose its first space.
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

    def warnings(self) -> list[str]:
        """Returns warnings about the template for the user, as sentences without a full stop."""
        if not self.depends_on_date:
            return []
        return [
            f"the chat template writes the date; this run uses {self.today} throughout. A run that starts on "
            "another day gets different ids"
        ]

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines ids and masks, including the date and RULES_VERSION."""
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

    def _decode(self, ids: np.ndarray) -> str:
        return decode(self.tokenizer, ids.tolist(), skip_special_tokens=False)

    def _encode_document(self, sample: Sample, ids: list[int]) -> Encoded:
        eos: Any = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.uint8), self._flags(sample, ids[:2]))

    def _flags(self, sample: Sample, first_ids: list[int]) -> int:
        flags = SampleFlag(0)
        if self._special_token_pattern and any(map(self._special_token_pattern.search, _texts(sample))):
            flags |= SampleFlag.SPECIAL_IN_CONTENT
        if self._bos is not None and first_ids == [self._bos, self._bos]:
            flags |= SampleFlag.DOUBLE_BOS
        roles = (m["role"] for m in sample.messages)
        if next((r for r in roles if r != "system"), "") == "assistant":
            flags |= SampleFlag.STARTS_WITH_ASSISTANT
        return flags.value

    def _compare_with_prompts(self, conversation: Rendered, ids: np.ndarray, offsets: np.ndarray) -> dict[str, Note]:
        """Counts the trained turns for which the tokens before the turn differ from the generation prompt for it."""
        if len(conversation.spans) != len(conversation.train_indices):  # Spans cannot be matched with messages.
            return {}
        inputs = inputs_of(conversation.sample)
        compared, differing, example = 0, 0, ""
        for i, span in zip(conversation.train_indices, conversation.spans, strict=True):
            if i == 0 or conversation.messages[i]["role"] != "assistant":  # These have no prompt.
                continue
            try:
                text = self._template.render(conversation.messages[:i], inputs, add_generation_prompt=True)
            except TemplateError:  # the template does not render a conversation that ends there
                continue
            prompt = self._offset_tokenizer.encode(text)
            first_trained = int(_mask(offsets, [span]).argmax())
            before = ids[:first_trained].tolist()
            compared += 1
            if before != prompt:
                differing += 1
                example = example or self._difference(before, prompt, i)
        notes = {"prompts_compared": Note(compared)} if compared else {}
        return notes | ({"prompts_differ": Note(differing, example)} if differing else {})

    def _difference(self, before: list[int], prompt: list[int], i: int) -> str:
        """Describes the first difference between the tokens before a turn and the generation prompt."""
        pairs = zip(before, prompt, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(prompt)))
        in_training, in_prompt = (
            decode(self.tokenizer, ids[same : same + EXAMPLE_TOKENS], skip_special_tokens=False)
            for ids in (before, prompt)
        )
        return f"before messages[{i}], the training sample has {in_training!r}, and the generation prompt {in_prompt!r}"


# ---------------------------------------------------------------------------------------- helpers
def _is_document(sample: Sample) -> bool:
    return sample.messages[0]["role"] == "pretraining"


def _mask(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Returns a mask of the tokens that overlap a span.

    Args:
      offsets: int [n 2], start and end of each token in the text, in characters.
      spans: the trained spans of the text.

    Returns:
      uint8 [n].
    """
    starts, ends = offsets.T
    # A token without characters, such as an added prefix space, is trained if the character after it is.
    ends = np.maximum(ends, starts + 1)
    trained = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        trained |= (starts < end) & (ends > start)
    return trained


def _texts(sample: Sample) -> Iterator[str]:
    """Yields the texts of a sample: of its messages contents, reasoning and tool calls, and its tools and documents."""
    for given in (sample.tools, sample.documents):
        if given:
            yield json.dumps(given, ensure_ascii=False)
    for m in sample.messages:
        if m.get("content"):
            yield m["content"]
        yield from (m[k] for k in REASONING if m.get(k))
        if m.get("tool_calls"):
            yield json.dumps(m["tool_calls"], ensure_ascii=False)


def _longest_of(strings: Iterable[str]) -> str:
    """Returns a regular expression that matches the longest of the strings at a position; for no strings, nothing."""
    longest_first = sorted(set(strings), key=lambda s: (-len(s), s))
    return "|".join(map(re.escape, longest_first)) or MATCHES_NOTHING


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Returns a compiled pattern that finds any of the strings, or nothing if there are none.

    The strings are grouped by their first two characters, because some tokenizers have a thousand special tokens, and
    an alternation of as many strings would be slow.
    """
    groups = itertools.groupby(sorted(set(strings)), lambda s: s[:2])
    parts = (f"{re.escape(start)}(?:{'|'.join(re.escape(s[2:]) for s in group)})" for start, group in groups)
    return re.compile("|".join(parts) or MATCHES_NOTHING)
