"""Where raw records come from: files of several kinds, here or in an object store, TFDS and Hugging Face datasets.

A source opens to a reader, which knows what its content depends on (for the token store's key) and yields blocks: a
few hundred records each, unparsed where that is possible, so that a block is cheap to send to another process.
"""

import abc
import codecs
import glob
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mice_jax.errors import UserError, one_line

BLOCK_RECORDS = 512
BLOCK_BYTES = 2 * 2**20  # of lines, packed ones unpacked
PARQUET_BUFFER = 2**20  # bytes of a column at a time, where arrow would read a whole row group
MAX_REMEMBERED = 10_000  # digests of files
MAX_LINE = 256 * 2**20  # bytes; a longer one is a file of another kind

Raw = tuple[int, Any]  # a record's number in its place, from 1; its line's bytes, or the record parsed


# ---------------------------------------------------------------------------------------- blocks
@dataclass(frozen=True)
class Block(abc.ABC):
    """Records in a row of one place."""

    place: int  # among the reader's places
    first: int  # the first record's number
    done: int  # of the reader's size, once these are read

    @abc.abstractmethod
    def records(self) -> Iterator[Raw]: ...


@dataclass(frozen=True)
class Lines(Block):
    lines: list[bytes]

    def records(self) -> Iterator[Raw]:
        for number, line in enumerate(self.lines, self.first):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            line = line.strip()
            if line:
                yield number, line


@dataclass(frozen=True)
class Items(Block):
    items: list[Any]

    def records(self) -> Iterator[Raw]:
        return enumerate(self.items, self.first)


@dataclass(frozen=True)
class Table(Block):
    rows: pa.RecordBatch

    def records(self) -> Iterator[Raw]:
        return enumerate(map(_sparse, self.rows.to_pylist()), self.first)


@dataclass(frozen=True)
class Examples(Block):
    """Of a TFDS data source, which whoever wants them opens for himself."""

    source: Sequence[Any]
    stop: int

    def records(self) -> Iterator[Raw]:
        for number in range(self.first, self.stop):
            yield number, _plain(self.source[number - 1])


