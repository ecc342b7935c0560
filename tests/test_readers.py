"""Every kind of place that records come from: what they are, where they stand, and what their key follows."""

import gzip
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.runs import read_samples
from mice_jax.data import readers
from mice_jax.data.readers import Reader, file_digests, files_of, open_source
from mice_jax.errors import UserError
from test_sources import GOOD, HELLO, lines, read


# ---------------------------------------------------------------------------------------- files
def test_lines_are_read_in_order_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    data = lines(GOOD) + b"\n  \r\n" + lines({**GOOD, "unmask": True, "tools": [{"name": "add"}]})
    first, second = read(tmp_path / "a.jsonl", data)
    assert (first.messages, first.tools, first.unmask) == (HELLO, None, False)
    assert (second.tools, second.unmask) == ([{"name": "add"}], True)
    assert (first.where, second.where) == (f"{tmp_path}/a.jsonl line 1", f"{tmp_path}/a.jsonl line 4")


def test_last_line_without_newline_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
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


def test_json_file_is_a_list_of_records(tmp_path: Path) -> None:
    (sample,) = read(tmp_path / "a.json", json.dumps([GOOD], indent=1).encode())
    assert (sample.messages, sample.where) == (HELLO, f"{tmp_path}/a.json item 1")
    with pytest.raises(UserError, match=r"a\.json item 2: it is the number 3"):
        read(tmp_path / "a.json", json.dumps([GOOD, 3]).encode())


BAD_LISTS = {  # a file that holds no list, its good items, and what is said of it
    "": (0, "a list begins with '[' at line 1 column 1"),
    '{"messages": []}': (0, r"a list begins with '\[' at line 1 column 1.*name it \.jsonl"),
    "[1, 2": (2, "after an item comes ',' or ']' at line 1 column 6"),
    "[1,\n 2,\n]": (2, "Expecting value at line 3 column 1"),
    '[{"a": 1},\n {"b": "cut sho': (1, "Unterminated string starting at at line 2 column 8"),
    '[{"a": 1}\n\n  {"b": 2}]': (1, "after an item comes ',' or ']' at line 3 column 3"),
    "[1] [2]": (1, "there is more text after the list at line 1 column 5"),
    "[1, NaN]": (1, "NaN is not a JSON value"),
    '[1, "\xff"]': (1, "codec can't decode byte 0xff"),
    "[1, " + "[" * 100_000: (1, "recursion"),
}


@pytest.mark.parametrize("at_once", [1, 2, 5, 2**20])
@pytest.mark.parametrize("text", BAD_LISTS, ids=range(len(BAD_LISTS)))
def test_bad_json_list_is_an_error_with_item_line_and_column(
    text: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", at_once)
    good, words = BAD_LISTS[text]
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words.replace("'['", r"'\['")) as raised:
        list(open_source(str(tmp_path / "a.json")).blocks())
    read = 0 if "codec" in words else good  # a bad byte spoils what is read with it
    assert f"a.json cannot be read past item {read}: " in str(raised.value)


JSON_LISTS = st.lists(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
), max_size=8)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(JSON_LISTS, st.sampled_from([None, 0, 1]), st.booleans(), st.integers(1, 40), st.data())
def test_json_list_items_equal_those_of_json_loads_for_any_block_size(
    tmp_path: Path, items: list[Any], indent: int | None, ascii: bool, at_once: int, data: st.DataObject
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    if data.draw(st.booleans()):  # damaged
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.sampled_from(["", "[", "]", "{", '"', ",", "1e", "-", "\\"])) + text[at + 1 :]
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        wanted = json.loads(file.read_bytes())
    except ValueError:
        wanted = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", at_once)
        try:
            found = [item for block in open_source(str(file)).blocks() for _, item in block.records()]
        except UserError:
            found = None
    assert found == (wanted if isinstance(wanted, list) else None)


