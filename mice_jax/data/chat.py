"""Turns samples into token ids and a loss mask.

The whole conversation is rendered once with the chat template (module `conversation`), and the text is tokenised. The
mask is derived in characters (module `template_spans`) and mapped to tokens by their character offsets: a token that
overlaps a trained span by at least one character gets loss.
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
from mice_jax.data.tokenizer import IdsAndSpans, Span, decode, offset_tokenizer
from mice_jax.errors import UserError

RULES_VERSION = 3  # increased whenever ids or masks change, so that token stores are rebuilt
EXAMPLE_TOKENS = 6  # shown of the first difference between a sample and its prompt
# The assistant messages that get loss, unless a message's `train` or a sample's `unmask` overrides it.
TRAIN_ON = ("all", "last")


class SampleFlag(enum.IntFlag):
    """Properties of a sample that may be a mistake in the data or the template."""

    SPECIAL_IN_CONTENT = 1  # the text of a special token occurs in a message, and is encoded as that token
    DOUBLE_BOS = 2  # the ids begin with two bos tokens
    STARTS_WITH_ASSISTANT = 4  # the first message that is not a system message is an assistant message


@dataclass(frozen=True)
class Encoded:
    """An encoded sample of n tokens."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # uint8 [n]; 1 = the model learns to predict this token
    flags: int = 0  # a combination of `SampleFlag`
    notes: Notes = field(default_factory=lambda: NO_NOTES)  # what was left out or changed, and how often


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
            reasoning the template leaves out; "per_turn" trains each turn in a sample of its own (`split_by_turn`),
            rendered as in inference; "drop" removes reasoning.

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
        spans = TemplateSpans(self._template, _longest_match(added + special), _longest_match(special))
        self._renderer = ConversationRenderer(self._template, spans, train_on, reasoning)
        special_added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
        # With split_special_tokens, the text of a special token is encoded like any other text.
        splits_special = getattr(tokenizer, "split_special_tokens", False)
        self._special_token_pattern = None if splits_special else _compile_search(special + special_added)
        self._bos: Any = tokenizer.bos_token_id

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encodes samples.

        The ids of a chat equal those of `apply_chat_template` for its messages, tools, documents and template_kwargs. A
        document, whose only message has the role "pretraining", is encoded as its text, followed by eos if the
        tokenizer has one and has not added it.

        Args:
          samples: conversations and documents.

        Returns:
          One `Encoded` for each sample, in order.

        Raises:
          UserError: if the template raises an error or leaves out tools or calls, or trained spans cannot be derived.
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
          compare: for this many conversations, the tokens before each trained turn are compared with its prompt.

        Returns:
          An `Encoded` or a `BadRecord` for each sample, in order.
        """
        found: list[Encoded | BadRecord | None] = [None] * len(samples)
        documents = [i for i, s in enumerate(samples) if _is_document(s)]
        texts = [samples[i].messages[0]["content"] for i in documents]
        for i, ids in zip(documents, self._offset_tokenizer.encode_documents(texts), strict=True):
            found[i] = self._encode_document(samples[i], ids)
        rendered: dict[int, Rendered] = {}
        for i in (i for i, one in enumerate(found) if one is None):
            one = self._renderer.render(samples[i])
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
        rendered = (self._renderer.render(s) for s in samples if not _is_document(s))
        return [one for one in rendered if isinstance(one, BadRecord)]

    def split_by_turn(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yields a sample for each trained turn if `reasoning` is "per_turn", and the given samples otherwise.

        The sample of a turn ends with it, so that the template renders it as in inference. A trained message of another
        role belongs to the next turn of the assistant.
        """
        for sample in samples:
            turns = [] if self.reasoning != "per_turn" or _is_document(sample) else self._turns(sample)
            if not turns:
                yield sample
            for trained in turns:
                messages = [m | {"train": i in trained} for i, m in enumerate(sample.messages[: trained[-1] + 1])]
                yield replace(sample, messages=messages, conversation=sample.conversation or sample)

    def _turns(self, sample: Sample) -> list[list[int]]:
        """Returns the trained messages in groups that end with an assistant message, except possibly the last group."""
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
        tools: list[Message] | None = None,
        documents: list[Message] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation, followed by the generation prompt.

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
            text = self._template.render(self._renderer.as_template_sees(messages), inputs, add_generation_prompt=True)
        except TemplateError as e:
            raise UserError(
                f"the chat template cannot render a prompt: {e}. The prompt is {json.dumps(messages)[:200]}"
            ) from e
        return self._offset_tokenizer.encode(text)

    def stop_ids(self) -> list[int]:
        """Returns, in a list, the token that ends an assistant's turn: the last trained one of a short example."""
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

    def _compared(self, one: Rendered, located: IdsAndSpans) -> dict[str, Note]:
        """Compares what precedes each trained turn with the prompt that asks for it, token by token."""
        if len(one.spans) != len(one.train_indices):  # It is not known which span belongs to which message.
            return {}
        ids, offsets = located
        compared, differing, example = 0, 0, ""
        for i, span in zip(one.train_indices, one.spans, strict=True):
            if one.messages[i]["role"] != "assistant" or not i:
                continue
            inputs = inputs_of(one.sample)
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
    # An empty token, such as an added prefix space, counts as one character: it is trained if the next character is.
    ends = np.maximum(ends, starts + 1)
    trained = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        trained |= (starts < end) & (ends > start)
    return trained


def _texts(messages: list[Message]) -> Iterator[str]:
    """Yields the texts of messages: contents, reasoning and tool calls."""
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
