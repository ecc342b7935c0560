"""Stores are read without a copy, hold what the encoder gives, and are built anew exactly when they must be."""

import errno
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import CHATML, REPOSITORY, chat, make_chats, make_tokenizer, read_samples, write_jsonl
from mice_jax.data import readers, tokenise
from mice_jax.data import store as store_module
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.mixture import Corpus
from mice_jax.data.readers import FileReader
from mice_jax.data.store import TokenStore, build_store
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError

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
    def build(
        path: Path = data, format: str = "messages", by: ChatEncoder = encoder, skip: bool = False, **more: Any
    ) -> TokenStore:
        return build_store(str(path), format=format, encoder=by, skip_bad=skip, cache_dir=cache, **more)

    return build


def stamps(cache: Path) -> dict[str, int]:
    """Each store with the time at which it was written."""
    return {f.parent.name: f.stat().st_mtime_ns for f in cache.glob("*/tokens.arrow")}


# ---------------------------------------------------------------------------------------- content
def test_store_holds_what_the_encoder_gives(build: Build, data: Path, encoder: ChatEncoder) -> None:
    store = build()
    wanted = encoder.encode(list(read_samples(FileReader([data]))))
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
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 7)
    monkeypatch.setattr(store_module, "VERSION", 10**6)  # so that it is built anew
    store = build()
    assert len(store._offsets) == 5
    assert [[x.tolist() for x in store.sample(i)] for i in range(30)] == whole
    assert store.lengths.tolist() == [len(tokens) for tokens, _ in whole]


def test_first_token_of_a_sample_is_not_trained(build: Build, tmp_path: Path) -> None:
    document = {"messages": [{"role": "pretraining", "content": "red barn"}]}
    store = build(write_jsonl(tmp_path / "documents.jsonl", [document]))
    assert store.sample(0)[1].all()
    assert store.num_trained.tolist() == [store.lengths[0] - 1]


def test_trained_tokens_of_truncated_samples_are_counted_at_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 7)
    store = build()
    marks = [store.sample(i)[1].tolist() for i in range(30)]
    longest = int(store.lengths.max())
    monkeypatch.setattr(TokenStore, "sample", None)  # whoever asks, fails
    for most in (1, 2, 20, int(np.median(store.lengths)), longest - 1, longest):
        assert store.num_trained_within(most).tolist() == [sum(m[1:most]) for m in marks], most
        assert Corpus([store], most).num_trained.tolist() == store.num_trained_within(most).tolist()
    assert store.num_trained_within(20).tolist() != store.num_trained.tolist()


def test_sample_is_located_by_file_and_line(build: Build, data: Path, tmp_path: Path) -> None:
    data.write_bytes(b"\n\n" + data.read_bytes())
    for folder in ("one", "two"):  # the same content in another place: the same store, with places of its own
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(data.read_bytes())
        (tmp_path / folder / "b.jsonl").write_bytes(data.read_bytes())
        store = build(tmp_path / folder)
        assert len(store) == 60
        assert store.where(0) == f"{tmp_path / folder}/a.jsonl line 3"
        assert store.where(30) == f"{tmp_path / folder}/b.jsonl line 3"
        assert store.where(59) == f"{tmp_path / folder}/b.jsonl line 32"


def test_detected_format_is_reported_and_recorded(build: Build, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "who?", "completion": "mice"}])
    said: list[str] = []
    detected = build(file, log=said.append)
    assert detected.meta["format"] == "prompt_completion" and ["read as prompt_completion" in s for s in said] == [True]
    assert build(file, "prompt_completion").fingerprint == detected.fingerprint


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
def test_unchanged_source_is_not_tokenised_again(build: Build, cache: Path, data: Path, tmp_path: Path) -> None:
    build()
    first = stamps(cache)
    os.utime(data)  # the bytes count, not the time or the name
    again = data.rename(tmp_path / "renamed.jsonl")
    assert build(again).sample(0)[0].tolist()
    assert stamps(cache) == first and len(first) == 1


def test_store_is_rebuilt_when_its_inputs_change(build: Build, cache: Path, data: Path) -> None:
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


def test_store_is_of_one_format(build: Build, cache: Path, tmp_path: Path) -> None:
    record = {"prompt": "who?", "completion": "mice", "text": "mice"}
    file = write_jsonl(tmp_path / "both.jsonl", [record])
    asked, read = build(file, "prompt_completion"), build(file, "text")
    assert asked.sample(0)[0].tolist() != read.sample(0)[0].tolist()
    assert len(stamps(cache)) == 2