HOLD = """
import sys
from mice_jax.data.readers import open_source
held = lambda field: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) * 1024
before, count = held("VmRSS"), 0
blocks = open_source(sys.argv[1]).blocks()
for block in (list(blocks) if sys.argv[2] == "all" else blocks):
    count += sum(1 for _ in block.records())
print(count, held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "kind", [".jsonl.gz", *(pytest.param(k, marks=pytest.mark.slow) for k in (".json", ".parquet"))]
)
def test_long_file_is_read_in_little_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"long{kind}"
    texts = [os.urandom(1000).hex() for _ in range(30_000)]
    rows = [{"messages": [{**HELLO[0], "content": text}, HELLO[1]]} for text in texts]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=30_000, compression="none")
    elif kind == ".json":
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        path.write_bytes(gzip.compress(lines(*rows), compresslevel=0))

    def read(how: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", HOLD, str(path), how], capture_output=True, text=True, check=True)
        count, grown = done.stdout.split()
        return int(count), int(grown)

    count, grown = read("")
    assert count == 30_000 and grown < 50e6  # the first rows of a parquet file take 30 of them
    assert read("all")[1] > 60e6  # the negative control


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
def test_file_that_is_not_of_its_kind_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} cannot be read past"):
        read(tmp_path / name, lines(GOOD))


def test_packed_file_cut_short_is_named_even_where_bad_lines_are_skipped(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(lines({"messages": [{**HELLO[0], "n": i}]}) for i in range(9999)))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read past line [0-9]{3,}"):
        read(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2], skip_bad=Counter())


def test_files_are_found_by_name_glob_and_folder_in_order(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c[1].jsonl", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.jsonl").mkdir()
    found = [Path(p).name for p in files_of(f"{tmp_path}/*.jsonl")]
    assert found == ["a.jsonl", "b.jsonl", "c[1].jsonl"] == [Path(p).name for p in files_of(str(tmp_path))]
    assert [Path(p).name for p in files_of(f"{tmp_path}/c[1].jsonl")] == ["c[1].jsonl"]
    for nothing in ("nowhere.jsonl", "*.parquet", "d.jsonl"):
        with pytest.raises(UserError, match="names no file"):
            files_of(f"{tmp_path}/{nothing}")
    with pytest.raises(UserError, match=r"notes\.txt is not a kind of file"):
        read(tmp_path / "notes.txt")


# ---------------------------------------------------------------------------------------- blocks
def records(reader: Reader) -> list[tuple[str, Any]]:
    return [(f"{reader.places[b.place]} {n}", raw) for b in reader.blocks() for n, raw in b.records()]


def test_blocks_are_bounded_by_records_and_bytes_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"messages": [{**HELLO[0], "content": "x" * 650}]}
    (tmp_path / "a.jsonl").write_bytes(lines(*[GOOD] * 20, long, long, GOOD))
    (tmp_path / "b.json").write_text(json.dumps([GOOD] * 9))
    pq.write_table(pa.Table.from_pylist([GOOD] * 9), tmp_path / "c.parquet")
    whole = records(open_source(str(tmp_path)))
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 7)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)
    reader = open_source(str(tmp_path))
    assert records(reader) == whole and len(whole) == 23 + 9 + 9
    blocks = list(reader.blocks())
    sizes = [[len(line) for line in b.lines] for b in blocks if b.place == 0]
    assert [len(s) for s in sizes][:2] == [7, 7] and all(sum(s[:-1]) < 700 for s in sizes)
    assert any(sum(s) >= 700 and len(s) < 7 for s in sizes)
    assert [len(list(b.records())) for b in blocks if b.place] == [7, 2, 7, 2]
    done = [b.done for b in blocks]
    assert done == sorted(done) and done[-1] == reader.size


def test_file_without_lines_is_not_read_into_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is longer than 1,000 bytes"):
        read(tmp_path / "a.jsonl", lines(GOOD) + b"x" * 5000)


# ---------------------------------------------------------------------------------------- object stores
@pytest.fixture
def bucket() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name, data in (("b.jsonl", lines(GOOD)), ("a.jsonl.gz", gzip.compress(lines(GOOD, GOOD))), ("c.txt", b"")):
        fs.pipe(f"/bucket/{name}", data)
    pq.write_table(pa.Table.from_pylist([GOOD]), "bucket/d.parquet", filesystem=fs)
    yield "memory://bucket"
    fs.store.clear()


def test_object_store_is_read_by_name_glob_and_folder(bucket: str) -> None:
    assert [p.rpartition("/")[2] for p in files_of(bucket)] == ["a.jsonl.gz", "b.jsonl", "d.parquet"]
    assert [p.rpartition("/")[2] for p in files_of(f"{bucket}/*.gz")] == ["a.jsonl.gz"]
    samples = list(read_samples(open_source(bucket)))
    assert [s.messages for s in samples] == [HELLO] * 4
    assert samples[2].where == "memory:///bucket/b.jsonl line 1"
    assert open_source(bucket).size > 0


def test_key_of_an_object_follows_it(bucket: str, tmp_path: Path) -> None:
    before = open_source(bucket).digest(tmp_path)
    assert open_source(bucket).digest(tmp_path) == before
    fsspec.filesystem("memory").pipe("/bucket/b.jsonl", lines(GOOD, GOOD))
    assert open_source(bucket).digest(tmp_path) != before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("memory://nowhere/*.jsonl", "names no file"),
        ("zz://bucket/a.jsonl", "cannot be read: Protocol not known: zz"),
        ("memory://bucket/c.txt", "not a kind of file that can be read"),
    ],
)
def test_object_that_cannot_be_read_is_named(path: str, words: str, bucket: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(path)


# ---------------------------------------------------------------------------------------- web servers
class Server(http.server.BaseHTTPRequestHandler):
    """Serves one content, with what it says of it, at every address; counts what is fetched."""

    content, says, fetched, fails = b"", {}, 0, False

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(self.content)), **self.says}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        type(self).fetched += 1
        if self.fails:
            return self.send_error(503, "Down")
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[type[Server]]:
    kind = type("Fresh", (Server,), {"says": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        kind.address = f"http://127.0.0.1:{running.server_port}/a.jsonl"  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield kind
        running.shutdown()


@pytest.mark.parametrize("says", [{}, {"ETag": '"1"'}, {"Last-Modified": "Thu, 26 Nov 2026 13:00:00 GMT"}])
def test_key_of_a_file_from_the_web_follows_its_content(says: dict[str, str], server: Any, tmp_path: Path) -> None:
    other = {"messages": [HELLO[0], {**HELLO[1], "content": "Blu"}]}
    assert len(lines(other)) == len(lines(GOOD))
    server.content, server.says = lines(GOOD, GOOD), says
    assert [s.messages for s in read_samples(open_source(server.address))] == [HELLO, HELLO]
    again = open_source(server.address)
    before = server.fetched
    key = again.digest(tmp_path)
    assert (server.fetched > before) == (not says)  # fetched only where the server has no word for it
    assert open_source(server.address).digest(tmp_path) == key
    server.content = lines(GOOD, other)
    if says:
        server.says = {name: value.replace("1", "2") for name, value in says.items()}
    assert open_source(server.address).digest(tmp_path) != key


def test_failing_server_is_an_error_without_a_traceback(server: Any) -> None:
    server.content = lines(GOOD)
    reader = open_source(server.address)
    server.fails = True
    with pytest.raises(UserError, match=r"a\.jsonl.* cannot be read.*(503|Down)"):
        list(read_samples(reader))


# ---------------------------------------------------------------------------------------- TFDS
BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

TURNS = {"role": tfds.features.Text(), "content": tfds.features.Text()}


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="large")]

    def _info(self):
        features = {"messages": tfds.features.Sequence(TURNS), "number": tfds.features.Scalar(np.int32)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5 if self.builder_config.name == "small" else 9):
            answer = {"role": "assistant", "content": "Röd " * i + "."}
            yield i, {"messages": [{"role": "user", "content": f"{i}?"}, answer], "number": i}
"""
PREPARE = """
import sys
from mice_chats.mice_chats_dataset_builder import Builder
for config in ("small", "large"):
    Builder(data_dir=sys.argv[1], config=config, file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TFDS data, as a builder of array_record files leaves it."""
    folder = tmp_path_factory.mktemp("tfds")
    package = folder / "code" / "mice_chats"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mice_chats_dataset_builder.py").write_text(BUILDER)
    command = [sys.executable, "-c", PREPARE, str(folder / "data")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(folder / "code")}, capture_output=True)
    return folder / "data"


