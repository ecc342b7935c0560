"""One error lists the bad records of all sources: the first ones by place, all of them by reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import chat, make_chats, make_tokenizer, write_jsonl
from mice_jax.config import Data, Phase, Source
from mice_jax.data import readers
from mice_jax.data.bad_records import BadRecord, BadRecords
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke

CALLED = chat("Add.", "")
CALLED["messages"][1]["tool_calls"] = [{"function": {"name": "add", "arguments": {"a": 1}}}]
REFUSING = "{% if messages[0].content == 'no' %}{{ raise_exception('I will not') }}{% endif %}"


def build(*paths: Path, **fields: Any) -> Dataset:
    data = Data(phases=[Phase(sources=[Source(path=str(p)) for p in paths])])
    template = make_tokenizer().chat_template
    for name, value in fields.items():
        setattr(data, name, value)
    return build_dataset(data, ChatEncoder(make_tokenizer(), REFUSING + str(template)))


def places(text: str) -> list[tuple[str, int]]:
    found = re.findall(r"(\w+)\.jsonl lines? ([\d, ]+):", text)
    return [(name, int(line)) for name, lines in found for line in lines.split(", ")]


def test_all_bad_lines_of_all_sources_are_listed_at_once(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [chat("a", "b"), {"turns": []}, chat("no", "b"), CALLED, [1]])
    two = write_jsonl(tmp_path / "two.jsonl", [{"messages": []}, chat("a", "b")])
    with pytest.raises(UserError) as raised:
        build(one, two)
    said = str(raised.value)
    assert said.startswith("5 records cannot be used: (1) ") and "\n" not in said
    assert places(said) == [("one", 2), ("one", 3), ("one", 4), ("one", 5), ("two", 1)]
    for words in ("no `messages`", "I will not", "leaves out the `tool_calls`", "must be an object", "empty list"):
        assert words in said
    assert "1 tools left out by the chat template" in said and "Take chatml, granite, llama3 or mistral" in said
    assert said.endswith("data.skip_bad=True to leave such records out and count them.")


def test_skipped_records_are_counted_whatever_refused_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", [chat("a", "b"), {"turns": []}, chat("no", "b"), CALLED])
    (entry,) = build(path, skip_bad=True).report["sources"].values()
    assert (entry["read"], entry["kept"]) == (4, 1)
    assert entry["dropped"] == {
        "bad line: no messages": 1,
        "bad line: refused by the chat template": 1,
        "bad line: tools left out by the chat template": 1,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_first_twenty_are_listed_and_all_are_counted(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 8)
    lines = [json.dumps(r) for r in make_chats(64)]
    for i in range(3, 64, 2):  # 31 lines, of two kinds
        lines[i] = "{" if i % 4 == 3 else json.dumps(chat("no", "b"))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        build(tmp_path / "many.jsonl", prepare_workers=workers)
    said = str(raised.value)
    assert sorted(places(said)) == [("many", i + 1) for i in range(3, 43, 2)]
    assert "(2) " in said and "(3) " not in said, "each text is there once"
    assert "31 records cannot be used" in said and "; and 11 more." in said
    assert "By reason: 16 not JSON, 15 refused by the chat template." in said


def test_single_bad_record_is_one_sentence_with_its_advice() -> None:
    bad = BadRecords()
    bad.add([BadRecord("a.jsonl line 3", "no end", "it has no end", "give it one")])
    assert bad.paragraph() == (
        "a.jsonl line 3: it has no end; give it one. Fix it, or set data.skip_bad=True to leave such records out and "
        "count them."
    )
    bad.add([BadRecord("a.jsonl line 4", "no end", "x" * 999, "give it one")])
    assert len(bad.paragraph()) < 600 and bad.paragraph().count("Give it one.") == 1
