"""Every kind of Arrow column, as the JSON value that it stands for or as a refusal with its place."""

import datetime
import decimal
import json
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.runs import read_samples
from mice_jax.data.arrow_values import NotJSONError, json_rows
from mice_jax.data.readers import open_source
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke

CALL = {"city": "Rome", "days": 2}
PAIRS = [("city", "Rome"), ("days", "2")]
UUID = uuid.UUID(int=7)
TEXT_MAP = pa.map_(pa.string(), pa.string())


def converted(values: list[Any], kind: pa.DataType) -> list[Any]:
    """The values of one column of a type, each as `json_rows` gives it or as its error."""
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    array = pa.array(values, storage)
    if isinstance(kind, pa.BaseExtensionType):
        array = pa.ExtensionArray.from_storage(kind, array)
    rows = json_rows(pa.record_batch([array], ["a"]))
    return [row if isinstance(row, NotJSONError) else row.get("a") for row in rows]


JSON_VALUES: dict[str, tuple[pa.DataType, Any, Any]] = {
    "json": (pa.json_(), json.dumps(CALL), CALL),
    "json of a text": (pa.json_(), '"Rome"', "Rome"),
    "json with a null": (pa.json_(), '{"a": null, "b": [null]}', {"a": None, "b": [None]}),
    "map": (TEXT_MAP, PAIRS, {"city": "Rome", "days": "2"}),
    "map with a null": (TEXT_MAP, [("a", None)], {"a": None}),
    "map of maps": (pa.map_(pa.string(), TEXT_MAP), [("a", PAIRS)], {"a": {"city": "Rome", "days": "2"}}),
    "map without entries": (TEXT_MAP, [], {}),
    "struct of a map": (pa.struct([("m", TEXT_MAP), ("n", pa.int8())]), {"m": PAIRS, "n": None}, {"m": dict(PAIRS)}),
    "list of maps": (pa.list_(TEXT_MAP), [PAIRS, None], [dict(PAIRS), None]),
    "large list of structs": (pa.large_list(pa.struct([("n", pa.int8())])), [{"n": None}, {"n": 1}], [{}, {"n": 1}]),
    "fixed list of maps": (pa.list_(TEXT_MAP, 1), [PAIRS], [dict(PAIRS)]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), "Rome", "Rome"),
    "uuid": (pa.uuid(), UUID.bytes, str(UUID)),
    "large text": (pa.large_string(), "Rome", "Rome"),
    "number": (pa.float32(), 0.5, 0.5),
    "boolean": (pa.bool_(), True, True),
}


@pytest.mark.parametrize("name", JSON_VALUES)
def test_column_is_the_json_value_that_it_stands_for(name: str) -> None:
    kind, given, wanted = JSON_VALUES[name]
    assert converted([given, None], kind) == [wanted, None]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (pa.map_(pa.int32(), pa.string()), [(1, "Rome")], "keys of type int32"),
        (TEXT_MAP, [("a", "1"), ("a", "2")], "the key 'a' twice"),
        (pa.json_(), "{", "which is not JSON"),
        (pa.json_(), "NaN", "NaN is not a JSON value"),
    ],
)
def test_value_that_json_cannot_hold_spoils_its_row_alone(kind: pa.DataType, value: Any, words: str) -> None:
    error, nothing = converted([value, None], kind)
    assert isinstance(error, NotJSONError) and words in str(error) and nothing is None


# ---------------------------------------------------------------------------------------- samples
def write(path: Path, arguments: Any, kind: pa.DataType) -> Path:
    """A file with one sample whose call has these arguments, of this type."""
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    column = pa.array([arguments], storage)
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.ExtensionArray.from_storage(kind, column)
    function = pa.StructArray.from_arrays([pa.array(["weather"]), column], ["name", "arguments"])
    calls = pa.ListArray.from_arrays([0, 0, 1], pa.StructArray.from_arrays([function], ["function"]))
    columns = [pa.array(["user", "assistant"]), pa.array(["Weather?", ""]), calls]
    turns = pa.StructArray.from_arrays(columns, ["role", "content", "tool_calls"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2], turns)}), path)
    return path


def arguments_of(path: str) -> Any:
    (sample,) = read_samples(open_source(path))
    return sample.messages[1]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(("given", "kind"), [(json.dumps(CALL), pa.json_()), ([*CALL.items()], None)])
def test_arguments_of_a_call_are_an_object(given: Any, kind: pa.DataType | None, tmp_path: Path) -> None:
    wanted = CALL if kind else {"city": "Rome", "days": "2"}
    path = write(tmp_path / "a.parquet", given if kind else PAIRS, kind or TEXT_MAP)
    assert arguments_of(str(path)) == arguments_of(str(tmp_path)) == wanted  # the file, and its folder


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (decimal.Decimal("1.5"), pa.decimal128(4, 2)),
        (datetime.datetime(2026, 1, 2), pa.timestamp("us")),
        (datetime.date(2026, 1, 2), pa.date32()),
        (datetime.timedelta(1), pa.duration("s")),
        (b"Rome", pa.binary()),
        (float("nan"), pa.float64()),
    ],
)
def test_arguments_that_json_cannot_hold_are_refused_by_place(value: Any, kind: pa.DataType, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", value, kind)
    with pytest.raises(UserError, match=r"a\.parquet row 1: messages\[1\]\.tool_calls holds what JSON cannot"):
        arguments_of(str(path))


def test_row_that_cannot_be_converted_is_a_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [("a", "1"), ("a", "2")], TEXT_MAP)
    with pytest.raises(UserError, match=r"a\.parquet row 1: a map has the key 'a' twice.*data\.skip_bad"):
        arguments_of(str(path))
    skipped: Counter[str] = Counter()
    assert list(read_samples(open_source(str(path)), skip_bad=skipped)) == [] and skipped == {"not JSON": 1}


def test_json_columns_of_the_datasets_library_are_values_on_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    text, value = datasets.Value("string"), datasets.Json()
    turn = {
        "role": text,
        "content": text,
        "tool_calls": datasets.List({"function": {"name": text, "arguments": value}}),
    }
    call = {"function": {"name": "weather", "arguments": CALL}}
    messages = [
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    for name, of in (("arguments", turn), ("messages", value)):
        folder = tmp_path / name
        features = datasets.Features({"messages": datasets.List(of)})
        data = datasets.Dataset.from_list([{"messages": messages}], features=features)
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
        for path in (f"hf:{folder}:train", str(folder), f"{folder}/train.parquet"):
            (sample,) = read_samples(open_source(path))
            wanted = [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            assert sample.messages == wanted, path
