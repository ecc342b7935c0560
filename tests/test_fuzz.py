"""Damaged chat files: the right samples or one sentence with file and line, never a traceback, never a hang.

What a good line holds is known, so the check does not ask the reader itself: every line that was left as it was must
come out as it was, in order, and every other one must come out or be counted.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.runs import chat, make_tokenizer, read_samples, run_prepare, setting
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import FileReader
from mice_jax.data.sources import Sample
from mice_jax.errors import UserError

RECORDS: list[dict[str, Any]] = [
    chat("who?", "mice"),
    chat("hé 🤖", "naïve\n\\ \u2028 \"quoted\"", unmask=True),
    {"messages": [{"role": "pretraining", "content": "red barn"}]},
    chat("add 1", "2", tools=[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]),
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant", "content": "b", "train": False, "reasoning_content": "c"}]},
]  # fmt: skip
LINES = [json.dumps(r, ensure_ascii=i % 2 == 0).encode() for i, r in enumerate(RECORDS)]
ENCODER = ChatEncoder(make_tokenizer())

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["messages", "tools", "unmask", "role", "content", "train", "tool_calls", "reasoning_content", "text"]


@st.composite
def damaged(draw: Any) -> bytes:
    """A file of good lines, some of its bytes changed, cut out or doubled."""
    data = bytearray(b"\n".join(draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=6))) + b"\n")
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        end = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["flip", "cut", "double", "insert"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:end]
            case "double":
                data[at:at] = data[at:end]
            case "insert":
                data[at:at] = draw(st.binary(max_size=6) | st.sampled_from([b"\\ud83d", b"[" * 3000, b"NaN", b"1e999"]))
    return bytes(data)


@st.composite
def mistyped(draw: Any) -> bytes:
    """Good JSON whose values are of any type, in any place."""

    def spoil(value: Any) -> Any:
        if draw(st.integers(0, 5)) == 0:
            return draw(JSON | st.sampled_from(KEYS))
        if isinstance(value, dict):
            return {
                draw(st.sampled_from(KEYS)) if draw(st.integers(0, 9)) == 0 else k: spoil(v) for k, v in value.items()
            }
        return [spoil(v) for v in value] if isinstance(value, list) else value

    records = draw(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=4))
    return b"".join(json.dumps(spoil(r)).encode() + b"\n" for r in records)


def known(sample: Sample) -> tuple[Any, ...]:
    return (sample.messages, sample.tools, sample.unmask)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.jsonl"


def check(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    bad: Counter[str] = Counter()
    samples = list(read_samples(FileReader([file]), skip_bad=bad))
    lines = [line.strip() for line in data.split(b"\n")]
    assert len(samples) + sum(bad.values()) == sum(bool(line) for line in lines)
    by_number = {s.number: s for s in samples}
    for number, line in enumerate(lines, 1):
        if line in GOOD:
            assert known(by_number[number]) == GOOD[line]
    try:
        every = list(read_samples(FileReader([file])))
    except UserError as e:
        first = min({n for n, line in enumerate(lines, 1) if line} - by_number.keys())
        assert str(e).startswith(f"{file} line {first}: ")
    else:
        assert not bad and list(map(known, every)) == list(map(known, samples))
    for sample in samples:
        try:
            (encoded,) = ENCODER.encode([sample])
        except UserError as e:
            assert sample.where in str(e)
        else:
            assert len(encoded.ids) == len(encoded.trained)


GOOD: dict[bytes, tuple[Any, ...]] = {}


@pytest.fixture(scope="module", autouse=True)
def good(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("good") / "a.jsonl"
    file.write_bytes(b"\n".join(LINES))
    for line, record, sample in zip(LINES, RECORDS, read_samples(FileReader([file])), strict=True):
        texts = [m["content"] if isinstance(m["content"], str) else "a" for m in record["messages"]]
        assert [m["content"] for m in sample.messages] == texts
        GOOD[line] = known(sample)


FUZZ = settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(data=damaged())
def test_damaged_bytes_give_right_samples_or_file_and_line(data: bytes, file: Path) -> None:
    check(file, data)


@FUZZ
@given(data=mistyped())
def test_values_of_any_type_give_right_samples_or_file_and_line(data: bytes, file: Path) -> None:
    check(file, data)


HARD: dict[str, tuple[bytes, bool]] = {  # a line, and whether it is a sample
    "10 MB of text": (json.dumps(chat("who?", "mice " * 2_000_000)).encode(), True),
    "10 MB of brackets": (b"[" * 10_000_000, False),
    "10 MB of objects": (b'{"a":' * 2_000_000, False),
    "10 MB of digits": (b'{"messages": ' + b"9" * 10_000_000 + b"}", False),
    "10 MB of zeros": (b"\x00" * 10_000_000, False),
    "100,000 messages": (json.dumps(chat(*["a", "b"] * 50_000)).encode(), True),
    "a deep schema": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"]}",
        True,
    ),
    "a lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', False),
}


@pytest.mark.parametrize("name", HARD)
def test_huge_line_is_read_or_an_error_within_seconds(name: str, file: Path) -> None:
    line, is_sample = HARD[name]
    began = time.monotonic()
    file.write_bytes(LINES[0] + b"\n" + line + b"\n" + LINES[0])
    bad: Counter[str] = Counter()
    assert len(list(read_samples(FileReader([file]), skip_bad=bad))) == 2 + is_sample
    assert sum(bad.values()) == (not is_sample)
    if not is_sample:
        with pytest.raises(UserError, match=r"a\.jsonl line 2: .{1,400}$"):
            list(read_samples(FileReader([file])))
    assert time.monotonic() - began < 10


def test_damaged_file_ends_the_command_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = setting(tmp_path / "run", samples=16)
    data = config.parent / "chats.jsonl"
    whole = data.read_bytes().splitlines()
    for spoiled in (whole[6][:-9], b"\xff" + whole[6], whole[6].replace(b'"user"', b"7"), b"[" * 10**6):
        data.write_bytes(b"\n".join([*whole[:6], spoiled, *whole[7:]]))
        assert run_prepare(config) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {data} line 7: ") and err.count("\n") == 1
    data.write_bytes(b"\n".join(whole))
    assert run_prepare(config) == 0  # the negative control
