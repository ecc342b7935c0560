"""Every kind of file and format, and every way in which a line can be bad, with its file and line."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mice_jax.data.sources import FORMATS, Sample, files_of, read_samples
from mice_jax.errors import UserError

HELLO = [{"role": "user", "content": "Hello 🤖"}, {"role": "assistant", "content": "Red"}]
GOOD = {"messages": HELLO}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def read(path: Path, data: bytes | None = None, **options: Any) -> list[Sample]:
    if data is not None:
        path.write_bytes(data)
    return list(read_samples([path], **options))


def with_message(**keys: Any) -> dict[str, Any]:
    return {"messages": [HELLO[0], {"role": "assistant", "content": "Red", **keys}]}


# ---------------------------------------------------------------------------------------- files
def test_lines_are_read_in_order_and_blank_ones_are_nothing(tmp_path: Path) -> None:
    data = lines(GOOD) + b"\n  \r\n" + lines({**GOOD, "unmask": True, "tools": [{"name": "add"}]})
    first, second = read(tmp_path / "a.jsonl", data)
    assert (first.messages, first.tools, first.unmask) == (HELLO, None, False)
    assert (second.tools, second.unmask) == ([{"name": "add"}], True)
    assert (first.where, second.where) == (f"{tmp_path}/a.jsonl line 1", f"{tmp_path}/a.jsonl line 4")


def test_a_last_line_without_newline_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    assert len(read(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(GOOD, GOOD).rstrip())) == 2
    assert len(read(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())) == 1


def test_packed_files_are_read_as_plain_ones(tmp_path: Path) -> None:
    data = lines(GOOD, GOOD)
    plain = [s.messages for s in read(tmp_path / "a.jsonl", data)]
    two_members = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    assert [s.messages for s in read(tmp_path / "a.jsonl.gz", two_members)] == plain
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as out:
        out.write(data)
    assert [s.messages for s in read(tmp_path / "a.jsonl.zst")] == plain


def test_a_json_file_is_a_list_of_records(tmp_path: Path) -> None:
    (sample,) = read(tmp_path / "a.json", json.dumps([GOOD], indent=1).encode())
    assert (sample.messages, sample.where) == (HELLO, f"{tmp_path}/a.json item 1")
    with pytest.raises(UserError, match=r"a\.json holds an object"):
        read(tmp_path / "a.json", json.dumps(GOOD).encode())
    with pytest.raises(UserError, match=r"a\.json is not one JSON document.*line 2.*name it \.jsonl"):
        read(tmp_path / "a.json", lines(GOOD, GOOD))
    with pytest.raises(UserError, match=r"a\.json item 2: it is the number 3"):
        read(tmp_path / "a.json", json.dumps([GOOD, 3]).encode())


def test_parquet_rows_are_read_without_the_nulls_that_its_structs_add(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "train": True}
    rows = [{**GOOD, "tools": [{"name": "add"}], "unmask": True}, {"messages": [HELLO[0], called]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert (first.messages, first.tools, first.unmask) == (HELLO, [{"name": "add"}], True)
    assert (second.messages, second.tools, second.unmask) == ([HELLO[0], called], None, False)
    assert second.where == f"{tmp_path}/a.parquet row 2"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_of_its_kind_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} cannot be read past"):
        read(tmp_path / name, lines(GOOD))


def test_a_packed_file_cut_short_is_named_even_where_bad_lines_are_skipped(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(lines({"messages": [{**HELLO[0], "n": i}]}) for i in range(9999)))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read past line [0-9]{3,}"):
        read(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2], skip_bad=Counter())


def test_files_are_found_by_name_glob_and_folder_in_order(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c[1].jsonl", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.jsonl").mkdir()
    found = [p.name for p in files_of(f"{tmp_path}/*.jsonl")]
    assert found == ["a.jsonl", "b.jsonl", "c[1].jsonl"] == [p.name for p in files_of(str(tmp_path))]
    assert [p.name for p in files_of(f"{tmp_path}/c[1].jsonl")] == ["c[1].jsonl"]
    for nothing in ("nowhere.jsonl", "*.parquet", "d.jsonl"):
        with pytest.raises(UserError, match="names no file"):
            files_of(f"{tmp_path}/{nothing}")
    with pytest.raises(UserError, match=r"notes\.txt is of no kind"):
        read(tmp_path / "notes.txt")


# ---------------------------------------------------------------------------------------- bad lines
BAD: dict[str, tuple[bytes, str, str]] = {
    "a byte that is no text": (b'{"messages": "\xff"}', "not UTF-8", r"byte 15 \(0xff\) is not UTF-8"),
    "a line cut short": (b'{"messages": [', "not JSON", r"not JSON: .*column 15"),
    "no number": (b'{"messages": NaN}', "not JSON", "NaN"),
    "too many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON", "not JSON"),
    "too deep": (b"[" * 100_000, "nested too deep", "nested too deep"),
    "a list": (b"[1]", "not an object", "is a list, and must be an object"),
    "a string": (b'"hi"', "not an object", "is the string 'hi', and must be an object"),
}
BAD_RECORDS: dict[str, tuple[Any, str, str]] = {
    "other fields": ({"text": "hi"}, "no messages", r"no `messages` but \['text'\]"),
    "sharegpt": ({"conversations": []}, "no messages", "looks like Source.format='sharegpt'"),
    "no list": ({"messages": "hi"}, "bad messages", "messages is the string 'hi'"),
    "empty": ({"messages": []}, "bad messages", "messages is an empty list"),
    "no object": ({"messages": [*HELLO, "hi"]}, "bad messages", r"messages\[2\] is the string 'hi'"),
    "no role": ({"messages": [{"content": "hi"}]}, "no role", r"messages\[0\] has no `role`"),
    "misspelt role": (with_message(role="asistant"), "unknown role", "did you mean 'assistant'"),
    "capital role": (with_message(role="User"), "unknown role", "did you mean 'user'"),
    "strange role": (with_message(role="xyz"), "unknown role", "one of system, user, assistant"),
    "role no string": (with_message(role=3), "bad messages.role", r"messages\[1\].role is the number 3"),
    "no content": ({"messages": [{"role": "user"}]}, "no content", r"messages\[0\] has no `content`"),
    "null content": (with_message(content=None), "no content", "null is for messages with `tool_calls`"),
    "null beside no call": (with_message(content=None, tool_calls=[]), "no content", "null is for"),
    "content a number": (with_message(content=3), "bad messages.content", "content is the number 3"),
    "content an object": (with_message(content={}), "bad messages.content", "content is an object"),
    "an image": (
        with_message(content=[{"type": "image", "url": "x"}]),
        "bad messages.content",
        r"messages\[1\].content\[0\] is an object.*only text",
    ),
    "part no string": (
        with_message(content=[{"type": "text", "text": 1}]),
        "bad messages.content",
        "only text",
    ),
    "train a string": (with_message(train="yes"), "bad messages.train", "train is the string 'yes'"),
    "train a number": (with_message(train=1), "bad messages.train", "train is the number 1"),
    "calls": (with_message(tool_calls="f()"), "bad messages.tool_calls", "must be a list of objects"),
    "reasoning": (with_message(reasoning_content=[1]), "bad messages.reasoning_content", "a string"),
    "unmask": ({**GOOD, "unmask": "yes"}, "bad unmask", "unmask is the string 'yes'"),
    "tools": ({**GOOD, "tools": ["add"]}, "bad tools", "tools is a list, and must be a list of objects"),
    "pretraining": (
        {"messages": [{"role": "pretraining", "content": "a"}, *HELLO]},
        "pretraining among turns",
        "record of its own",
    ),
}
BAD |= {k: (lines(r).rstrip(), reason, text) for k, (r, reason, text) in BAD_RECORDS.items()}
for key in ("content", "name", "tool_calls"):
    half = {"content": "🤖", "name": "🤖", "tool_calls": [{"name": "🤖"}]}[key]
    first, _, second = json.dumps(with_message(**{key: half})).rpartition("\\udd16")
    data = (first + second).encode()
    words = rf"messages\[1\]\.{key} holds .ud83e, half of a character"
    BAD[f"half a character in {key}"] = (data, "lone surrogate", words)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_with_its_file_and_number_or_skipped_and_counted(case: str, tmp_path: Path) -> None:
    line, reason, words = BAD[case]
    data = lines(GOOD) + b"\n" + line + b"\n" + lines(GOOD)
    with pytest.raises(UserError, match=rf"a\.jsonl line 3: .*({words}).*data\.skip_bad"):
        read(tmp_path / "a.jsonl", data)
    skipped: Counter[str] = Counter()
    good = read(tmp_path / "a.jsonl", data, skip_bad=skipped)
    assert [s.messages for s in good] == [HELLO, HELLO]
    assert skipped == {reason: 1}


def test_a_very_long_line_is_read(tmp_path: Path) -> None:
    (sample,) = read(tmp_path / "a.jsonl", lines(with_message(content="long " * 2_000_000)))
    assert len(sample.messages[1]["content"]) == 10_000_000


def test_what_the_template_may_use_is_passed_through(tmp_path: Path) -> None:
    extra = {"name": "Ann", "train": False, "reasoning_content": "Hm.", "weight": None}
    (sample,) = read(tmp_path / "a.jsonl", lines(with_message(**extra)))
    wanted = {k: v for k, v in extra.items() if v is not None}
    assert sample.messages[1] == {"role": "assistant", "content": "Red", **wanted}


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Red "}, {"type": "text", "text": "blue"}]
    (sample,) = read(tmp_path / "a.jsonl", lines(with_message(content=parts)))
    assert sample.messages[1]["content"] == "Red blue"


# ---------------------------------------------------------------------------------------- formats
FORMATTED: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": (GOOD, [("user", "Hello 🤖"), ("assistant", "Red")]),
    "prompt_completion": ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    "text": ({"text": "a b"}, [("pretraining", "a b")]),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "text": "not read"},
        [("user", "Add.\n\n1 1"), ("assistant", "2")],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "tool", "value": "c"},
            ]
        },
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c")],
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_becomes_messages(format: str, tmp_path: Path) -> None:
    record, turns = FORMATTED[format]
    (sample,) = read(tmp_path / "a.jsonl", lines({**record, "unmask": True}), format=format)
    assert [(m["role"], m["content"]) for m in sample.messages] == turns
    assert sample.unmask


def test_alpaca_leaves_out_an_empty_input_and_keeps_a_system_message(tmp_path: Path) -> None:
    record = {"system": "Be kind.", "instruction": "Add.", "input": "", "output": "2"}
    (sample,) = read(tmp_path / "a.jsonl", lines(record), format="alpaca")
    turns = [(m["role"], m["content"]) for m in sample.messages]
    assert turns == [("system", "Be kind."), ("user", "Add."), ("assistant", "2")]


@pytest.mark.parametrize(
    ("format", "record", "words"),
    [
        ("alpaca", {"instruction": "a"}, r"output is null, and must be a string \(the record has \['ins"),
        ("text", {"text": 3}, "text is the number 3"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "prompt is a list"),
        ("sharegpt", {"messages": []}, "conversations is null"),
        ("sharegpt", {"conversations": ["hi"]}, r"conversations\[0\] is the string 'hi'"),
        ("sharegpt", {"conversations": [{"from": "humn"}]}, "did you mean 'human'"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"messages\[0\] has no `content`"),
    ],
)
def test_a_record_of_another_format_is_named(format: str, record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl line 1: .*{words}"):
        read(tmp_path / "a.jsonl", lines(record), format=format)


def test_an_unknown_format_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Source\.format='alpacca'.*did you mean 'alpaca'"):
        read(tmp_path / "a.jsonl", lines(GOOD), format="alpacca")
    with pytest.raises(UserError, match=r"one of messages, alpaca, prompt_completion, sharegpt, text"):
        read(tmp_path / "a.jsonl", lines(GOOD), format="zzz")
