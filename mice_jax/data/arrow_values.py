"""Converts the rows of an Arrow table to JSON values.

Some logical types have a Python form that is not the JSON value that they stand for: a map becomes a list of pairs, and
JSON (the `Json()` columns of the datasets library, and the JSON type of Parquet) becomes its text. Types that have no
JSON value, such as timestamps, decimals and bytes, stay Python objects, which `sources` refuses by their place where a
sample uses them.
"""

import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from mice_jax.data.json_list import DECODER
from mice_jax.errors import one_line

Convert = Callable[[Any], Any]


class NotJSONError(ValueError):
    """A value that has no JSON form; the message says which."""


def json_rows(rows: pa.RecordBatch) -> Iterator[dict[str, Any] | NotJSONError]:
    """Yields the rows as JSON values without the nulls of structs, or the error of a row that cannot be converted.

    The struct of a table gives every message the keys that any message has, so its nulls mean that a key is absent.
    Nulls inside a map or a JSON value were written on purpose and stay.
    """
    convert = _struct({field.name: _converter(field.type) for field in rows.schema})
    for row in rows.to_pylist():
        try:
            yield convert(row)
        except NotJSONError as e:
            yield e


@functools.cache
def _converter(kind: pa.DataType) -> Convert:
    """The function that converts a value of a type, as `to_pylist` gives it."""
    if isinstance(kind, pa.JsonType):
        return _parsed
    if isinstance(kind, pa.UuidType):
        return _uuid_text
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if pa.types.is_map(kind):
        return _map(kind)
    if pa.types.is_struct(kind):
        return _struct({field.name: _converter(field.type) for field in kind})
    if isinstance(kind, _LISTS):
        return _list(_converter(kind.value_type))
    return _unchanged


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def _unchanged(value: Any) -> Any:
    return value


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as e:
        raise NotJSONError(f"a JSON column holds {text[:40]!r}, which is not JSON: {one_line(e)}") from e


def _uuid_text(value: uuid.UUID | None) -> str | None:
    return None if value is None else str(value)


def _map(kind: pa.MapType) -> Convert:
    is_text = pa.types.is_string(kind.key_type) or pa.types.is_large_string(kind.key_type)
    convert_key, convert = _converter(kind.key_type), _converter(kind.item_type)

    def convert_map(pairs: list[tuple[Any, Any]] | None) -> dict[str, Any] | None:
        if pairs is None:
            return None
        keys = [convert_key(key) for key, _ in pairs]
        if not (is_text or all(isinstance(key, str) for key in keys)):
            raise NotJSONError(f"a map has keys of type {kind.key_type}, and those of a JSON object are strings")
        if len(set(keys)) < len(keys):
            raise NotJSONError(f"a map has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return {key: convert(value) for key, (_, value) in zip(keys, pairs, strict=True)}

    return convert_map


def _struct(fields: dict[str, Convert]) -> Convert:
    def convert_struct(value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else {k: fields[k](v) for k, v in value.items() if v is not None}

    return convert_struct


def _list(convert: Convert) -> Convert:
    if convert is _unchanged:
        return _unchanged

    def convert_list(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [convert(v) for v in values]

    return convert_list
