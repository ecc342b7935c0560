"""Asks the models of a study the held-out questions; models of one shape share the compiled functions."""

import json
from pathlib import Path

import jax.numpy as jnp

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.inference.sampler import Sampler, Sampling
from mice_jax.model_source import resolve_source
from mice_jax.training import build


class Asked:
    """The model of a run's workdir, whose weights can be replaced."""

    def __init__(self, folder: Path):
        source = resolve_source(str(folder))
        self._encoder = ChatEncoder(load_tokenizer(str(source.folder)))
        loaded = build.load_for_inference(source)
        self._params, self._sampler = loaded.params, Sampler(loaded.decoder, jnp.float32)

    def load(self, folder: Path) -> None:
        """Takes the weights of a run of the same model and tokenizer."""
        self._params = build.load_for_inference(resolve_source(str(folder))).params

    def exact_match(self, file: Path) -> tuple[int, int]:
        """How many held-out answers are given word for word, and how many were asked."""
        samples = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        prompts = [self._encoder.prompt_ids(s[:-1]) for s in samples]
        answers = self._sampler.generate(
            self._params, prompts, Sampling(max_new_tokens=60), self._encoder.stop_ids(), batch_size=25
        )
        texts = [str(self._encoder.tokenizer.decode(a.ids)) for a in answers]
        return sum(text == s[-1]["content"] for text, s in zip(texts, samples, strict=True)), len(samples)
