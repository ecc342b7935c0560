"""Turns raw records of several formats into checked samples.

A reader yields records, each with the place it came from ("a.jsonl line 12"). A format turns a record into
`{"messages": [...]}`, which is then checked. A bad record is returned as such, with its place and what is wrong. Keys
that neither a format nor a template can read are listed with the sample, so that they can be counted and reported.
"""

import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mice_jax.data.arrow_values import NotJSONError
from mice_jax.data.bad_records import BadRecord
from mice_jax.data.json_list import DECODER
from mice_jax.data.readers import Block, Reader
from mice_jax.data.reasoning import REASONING
from mice_jax.data.template_source import RESERVED
from mice_jax.errors import UserError, did_you_mean, one_line, sentence

ROLES = ("system", "user", "assistant", "tool", "pretraining")
# Keys of a message that say whether it is trained on. `weight` is that of OpenAI's format, `loss` that of ms-swift.
TRAIN_KEYS = ("train", "weight", "loss")
# Keys of a record that every format may have; all others are read by its format, or by nothing.
RECORD_KEYS = ("messages", "tools", "unmask", "documents", "chat_template_kwargs")

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One conversation or document; a `content` is a string, or None in a message with `tool_calls`."""

    messages: list[Record]
    tools: list[Record] | None
    unmask: bool
    where: str  # "a.jsonl line 12"
    place: int = 0  # index in the reader's places
    number: int = 0  # of the record in that place
    documents: list[Record] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # further variables of the template
    unread: tuple[str, ...] = ()  # keys of the record that nothing reads
    conversation: "Sample | None" = None  # the whole one, where this sample is one turn of it


class _BadRecord(Exception):
    """A record that cannot be used."""

    def __init__(self, reason: str, text: str) -> None:
        """Keeps the short reason, by which bad records are counted, and the sentence for the user."""
        super().__init__(text)
        self.reason = reason


def parse_block(block: Block, places: Sequence[str], format: str) -> Iterator[Sample | BadRecord]:
    """Yields each record of a block as a sample or, where that is not possible, as a bad record.

    Args:
      block: raw records.
      places: those of the reader.
      format: a key of `FORMATS`.

    Yields:
      The samples and bad records in order.
    """
    convert, place = FORMATS[format], places[block.place]
    for number, raw in block.records():
        where = f"{place} {number}"
        try:
            record = _record(raw)
            yield _sample(convert(record), where, block.place, number, _unread_keys(record, format))
        except _BadRecord as bad:
            yield BadRecord(where, bad.reason, str(bad))


def _unread_keys(record: Record, format: str) -> tuple[str, ...]:
    known = {*RECORD_KEYS, *_READ_BY_FORMAT[format]}
    return tuple(key for key, value in record.items() if key not in known and value is not None)


def find_format(path: str, reader: Reader, format: str) -> tuple[str, str]:
    """Finds the format of a source.

    The default format is `messages`. Where the first record has no messages, and has the fields of exactly one other
    format, that one is used.

    Args:
      path: of the source, for messages.
      reader: of the source.
      format: as in `Source.format`.

    Returns:
      The format, and a sentence for the user if it differs from the given one.

    Raises:
      UserError: the format is unknown, or the first record has the fields of several.
    """
    if format not in FORMATS:
        raise UserError(sentence(f"Source.format={format!r} of {path} is not known{_nearest(format, FORMATS)}"))
    record = _first_record(reader) if format == "messages" else None
    if record is None or "messages" in record:
        return format, ""
    if _turn_keys(record.get("conversations")) == "messages":
        return format, f"{path} is read as messages: the `conversations` of its first record are messages"
    fits = [name for name, fields in _FIELDS.items() if all(record.get(f) is not None for f in fields)]
    if len(fits) > 1:
        raise UserError(
            f"{path} has no `messages` but {_brief(list(record))}, which could be read as {' or as '.join(fits)}. Set "
            f"one of them, such as Source.format={fits[0]!r}."
        )
    if not fits:
        return format, ""
    fields = " and ".join(f"`{f}`" for f in _FIELDS[fits[0]])
    return fits[0], f"{path} is read as {fits[0]}: its first record has {fields}, and no `messages`"


def _first_record(reader: Reader) -> Record | None:
    """The first record that is an object; bad records before it are reported when they are read as samples."""
    for block in reader.blocks():
        for _, raw in block.records():
            try:
                return _record(raw)
            except _BadRecord:
                continue
    return None


# ---------------------------------------------------------------------------------------- records
def _record(raw: Any) -> Record:
    """The object that a line holds; some kinds of file give parsed objects, or the error of one that is not JSON."""
    if isinstance(raw, NotJSONError):
        raise _BadRecord("not JSON", str(raw)) from raw
    if isinstance(raw, bytes):
        try:
            raw = DECODER.decode(raw.decode())
        except UnicodeDecodeError as e:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                text = "it begins with the mark of UTF-16; convert the file, as with iconv -f UTF-16 -t UTF-8"
                raise _BadRecord("not UTF-8", text) from e
            byte = f"byte {e.start + 1} (0x{raw[e.start]:02x})"
            raise _BadRecord("not UTF-8", f"{byte} is not UTF-8 ({e.reason})") from e
        except RecursionError as e:
            raise _BadRecord("nested too deep", "its JSON is nested too deep") from e
        except json.JSONDecodeError as e:
            raise _BadRecord("not JSON", f"it is not JSON: {e.msg.removesuffix(' at')} at column {e.colno}") from e
        except ValueError as e:  # such as NaN, or an integer of thousands of digits
            raise _BadRecord("not JSON", f"it is not JSON: {one_line(e)}") from e
    if not isinstance(raw, dict):
        raise _BadRecord("not an object", f"it is {_kind(raw)}, and must be an object")
    return raw


def _messages(record: Record) -> Record:
    """Messages, whatever they are called and however their turns are written."""
    turns = record.get("messages")
    if turns is None and _turn_keys(record.get("conversations")) == "messages":
        return record | {"messages": record["conversations"]}
    return _sharegpt(record | {"conversations": turns}) if _turn_keys(turns) == "sharegpt" else record


def _turn_keys(turns: Any) -> str:
    """The format whose keys the first turn of a conversation has: messages, sharegpt, or "" for neither."""
    turns = _listed(turns)
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict):
        return ""
    if first.get("role") is not None:
        return "messages"
    return "sharegpt" if first.get("from") is not None else ""


def _prompt_completion(record: Record) -> Record:
    """Two texts, or two lists of messages; the second is trained on."""
    prompt, completion = (_listed(record.get(k)) for k in ("prompt", "completion"))
    if _objects(prompt) and _objects(completion):
        return record | {"messages": [*({"train": False, **m} for m in prompt), *completion]}
    return _turns(record, user=_text(record, "prompt"), assistant=_text(record, "completion"))


def _document(record: Record) -> Record:
    return _turns(record, pretraining=_text(record, "text"))


def _alpaca(record: Record) -> Record:
    asked = [_text(record, "instruction"), _text(record, "input", "")]
    return _turns(record, user="\n\n".join(p for p in asked if p), assistant=_text(record, "output"))


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",  # its value is a call, not a text
}


def _sharegpt(record: Record) -> Record:
    turns = _listed(record.get("conversations"))
    _check(isinstance(turns, list), "conversations", turns, "a list of turns")
    if _turn_keys(turns) == "messages":
        return record | {"messages": turns}
    messages: list[Record] = []
    for i, turn in enumerate(turns or []):
        at = f"conversations[{i}]"
        _check(isinstance(turn, dict), at, turn, "an object with `from` and `value`")
        role = turn.get("from")
        _check_name(role, f"{at}.from", _SHAREGPT_ROLES)
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        said = {"content": turn["value"]} if "value" in turn else {}
        if role == "function_call":
            said = {"content": "", "tool_calls": _calls(turn.get("value"), f"{at}.value")}
        messages.append(rest | {"role": _SHAREGPT_ROLES[role]} | said)
    return record | {"messages": messages}


def _calls(text: Any, at: str) -> list[Record]:
    """The calls in the text of a turn: one JSON object with `name` and `arguments`, or a list of them."""
    calls = _decoded(text)
    calls = calls if isinstance(calls, list) else [calls]
    good = calls and all(isinstance(c, dict) and isinstance(c.get("name"), str) and "arguments" in c for c in calls)
    _check(good, at, text, 'the JSON of {"name": ..., "arguments": {...}}, or of a list of such calls')
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


# How a record of each `Source.format` becomes {"messages": [...], "tools": ..., "unmask": ...}.
FORMATS: dict[str, Callable[[Record], Record]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "text": _document,
}


# The fields from which the format of a record without messages is detected.
_FIELDS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}


# The keys of a record that a format reads, besides RECORD_KEYS. `system` becomes the first message.
_READ_BY_FORMAT = {
    "messages": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
    "prompt_completion": ("prompt", "completion", "system"),
    "sharegpt": ("conversations", "system"),
    "text": ("text",),
}


def _turns(record: Record, **turns: str) -> Record:
    return record | {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def _text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key)
    value = default if value is None else value
    _check(isinstance(value, str), key, value, f"a string (the record has {_brief(list(record))})")
    return value  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------- checks
def _sample(record: Record, where: str, place: int, number: int, unread: tuple[str, ...] = ()) -> Sample:
    messages, unmask = _listed(record.get("messages")), record.get("unmask")
    tools, documents = (_listed(_decoded(record.get(k))) for k in ("tools", "documents"))
    kwargs = _decoded(record.get("chat_template_kwargs"))
    if messages is None:
        hint = ", and looks like Source.format='sharegpt'" if "conversations" in record else ""
        raise _BadRecord("no messages", f"it has no `messages` but {_brief(list(record))}{hint}")
    good = isinstance(messages, list) and messages
    _check(good, "messages", messages, "a list of at least one message")
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    if len(messages) > 1 and any(m["role"] == "pretraining" for m in messages):
        alone = "it is a whole document and must be the only message; give it a separate record"
        text = f"one of its {len(messages)} messages has the role 'pretraining', but {alone}"
        raise _BadRecord("pretraining among turns", text)
    if messages[0]["role"] != "pretraining":
        messages = _with_system(messages, record)
    _check(tools is None or _objects(tools), "tools", tools, "a list of objects (JSON schemas)")
    _check(documents is None or _objects(documents), "documents", documents, "a list of objects")
    _check(kwargs is None or isinstance(kwargs, dict), "chat_template_kwargs", kwargs, "an object")
    taken = next((k for k in kwargs or {} if k in RESERVED), None)
    if taken:
        text = f"chat_template_kwargs has {taken!r}, which every conversation sets by itself"
        raise _BadRecord("bad chat_template_kwargs", text)
    for name, value in (("tools", tools), ("documents", documents), ("chat_template_kwargs", kwargs)):
        _check_characters(value, name)
    _check(isinstance(unmask, bool | None), "unmask", unmask, "true or false")
    return Sample(messages, tools, bool(unmask), where, place, number, documents, kwargs or {}, unread)


def _with_system(messages: list[Record], record: Record) -> list[Record]:
    """The messages with the record's own `system` at their start."""
    system = _text(record, "system", "")
    if not system:
        return messages
    _check_characters(system, "system")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        text = "it has a `system` besides the system message of its `messages`, and they differ"
        raise _BadRecord("two system messages", text)
    return messages


