"""Reads raw records from files (local or in an object store), TFDS, and Hugging Face datasets.

A reader computes a digest of its source, which is part of the key of the token store, and yields blocks of a few
hundred records. Blocks hold unparsed records where possible, so that they are cheap to send to another process.
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
from typing import Any, BinaryIO, Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mice_jax.data.arrow_values import json_rows
from mice_jax.data.json_list import JSONListItems
from mice_jax.errors import UserError, install_command, nearest_path, one_line

BLOCK_RECORDS = 512
BLOCK_BYTES = 2 * 2**20  # limit of a block, in bytes of decompressed text
PARQUET_BUFFER = 2**20  # bytes of a column that are read at once, instead of a whole row group
MAX_CACHED_DIGESTS = 10_000
MAX_LINE = 256 * 2**20  # bytes; a file with a longer line is not a file of lines
COPY_AGAIN = "If the file was cut or damaged on its way here, copy it again."

Raw = tuple[int, Any]  # the number of a record in its place, counted from 1, and its line as bytes or parsed


# ---------------------------------------------------------------------------------------- blocks
@dataclass(frozen=True)
class Block(abc.ABC):
    """Consecutive records of one place."""

    place: int  # index in the reader's places
    first: int  # number of the first record
    done: int  # how much of the reader's size has been read after this block

    @abc.abstractmethod
    def records(self) -> Iterator[Raw]:
        """Yields the records with their numbers."""


@dataclass(frozen=True)
class Lines(Block):
    """Lines of a file, as bytes."""

    lines: list[bytes]

    def records(self) -> Iterator[Raw]:
        """Yields the lines that are not blank, with their numbers."""
        for number, line in enumerate(self.lines, self.first):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            line = line.strip()
            if line:
                yield number, line


@dataclass(frozen=True)
class Items(Block):
    """Items of a JSON list, parsed."""

    items: list[Any]

    def records(self) -> Iterator[Raw]:
        """Yields the items with their numbers."""
        return enumerate(self.items, self.first)


@dataclass(frozen=True)
class Table(Block):
    """Rows of a table."""

    rows: pa.RecordBatch

    def records(self) -> Iterator[Raw]:
        """Yields the rows as dicts without nulls, or the error of one that JSON cannot hold, with their numbers."""
        return enumerate(json_rows(self.rows), self.first)


@dataclass(frozen=True)
class Examples(Block):
    """Examples of a TFDS data source; a worker process reads them itself."""

    source: Sequence[Any]
    stop: int  # number of the first record after this block

    def records(self) -> Iterator[Raw]:
        """Reads the examples and yields them with their numbers."""
        for number in range(self.first, self.stop):
            yield number, _plain(self.source[number - 1])


def _plain(value: Any) -> Any:
    """Converts a TFDS example, whose texts are bytes and whose lists are arrays, to the types of JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # `sources` raises for text that is not UTF-8
    if hasattr(value, "tolist"):  # True for numpy's arrays and scalars
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- readers
class Reader(Protocol):
    """The records of a source, in a fixed order."""

    places: list[str]  # such as "a.jsonl line"; the number of a record follows
    size: int  # the `done` of the last block

    def digest(self, cache_dir: Path) -> bytes:
        """Returns a key that changes with the records; hashes of files are cached in `cache_dir`."""
        ...

    def blocks(self) -> Iterator[Block]:
        """Yields all records."""
        ...


def open_source(path: str) -> Reader:
    """Opens the source that a `Source.path` names; raises UserError if it cannot be read."""
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
        """Returns the digests of local files and the versions of remote ones."""
        local = [f for f in self._files if not is_remote(f)]
        known = dict(zip(local, file_digests([Path(f) for f in local], cache_dir), strict=True))
        # The version that an object store reports (mostly an ETag) is used, since hashing would download the object.
        return b"".join(known[f] if f in known else _remote_key(f) for f in self._files)

    def blocks(self) -> Iterator[Block]:
        """Yields the records of all files, in order."""
        before = 0
        for place, (file, (_, read), size) in enumerate(zip(self._files, self._kinds, self._sizes, strict=True)):
            with _store_errors(file):
                for make, first, content, at in read(file):
                    yield make(place, first, before + min(at, size), content)
            before += size