def test_a_missing_tfds_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"tfds:mice:train needs .*\[tfds\]"):
        open_source("tfds:mice:train")


USE = """
import sys
from pathlib import Path
from mice_jax.data.readers import open_source
from mice_jax.data.sources import parse_block
reader = open_source(sys.argv[1])
for sample in (s for block in reader.blocks() for s in parse_block(block, reader.places, "messages")):
    print(sample.where, [m["content"] for m in sample.messages], sample.messages[1]["role"], sep="|")
print(reader.size, reader.digest(Path(sys.argv[2])).hex(), "tensorflow" in sys.modules)
"""


def use(path: str, data: Path, tmp_path: Path) -> list[str]:
    """What another process reads: TFDS looks for its folder once, when it is imported."""
    command = [sys.executable, "-c", USE, path, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"TFDS_DATA_DIR": str(data)}, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else [done.stderr]


@pytest.mark.slow
def test_tfds_data_set_is_read_by_name_and_split_without_tensorflow(tfds_data: Path, tmp_path: Path) -> None:
    *small, _ = use("tfds:mice_chats/small:train", tfds_data, tmp_path)
    *large, end = use("tfds:mice_chats/large:test", tfds_data, tmp_path)
    assert sorted(line.partition("|")[2] for line in small) == [
        f"['{i}?', '{'Röd ' * i}.']|assistant" for i in range(5)
    ]
    assert len(large) == 9 and end.startswith("9 ") and end.endswith("False")
    assert [line.partition("|")[0] for line in small] == [
        f"tfds:mice_chats/small:train example {i}" for i in range(1, 6)
    ]
    *part, _ = use("tfds:mice_chats/large:train[:30%]", tfds_data, tmp_path)
    assert len(part) == 3
    *folder, _ = use(f"tfds:{tfds_data}/mice_chats/small/1.0.0:train", tfds_data, tmp_path)
    assert [line.partition("|")[2] for line in folder] == [line.partition("|")[2] for line in small]


