"""Reads chat data: files of several kinds, in several formats, into checked samples.

A file yields raw records, each with the place it came from ("a.jsonl line 12"); a format turns a
record into `{"messages": [...]}`; one check covers them all. A record that fails stops the run with
its place and the mend, or is counted by reason where the user asked to skip bad ones.
"""

import codecs
import difflib
import glob
import io
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from mice_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "pretraining")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names templates know it by

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One conversation or document; a `content` is a string, or None beside `tool_calls`."""

    messages: list[Record]
    tools: list[Record] | None
    unmask: bool
    where: str


class _Bad(Exception):
    """A record that cannot be used: a short reason to count by, and a sentence for the user."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def files_of(path: str) -> list[Path]:
    """The files that `path` (a file, a folder or a glob) stands for, sorted."""
    there = Path(os.path.expanduser(path))
    if there.is_dir():
        found = [p for p in there.iterdir() if p.is_file() and p.name.endswith(tuple(READERS))]
    elif there.is_file():  # also a name with glob characters in it
        found = [there]
    else:
        found = [Path(p) for p in glob.glob(str(there), recursive=True) if os.path.isfile(p)]
    if not found:
        raise UserError(
            f"the source {path!r} names no file: it is neither a file, nor a folder of "
            f"{', '.join(READERS)} files, nor a glob that matches one from {os.getcwd()}. "
            "Mend Source.path."
        )
    return sorted(found)


def read_samples(
    files: Sequence[Path], format: str = "messages", skip_bad: Counter[str] | None = None
) -> Iterator[Sample]:
    """Every sample, in order; a bad record raises, or is counted in `skip_bad` where given."""
    if format not in FORMATS:
        raise UserError(f"Source.format={format!r} is not known{_nearest(format, FORMATS)}.")
    convert = FORMATS[format]
    for path in files:
        for where, raw in _reader(path)(path):
            try:
                yield _sample(convert(_record(raw)), where)
            except _Bad as bad:
                if skip_bad is None:
                    raise UserError(
                        f"{where}: {bad}. Mend it, or set data.skip_bad=True to leave such records out and count them."
                    ) from bad
                skip_bad[bad.reason] += 1


