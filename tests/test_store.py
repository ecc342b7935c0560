"""Stores are read without a copy, hold what the encoder gives, and are built anew exactly when they must be."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mice_jax.data import store as store_module
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import read_samples
from mice_jax.data.store import TokenStore, build_store
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from runs import CHATML, REPOSITORY, chat, make_chats, make_tokenizer, write_jsonl

Build = Callable[..., TokenStore]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", make_chats(30))


@pytest.fixture
def build(cache: Path, data: Path, encoder: ChatEncoder) -> Build:
    def build(path: Path = data, format: str = "messages", by: ChatEncoder = encoder, skip: bool = False) -> TokenStore:
        return build_store(str(path), format=format, encoder=by, skip_bad=skip, cache_dir=cache)

    return build


def stamps(cache: Path) -> dict[str, int]:
    """Each store with the time at which it was written."""
    return {f.parent.name: f.stat().st_mtime_ns for f in cache.glob("*/tokens.arrow")}


# ---------------------------------------------------------------------------------------- content
def test_a_store_holds_what_the_encoder_gives(build: Build, data: Path, encoder: ChatEncoder) -> None:
    store = build()
    wanted = encoder.encode(list(read_samples([data])))
    assert len(store) == len(wanted) == 30
    for i, sample in enumerate(wanted):
        tokens, trained = store.sample(i)
        assert np.array_equal(tokens, sample.ids) and np.array_equal(trained, sample.trained)
        assert (tokens.dtype, trained.dtype) == (np.int32, np.uint8)
    assert store.lengths.tolist() == [len(s.ids) for s in wanted]
    assert store.num_trained.tolist() == [int(s.trained[1:].sum()) for s in wanted]
    assert store.meta["samples"] == 30 and store.meta["tokens"] == store.lengths.sum()


def test_samples_are_found_across_record_batches(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [[x.tolist() for x in build().sample(i)] for i in range(30)]
    monkeypatch.setattr(store_module, "ENCODE_AT_ONCE", 7)
    monkeypatch.setattr(store_module, "VERSION", 10**6)  # so that it is built anew
    store = build()
    assert len(store._offsets) == 5
    assert [[x.tolist() for x in store.sample(i)] for i in range(30)] == whole
    assert store.lengths.tolist() == [len(tokens) for tokens, _ in whole]


def test_the_first_token_of_a_sample_is_no_trained_one(build: Build, tmp_path: Path) -> None:
    document = {"messages": [{"role": "pretraining", "content": "red barn"}]}
    store = build(write_jsonl(tmp_path / "documents.jsonl", [document]))
    assert store.sample(0)[1].all()
    assert store.num_trained.tolist() == [store.lengths[0] - 1]


def test_equal_samples_have_equal_hashes_and_others_have_others(build: Build, tmp_path: Path) -> None:
    a, b = chat("who?", "mice"), chat("who?", "elephants")
    unmasked = chat("who?", "mice", unmask=True)
    hashes = build(write_jsonl(tmp_path / "few.jsonl", [a, b, a, unmasked])).content_hashes
    assert hashes[0] == hashes[2] and len(set(hashes.tolist())) == 3


# ---------------------------------------------------------------------------------------- zero copy
def mapped(file: Path) -> list[range]:
    """The addresses at which this process has a file mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [line[0].split("-") for line in lines if line[-1] == str(file.resolve())]
    return [range(int(start, 16), int(end, 16)) for start, end in ends]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_samples_are_views_of_the_mapped_file(build: Build, cache: Path) -> None:
    store = build()
    (file,) = cache.glob("*/tokens.arrow")
    where = mapped(file)
    for i in (0, 13, 29):
        for array in store.sample(i):
            assert not array.flags.owndata and not array.flags.writeable
            assert any(array.ctypes.data in r for r in where)
    assert not any(store.sample(0)[0].copy().ctypes.data in r for r in where)  # the negative control


