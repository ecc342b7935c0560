"""Turns samples into token ids and a loss mask.

The ids are those of the tokenizer's chat template over the whole conversation, rendered once. The mask is derived in
characters (`template_spans`) and mapped to tokens by their character offsets: a token that overlaps a trained span by
at least one character gets loss.
"""

import datetime
import enum
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mice_jax.data.chat_template import ChatTemplate, Message, TemplateError
from mice_jax.data.sources import REASONING, Sample
from mice_jax.data.template_spans import PROBE_MESSAGES, NoTurnEndError, TemplateSpans
from mice_jax.data.tokenizer import Span, decode, offset_tokenizer
from mice_jax.errors import UserError

RULES_VERSION = 3  # increased whenever ids or masks change, so that token stores are rebuilt
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


class ChatEncoder:
    """Encodes samples with one tokenizer and one chat template; it can be pickled for worker processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        train_on: str = "all",
        today: datetime.date | None = None,
    ) -> None:
        """Sets up the tokenizer and the template.

        Args:
          tokenizer: a fast or slow tokenizer of transformers.
          chat_template: the text of a template; None or "" takes the tokenizer's template.
          train_on: "all" trains every assistant message, "last" only the last one of each conversation. The `train` of
            a message and the `unmask` of a sample override it.
          today: the date that templates may write; None means today. A resumed run passes the date of its first start.

        Raises:
          UserError: if `train_on` is unknown.
        """
        if train_on not in TRAIN_ON:
            raise UserError(f"data.train_on={train_on!r} is not one of {', '.join(TRAIN_ON)}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
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
          UserError: if the template raises an error, or the trained spans of a sample cannot be derived.
        """
        encoded: list[Encoded | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if s.messages[0]["role"] == "pretraining"]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._offset_tokenizer.encode_documents(texts), strict=True):
            encoded[i] = self._encode_document(samples[i], ids)
        chats = [i for i, e in enumerate(encoded) if e is None]
        rendered = [self._render_and_find_spans(samples[i]) for i in chats]
        tokens = self._offset_tokenizer.encode_with_offsets([text for text, _ in rendered])
        for i, (ids, offsets), (_, spans) in zip(chats, tokens, rendered, strict=True):
            encoded[i] = Encoded(ids, _mask(offsets, spans), self._flags(samples[i], ids[:2].tolist()))
        return encoded  # type: ignore[return-value]

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
        """Returns the ids of a conversation, followed by the header after which the model writes the next turn.

        Args:
          messages: the conversation.
          tools: the JSON schemas of the tools.

        Returns:
          The ids.

        Raises:
          UserError: if the template cannot render the conversation.
        """
        try:
            text = self._template.render(_without_own_keys(messages), tools, add_generation_prompt=True)
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
        if self._special_token_pattern and any(map(self._special_token_pattern.search, _texts(sample.messages))):
            flags |= SampleFlag.SPECIAL_IN_CONTENT
        if self._bos is not None and first_ids == [self._bos, self._bos]:
            flags |= SampleFlag.DOUBLE_BOS
        roles = (m["role"] for m in sample.messages)
        if next((r for r in roles if r != "system"), "") == "assistant":
            flags |= SampleFlag.STARTS_WITH_ASSISTANT
        return flags.value

    def _render_and_find_spans(self, sample: Sample) -> tuple[str, list[Span]]:
        """Returns the text of a conversation, and the spans of the text that are trained."""
        messages, tools = _without_own_keys(sample.messages), sample.tools
        train_indices = self._messages_to_train(sample)
        try:
            # The tags of a template enclose assistant messages only.
            only_assistant = all(messages[i]["role"] == "assistant" for i in train_indices)
            if only_assistant and self._template.is_tagged(tools):
                text, tagged = self._template.render_with_spans(messages, tools)
                return text, self._spans.from_tags(messages, text, tagged, train_indices) if train_indices else []
            text = self._template.render(messages, tools)
        except TemplateError as e:
            raise UserError(f"{sample.where}: {e}.") from e
        except NoTurnEndError as e:
            raise _no_turn_end_error(sample, e) from e
        if not train_indices:
            return text, []
        try:
            return text, self._spans.derive(messages, tools, text, train_indices)
        except NoTurnEndError as e:
            raise _no_turn_end_error(sample, e) from e
        except TemplateError as e:
            raise UserError(
                f"{sample.where}: the trained tokens cannot be derived from the chat template: {e}."
                " In a copy of the template, put {% generation %} before and {% endgeneration %} after the "
                "assistant's turn (its content and the token that ends it), and set data.chat_template to the path "
                "of the copy."
            ) from e

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
def _no_turn_end_error(sample: Sample, e: NoTurnEndError) -> UserError:
    """Returns the error for a sample in which the template does not write a token that ends the turn."""
    return UserError(
        f"{sample.where}: {e}, so a model trained on it would never stop. Let the "
        "template write a token (such as the eos token) after each assistant message."
    )


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


def _without_own_keys(messages: list[Message]) -> list[Message]:
    """Returns the messages without nulls, which transformers leaves out too, and without this package's key `train`."""
    return [{k: v for k, v in m.items() if v is not None and k != "train"} for m in messages]


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