def _sparse(value: Any) -> Any:
    """Without nulls: a table's struct gives every message the keys that any message has."""
    if isinstance(value, dict):
        return {k: _sparse(v) for k, v in value.items() if v is not None}
    return [_sparse(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A TFDS example as JSON would have it: its texts are bytes, its lists arrays."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # what is not UTF-8 is refused where texts are checked
    if hasattr(value, "tolist"):  # arrays, and numbers of numpy
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- readers
class Reader(Protocol):
    """The records of a source, in an order that never changes."""

    places: list[str]  # "a.jsonl line"; a record's number follows
    size: int  # what the blocks' `done` goes up to

    def digest(self, cache_dir: Path) -> bytes:
        """Changes with the records. What it takes long to find out is remembered in `cache_dir`."""
        ...

    def blocks(self) -> Iterator[Block]: ...


def open_source(path: str) -> Reader:
    """A reader of what a `Source.path` names; UserError where that is nothing that can be read."""
    if path.startswith("tfds:"):
        return TFDSReader(path)
    return HFReader(path) if path.startswith("hf:") else FileReader(files_of(path))


class FileReader:
    """Files on disk or in an object store, one after another."""

    def __init__(self, files: Sequence[str | Path]):
        self._files = [str(f) for f in files]
        self._kinds = [_kind_of(f) for f in self._files]
        self.places = [f"{f} {unit}" for f, (unit, _) in zip(self._files, self._kinds, strict=True)]
        self._sizes = [_size(f) for f in self._files]
        self.size = sum(self._sizes)

    def digest(self, cache_dir: Path) -> bytes:
        local = [f for f in self._files if not is_remote(f)]
        known = dict(zip(local, file_digests([Path(f) for f in local], cache_dir), strict=True))
        # A store's own word for a content (an ETag, mostly): to hash it would be to fetch it.
        return b"".join(known[f] if f in known else _remote_key(f) for f in self._files)

    def blocks(self) -> Iterator[Block]:
        before = 0
        for place, (file, (_, read), size) in enumerate(zip(self._files, self._kinds, self._sizes, strict=True)):
            with _asking_a_store(file):
                for make, first, content, at in read(file):
                    yield make(place, first, before + min(at, size), content)
            before += size


class HFReader:
    """`hf:name:split` or `hf:name:config:split`, through the datasets library; `name` may be a local folder."""

    def __init__(self, path: str):
        name, *config, self._split = _parts(path, "hf:name:split", at_least=2)
        try:
            import datasets  # an extra
        except ImportError:
            raise UserError(f"{path} needs the datasets library: pip install 'mice_jax[hf]'.") from None
        try:
            # Mapped from files, by which it is known; a setting of the library may keep it in memory alone.
            self._data: Any = datasets.load_dataset(name, *config, split=self._split, keep_in_memory=False)
        except Exception as e:  # of all kinds, as the data set decides
            raise UserError(f"{path} cannot be loaded: {one_line(e)}.") from e
        self.places, self.size = [f"{path} row"], len(self._data)

    def digest(self, cache_dir: Path) -> bytes:
        files = [Path(f["filename"]) for f in self._data.cache_files]
        return b"".join([self._split.encode(), *file_digests(files, cache_dir)])

    def blocks(self) -> Iterator[Block]:
        at = 0
        for table in self._data.with_format("arrow").iter(batch_size=BLOCK_RECORDS):
            for rows in table.combine_chunks().to_batches():
                yield Table(0, at + 1, at + rows.num_rows, rows)
                at += rows.num_rows


class TFDSReader:
    """`tfds:name[/config]:split`, or a prepared folder for the name; array_record files need no TensorFlow."""

    def __init__(self, path: str):
        name, self._split = _parts(path, "tfds:name[/config]:split", at_least=2, at_most=2)
        try:
            import tensorflow_datasets as tfds  # optional, and slow to import
        except ImportError:
            raise UserError(f"{path} needs TensorFlow Datasets: pip install 'mice_jax[tfds]'.") from None

        try:
            is_folder = os.path.isdir(os.path.expanduser(name))
            builder: Any = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
            if not is_folder:
                builder.download_and_prepare(file_format="array_record")
            self._data = builder.as_data_source(split=self._split)
            self._files = [Path(f) for f in builder.info.splits[self._split].filepaths]
        except Exception as e:  # of all kinds, as the builder decides
            known = str(e).partition("\nAvailable datasets:")[0]  # it lists a thousand
            raise UserError(
                f"{path} cannot be opened: {known if known != str(e) else one_line(e)}. It is read without TensorFlow, "
                "from array_record files: prepare it with file_format='array_record', in $TFDS_DATA_DIR or in a folder "
                "given as tfds:/folder/of/the/version:split."
            ) from e
        self.places, self.size = [f"{path} example"], len(self._data)

    def digest(self, cache_dir: Path) -> bytes:
        return b"".join([self._split.encode(), *file_digests(self._files, cache_dir)])

    def blocks(self) -> Iterator[Block]:
        for start in range(0, self.size, BLOCK_RECORDS):
            stop = min(start + BLOCK_RECORDS, self.size)
            yield Examples(0, start + 1, stop, self._data, stop + 1)


def _parts(path: str, form: str, at_least: int, at_most: int = 3) -> list[str]:
    parts = re.split(r":(?![^\[]*\])", path)[1:]  # a split may be "train[:10%]"
    if not (at_least <= len(parts) <= at_most and all(parts)):
        raise UserError(f"the source {path!r} must have the form {form}. Mend Source.path.")
    return parts


# ---------------------------------------------------------------------------------------- files
def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def files_of(path: str) -> list[str]:
    """The files that `path` (a file, a folder or a glob, also of an object store) stands for, sorted."""
    found = _remote_files(path) if is_remote(path) else _local_files(path)
    if not found:
        raise UserError(
            f"the source {path!r} names no file: it is neither a file, nor a folder of {', '.join(READERS)} files, nor "
            f"a glob that matches one{'' if is_remote(path) else f' from {os.getcwd()}'}. Mend Source.path."
        )
    return sorted(found)


def _local_files(path: str) -> list[str]:
    there = Path(os.path.expanduser(path))
    if there.is_dir():
        return [str(p) for p in there.iterdir() if p.is_file() and p.name.endswith(tuple(READERS))]
    if there.is_file():  # also a name with glob characters in it
        return [str(there)]
    return [p for p in glob.glob(str(there), recursive=True) if os.path.isfile(p)]


def _remote_files(path: str) -> list[str]:
    with _asking_a_store(path):
        fs, there = fsspec.core.url_to_fs(path)
        if fs.isfile(there):
            found = [there]
        elif fs.isdir(there):
            found = [p for p in fs.ls(there, detail=False) if fs.isfile(p) and p.endswith(tuple(READERS))]
        else:
            found = [p for p in fs.glob(there) if fs.isfile(p)]
        return [fs.unstrip_protocol(p) for p in found]


def _remote_key(file: str) -> bytes:
    """Changes with an object: its store's own word for its content (an ETag, mostly), else the hash of all of it."""
    with _asking_a_store(file):
        fs, there = fsspec.core.url_to_fs(file)
        known = [str(fs.ukey(there))]
        if "http" in fs.protocol:  # whose key is but the address
            info = fs.info(there)
            words = [info[k] for k in ("ETag", "Content-MD5", "Digest", "Last-Modified") if k in info]
            if not words:
                with fs.open(there) as f:
                    return hashlib.file_digest(f, "sha256").digest()
            known += [str(info.get("size")), *words]
        return hashlib.sha256("\n".join(known).encode()).digest()


def _size(file: str) -> int:
    if not is_remote(file):
        return os.stat(file).st_size
    with _asking_a_store(file):
        fs, there = fsspec.core.url_to_fs(file)
        return int(fs.size(there) or 0)


@contextmanager
def _asking_a_store(path: str) -> Iterator[None]:
    """What goes wrong with an object store is the user's matter, whatever kind of error that store's library raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not is_remote(path):
            raise
        raise UserError(f"the source {path!r} cannot be read: {one_line(e)}.") from e


def _open(file: str) -> BinaryIO:
    if not is_remote(file):
        return open(file, "rb")
    return io.BufferedReader(fsspec.open(file, "rb").open())  # type: ignore[arg-type]  # whose lines have a bound


# What a kind of file yields: how to make a block, its first record's number, its content, bytes read of the file.
_Yielded = tuple[Callable[..., Block], int, Any, int]


def _lines(file: str) -> Iterator[_Yielded]:
    """Lines as bytes, so that one bad byte costs one line and has a line number."""
    number = 0
    lines: list[bytes] = []
    held = 0
    try:
        with _open(file) as packed:
            kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(file).suffix)
            unpacked: Any = io.BufferedReader(pa.CompressedInputStream(packed, kind)) if kind else packed
            while line := unpacked.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f"{file} line {number} is longer than {MAX_LINE:,} bytes; is it a file of lines?")
                lines.append(line)
                held += len(line)
                if len(lines) == BLOCK_RECORDS or held >= BLOCK_BYTES:
                    yield Lines, number - len(lines) + 1, lines, packed.tell()
                    lines, held = [], 0
            if lines:
                yield Lines, number - len(lines) + 1, lines, packed.tell()
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{file} cannot be read past line {number}: {one_line(e)}.") from e


def _list(file: str) -> Iterator[_Yielded]:
    """The items of one list, decoded as they come: no more of a long list is held than a block or an item needs."""
    number = 0
    items: list[Any] = []
    held = 0
    try:
        with _open(file) as f, io.TextIOWrapper(f, "utf-8-sig", newline="") as text:
            for item, size in _ListText(text):
                number += 1
                items.append(item)
                held += size
                if len(items) == BLOCK_RECORDS or held >= BLOCK_BYTES:
                    yield Items, number - len(items) + 1, items, f.tell()
                    items, held = [], 0
            if items:
                yield Items, number - len(items) + 1, items, f.tell()
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"{file} cannot be read past item {number}: {one_line(e)}. A .json file is one list of objects; if each "
            "line is an object, name it .jsonl."
        ) from e


class _ListText:
    """The items of a JSON list with the length of each, from as much of its text at a time as the next one needs."""

    def __init__(self, text: TextIO):
        self._text, self._held, self._at, self._is_all = text, "", 0, False
        self._line, self._column = 1, 1  # of the first character that is held

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._expect("[", "a list begins with '['")
        if self._next() != "]":
            yield self._item()
            while self._next() == ",":
                self._at += 1
                self._next()
                yield self._item()
        self._expect("]", "after an item comes ',' or ']'")
        self._expect("", "behind the list there is more")

    def _item(self) -> tuple[Any, int]:
        while True:
            is_enough = self._is_all or len(self._held) - self._at > MAX_LINE
            try:
                item, end = DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as e:
                if is_enough:
                    raise self._error(e.pos, e.msg) from None
            else:
                if is_enough or self._held[end : end + 1] in _AFTER:  # the first digits of a number are one too
                    size, self._at = end - self._at, end
                    return item, size
            self._read_on()

    def _next(self) -> str:
        """The character that comes next, blanks left out; "" at the end."""
        while True:
            self._at = _BLANKS.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held) or self._is_all:
                return self._held[self._at : self._at + 1]
            self._read_on()

    def _expect(self, character: str, rule: str) -> None:
        if self._next() != character:
            raise self._error(self._at, rule)
        self._at += 1

    def _read_on(self) -> None:
        self._line, self._column = self._place(self._at)
        rest = self._held[self._at :]
        more = self._text.read(max(len(rest), BLOCK_BYTES))  # twice as much each time, so that trying again is cheap
        self._held, self._at, self._is_all = rest + more, 0, not more

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column in the file."""
        lines = self._held.count("\n", 0, at)
        return self._line + lines, at - self._held.rfind("\n", 0, at) if lines else self._column + at

    def _error(self, at: int, why: str) -> ValueError:
        return ValueError("{1} at line {0[0]} column {0[1]}".format(self._place(at), why))


_BLANKS = re.compile(r"[ \t\n\r]*")
_AFTER = set(",] \t\n\r")  # what may follow an item


def _rows(file: str) -> Iterator[_Yielded]:
    number = 0
    try:
        with _open(file) as f, pq.ParquetFile(f, pre_buffer=False, buffer_size=PARQUET_BUFFER) as table:
            size, total = _size(file), table.metadata.num_rows
            for rows in table.iter_batches(batch_size=BLOCK_RECORDS):
                rows.validate(full=True)  # texts that are not UTF-8 among others
                yield Table, number + 1, rows, size * (number + rows.num_rows) // total
                number += rows.num_rows
    except (OSError, ValueError, pa.ArrowException) as e:
        raise UserError(f"{file} cannot be read past row {number}: {one_line(e)}.") from e


# What a record of each kind of file is called, and how they are read.
READERS: dict[str, tuple[str, Callable[[str], Iterator[_Yielded]]]] = {
    ".jsonl": ("line", _lines),
    ".jsonl.gz": ("line", _lines),
    ".jsonl.zst": ("line", _lines),
    ".json": ("item", _list),
    ".parquet": ("row", _rows),
}


def _kind_of(file: str) -> tuple[str, Callable[[str], Iterator[_Yielded]]]:
    for suffix, kind in READERS.items():
        if file.endswith(suffix):
            return kind
    raise UserError(f"{file} is of no kind that is read: a name must end in {', '.join(READERS)}.")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


# ---------------------------------------------------------------------------------------- digests
def file_digests(files: Sequence[Path], cache_dir: Path) -> list[bytes]:
    """The SHA-256 of each file's bytes, remembered by the file's place, size and time of change.

    A file changed in the last seconds is not remembered: it may change again within its clock's tick.
    """
    memo = cache_dir / "digests.json"
    try:
        known: dict[str, str] = json.loads(memo.read_text())
    except (OSError, ValueError):  # none yet, or one that another process is just replacing on some file systems
        known = {}
    digests = []
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        digest = known.get(key)
        if digest is None:
            with file.open("rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            if stat.st_ctime < time.time() - 5:
                _remember(memo, known, key, digest)
        digests.append(bytes.fromhex(digest))
    return digests


def _remember(memo: Path, known: dict[str, str], key: str, digest: str) -> None:
    """Whoever writes last wins; what is lost, or cannot be written, is only hashed again."""
    known[key] = digest
    while len(known) > MAX_REMEMBERED:
        del known[next(iter(known))]
    ours = memo.with_name(f"digests.{os.getpid()}.json")
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        ours.write_text(json.dumps(known))
        ours.replace(memo)
