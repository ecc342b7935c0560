"""Renders conversations with a tokenizer's chat template.

A template that writes today's date (`strftime_now`) is rendered with one day throughout. The day is part of the
fingerprint of a token store, so that one store never mixes two dates.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mice_jax.data import templates
from mice_jax.data.template_source import TemplateNames, names_in
from mice_jax.data.tokenizer import Span
from mice_jax.errors import UserError, one_line

Message = dict[str, Any]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")

_render_jinja: Any = render_jinja_template  # its type hints are narrower than what it accepts


class TemplateError(Exception):
    """The template cannot render these messages, or the attempted method cannot derive its trained spans."""


@dataclass(frozen=True)
class TemplateInputs:
    """What a template is rendered with besides the messages."""

    tools: list[dict[str, Any]] | None = None  # JSON schemas
    documents: list[dict[str, Any]] | None = None  # retrieved ones (RAG)
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # further variables, such as enable_thinking


NO_INPUTS = TemplateInputs()


class ChatTemplate:
    """A chat template with the tokenizer's special tokens and a fixed date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None, today: datetime.date) -> None:
        """Chooses the template.

        Args:
          tokenizer: the tokenizer, whose special tokens are variables of the template.
          text: the template; None or "" takes the tokenizer's template, or its named templates if it has several.
          today: the date that `strftime_now` writes.
        """
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._tokenizer = tokenizer
        self._template = text or tokenizer.chat_template
        self._today = today

    def with_text(self, text: str) -> "ChatTemplate":
        """Another template with the same special tokens and date."""
        return ChatTemplate(self._tokenizer, text, self._today)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template writes the date."""
        return any("strftime_now" in text for text in self._texts().values())

    def dated_texts(self) -> dict[str, str]:
        """Returns the text of each template by name, with the date written out; a single template has the name ""."""
        return {name: self._with_date(text) for name, text in self._texts().items()}

    def names(self, tools: list[Message] | None) -> TemplateNames:
        """The names of variables and keys in the template that is rendered with these tools."""
        try:
            return names_in(self._text_for(tools))
        except jinja2.TemplateSyntaxError as e:
            raise TemplateError(f"line {e.lineno} of the chat template does not parse: {e.message}") from e

    def is_tagged(self, tools: list[Message] | None) -> bool:
        """Returns whether the template marks trained text with `{% generation %}`."""
        return bool(self._template and _GENERATION_TAG.search(self._text_for(tools)))

    def render(
        self, messages: list[Message], inputs: TemplateInputs = NO_INPUTS, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation.

        Args:
          messages: the conversation, without the keys that only this package knows.
          inputs: what else the template is given.
          add_generation_prompt: whether the header of the assistant's next turn follows.

        Returns:
          The text.

        Raises:
          TemplateError: if the template raises an exception, or the tokenizer has no template.
        """
        return self._render(messages, inputs, add_generation_prompt=add_generation_prompt)[0]

    def render_with_spans(self, messages: list[Message], inputs: TemplateInputs) -> tuple[str, list[Span]]:
        """As `render`, with the spans (in characters) that the template's `{% generation %}` tags enclose."""
        return self._render(messages, inputs, return_assistant_tokens_mask=True)

    def _render(self, messages: list[Message], inputs: TemplateInputs, **options: bool) -> tuple[str, list[Span]]:
        template = self._text_for(inputs.tools)
        try:
            texts, spans = _render_jinja(
                conversations=[messages],
                tools=inputs.tools,
                documents=inputs.documents,
                chat_template=template,
                **options,
                **{**self.special_tokens, **inputs.kwargs},
            )
        except Exception as e:  # a template is a program and may raise anything
            raise TemplateError(f"the chat template raises an exception for these messages: {one_line(e)}") from e
        return texts[0], spans[0] if options.get("return_assistant_tokens_mask") else []

    def _text_for(self, tools: list[Message] | None) -> str:
        if not self._template:
            raise TemplateError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no chat template. Set data.chat_template (or the "
                f"flag --chat_template) to one of {templates.NAMES}, or to the path of a .jinja file"
            )
        if isinstance(self._template, str):
            return self._with_date(self._template)
        try:
            text = self._tokenizer.get_chat_template(tools=tools)  # type: ignore[arg-type]
        except ValueError as e:
            raise TemplateError(one_line(e)) from e
        return self._with_date(text)

    def _texts(self) -> dict[str, str]:
        named: Any = self._template or {}
        return {"": named} if isinstance(named, str) else named

    def _with_date(self, text: str) -> str:
        return _write_date(text, self._today) if "strftime_now" in text else text


@functools.cache
def _write_date(template: str, day: datetime.date) -> str:
    """Returns the template with each call of `strftime_now` replaced by the date that it would write on this day."""
    midnight = datetime.datetime.combine(day, datetime.time())
    dated = _DATE_CALL.sub(lambda m: json.dumps(midnight.strftime(m[1] or m[2] or "")), template)
    computed = re.search(r"strftime_now\s*\(.{0,40}", dated)
    if computed:
        raise UserError(
            f"the chat template writes a date with {computed[0]!r}, whose format is not a quoted string, so the ids "
            "would change from day to day. Write the format or the date into a copy of the template, and set "
            "data.chat_template to the path of the copy."
        )
    return dated