def _decoded(value: Any) -> Any:
    """The value of a text that is JSON; any other value as it is. Some formats store lists and objects as text."""
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def _message(message: Any, at: str) -> Record:
    _check(isinstance(message, dict), at, message, "an object with `role` and `content`")
    has_null = "content" in message and message["content"] is None
    message = {k: v for k, v in message.items() if v is not None}
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            if key == "content" and has_null:
                raise _BadRecord("no content", f"{at}.content is null, which only a message with `tool_calls` may have")
            raise _BadRecord(f"no {key}", f"{at} has no `{key}` but {_brief(list(message))}")
    _check_name(message["role"], f"{at}.role", ROLES)
    message["content"] = _content(message.get("content"), f"{at}.content")
    calls = message.get("tool_calls")
    _check(calls is None or _objects(calls), f"{at}.tool_calls", calls, "a list of objects")
    message = _with_train(message, at)
    for key in REASONING:
        value = message.get(key, "")
        _check(isinstance(value, str), f"{at}.{key}", value, "a string")
    for key, value in message.items():
        _check_characters(value, f"{at}.{key}")
    return message


def _with_train(message: Record, at: str) -> Record:
    """The message with what its keys say about training, which are several formats' own, as one `train`."""
    said = {key: message[key] for key in TRAIN_KEYS if key in message}
    for key, value in said.items():
        if key == "weight":
            is_good = isinstance(value, int | float) and not isinstance(value, bool) and value in (0, 1)
            _check(is_good, f"{at}.weight", value, "0 or 1: a message is trained on or not")
        else:
            _check(isinstance(value, bool), f"{at}.{key}", value, "true or false")
    if len({bool(value) for value in said.values()}) > 1:
        raise _BadRecord("contradictory train", f"{at} has {said}, which contradict each other")
    if not said:
        return message
    rest = {key: value for key, value in message.items() if key not in said}
    return rest | {"train": bool(next(iter(said.values())))}