# ---------------------------------------------------------------------------------------- several processes
def bytes_of(cache: Path) -> list[bytes]:
    return [f.read_bytes() for f in sorted(cache.glob("*/tokens.arrow"))]


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of ten blocks, of which other processes do all."""
    monkeypatch.setattr(tokenise, "_is_up", lambda first: first.result() is None)
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 20)
    return write_jsonl(tmp_path / "many.jsonl", make_chats(200))


@pytest.mark.slow
def test_number_of_processes_changes_nothing(build: Build, cache: Path, many: Path) -> None:
    watched: list[tuple[float, int]] = []
    build(many, workers=1)
    alone = bytes_of(cache)
    (done,) = cache.glob("*/meta.json")
    done.unlink()
    build(many, workers=2, watch=lambda done, samples: watched.append((done, samples)))
    assert bytes_of(cache) == alone and len(alone[0]) > 1000
    assert [samples for _, samples in watched] == list(range(20, 201, 20))
    assert [d for d, _ in watched] == sorted(d for d, _ in watched) and watched[-1][0] == 1


def test_main_process_tokenises_while_workers_start(
    build: Build, cache: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(many, workers=1)
    alone = bytes_of(cache)
    shutil.rmtree(cache)
    asked = iter([False] * 5)
    monkeypatch.setattr(tokenise, "_is_up", lambda first: next(asked, True))
    build(many, workers=2)
    assert bytes_of(cache) == alone and next(asked, None) is None


def test_every_bad_line_is_named_and_nothing_after_the_first_is_kept(build: Build, cache: Path, many: Path) -> None:
    lines = many.read_bytes().splitlines()
    lines[150], lines[97] = b"{bad", b"[]"
    many.write_bytes(b"\n".join(lines))
    for workers in (1, 3):
        for _ in range(2):  # a second build ends at the same line and does not go on behind it
            with pytest.raises(
                UserError, match=r"2 records .*: \(1\) .*line 98: it is an empty list.*\(2\) .*line 151: .*not J"
            ):
                build(many, workers=workers)
        (journal,) = cache.glob("*.partial/journal.jsonl")
        noted = json.loads(journal.read_text().splitlines()[-1])
        assert (noted["blocks"], noted["samples"]) == (4, 80)  # line 98 is in the fifth block
        shutil.rmtree(cache)
    store = build(many, workers=2, skip=True)
    assert len(store) == 198 and store.meta["bad_lines"] == {"not an object": 1, "not JSON": 1}


@pytest.mark.slow
def test_killed_worker_is_an_error_and_leaves_no_gap(build: Build, cache: Path, many: Path) -> None:
    mortal = Mortal(make_tokenizer())
    mortal.only = 60  # the blocks after it are done in time, by the other process
    with pytest.raises(UserError, match=r"ended from outside.*fewer data\.prepare_workers"):
        build(many, by=mortal, workers=2)
    mortal.go_on = True
    assert len(build(many, by=mortal, workers=2)) == 200
    gone_on = bytes_of(cache)
    shutil.rmtree(cache)
    build(many, by=mortal)
    assert bytes_of(cache) == gone_on


def test_bad_line_before_a_truncated_end_is_reported_with_it(build: Build, many: Path) -> None:
    lines = many.read_bytes().splitlines()
    lines[97] = b"[]"
    packed = gzip.compress(b"\n".join(lines))
    broken = many.with_suffix(".jsonl.gz")
    broken.write_bytes(packed[:-20])
    for workers in (1, 3):
        with pytest.raises(UserError, match=r"line 98: it is an empty list.*cannot be read past line 1"):
            build(broken, workers=workers)


class Mortal(ChatEncoder):
    """Ends its process past sample 100, or slowly at the block that ends in `only`, unless it is told to go on."""

    go_on = False
    only = 0

    def encode_each(self, samples: Any, compare: int = 0) -> Any:
        number = samples[-1].number
        if not self.go_on and (number == self.only if self.only else number > 100):
            time.sleep(1 if self.only else 0)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_each(samples, compare)


KILLED = """
import sys
from pathlib import Path
from mice_jax.data import readers, store
from mice_jax.data.tokenizer import load_tokenizer
from test_store import Mortal
readers.BLOCK_RECORDS, store.JOURNAL_EVERY_S = 20, 0
path, cache, tokenizer = sys.argv[1:]
encoder = Mortal(load_tokenizer(tokenizer))
store.build_store(path, format="messages", encoder=encoder, skip_bad=False, cache_dir=Path(cache))
"""


@pytest.fixture(scope="module")
def killed_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a tokenizer, and the stores that a process left when it was killed at work."""
    folder = tmp_path_factory.mktemp("killed")
    source = write_jsonl(folder / "many.jsonl", make_chats(200))
    make_tokenizer().save_pretrained(folder / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(source), str(folder / "stores"), str(folder / "tokenizer")]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["", "stream", "journal", "all", "zeros"])