# ---------------------------------------------------------------------------------------- built anew or not
def test_an_unchanged_source_is_not_tokenised_again(build: Build, cache: Path, data: Path, tmp_path: Path) -> None:
    build()
    first = stamps(cache)
    os.utime(data)  # the bytes count, not the time or the name
    again = data.rename(tmp_path / "renamed.jsonl")
    assert build(again).sample(0)[0].tolist()
    assert stamps(cache) == first and len(first) == 1


def test_a_store_is_built_anew_when_what_it_is_made_of_changes(build: Build, cache: Path, data: Path) -> None:
    build()
    ids = {0: build().sample(0)[0].tolist()}
    with data.open("a") as f:
        f.write(json.dumps(chat("one", "more")) + "\n")
    assert len(build()) == 31 and len(stamps(cache)) == 2
    other = build(by=ChatEncoder(make_tokenizer(CHATML.replace("\n{{ m.content", ": {{ m.content"))))
    assert other.sample(0)[0].tolist() != ids[0] and len(stamps(cache)) == 3
    build(skip=True)
    assert len(stamps(cache)) == 4
    assert build(data).sample(0)[0].tolist() == ids[0] and len(stamps(cache)) == 4


def test_a_store_is_of_one_format(build: Build, cache: Path, tmp_path: Path) -> None:
    record = {"prompt": "who?", "completion": "mice", "text": "mice"}
    file = write_jsonl(tmp_path / "both.jsonl", [record])
    asked, read = build(file, "prompt_completion"), build(file, "text")
    assert asked.sample(0)[0].tolist() != read.sample(0)[0].tolist()
    assert len(stamps(cache)) == 2


# ---------------------------------------------------------------------------------------- half-written, at once
def test_what_a_dead_process_left_is_never_read(build: Build, cache: Path) -> None:
    build()
    (folder,) = (f.parent for f in cache.glob("*/tokens.arrow"))
    wanted = build().sample(0)[0].tolist()
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    (partial / "tokens.arrow").write_bytes((partial / "tokens.arrow").read_bytes()[:100])
    (partial / "left").write_text("over")
    assert build().sample(0)[0].tolist() == wanted
    assert not partial.exists() and not (folder / "left").exists()


def test_a_failed_build_leaves_nothing_to_be_read(build: Build, cache: Path, data: Path) -> None:
    good = data.read_bytes()
    data.write_bytes(good + b"{not json\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"chats\.jsonl line 31"):
            build()
    assert stamps(cache).keys() == set() or all(k.endswith(".partial") for k in stamps(cache))
    data.write_bytes(good)
    assert len(build()) == 30


BUILDER = """
import sys, time
from pathlib import Path
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.store import build_store
from mice_jax.data.tokenizer import load_tokenizer
path, cache, tokenizer, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
encoder = ChatEncoder(load_tokenizer(tokenizer))
Path(f"{path}.{number}").touch()
while not all(Path(f"{path}.{n}").exists() for n in "01"):
    time.sleep(0.001)
store = build_store(path, format="messages", encoder=encoder, skip_bad=False, cache_dir=cache)
print(len(store), int(store.lengths.sum()))
"""


def test_two_processes_building_at_once_both_succeed(cache: Path, tmp_path: Path, build: Build) -> None:
    path = write_jsonl(tmp_path / "many.jsonl", make_chats(2000))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", BUILDER, str(path), str(cache), str(tmp_path / "tokenizer")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, n], cwd=REPOSITORY, **pipes) for n in "01"]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    store = build(path, by=ChatEncoder(load_tokenizer(str(tmp_path / "tokenizer"))))
    assert {out for out, _ in ends} == {f"2000 {store.lengths.sum()}\n"}
    assert len(stamps(cache)) == 1
    # One of them had to wait, and said so: they did meet.
    assert sum("waiting for another process" in err for _, err in ends) == 1
