"""Small inputs that other trainers are known to get wrong: what is trained of each, and what is counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.runs import read_samples, write_jsonl
from mice_jax.data.chat import ChatEncoder, Encoded
from mice_jax.data.readers import FileReader
from mice_jax.data.sample_notes import UNREAD
from mice_jax.data.tokenizer import load_tokenizer
from test_chat import CHATML, make_tokenizer
from test_template_checks import WITH_CALLS

pytestmark = pytest.mark.smoke

ASKED = {"role": "user", "content": "Weather in Rome?"}


def answered(content: str, **keys: Any) -> dict[str, Any]:
    """A record of a question and its answer."""
    return {"messages": [ASKED, {"role": "assistant", "content": content} | keys]}


def weighted(**keys: Any) -> dict[str, Any]:
    """A record whose first answer has some keys."""
    return {"messages": [*answered("BAD", **keys)["messages"], ASKED, {"role": "assistant", "content": "GOOD"}]}


def function(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


TURNS = [("human", "hi"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "3"), ("gpt", "three")]
SHAREGPT = {"conversations": [{"from": who, "value": said} for who, said in TURNS], "tools": "[]"}

# Of each record: its format, the text that is trained, and what is counted.
RECORDS: dict[str, tuple[Any, str, str, dict[str, int]]] = {
    "calls_and_empty_answers: a legacy call": (
        answered("", function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
        "messages", "<|im_end|>", {"empty_answer": 1, f"{UNREAD}messages.function_call": 1},
    ),
    "calls_and_empty_answers: an empty answer": (answered(""), "messages", "<|im_end|>", {"empty_answer": 1}),
    "calls_and_empty_answers: arguments as a string": (
        answered("", tool_calls=[function('{"city": "Rome"}')]),
        "messages", '<call>weather {"city": "Rome"}</call><|im_end|>', {},
    ),
    "message_weights: weight": (weighted(weight=0), "messages", "GOOD<|im_end|>", {}),
    "message_weights: loss": (weighted(loss=False), "messages", "GOOD<|im_end|>", {}),
    "message_weights: none, the control": (weighted(), "messages", "BAD<|im_end|>GOOD<|im_end|>", {}),
    "sharegpt_function_call": (SHAREGPT, "sharegpt", "<call>f {}</call><|im_end|>three<|im_end|>", {}),
}  # fmt: skip


def trained(path: Path, format: str, template: Path) -> tuple[str, dict[str, int]]:
    """The text that is trained of the only record of a file, and what is counted of it."""
    tokenizer = load_tokenizer(str(template.parent), str(template))
    (one,) = ChatEncoder(tokenizer).encode_each(list(read_samples(FileReader([path]), format)))
    assert isinstance(one, Encoded), one
    text = tokenizer.decode(one.ids[np.asarray(one.trained, bool)])
    return text, {name: note.count for name, note in one.notes.items()}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A template that writes calls, beside its tokenizer."""
    make_tokenizer(CHATML, ["<|im_end|>", "<|im_start|>"]).save_pretrained(tmp_path)
    (tmp_path / "calls.jinja").write_text(WITH_CALLS)
    return tmp_path / "calls.jinja"


@pytest.mark.parametrize("name", RECORDS)
def test_record_is_trained_and_counted_as_it_should(name: str, template: Path, tmp_path: Path) -> None:
    record, format, text, counted = RECORDS[name]
    assert trained(write_jsonl(tmp_path / "a.jsonl", [record]), format, template) == (text, counted)


def test_map_arguments_of_a_parquet_file_are_an_object(template: Path, tmp_path: Path) -> None:
    """As Spark and DuckDB write them."""
    arguments = pa.map_(pa.string(), pa.string())
    call = pa.struct(
        [("type", pa.string()), ("function", pa.struct([("name", pa.string()), ("arguments", arguments)]))]
    )
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    messages = answered("", tool_calls=[function([("city", "Rome"), ("days", "2")])])["messages"]
    pq.write_table(pa.table({"messages": pa.array([messages], pa.list_(message))}), tmp_path / "a.parquet")
    written = json.dumps({"city": "Rome", "days": "2"})
    wanted = f"<call>weather {written}</call><|im_end|>"
    assert trained(tmp_path / "a.parquet", "messages", template) == (wanted, {})


def test_template_bom_gives_no_token(template: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answered("Sun")])

    def ids() -> list[int]:
        encoder = ChatEncoder(load_tokenizer(str(tmp_path), str(template)))
        (one,) = encoder.encode(list(read_samples(FileReader([path]))))
        return one.ids.tolist()

    without = ids()
    template.write_bytes(b"\xef\xbb\xbf" + WITH_CALLS.encode())
    assert ids() == without
    template.write_text("x" + WITH_CALLS)
    assert ids() != without, "the control: another character would show"
