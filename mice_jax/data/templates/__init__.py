"""The chat templates that come with the package, for base models, which have none.

Each is a .jinja file here, with `{% generation %}` tags around what is trained. What one writes as a single token and
a tokenizer has not is added to the tokenizer, so that it is saved and exported with the model.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from mice_jax.data.template_names import NAMES as NAMES
from mice_jax.data.template_names import TOKENS
from mice_jax.errors import UserError

ENDED_BY_EOS = ("mistral", "plain")


def give_template(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Gives the tokenizer a template of `TOKENS` and the tokens for it; those that it lacked are returned."""
    known: Any = tokenizer  # its hints are narrower than what it takes
    if name in ENDED_BY_EOS and not tokenizer.eos_token:
        others = ", ".join(n for n in TOKENS if n not in ENDED_BY_EOS)
        raise UserError(
            f"data.chat_template={name!r} ends a turn with the tokenizer's eos token, and the tokenizer "
            f"{tokenizer.name_or_path!r} has none. Name one as eos_token in its tokenizer_config.json, or take a "
            f"template that brings a token for it: {others}."
        )
    lacking = [t for t in TOKENS[name] if t not in known.added_tokens_encoder]
    if lacking:
        added = [AddedToken(t, special=True, normalized=False) for t in lacking]
        known.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.chat_template = "{{- bos_token }}" * _puts_bos(tokenizer) + text_of(name)
    return lacking


def text_of(name: str) -> str:
    """The source of a template of `TOKENS`."""
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model knows texts by a bos token at their start, which is how its tokenizer encodes one."""
    bos: Any = tokenizer.bos_token_id
    return bos is not None and tokenizer.encode("a")[:1] == [bos]