def test_killed_build_goes_on_where_it_was(
    torn: str, killed_build: Path, build: Build, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 20)
    many = killed_build / "many.jsonl"
    shutil.copytree(killed_build / "stores", cache)
    encoder = ChatEncoder(load_tokenizer(str(killed_build / "tokenizer")))
    (partial,) = cache.glob("*.partial")
    if torn in ("stream", "all"):  # written and not noted, in part
        with (partial / "tokens.arrow").open("ab") as f:
            f.write(b"\xff" * 99)
    if torn in ("journal", "all"):
        os.truncate(partial / "journal.jsonl", (partial / "journal.jsonl").stat().st_size - 9)
    if torn == "zeros":  # what a disk may hold that lost its power
        with (partial / "tokens.arrow").open("r+b") as f:
            f.seek(-9, os.SEEK_END)
            f.write(bytes(9))
    said: list[str] = []
    store = build(many, by=encoder, log=said.append)
    there = 80 if torn in ("journal", "all", "zeros") else 100
    assert said == [f"continuing the token store of {many}: {there} samples were tokenised before"]
    gone_on = bytes_of(cache)
    shutil.rmtree(cache)
    build(many, by=encoder)
    assert bytes_of(cache) == gone_on
    assert store.meta["samples"] == 200 and not list(cache.glob("*.partial"))


# ---------------------------------------------------------------------------------------- half-written, at once
def test_partial_store_of_a_dead_process_is_never_read(build: Build, cache: Path) -> None:
    build()
    (folder,) = (f.parent for f in cache.glob("*/tokens.arrow"))
    wanted = build().sample(0)[0].tolist()
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    (partial / "tokens.arrow").write_bytes((partial / "tokens.arrow").read_bytes()[:100])
    (partial / "left").write_text("over")
    assert build().sample(0)[0].tolist() == wanted
    assert not partial.exists() and not (folder / "left").exists()


def test_failed_build_leaves_nothing_to_be_read(build: Build, cache: Path, data: Path) -> None:
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


@pytest.mark.slow
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


def test_waiting_process_repeats_its_notice(
    build: Build, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache / build().fingerprint
    shutil.rmtree(folder)
    monkeypatch.setattr(store_module, "WAIT_NOTICE_EVERY_S", 0.3)
    with (cache / f"{folder.name}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(1.0, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        assert len(build()) == 30
    words = capsys.readouterr().err.splitlines()
    assert len(words) >= 2 and all("waiting for another process, which builds the token store" in w for w in words)


def test_file_system_without_locks_is_an_error(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(store_module.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"has no locks \(No locks available\).*data\.cache_dir"):
        build()


def test_unwritable_cache_is_an_error_and_a_read_only_one_is_read(
    build: Build, cache: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(readers.time, "time", lambda: now + 60)  # so that digests are remembered
    cache.write_text("a file, where a folder should be")
    with pytest.raises(
        UserError, match=r"token store of .*chats\.jsonl cannot be built in .*stores: .*data\.cache_dir"
    ):
        build()
    cache.unlink()
    build()
    (cache / "digests.json").unlink()

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "write_text"):
        monkeypatch.setattr(Path, name, read_only)
    assert len(build()) == 30
    with data.open("a") as f:
        f.write(json.dumps(chat("one", "more")) + "\n")
    with pytest.raises(UserError, match="Read-only file system"):
        build()


def test_build_goes_on_after_a_full_disk(
    build: Build, cache: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store_module._append

    def append(stream: Any, progress: Any, block: Any) -> None:
        if progress.blocks == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(stream, progress, block)

    monkeypatch.setattr(store_module, "_append", append)
    with pytest.raises(UserError, match=r"many\.jsonl cannot be built in .*: .*No space left on device"):
        build(many)
    monkeypatch.setattr(store_module, "_append", written)
    said: list[str] = []
    assert len(build(many, log=said.append)) == 200
    assert said == [f"continuing the token store of {many}: 80 samples were tokenised before"]