class HFReader:
    """`hf:name:split` or `hf:name:config:split`, through the datasets library; `name` may be a local folder."""

    def __init__(self, path: str):
        name, *config, self._split = _parts(path, "hf:name:split", at_least=2)
        try:
            import datasets  # an optional dependency
        except ImportError:
            raise UserError(f"{path} needs the datasets library: {install_command('hf')}.") from None
        try:
            # The digest needs the files that the data set is mapped from, and a user's setting may keep it in memory.
            self._data: Any = datasets.load_dataset(name, *config, split=self._split, keep_in_memory=False)
        except Exception as e:  # a data set's own code may raise anything
            raise UserError(f"{path} cannot be loaded: {one_line(e)}.") from e
        self.places, self.size = [f"{path} row"], len(self._data)

    def digest(self, cache_dir: Path) -> bytes:
        """Returns the split and the digests of the files that the data set is mapped from."""
        files = [Path(f["filename"]) for f in self._data.cache_files]
        return b"".join([self._split.encode(), *file_digests(files, cache_dir)])

    def blocks(self) -> Iterator[Block]:
        """Yields all rows."""
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
            import tensorflow_datasets as tfds  # an optional dependency that is slow to import
        except ImportError:
            raise UserError(f"{path} needs TensorFlow Datasets: {install_command('tfds')}.") from None

        try:
            is_folder = os.path.isdir(os.path.expanduser(name))
            builder: Any = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
            if not is_folder:
                builder.download_and_prepare(file_format="array_record")
            self._data = builder.as_data_source(split=self._split)
            self._files = [Path(f) for f in builder.info.splits[self._split].filepaths]
        except Exception as e:  # a builder's own code may raise anything
            known = str(e).partition("\nAvailable datasets:")[0]  # the list that follows has a thousand names
            raise UserError(
                f"{path} cannot be opened: {known if known != str(e) else one_line(e)}. It is read without TensorFlow, "
                "from array_record files: prepare it with file_format='array_record', in $TFDS_DATA_DIR or in a folder "
                "given as tfds:/folder/of/the/version:split."
            ) from e
        self.places, self.size = [f"{path} example"], len(self._data)

    def digest(self, cache_dir: Path) -> bytes:
        """Returns the split and the digests of its files."""
        return b"".join([self._split.encode(), *file_digests(self._files, cache_dir)])

    def blocks(self) -> Iterator[Block]:
        """Yields all examples, which are read by whoever calls `Block.records`."""
        for start in range(0, self.size, BLOCK_RECORDS):
            stop = min(start + BLOCK_RECORDS, self.size)
            yield Examples(0, start + 1, stop, self._data, stop + 1)


def _parts(path: str, form: str, at_least: int, at_most: int = 3) -> list[str]:
    parts = re.split(r":(?![^\[]*\])", path)[1:]  # a split may be "train[:10%]"
    if not (at_least <= len(parts) <= at_most and all(parts)):
        raise UserError(f"the source {path!r} must have the form {form}. Fix Source.path.")
    return parts


