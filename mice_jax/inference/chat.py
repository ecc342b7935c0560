"""A model that answers conversations in words: the sampler with its tokenizer, and with texts that end an answer.

A text that ends an answer may begin and end within tokens. It is looked for in the decoded answer, and neither it nor
what comes after it is given out. Who reads along is shown a piece of text once no later token can change it or turn
out to be the rest of such an end.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import decode
from mice_jax.inference.sampler import Sampler, Sampling, check_fits
from mice_jax.models.transformer import Params

PARTIAL = "\ufffd"  # what a decoder writes for a character of which only some bytes are there

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str
    stopped: bool  # by the model or a text that ends answers; else cut at max_new_tokens


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model with all that its answers depend on but the chance."""

    sampler: Sampler
    params: Params
    encoder: ChatEncoder
    stop_ids: Sequence[int]
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(self.stop_texts), "an empty text ends every answer"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    def prompt(self, messages: list[Message], tools: list[Message] | None, sampling: Sampling, where: str) -> list[int]:
        """A conversation's ids; UserError where the template takes it not, or the model has no room for an answer."""
        ids = self.encoder.prompt_ids(messages, tools)
        check_fits(ids, sampling, self.sampler.spec, where)
        return ids

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int], *, batch_size: int
    ) -> Iterator[Completion]:
        """Each prompt's answer, in their order; draws depend on a prompt's number."""
        found = self.sampler.generate(
            self.params, prompts, sampling, self.stop_ids, batch_size=batch_size, numbers=numbers, ended=self._ended
        )
        for answer in found:
            text = self._text(answer.ids)
            end = self._end(text)
            yield Completion(text[:end], answer.stopped or end is not None)

    def chat_batch(
        self, conversations: Sequence[list[Message]], sampling: Sampling, numbers: Sequence[int], *, batch_size: int
    ) -> Iterator[Completion | None]:
        """As `answers` to conversations; None where the model's positions leave no room for one."""
        prompts = [self.encoder.prompt_ids(messages) for messages in conversations]
        room = self.sampler.spec.max_positions - sampling.max_new_tokens
        fits = [len(p) <= room for p in prompts]
        asked, own = list(itertools.compress(prompts, fits)), list(itertools.compress(numbers, fits))
        answers = self.answers(asked, sampling, own, batch_size=batch_size)
        for fit in fits:
            yield next(answers) if fit else None

    def stream(self, prompt: Sequence[int], sampling: Sampling, show: Callable[[str], None]) -> Completion:
        """One answer, shown piece by piece as it comes; an interrupt ends it early."""
        ids: list[int] = []
        text, shown, end = "", 0, None
        with contextlib.suppress(KeyboardInterrupt):
            for token in self.sampler.stream(self.params, prompt, sampling, self.stop_ids):
                ids.append(token)
                text = self._text(ids)
                if (end := self._end(text)) is not None:
                    break
                certain = shown if text.endswith(PARTIAL) else len(text) - self._partial_stop_length(text)
                if certain > shown:
                    show(text[shown:certain])
                    shown = certain
        text = text[:end]
        show(text[shown:])
        return Completion(text, end is not None or len(ids) < sampling.max_new_tokens)

    def _text(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids, skip_special_tokens=True)

    def _ended(self, ids: list[int]) -> bool:
        return bool(self.stop_texts) and self._end(self._text(ids)) is not None

    def _end(self, text: str) -> int | None:
        """Where the first of the texts that end an answer begins."""
        return min((at for stop in self.stop_texts if (at := text.find(stop)) >= 0), default=None)

    def _partial_stop_length(self, text: str) -> int:
        """How many of the last characters may be the beginning of such a text."""
        longest = max(map(len, self.stop_texts), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.stop_texts)), 0)