@pytest.mark.slow
def test_each_config_and_split_of_a_tfds_data_set_has_a_key_of_its_own(tfds_data: Path, tmp_path: Path) -> None:
    paths = ["small:train", "large:train", "large:train[:30%]", "large:test"]
    keys = [use(f"tfds:mice_chats/{p}", tfds_data, tmp_path)[-1].split()[1] for p in paths]
    assert len(set(keys)) == 4 and use(f"tfds:mice_chats/{paths[0]}", tfds_data, tmp_path)[-1].split()[1] == keys[0]


REFUSED = {
    "tfds:mice_chats/small": "must have the form tfds:name[/config]:split",
    "tfds:mice_chats/small:nosplit": "Unknown split",
    "tfds:mice_chatz:train": "Dataset mice_chatz not found",
}
REFUSE = """
import sys
from mice_jax.data.readers import open_source
from mice_jax.errors import UserError
for path in sys.argv[1:]:
    try:
        print(list(open_source(path).blocks()))
    except UserError as error:
        print(f"UserError: {error}".encode())
"""


def test_missing_tfds_data_set_is_an_error(tfds_data: Path) -> None:
    environment = os.environ | {"TFDS_DATA_DIR": str(tfds_data)}
    command = [sys.executable, "-c", REFUSE, *REFUSED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for (path, words), error in zip(REFUSED.items(), done.stdout.splitlines(), strict=True):
        assert f"UserError: {'the source' if 'form' in words else path}" in error and words in error
        assert "abstract_reasoning" not in error, "the list of all that there are"


# ---------------------------------------------------------------------------------------- Hugging Face datasets
@pytest.fixture
def hf_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "chats"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"messages": [{**HELLO[0], "content": str(i)}, HELLO[1]]} for i in range(count)]
        (folder / f"{split}.jsonl").write_bytes(lines(*rows))
    return folder


