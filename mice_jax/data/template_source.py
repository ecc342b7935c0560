"""Reads the source of a chat template: which variables and keys it uses; and gives variables of it other defaults.

A template's defaults are written into its text. They are then part of everything that the text is part of: the key of a
token store, the tokenizer that a run saves and exports, and what a prompt is rendered with later, here and elsewhere.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mice_jax.errors import UserError

# Names that the caller of a template sets, so that they cannot be given a value.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "conversations", "chat_template")
RESERVED += ("continue_final_message", "return_assistant_tokens_mask")
# What transformers defines besides the variables of a call.
_GLOBALS = {"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"}


@dataclass(frozen=True)
class TemplateNames:
    """The names that a template's source contains."""

    variables: frozenset[str]  # that it reads without setting them itself
    keys: frozenset[str]  # attributes and strings, of which some are keys of messages


class _GenerationTag(Extension):
    """Parses the tags of transformers around what the assistant writes, as if they were absent."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def names_in(source: str) -> TemplateNames:
    """The names in a template's source; jinja2.TemplateSyntaxError where it does not parse."""
    environment = ImmutableSandboxedEnvironment(extensions=[_GenerationTag, loopcontrols])
    tree = environment.parse(source)
    keys = {n.attr for n in tree.find_all(nodes.Getattr)}
    keys |= {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}
    return TemplateNames(frozenset(meta.find_undeclared_variables(tree) - _GLOBALS), frozenset(keys))


def with_defaults(source: str, values: Mapping[str, Any]) -> str:
    """The template with other defaults of its variables, which a caller can still override.

    Args:
      source: the template.
      values: the defaults, which are JSON values, by variable.

    Returns:
      The template's text.
    """
    # The newline after a block tag is trimmed, so that the source begins at the start of a line, as it did.
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + source


def check_defaults(sources: Mapping[str, str], values: Mapping[str, Any], reserved: Mapping[str, Any]) -> None:
    """Raises UserError if a value of data.template_kwargs would not reach the template.

    Args:
      sources: the template's text, by the name of each where there are several.
      values: the values by variable.
      reserved: the special tokens, which the tokenizer sets.
    """
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"data.template_kwargs has {name!r}, which is not the name of a variable of a template.")
        if name in RESERVED or name in reserved:
            raise UserError(
                f"data.template_kwargs has {name!r}, which is set for every conversation by its messages or the "
                "tokenizer. Leave it out."
            )
    read = {v for source in sources.values() for v in names_in(source).variables}
    unread = [name for name in values if name not in read]
    if unread:
        known = ", ".join(sorted(read - {*RESERVED, *reserved})) or "none"
        raise UserError(
            f"data.template_kwargs has {', '.join(map(repr, unread))}, which the chat template does not read. The "
            f"variables that it reads are: {known}. Leave the others out."
        )
