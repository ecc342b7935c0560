"""Every format, and every way in which a record can be bad, with its file and line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import read_samples
from mice_jax.data.readers import FileReader
from mice_jax.data.sources import FORMATS, Sample, find_format
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke

HELLO = [{"role": "user", "content": "Hello 🤖"}, {"role": "assistant", "content": "Red"}]
GOOD = {"messages": HELLO}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def read(path: Path, data: bytes | None = None, **options: Any) -> list[Sample]:
    if data is not None:
        path.write_bytes(data)
    return list(read_samples(FileReader([path]), **options))


def with_message(**keys: Any) -> dict[str, Any]:
    return {"messages": [HELLO[0], {"role": "assistant", "content": "Red", **keys}]}


# ---------------------------------------------------------------------------------------- bad lines
BAD: dict[str, tuple[bytes, str, str]] = {
    "a byte that is no text": (b'{"messages": "\xff"}', "not UTF-8", r"byte 15 \(0xff\) is not UTF-8"),
    "a line of UTF-16": (b"\xff\xfe{\x00}\x00", "not UTF-8", "UTF-16; convert the file"),
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
    "null content": (with_message(content=None), "no content", r"content is null, which only"),
    "null beside no call": (with_message(content=None, tool_calls=[]), "no content", "content is null, which only"),
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
    "tools a text": ({**GOOD, "tools": "add"}, "bad tools", "tools is the string 'add', and must be a list of objects"),
    "weight": (with_message(weight=0.5), "bad messages.weight", "weight is the number 0.5, and must be 0 or 1"),
    "weight a boolean": (with_message(weight=True), "bad messages.weight", "weight is the boolean True"),
    "loss": (with_message(loss=1), "bad messages.loss", "loss is the number 1, and must be true or false"),
    "contradiction": (with_message(train=True, weight=0), "contradictory train", "contradict each other"),
    "documents": ({**GOOD, "documents": ["a"]}, "bad documents", "documents is a list, and must be a list of objects"),
    "kwargs": ({**GOOD, "chat_template_kwargs": 3}, "bad chat_template_kwargs", "is the number 3"),
    "kwargs reserved": (
        {**GOOD, "chat_template_kwargs": {"messages": []}},
        "bad chat_template_kwargs",
        "has 'messages', which every conversation sets by itself",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, *HELLO], "system": "b"},
        "two system messages",
        "they differ",
    ),
    "pretraining": (
        {"messages": [{"role": "pretraining", "content": "a"}, *HELLO]},
        "pretraining among turns",
        "separate record",
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
def test_bad_line_is_named_or_skipped_and_counted(case: str, tmp_path: Path) -> None:
    line, reason, words = BAD[case]
    data = lines(GOOD) + b"\n" + line + b"\n" + lines(GOOD)
    with pytest.raises(UserError, match=rf"a\.jsonl line 3: .*({words}).*data\.skip_bad"):
        read(tmp_path / "a.jsonl", data)
    skipped: Counter[str] = Counter()
    good = read(tmp_path / "a.jsonl", data, skip_bad=skipped)
    assert [s.messages for s in good] == [HELLO, HELLO]
    assert skipped == {reason: 1}


def test_very_long_line_is_read(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize(
    ("keys", "train"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"loss": False}, False),
        ({"loss": True, "train": True, "weight": 1}, True),
        ({"weight": None, "loss": None}, None),
    ],
)
def test_weight_and_loss_of_a_message_mean_train(keys: dict[str, Any], train: bool | None, tmp_path: Path) -> None:
    (sample,) = read(tmp_path / "a.jsonl", lines(with_message(**keys)))
    wanted = {"role": "assistant", "content": "Red"} | ({} if train is None else {"train": train})
    assert sample.messages[1] == wanted


def test_keys_of_a_record_that_nothing_reads_are_listed(tmp_path: Path) -> None:
    records = {
        "messages": {**GOOD, "id": 7, "prompt": "b", "system": None, "tools": [], "comment": None},
        "alpaca": {"instruction": "a", "input": "", "output": "c", "text": "d"},
        "text": {"text": "a", "system": "s"},
    }
    unread = {"messages": ("id", "prompt"), "alpaca": ("text",), "text": ("system",)}
    for format, record in records.items():
        (sample,) = read(tmp_path / "a.jsonl", lines(record), format=format)
        assert sample.unread == unread[format], format


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


def test_prompt_and_completion_of_messages_trains_on_the_completion_alone(tmp_path: Path) -> None:
    shot = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    record = {"prompt": shot, "completion": [{"role": "assistant", "content": "4"}]}
    (sample,) = read(tmp_path / "a.jsonl", lines(record), format="prompt_completion")
    assert [(m["content"], m.get("train")) for m in sample.messages] == [*((c, False) for c in "123"), ("4", None)]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_sharegpt_call_is_an_assistant_turn_and_its_result_a_tool_turn(tmp_path: Path) -> None:
    call = json.dumps(CALL["function"])
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "three"},
    ]
    record = {"conversations": turns, "tools": '[{"name": "f"}]', "system": "Be kind."}
    (sample,) = read(tmp_path / "a.jsonl", lines(record), format="sharegpt")
    assert sample.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    assert sample.tools == [{"name": "f"}] and sample.unread == ()
    turns[1]["value"] = f"[{call}, {call}]"
    (sample,) = read(tmp_path / "a.jsonl", lines(record), format="sharegpt")
    assert sample.messages[2]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize("value", ["f()", "[]", '{"arguments": {}}', '{"name": "f"}', None, "3"])
def test_sharegpt_call_that_is_none_is_named(value: Any, tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": value}]}
    with pytest.raises(UserError, match=r"line 1: conversations\[1\]\.value is .* must be the JSON of"):
        read(tmp_path / "a.jsonl", lines(record), format="sharegpt")


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_turns_are_read_by_their_keys_whatever_they_are_called(format: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello 🤖"}, {"from": "gpt", "value": "Red"}]
    for record in ({"conversations": HELLO}, {"conversations": turns} if format == "sharegpt" else {"messages": turns}):
        (sample,) = read(tmp_path / "a.jsonl", lines(record), format=format)
        assert sample.messages == HELLO


def test_messages_kept_as_lists_of_fields_are_put_together(tmp_path: Path) -> None:
    columns = {k: [m[k] for m in HELLO] for k in ("role", "content")}
    (sample,) = read(tmp_path / "a.jsonl", lines({"messages": columns}))
    assert sample.messages == HELLO
    with pytest.raises(UserError, match="messages is an object, and must be a list"):
        read(tmp_path / "a.jsonl", lines({"messages": {"role": ["user"], "content": []}}))


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
def test_record_of_another_format_is_named(format: str, record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl line 1: .*{words}"):
        read(tmp_path / "a.jsonl", lines(record), format=format)


# ---------------------------------------------------------------------------------------- which format
def found(folder: Path, format: str, *records: Any) -> tuple[str, str]:
    (folder / "a.jsonl").write_bytes(lines(*records))
    return find_format("a.jsonl", FileReader([folder / "a.jsonl"]), format)


def test_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Source\.format='alpacca'.*did you mean 'alpaca'"):
        found(tmp_path, "alpacca", GOOD)
    with pytest.raises(UserError, match=r"one of messages, alpaca, prompt_completion, sharegpt, text"):
        found(tmp_path, "zzz", GOOD)


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "messages"])
def test_format_is_detected_from_the_first_record_and_reported(format: str, tmp_path: Path) -> None:
    record, _ = FORMATTED[format]
    record = {k: v for k, v in record.items() if k != "text" or format == "text"}
    taken, said = found(tmp_path, "messages", 3, {**record, "unmask": True})  # the first *object*
    assert taken == format and f"read as {format}: its first record has `" in said and "no `messages`" in said
    assert found(tmp_path, format, record) == (format, "")


def test_conversations_of_messages_are_read_as_messages_and_reported(tmp_path: Path) -> None:
    taken, said = found(tmp_path, "messages", {"conversations": HELLO})
    assert taken == "messages" and "the `conversations` of its first record are messages" in said
    assert read(tmp_path / "a.jsonl", lines({"conversations": HELLO}))[0].messages == HELLO


def test_format_is_never_guessed(tmp_path: Path) -> None:
    assert found(tmp_path, "messages", {**GOOD, "text": "a", "prompt": "b", "completion": "c"}) == ("messages", "")
    assert found(tmp_path, "messages", {"question": "a", "answer": "b"}) == ("messages", "")
    assert found(tmp_path, "messages") == ("messages", "")
    assert found(tmp_path, "text", GOOD) == ("text", "")  # asked for: its records will say what is wrong
    with pytest.raises(UserError, match=r"could be read as prompt_completion or as text.*format='prompt_completion'"):
        found(tmp_path, "messages", {"prompt": "a", "completion": "b", "text": "ab"})