def _content(content: Any, at: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    _check(isinstance(content, list), at, content, "a string or a list of text parts")
    for i, part in enumerate(content):
        good = isinstance(part, dict) and part.get("type") == "text"
        good = good and isinstance(part.get("text"), str)
        _check(good, f"{at}[{i}]", part, '{"type": "text", "text": "..."}: only text is read')
    return "".join(part["text"] for part in content)


def _check(good: object, at: str, value: Any, wanted: str) -> None:
    if not good:
        field = re.sub(r"\[[0-9]+\]", "", at)
        raise _BadRecord(f"bad {field}", f"{at} is {_kind(value)}, and must be {wanted}")


def _check_name(name: Any, at: str, names: Collection[str]) -> None:
    _check(isinstance(name, str), at, name, f"one of {', '.join(names)}")
    if name not in names:
        raise _BadRecord("unknown role", f"{at}={name!r} is not known{_nearest(name, names)}")


def _check_characters(value: Any, at: str) -> None:
    """Raises for lone surrogates, which come from JSON escapes (half of an escaped pair) and are not text."""
    if value is None or isinstance(value, bool):
        return
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}, half of a character (a lone surrogate)"
        raise _BadRecord("lone surrogate", f"{at} holds {half}") from e
    except RecursionError as e:
        raise _BadRecord("nested too deep", f"{at} is nested too deep") from e
    except (TypeError, ValueError) as e:  # such as a date, bytes or NaN, which only parquet has
        raise _BadRecord("not JSON", f"{at} holds what JSON cannot: {one_line(e)}") from e


def _listed(value: Any) -> Any:
    """Turns an object of lists into a list of objects; TFDS and older data sets store lists of objects that way."""
    columns = value if isinstance(value, dict) and value else {"": 0}
    lengths = {len(c) if isinstance(c, list) else -1 for c in columns.values()}
    if len(lengths) > 1 or lengths == {-1}:
        return value
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) for v in value)


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "the boolean",
    int: "the number",
    float: "the number",
    str: "the string",
    dict: "an object",
}


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    kind = _KINDS.get(type(value), f"a {type(value).__name__}")
    return f"{kind} {_brief(value)}" if kind.startswith("the ") else kind


def _brief(value: Any) -> str:
    return reprlib.repr(value)


def _nearest(name: str, names: Collection[str]) -> str:
    """Returns the end of an error message: the name that was probably meant, or else all names."""
    return did_you_mean(name.lower(), names, f"; it is one of {', '.join(names)}")
