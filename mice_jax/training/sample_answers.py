"""What the model of a run answers to some held-out prompts, for the reader of the report."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mice_jax.data.dataset import HeldOut
from mice_jax.data.mixture import Corpus
from mice_jax.inference.sampler import Sampler, Sampling, default_max_new_tokens
from mice_jax.models.transformer import Decoder, Params

MAX_NEW_TOKENS = 128  # A longer answer is cut: readers see where it is going.


class Question(NamedTuple):
    """A prompt of held-out data, as token ids, and the answer that the data have."""

    source: str
    prompt: list[int]
    expected: list[int]


def questions(held_out: Sequence[HeldOut], corpus: Corpus, count: int, longest: int) -> list[Question]:
    """Returns the first prompts of held-out data, from one source after the other.

    A prompt is what stands before the first trained token of a sample, so a document has none.

    Args:
      held_out: The held-out samples of each source.
      corpus: The run's samples.
      count: The number of prompts; there are fewer where the data have fewer.
      longest: Longer prompts are left out.
    """
    by_source = [_questions_of(h, corpus, longest) for h in held_out]
    in_turn = itertools.zip_longest(*(itertools.islice(of, count) for of in by_source))
    return [q for q in itertools.chain.from_iterable(in_turn) if q is not None][:count]


def _questions_of(held: HeldOut, corpus: Corpus, longest: int) -> Iterator[Question]:
    for i in held.ids:
        tokens, trained = corpus.sample(int(i))
        start = int(np.argmax(trained))
        if trained[start] and 0 < start <= longest:
            span = trained[start:]
            end = start + (len(span) if span.all() else int(np.argmin(span)))
            yield Question(held.name, tokens[:start].tolist(), tokens[start:end].tolist())


def answerer(
    asked: Sequence[Question],
    decoder: Decoder,
    mesh: Mesh,
    dtype: Any,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> Callable[[Params], list[dict[str, str]]]:
    """Returns a function that lets a model answer questions, by its likeliest tokens.

    Args:
      asked: The questions.
      decoder: The model.
      mesh: The mesh on which its parameters are placed.
      dtype: The dtype of activations.
      tokenizer: The run's tokenizer.
      stop_ids: The tokens that end an answer.

    Returns:
      A function of the parameters that returns source, prompt, expected and own answer of each question, as texts.
    """
    sampler = Sampler(decoder, dtype)
    how = Sampling(max_new_tokens(decoder))

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def answer(params: Params) -> list[dict[str, str]]:
        with jax.set_mesh(mesh):
            given = list(sampler.generate(params, [q.prompt for q in asked], how, stop_ids))
        return [
            {"source": q.source, "prompt": text(q.prompt), "expected": text(q.expected), "answer": text(a.ids)}
            for q, a in zip(asked, given, strict=True)
        ]

    return answer


def max_new_tokens(decoder: Decoder) -> int:
    """Returns the longest answer in tokens, which leaves half of few positions to the prompt."""
    return min(MAX_NEW_TOKENS, default_max_new_tokens(decoder.spec))