# ---------------------------------------------------------------------------------------- files
def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines as bytes, so that one bad byte costs one line and has a line number."""
    number = 0
    try:
        # Pyarrow unpacks by the file's suffix, but has no readline of its own.
        with pa.input_stream(str(path), compression="detect") as raw:
            for number, line in enumerate(io.BufferedReader(raw), 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                line = line.strip()
                if line:
                    yield f"{path} line {number}", line
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read past line {number}: {_one_line(e)}.") from e


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
        items = _DECODER.decode(text)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"{path} is not one JSON document: {_one_line(e)}. Mend it; if each line is an object, name it .jsonl."
        ) from e
    if not isinstance(items, list):
        raise UserError(f"{path} holds {_kind(items)}, and must hold a list of objects.")
    for number, item in enumerate(items, 1):
        yield f"{path} item {number}", item


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _sparse(row)
    except (OSError, ValueError, pa.ArrowException) as e:  # ValueError: text that is not UTF-8
        raise UserError(f"{path} cannot be read past row {number}: {_one_line(e)}.") from e


def _sparse(value: Any) -> Any:
    """Without nulls: a parquet struct gives every message the keys that any message has."""
    if isinstance(value, dict):
        return {k: _sparse(v) for k, v in value.items() if v is not None}
    return [_sparse(v) for v in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".jsonl.zst": _lines,
    ".json": _list,
    ".parquet": _rows,
}


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise UserError(f"{path} is of no kind that is read: a name must end in {', '.join(READERS)}.")


# ---------------------------------------------------------------------------------------- records
def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _record(raw: Any) -> Record:
    """The object that a line holds (other kinds of file give it parsed already)."""
    if isinstance(raw, bytes):
        try:
            raw = _DECODER.decode(raw.decode())
        except UnicodeDecodeError as e:
            byte = f"byte {e.start + 1} (0x{raw[e.start]:02x})"
            raise _Bad("not UTF-8", f"{byte} is not UTF-8 ({e.reason})") from e
        except RecursionError as e:
            raise _Bad("nested too deep", "its JSON is nested too deep") from e
        except json.JSONDecodeError as e:
            raise _Bad("not JSON", f"it is not JSON: {e.msg} at column {e.colno}") from e
        except ValueError as e:  # NaN, an integer of thousands of digits
            raise _Bad("not JSON", f"it is not JSON: {_one_line(e)}") from e
    if not isinstance(raw, dict):
        raise _Bad("not an object", f"it is {_kind(raw)}, and must be an object")
    return raw


def _messages(record: Record) -> Record:
    return record


def _prompt_completion(record: Record) -> Record:
    return _turns(record, user=_text(record, "prompt"), assistant=_text(record, "completion"))


def _document(record: Record) -> Record:
    return _turns(record, pretraining=_text(record, "text"))


def _alpaca(record: Record) -> Record:
    asked = [_text(record, "instruction"), _text(record, "input", "")]
    system = _text(record, "system", "")
    turns = {"user": "\n\n".join(p for p in asked if p), "assistant": _text(record, "output")}
    return _turns(record, **({"system": system} if system else {}), **turns)


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def _sharegpt(record: Record) -> Record:
    turns, system = record.get("conversations"), _text(record, "system", "")
    _check(isinstance(turns, list), "conversations", turns, "a list of turns")
    messages = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns or []):
        at = f"conversations[{i}]"
        _check(isinstance(turn, dict), at, turn, "an object with `from` and `value`")
        role = turn.get("from")
        _check_name(role, f"{at}.from", _SHAREGPT_ROLES)
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        messages.append(rest | {"role": _SHAREGPT_ROLES[role], "content": turn.get("value")})
    return record | {"messages": messages}


# How a record of each `Source.format` becomes {"messages": [...], "tools": ..., "unmask": ...}.
FORMATS: dict[str, Callable[[Record], Record]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "text": _document,
}


def _turns(record: Record, **turns: str) -> Record:
    return record | {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def _text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key)
    value = default if value is None else value
    _check(isinstance(value, str), key, value, f"a string (the record has {_brief(list(record))})")
    return value  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------- checks
def _sample(record: Record, where: str) -> Sample:
    messages, tools, unmask = (record.get(k) for k in ("messages", "tools", "unmask"))
    if messages is None:
        hint = ", and looks like Source.format='sharegpt'" if "conversations" in record else ""
        raise _Bad("no messages", f"it has no `messages` but {_brief(list(record))}{hint}")
    good = isinstance(messages, list) and messages
    _check(good, "messages", messages, "a list of at least one message")
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    if len(messages) > 1 and any(m["role"] == "pretraining" for m in messages):
        alone = "is a whole document and must be the only one; give it a record of its own"
        text = f"a message of role 'pretraining' stands among {len(messages)} messages, but {alone}"
        raise _Bad("pretraining among turns", text)
    _check(tools is None or _objects(tools), "tools", tools, "a list of objects (JSON schemas)")
    _check_characters(tools, "tools")
    _check(isinstance(unmask, bool | None), "unmask", unmask, "true or false")
    return Sample(messages, tools, bool(unmask), where)


def _message(message: Any, at: str) -> Record:
    _check(isinstance(message, dict), at, message, "an object with `role` and `content`")
    message = {k: v for k, v in message.items() if v is not None}
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            hint = " (null is for messages with `tool_calls`)" if key == "content" else ""
            raise _Bad(f"no {key}", f"{at} has no `{key}` but {_brief(list(message))}{hint}")
    _check_name(message["role"], f"{at}.role", ROLES)
    message["content"] = _content(message.get("content"), f"{at}.content")
    calls, train = message.get("tool_calls"), message.get("train")
    _check(calls is None or _objects(calls), f"{at}.tool_calls", calls, "a list of objects")
    _check(isinstance(train, bool | None), f"{at}.train", train, "true or false")
    for key in REASONING:
        value = message.get(key, "")
        _check(isinstance(value, str), f"{at}.{key}", value, "a string")
    for key, value in message.items():
        _check_characters(value, f"{at}.{key}")
    return message


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
        raise _Bad(f"bad {field}", f"{at} is {_kind(value)}, and must be {wanted}")


def _check_name(name: Any, at: str, names: Collection[str]) -> None:
    _check(isinstance(name, str), at, name, f"one of {', '.join(names)}")
    if name not in names:
        raise _Bad("unknown role", f"{at}={name!r} is not known{_nearest(name, names)}")


def _check_characters(value: Any, at: str) -> None:
    """Lone surrogates come out of JSON escapes (half of "\\ud83d\\ude00"), and are no text."""
    if value is None or isinstance(value, bool):
        return
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}, half of a character (a lone surrogate)"
        raise _Bad("lone surrogate", f"{at} holds {half}") from e
    except RecursionError as e:
        raise _Bad("nested too deep", f"{at} is nested too deep") from e
    except TypeError as e:  # a date, bytes: only parquet has them
        raise _Bad("not JSON", f"{at} holds what JSON cannot: {_one_line(e)}") from e


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _nearest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; it is one of {', '.join(names)}"
