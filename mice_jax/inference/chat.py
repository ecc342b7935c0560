"""A model that answers chats with text: the sampler with a tokenizer, a chat template and stop texts.

A stop text ends an answer. It may begin and end within tokens, so it is searched for in the decoded answer; neither the
stop text nor what follows it is part of the answer. When an answer is streamed, a piece of text is shown as soon as no
later token can change it or complete a stop text that it begins.
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

PARTIAL = "\ufffd"  # A decoder writes this for a character of which some bytes are missing.

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: The answer, without what ended it.
      stopped: Whether the model or a stop text ended it; else it was cut at max_new_tokens.
    """

    text: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model with everything that determines its answers, except for the sampling settings.

    Attributes:
      sampler: The compiled functions.
      params: The parameters.
      encoder: The tokenizer and the chat template.
      stop_ids: The token ids that end an answer.
      stop_texts: The texts that end an answer.
    """

    sampler: Sampler
    params: Params
    encoder: ChatEncoder
    stop_ids: Sequence[int]
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(self.stop_texts), "an empty stop text would end every answer"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the encoder."""
        return self.encoder.tokenizer

    def prompt(self, messages: list[Message], tools: list[Message] | None, sampling: Sampling, where: str) -> list[int]:
        """Returns the token ids of a chat.

        Args:
          messages: The messages; the answer follows the last one.
          tools: The tools that the model may call, for the chat template.
          sampling: How the chat will be answered.
          where: What an error message calls the chat.

        Raises:
          UserError: The template does not accept the chat, or the model's positions leave no room for the answer.
        """
        ids = self.encoder.prompt_ids(messages, tools)
        check_fits(ids, sampling, self.sampler.spec, where)
        return ids

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int], *, batch_size: int
    ) -> Iterator[Completion]:
        """Yields the answer of each prompt, in their order.

        Args:
          prompts: The token ids of each prompt.
          sampling: How tokens are chosen.
          numbers: The number of each prompt, on which its draws depend.
          batch_size: The number of prompts that are answered at once.
        """
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
        """Yields the answer of each chat, or None if the model's positions leave no room for it.

        Args:
          conversations: The messages of each chat.
          sampling: How tokens are chosen.
          numbers: The number of each chat, on which its draws depend.
          batch_size: The number of chats that are answered at once.
        """
        prompts = [self.encoder.prompt_ids(messages) for messages in conversations]
        room = self.sampler.spec.max_positions - sampling.max_new_tokens
        fits = [len(p) <= room for p in prompts]
        asked, own = list(itertools.compress(prompts, fits)), list(itertools.compress(numbers, fits))
        answers = self.answers(asked, sampling, own, batch_size=batch_size)
        for fit in fits:
            yield next(answers) if fit else None

    def stream(self, prompt: Sequence[int], sampling: Sampling, show: Callable[[str], None]) -> Completion:
        """Answers one prompt and shows the answer while it is generated; an interrupt ends it early.

        Args:
          prompt: The prompt's token ids.
          sampling: How tokens are chosen.
          show: Called with each further piece of the answer.
        """
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
        """Returns where the first stop text begins, or None."""
        return min((at for stop in self.stop_texts if (at := text.find(stop)) >= 0), default=None)

    def _partial_stop_length(self, text: str) -> int:
        """Returns how many of the last characters may be the beginning of a stop text."""
        longest = max(map(len, self.stop_texts), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.stop_texts)), 0)