# ---------------------------------------------------------------------------------------- files
def is_remote(path: str) -> bool:
    """Whether the path is the address of an object in a store or on a server."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def files_of(path: str) -> list[str]:
    """Returns the sorted files that `path` names: a file, a folder or a glob, local or in an object store.

    Raises:
      UserError: It names no file, or one that is not of a kind in READERS.
    """
    found = _remote_files(path) if is_remote(path) else _local_files(path)
    if not found:
        end = "." if is_remote(path) else nearest_path(path, f" from {os.getcwd()}.")
        raise UserError(
            f"the source {path!r} names no file: it is neither a file, nor a folder of {', '.join(READERS)} files, nor "
            f"a glob that matches one{end} Fix Source.path."
        )
    for file in found:
        _kind_of(file)
    return sorted(found)


def _local_files(path: str) -> list[str]:
    there = Path(os.path.expanduser(path))
    if there.is_dir():
        return [str(p) for p in there.iterdir() if p.is_file() and p.name.endswith(tuple(READERS))]
    if there.is_file():  # checked before the glob, since a file's name may contain glob characters
        return [str(there)]
    return [p for p in glob.glob(str(there), recursive=True) if os.path.isfile(p)]


def _remote_files(path: str) -> list[str]:
    with _store_errors(path):
        fs, there = fsspec.core.url_to_fs(path)
        if fs.isfile(there):
            found = [there]
        elif fs.isdir(there):
            found = [p for p in fs.ls(there, detail=False) if fs.isfile(p) and p.endswith(tuple(READERS))]
        else:
            found = [p for p in fs.glob(there) if fs.isfile(p)]
        return [fs.unstrip_protocol(p) for p in found]


def _remote_key(file: str) -> bytes:
    """Returns a key that changes with an object: the version that its store reports (mostly an ETag), or a hash."""
    with _store_errors(file):
        fs, there = fsspec.core.url_to_fs(file)
        known = [str(fs.ukey(there))]
        if "http" in fs.protocol:  # the key of an HTTP object is only its address
            info = fs.info(there)
            versions = [info[k] for k in ("ETag", "Content-MD5", "Digest", "Last-Modified") if k in info]
            if not versions:
                with fs.open(there) as f:
                    return hashlib.file_digest(f, "sha256").digest()
            known += [str(info.get("size")), *versions]
        return hashlib.sha256("\n".join(known).encode()).digest()


def _size(file: str) -> int:
    if not is_remote(file):
        return os.stat(file).st_size
    with _store_errors(file):
        fs, there = fsspec.core.url_to_fs(file)
        return int(fs.size(there) or 0)


@contextmanager
def _store_errors(path: str) -> Iterator[None]:
    """Turns any error of an object store's library into a UserError."""
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
    return io.BufferedReader(fsspec.open(file, "rb").open())  # type: ignore[arg-type]  # readline must accept a limit


# A reader of a kind of file yields the class of a block, the number of its first record, its content, and bytes read.
_Yielded = tuple[Callable[..., Block], int, Any, int]


def _lines(file: str) -> Iterator[_Yielded]:
    """Yields lines as bytes, so that text that is not UTF-8 affects a single line, whose number is known."""
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
        raise UserError(f"{file} cannot be read past line {number}: {one_line(e)}. {COPY_AGAIN}") from e


def _list(file: str) -> Iterator[_Yielded]:
    """Yields the items of one list, decoded while it is read, so that only a block is in memory."""
    number = 0
    items: list[Any] = []
    held = 0
    try:
        with _open(file) as f, io.TextIOWrapper(f, "utf-8-sig", newline="") as text:
            for item, size in JSONListItems(text, BLOCK_BYTES, MAX_LINE):
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


def _rows(file: str) -> Iterator[_Yielded]:
    """Yields the rows of a Parquet file."""
    number = 0
    try:
        # With extensions enabled, a column of Parquet's JSON type is distinguished from one of texts.
        options: Any = {"pre_buffer": False, "buffer_size": PARQUET_BUFFER, "arrow_extensions_enabled": True}
        with _open(file) as f, pq.ParquetFile(f, **options) as table:
            size, total = _size(file), table.metadata.num_rows
            for rows in table.iter_batches(batch_size=BLOCK_RECORDS):
                rows.validate(full=True)  # raises, for example, for text that is not UTF-8
                yield Table, number + 1, rows, size * (number + rows.num_rows) // total
                number += rows.num_rows
    except (OSError, ValueError, pa.ArrowException) as e:
        raise UserError(f"{file} cannot be read past row {number}: {one_line(e)}. {COPY_AGAIN}") from e


# For each kind of file, the name of a record and the function that reads it.
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
    raise UserError(f"{file} is not a kind of file that can be read: its name must end in {', '.join(READERS)}.")


# ---------------------------------------------------------------------------------------- digests
def file_digests(files: Sequence[Path], cache_dir: Path) -> list[bytes]:
    """Hashes files.

    A digest is cached by the file's path, size and time of change. A file that changed in the last seconds is not
    cached, since it may change again within one tick of the file system's clock.

    Args:
      files: local files.
      cache_dir: the folder of the cache.

    Returns:
      The SHA-256 of each file.
    """
    memo = cache_dir / "digests.json"
    try:
        known: dict[str, str] = json.loads(memo.read_text())
    except (OSError, ValueError):  # the cache does not exist yet, or another process is replacing it
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
    """Adds a digest to the cache. The last writer wins; a digest that is lost is computed again."""
    known[key] = digest
    while len(known) > MAX_CACHED_DIGESTS:
        del known[next(iter(known))]
    ours = memo.with_name(f"digests.{os.getpid()}.json")
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        ours.write_text(json.dumps(known))
        ours.replace(memo)
