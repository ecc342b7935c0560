"""Makes a decoder in memory available to lm-evaluation-harness as one of its models.

Texts are tokenised as in the harness's own `hf` model. A context and its continuation are encoded together and split
where the context alone ends. A text that starts with the bos token does not get a second one. A text longer than the
model's positions loses its first tokens, and these losses are counted. Every process of a run makes the same calls and
gets all results.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from mice_jax.errors import UserError
from mice_jax.evals.loglikelihood import Scorer
from mice_jax.evals.prefix_tree import Request
from mice_jax.inference.generation_config import NO_OP_VALUES, GenerationDefaults, ignored_fields_in
from mice_jax.inference.sampler import Sampler, Sampling
from mice_jax.models.transformer import Decoder, Params

MAX_GEN_TOKS = 256  # The longest answer, in tokens, of a task that does not set it. It is the harness's default.
SHOWN = 60  # An error quotes at most this many characters of a text.
KNOWN_KWARGS = ("do_sample", "temperature", "top_p", "top_k")

Tokens = tuple[Any, list[int], list[int]]  # The texts of a request, and the ids of its context and continuation.


class MiceLM(TemplateLM):
    """A model of the harness.

    Attributes:
      params: The parameters to evaluate, which the caller sets before each evaluation.
      cut: The number of tokens that each request longer than the model's positions has lost.
      without_system: The number of conversations whose system message the chat template does not accept.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        dtype: Any,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationDefaults,
        *,
        batch_size: int = 16,
        watch: Callable[[str, int, int], None] = lambda what, done, total: None,
    ):
        """Makes the functions that score and generate; they are compiled when they are first called.

        Args:
          decoder: The model's functions.
          mesh: The devices.
          dtype: The dtype to compute in.
          tokenizer: The model's tokenizer.
          generation: The model's generation defaults, for what a task does not set.
          batch_size: The number of answers that are generated at once.
          watch: Called with the kind of work, the number of requests that are done, and the number of all.
        """
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.params: Params | None = None
        self.cut: list[int] = []
        self.without_system = 0
        self._max_length, self._mesh, self._watch = decoder.spec.max_positions, mesh, watch
        self._scorer, self._sampler = Scorer(decoder, mesh, dtype), Sampler(decoder, dtype)
        self.generation = generation
        self._stop_ids = {*generation.stop_ids, *([] if self.eot_token_id is None else [self.eot_token_id])}
        self._begins: str = self.tokenizer.decode(self.prefix_token_id)

    # ---- Properties of the model that the harness reads --------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the token that stands before a text without a context; raises UserError if there is none."""
        found = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not found:
            raise UserError("the tokenizer has neither a bos_token nor an eos_token; benchmarks need one of them.")
        return found[0]

    @property
    def max_length(self) -> int:
        """The number of the model's positions."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """The longest answer, in tokens, of a task that does not set it."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as the harness uses it in names of files."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation, without its system message if the chat template does not accept one.

        Args:
          chat_history: The messages, each with role and content.
          add_generation_prompt: Whether the model's turn begins at the end; otherwise the last message stays open.

        Returns:
          The text of the conversation.

        Raises:
          UserError: The chat template does not accept the messages.
        """

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError as e:  # Many templates accept no system message.
            without = [m for m in chat_history if m["role"] != "system"]
            if len(without) == len(chat_history):
                raise UserError(f"the chat template does not accept a task's messages: {e}.") from None
            self.without_system += 1
            return render(without)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text, without special tokens if the text already starts with one.

        Args:
          string: The text.
          add_special_tokens: Whether the tokenizer adds its special tokens; None leaves it to the text.
          **kwargs: Further arguments of the harness, which are ignored.
        """
        if add_special_tokens is None and string.startswith(self._begins):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **how)

    # ---- Scores -------------------------------------------------------------------------------------------------
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores continuations after their contexts.

        Args:
          requests: The harness's requests, each with a context and a continuation.
          disable_tqdm: Ignored, because `watch` reports progress.

        Returns:
          For each request, the log-probability of its continuation, and whether every token is the likeliest.

        Raises:
          UserError: A continuation is empty or too long.
        """
        for request in requests:
            context, continuation = _pair(request)
            if not continuation:
                raise UserError(f"a continuation is empty, after {_end(context)}: there is nothing to score.")
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Scores whole texts, in windows if they are longer than the model's positions.

        Args:
          requests: The harness's requests, each with a text.
          disable_tqdm: Ignored, because `watch` reports progress.

        Returns:
          The log-probability of each text.
        """
        windows: list[Tokens] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [logprob for logprob, _ in self._loglikelihood_tokens(windows)])
        return sums.tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Tokens], **kwargs: Any) -> list[tuple[float, bool]]:
        made = [self._request(*r) for r in requests]
        assert self.params is not None
        return self._scorer.score(self.params, made, lambda done: self._watch("scoring requests", done, len(requests)))

    def _request(self, texts: Any, context: list[int], continuation: list[int]) -> Request:
        """Makes the request to score, with as many of the last tokens as the model has positions for."""
        if not context or not continuation:
            which = "context" if not context else "continuation"
            raise UserError(f"the {which} of a request has no tokens: {_end(texts[0])} followed by {texts[1]!r}.")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length} positions; "
                f"it begins with {texts[1][:SHOWN]!r}."
            )
        ids = self._shortened(context + continuation, self.max_length + 1)
        whole = np.array(ids, np.int32)
        return Request(whole[:-1], whole[len(whole) - len(continuation) :])

    def _shortened(self, ids: list[int], most: int) -> list[int]:
        """Returns the last `most` ids, and counts how many are lost."""
        if len(ids) > most:
            self.cut.append(len(ids) - most)
        return ids[-most:]

    # ---- Answers ------------------------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generates answers. Requests with the same generation arguments are batched together.

        Args:
          requests: The harness's requests, each with a context and generation arguments.
          disable_tqdm: Ignored, because `watch` reports progress.

        Returns:
          The text of each answer, up to the first string or token that ends it.
        """
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(_pair(request)[1], sort_keys=True), []).append(i)
        done = 0
        for which in alike.values():
            contexts, kwargs = [_pair(requests[i])[0] for i in which], _pair(requests[which[0]])[1]
            for i, answer in zip(which, self._answers(contexts, kwargs), strict=True):
                answers[i] = answer
                done += 1
                self._watch("answering requests", done, len(requests))
        return answers

    def _answers(self, contexts: Sequence[str], kwargs: dict[str, Any]) -> Any:
        """Yields the answer to each context, up to the first string or token that ends it."""
        sampling, until = parse_generation_kwargs(kwargs, self.generation, self.max_length)
        eos = None if self.eot_token_id is None else self._text([self.eot_token_id], False)
        until = handle_stop_sequences(until, eos)
        room = self.max_length - sampling.max_new_tokens
        bos = self.tokenizer.bos_token
        prompts = []
        for context in contexts:
            begun = bos is not None and context.startswith(bos)
            prompts.append(self._shortened(self._encode(context, False if begun else None), room))
        stops = self._stop_ids | {i for i in map(self._special_id, until) if i is not None}

        def ended(ids: list[int]) -> bool:
            text = self._text(ids, False)
            return any(term in text for term in until if term)

        with jax.set_mesh(self._mesh):
            assert self.params is not None
            for answer in self._sampler.generate(
                self.params, prompts, sampling, stops, batch_size=self.batch_size, ended=ended
            ):
                yield postprocess_generated_text(self._text(answer.ids, True), until, None)

    def _special_id(self, text: str) -> int | None:
        """Returns the id of a stop string that is one special token, else None.

        Such a token is not part of the decoded text, so that the string cannot be found there.
        """
        i = self.tokenizer.added_tokens_encoder.get(text)
        return i if i is not None and self._text([i], True) == "" else None

    def _text(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _pair(request: Instance) -> tuple[Any, Any]:
    """Returns the context of a request, and its continuation or generation arguments."""
    first, second = request.arguments
    return first, second


def parse_generation_kwargs(
    kwargs: dict[str, Any], generation: GenerationDefaults, positions: int
) -> tuple[Sampling, list[str]]:
    """Reads the generation arguments of a task as the harness's `hf` model does.

    The temperature is always the task's. top_k and top_p are the task's, else those of generation_config.json, else
    the defaults of transformers.

    Args:
      kwargs: The task's generation_kwargs.
      generation: The model's generation defaults.
      positions: The number of the model's positions.

    Returns:
      How tokens are chosen, and the strings that end an answer.

    Raises:
      UserError: An argument is not supported, or the answers leave no room for a prompt.
    """
    how: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, MAX_GEN_TOKS))
    until, longest = how.pop("until"), how.pop("max_gen_toks")
    unknown = {k: v for k, v in how.items() if k not in (*KNOWN_KWARGS, *NO_OP_VALUES)}
    wrong = [f"{k}={v!r}" for k, v in unknown.items()] + list(ignored_fields_in(how))
    if wrong:
        raise UserError(
            f"its generation_kwargs have {', '.join(wrong)}, which is not supported. Supported are max_gen_toks, "
            "until, do_sample, temperature, top_p and top_k."
        )
    if positions <= longest:
        raise UserError(
            f"it asks for answers of max_gen_toks={longest} tokens, which leave no room for a prompt in the model's "
            f"{positions} positions. Lower it in the task's generation_kwargs."
        )
    if not how["do_sample"]:
        return Sampling(longest), until
    temperature = float(how.get("temperature", 0.0))
    if not temperature:
        raise UserError("its generation_kwargs have do_sample=True without a temperature above 0; give one.")
    top_p, top_k = generation.sampling_defaults()
    top_p, top_k = float(how.get("top_p", top_p)), int(how.get("top_k", top_k))
    return Sampling(longest, temperature, top_p, top_k, seed=1234), until


def _end(text: str) -> str:
    """Returns the end of a text, quoted for an error message."""
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])