def test_data_set_of_the_datasets_library_is_read_by_split(hf_data: Path, tmp_path: Path) -> None:
    train, test, half = (open_source(f"hf:{hf_data}:{s}") for s in ("train", "test", "train[:50%]"))
    samples = list(read_samples(train))
    assert [s.messages[0]["content"] for s in samples] == ["0", "1", "2", "3"]
    assert samples[3].where == f"hf:{hf_data}:train row 4"
    assert [s.messages[0]["content"] for s in read_samples(half)] == ["0", "1"]
    assert (train.size, test.size, half.size) == (4, 2, 2)
    assert len({r.digest(tmp_path) for r in (train, test, half)}) == 3
    (hf_data / "train.jsonl").write_bytes(lines(*[{"messages": HELLO}] * 4))
    assert open_source(f"hf:{hf_data}:train").digest(tmp_path) != train.digest(tmp_path)


def test_data_sets_in_memory_have_keys_of_their_own(
    hf_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    other = tmp_path / "other"
    shutil.copytree(hf_data, other)
    (other / "train.jsonl").write_bytes(lines(*[{"messages": HELLO}] * 4))
    assert len({open_source(f"hf:{folder}:train").digest(tmp_path) for folder in (hf_data, other)}) == 2


def test_data_set_that_cannot_be_loaded_is_an_error(hf_data: Path) -> None:
    with pytest.raises(UserError, match=r"must have the form hf:name:split"):
        open_source("hf:someone/something")
    with pytest.raises(UserError, match=r"hf:.*nothing:train cannot be loaded"):
        open_source(f"hf:{hf_data}/nothing:train")
    with pytest.raises(UserError, match=r"hf:.*:dev cannot be loaded: Unknown split"):
        open_source(f"hf:{hf_data}:dev")


# ---------------------------------------------------------------------------------------- digests
def test_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_bytes(lines(GOOD))
    first = file_digests([file], cache)
    assert not (cache / "digests.json").exists()  # it has only just been written, and may change within this tick
    now = readers.time.time()
    monkeypatch.setattr(readers.time, "time", lambda: now + 60)
    assert file_digests([file], cache) == first and (cache / "digests.json").exists()
    monkeypatch.setattr(readers.hashlib, "file_digest", None)  # whoever hashes now, fails
    assert file_digests([file], cache) == first
    file.write_bytes(lines(GOOD, GOOD))
    with pytest.raises(TypeError):
        file_digests([file], cache)
    (cache / "digests.json").write_text("{cut sho")
    monkeypatch.undo()
    assert file_digests([file], cache) != first


def test_memory_of_digests_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_CACHED_DIGESTS", 3)
    now = readers.time.time()
    monkeypatch.setattr(readers.time, "time", lambda: now + 60)
    files = [tmp_path / f"{i}.jsonl" for i in range(5)]
    for file in files:
        file.write_bytes(file.name.encode())
    file_digests(files, tmp_path)
    assert [Path(k.split()[0]).name for k in json.loads((tmp_path / "digests.json").read_text())] == [
        "2.jsonl",
        "3.jsonl",
        "4.jsonl",
    ]
