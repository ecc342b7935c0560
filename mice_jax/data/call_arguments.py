"""The arguments of a tool call: the text of a JSON object and the object itself are two forms of the same.

OpenAI's format has a text, and most chat templates write the arguments as JSON, so that they would quote a text.
"""

import json
from typing import Any

from mice_jax.data.json_list import DECODER

Call = dict[str, Any]


def with_object_arguments(call: Call) -> Call:
    """The call with its arguments as an object, if they are the text of one."""
    text = function_of(call).get("arguments")
    found = object_in(text) if isinstance(text, str) else None
    return call if found is None else _with_arguments(call, found)


def with_text_arguments(call: Call) -> Call:
    """The call with its arguments as the text of an object."""
    arguments = function_of(call).get("arguments")
    if arguments is None or isinstance(arguments, str):
        return call
    return _with_arguments(call, json.dumps(arguments, ensure_ascii=False))


def has_other_text(call: Call) -> bool:
    """Whether the arguments are a text that holds no JSON object."""
    arguments = function_of(call).get("arguments")
    return isinstance(arguments, str) and object_in(arguments) is None


def function_of(call: Call) -> dict[str, Any]:
    """The part of a call with its name and arguments: the call itself, or its `function`."""
    if not isinstance(call, dict):
        return {}
    return call["function"] if isinstance(call.get("function"), dict) else call


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that a text holds; None where it holds none."""
    try:
        found = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _with_arguments(call: Call, arguments: Any) -> Call:
    function = function_of(call)
    changed = function | {"arguments": arguments}
    return changed if function is call else call | {"function": changed}
