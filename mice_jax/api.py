"""The Python interface to a trained model: `mice_jax.load_model(...)`, then generate, chat or score.

  import mice_jax
  model = mice_jax.load_model("runs/demo")
  model.generate(["Why do mice run?", [{"role": "user", "content": "And elephants?"}]], max_new_tokens=64)

Errors of the input are raised as `mice_jax.errors.UserError`. Nothing here ends the process or changes settings of JAX.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mice_jax.cli.progress_display import Display
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.evals.loglikelihood import Scorer
from mice_jax.evals.prefix_tree import Request
from mice_jax.inference.chat import ChatModel, Message
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.inference.sampler import Sampler, check_fits, default_max_new_tokens
from mice_jax.model_source import check_vocabulary, compute_dtype, generation_config_of, resolve_model
from mice_jax.training.build import LoadedModel, load_for_inference


class Score(NamedTuple):
    """The log-probability of a text.

    Attributes:
      logprob: The sum of log-probabilities of the text's tokens (natural logarithm), each after those before it.
      num_tokens: The number of tokens in that sum: all tokens but the first, which has no context.
    """

    logprob: float
    num_tokens: int


def load_model(model: str | Path, *, step: int | None = None, dtype: str = "auto", chat_template: str = "") -> "Model":
    """Loads a trained model onto all devices of this process.

    Args:
      model: A Hugging Face folder, a model of the Hub (`owner/name` or `owner/name@revision`), a run's workdir, or one
        of its `checkpoints/<step>`.
      step: The checkpoint of a run; None takes the newest.
      dtype: The dtype to compute in: "float32", "bfloat16" or "auto", which is float32 on a CPU and bfloat16 elsewhere.
      chat_template: The name of a built-in chat template or a .jinja file; "" takes the tokenizer's own.

    Raises:
      UserError: There is no such model, or it cannot be loaded.
    """
    source = resolve_model(str(model), step)
    tokenizer = load_tokenizer(str(source.tokenizer_folder), chat_template)
    check_vocabulary(source, tokenizer.get_vocab())
    computed_in = compute_dtype(dtype)
    loaded = load_for_inference(source, step=step, dtype=computed_in)
    return Model(loaded, tokenizer, generation_config_of(source, tokenizer), computed_in)


class Model:
    """A trained model in memory, with its tokenizer. `load_model` makes it.

    Attributes:
      tokenizer: The model's tokenizer, with the chat template in use.
    """

    def __init__(
        self, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase, defaults: GenerationDefaults, dtype: Any
    ) -> None:
        """Makes a model of its parts.

        Args:
          loaded: The decoder, its parameters and the devices.
          tokenizer: The tokenizer, with the chat template to use.
          defaults: How the model generates if the arguments of a call do not set it.
          dtype: The dtype to compute in.
        """
        self.tokenizer = tokenizer
        self._loaded, self._defaults, self._dtype = loaded, defaults, dtype
        self._encoder = ChatEncoder(tokenizer)
        self._sampler = Sampler(loaded.decoder, dtype)
        self._scorer = Scorer(loaded.decoder, loaded.mesh, dtype)

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        batch_size: int = 16,
        progress: bool = False,
    ) -> list[str]:
        """Answers each prompt.

        Args:
          prompts: Texts and chats, which may be mixed. A text is one turn of a user; a chat is a list of messages, each
            with `role` and `content`, and its answer is the assistant's next turn.
          max_new_tokens: The longest answer; None is 256, or half of the model's positions if that is fewer.
          temperature: 0 takes the likeliest token each time. None takes the default of the model's
            generation_config.json, or else 0; likewise for top_k and top_p.
          top_k: The number of likeliest tokens to draw from; 0 draws from all.
          top_p: Draws from as few of the likeliest tokens as hold this much probability.
          seed: The seed of the draws. An answer depends on it and on the position of its prompt in the list.
          stop: Texts that end an answer, and are not part of it.
          raw: Whether a text is continued as it is, without the chat template.
          batch_size: The number of prompts that are answered at once.
          progress: Whether to show a progress bar.

        Returns:
          An answer for each prompt, in the same order.

        Raises:
          UserError: A prompt is not valid or too long, the tokenizer has no chat template, or a number is out of range.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is a single text; give a list, as in generate([text]).")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise UserError("stop has an empty text, which would end every answer. Leave it out, or give stop=().")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        if max_new_tokens is None:
            max_new_tokens = default_max_new_tokens(self._loaded.decoder.spec)
        sampling = self._defaults.sampling(max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        ids = [self._prompt_ids(prompt, raw, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        for i, prompt in enumerate(ids):
            check_fits(prompt, sampling, self._loaded.decoder.spec, f"prompts[{i}]")
        has_chat = any(not (raw and isinstance(prompt, str)) for prompt in prompts)
        chat_stop_ids = self._encoder.stop_ids() if has_chat else []
        chat = ChatModel(
            self._sampler, self._loaded.params, self._encoder, [*chat_stop_ids, *self._defaults.stop_ids], stops
        )
        answers = []
        with self._context(), Display(Console(quiet=not progress)) as display:
            report = display.watch("answering", "prompts")
            for answer in chat.answers(ids, sampling, range(len(ids)), batch_size=batch_size):
                answers.append(answer.text)
                report(len(answers) / len(ids), len(answers))
        return answers

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """Returns the assistant's next turn of one chat; `options` are those of `generate`."""
        return self.generate([messages], **options)[0]

    def score(self, texts: Sequence[str]) -> list[Score]:
        """Scores texts as they are, without the chat template.

        A text's tokens are those of the tokenizer, which may add a token at its beginning. The first token is context
        only. The perplexity of a text is exp(-logprob / num_tokens).

        Args:
          texts: The texts.

        Returns:
          The sum of log-probabilities and the number of tokens of each text.

        Raises:
          UserError: A text has fewer than two tokens, or more than the model has positions.
        """
        if isinstance(texts, str):
            raise UserError("texts is a single text; give a list, as in score([text]).")
        requests = [self._request(text, f"texts[{i}]") for i, text in enumerate(texts)]
        with self._context():
            scores = self._scorer.score(self._loaded.params, requests)
        return [Score(logprob, len(r.targets)) for (logprob, _), r in zip(scores, requests, strict=True)]

    def _prompt_ids(self, prompt: str | Sequence[Message], raw: bool, where: str) -> list[int]:
        if isinstance(prompt, str) and raw:
            return list(self.tokenizer.encode(prompt))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UserError(f"{where} must be a text or a list of messages with `role` and `content`: {message!r}.")
        if not messages:
            raise UserError(f"{where} has no message.")
        try:
            return self._encoder.prompt_ids(messages)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None

    def _request(self, text: str, where: str) -> Request:
        ids = np.array(self.tokenizer.encode(text), np.int32)
        positions = self._loaded.decoder.spec.max_positions
        if len(ids) < 2:
            raise UserError(f"{where} has {len(ids)} tokens; at least 2 are needed, because the first is context only.")
        if len(ids) > positions:
            raise UserError(f"{where} has {len(ids)} tokens, and the model has {positions} positions. Shorten it.")
        return Request(ids[:-1], ids[1:])

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """The mesh, and products in full float32 precision if the model computes in float32."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self._loaded.mesh))
            settings: Any = jax.config
            if self._dtype == np.float32 and settings.jax_default_matmul_precision is None:
                stack.enter_context(jax.default_matmul_precision("highest"))
            yield
