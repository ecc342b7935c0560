"""The token store: a source's samples as token ids and trained marks, in one memory-mapped Arrow file.

A store lies in the cache under a fingerprint of whatever its content depends on: the records, the tokenizer, the chat
template, the format. It is written beside its place and renamed once whole, so that a half-written store is never
read; a lock lets one process build while others wait. `max_length`, weights and held-out splits are applied later, so
runs that differ in those share a store.

Processes tokenise a block of records each; this one appends what they give, in order, to one Arrow stream. A journal
says how far the stream is sound: a build that was interrupted goes on from there.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import Reader, open_source
from mice_jax.data.sources import find_format
from mice_jax.data.tokenise import SCHEMA, Tokenised, tokenise
from mice_jax.errors import UserError, one_line

VERSION = 2  # of the layout; part of the fingerprint
JOURNAL_EVERY_S = 2.0  # what an interrupted build may have to do again
WAIT_WORD_S = 30.0
READ_AT_ONCE = 16 * 2**20  # bytes of what is there already
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# Called with what has been read (0 to 1) and how many samples there are so far.
Watch = Callable[[float, int], None]


class TokenStore:
    """Read access to a store; arrays are views of the mapped file, nothing is copied."""

    def __init__(self, folder: Path, places: Sequence[str]):
        """`places` are those of the source as it is now: files may have been renamed since the store was built."""
        self._folder, self._places = folder, list(places)
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self._table = table = pa.ipc.open_stream(pa.memory_map(str(folder / "tokens.arrow"))).read_all()
        self._tokens = [c.values.to_numpy(zero_copy_only=True) for c in table["tokens"].chunks]
        self._trained = [c.values.to_numpy(zero_copy_only=True) for c in table["trained"].chunks]
        self._offsets = [c.offsets.to_numpy(zero_copy_only=True) for c in table["tokens"].chunks]
        self._first = np.cumsum([0] + [len(o) - 1 for o in self._offsets])  # first sample of each chunk
        self.lengths = np.concatenate([np.diff(o) for o in self._offsets]).astype(np.int32)
        self.num_trained = np.asarray(table["num_trained"])
        self.content_hashes = np.asarray(table["content_hash"])
        self.flags = np.asarray(table["signs"])

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, list[str]]]:
        """A worker process maps the file itself; nothing is sent to it."""
        return TokenStore, (self._folder, self._places)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        return self._folder.name

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and trained marks (uint8) of sample i."""
        chunk = int(np.searchsorted(self._first, i, side="right")) - 1
        start, stop = self._offsets[chunk][i - self._first[chunk] :][:2]
        return self._tokens[chunk][start:stop], self._trained[chunk][start:stop]

    def num_trained_within(self, most: int) -> np.ndarray:
        """As `num_trained`, of each sample's first `most` tokens alone."""
        counts = self.num_trained.copy()
        for first, offsets, trained in zip(self._first, self._offsets, self._trained, strict=False):
            (cut,) = np.nonzero(np.diff(offsets) > most)
            if len(cut):
                spans = np.stack([offsets[cut] + 1, offsets[cut] + most], axis=1).ravel()
                # Of a span without a token, reduceat gives the token at its start.
                counts[first + cut] = np.add.reduceat(trained, spans, dtype=np.int32)[::2] if most > 1 else 0
        return counts

    def where(self, i: int) -> str:
        """Where sample i came from: `a.jsonl line 12`."""
        place, number = (self._table[name][i].as_py() for name in ("place", "number"))
        return f"{self._places[place]} {number}"


def build_store(
    path: str,
    *,
    format: str,
    encoder: ChatEncoder,
    skip_bad: bool,
    cache_dir: Path,
    workers: int = 1,
    say: Callable[[str], None] = lambda text: None,
    watch: Watch = lambda done, samples: None,
) -> TokenStore:
    """The store of what `path` names, built first where the cache lacks it.

    Args:
      format: as in `Source.format`; another one is taken, and said, where the records leave no doubt.
      skip_bad: count bad records instead of stopping at the first.
      workers: processes that tokenise; they change nothing but the time it takes.
      say: is told in a sentence what the user should know.
      watch: is told how far the tokenising is.

    Raises UserError for a bad record (unless `skip_bad`), and for a source without a sample.
    """
    reader = open_source(path)
    format, detected = find_format(path, reader, format)
    if detected:
        say(detected)
    key = _fingerprint(reader.digest(cache_dir), format, encoder, skip_bad)
    folder = cache_dir / key
    try:
        if not (folder / "meta.json").exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _lock(cache_dir / f"{key}.lock", what=f"the token store of {path}"):
                if not (folder / "meta.json").exists():
                    partial = cache_dir / f"{key}.partial"
                    _write(partial, path, reader, format, encoder, skip_bad, workers, say, watch)
                    shutil.rmtree(folder, ignore_errors=True)  # without a meta.json it is no store
                    partial.rename(folder)
    except OSError as e:  # a full disk, a folder that may not be written
        raise UserError(
            f"the token store of {path} cannot be built in {cache_dir}: {one_line(e)}. Make room there, or set "
            "data.cache_dir (or $MICE_JAX_CACHE) to a folder that can be written; what is done is gone on with."
        ) from e
    return TokenStore(folder, reader.places)


# ---------------------------------------------------------------------------------------- writing
@dataclass
class _Progress:
    """How far the stream of a store is sound: one line of its journal."""

    blocks: int = 0
    end: int = 0  # bytes
    crc: int = 0  # of all of them
    samples: int = 0
    tokens: int = 0
    bad: dict[str, int] = field(default_factory=dict)


def _write(
    folder: Path,
    path: str,
    reader: Reader,
    format: str,
    encoder: ChatEncoder,
    skip_bad: bool,
    workers: int,
    say: Callable[[str], None],
    watch: Watch,
) -> None:
    """The whole store in `folder`, going on where an interrupted build left it."""
    progress = _recover(folder)
    if progress.blocks:
        say(f"going on with the token store of {path}: {progress.samples:,} samples were tokenised before")
    with (folder / "tokens.arrow").open("ab") as stream, (folder / "journal.jsonl").open("a") as journal:
        if not progress.end:
            _extend(stream, progress, SCHEMA.serialize().to_pybytes())
        written = time.monotonic()
        try:
            blocks = tokenise(reader, encoder, format, skip_bad, skip=progress.blocks, workers=workers)
            for done, block in blocks:
                _append(stream, progress, block)
                watch(done, progress.samples)
                if time.monotonic() > written + JOURNAL_EVERY_S:
                    _note(stream, journal, progress)
                    written = time.monotonic()
        finally:
            _note(stream, journal, progress)
        stream.write(END_OF_STREAM)
        stream.flush()
        os.fsync(stream.fileno())  # before it gets its name: a store that has one is whole
    if not progress.samples:
        skipped = f": all {sum(progress.bad.values())} records are bad ({progress.bad})" if progress.bad else ""
        shutil.rmtree(folder)
        raise UserError(f"{path} holds no sample{skipped}. A source needs at least one record with a sample.")
    meta = {
        "version": VERSION,
        "path": path,
        "format": format,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "bad_lines": progress.bad,
    }
    (folder / "journal.jsonl").unlink()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _append(stream: BinaryIO, progress: _Progress, block: Tokenised) -> None:
    progress.blocks += 1
    _extend(stream, progress, block.batch)
    progress.samples += block.samples
    progress.tokens += block.tokens
    progress.bad = dict(Counter(progress.bad) + Counter(block.bad))


def _extend(stream: BinaryIO, progress: _Progress, data: bytes) -> None:
    progress.end += stream.write(data)
    progress.crc = zlib.crc32(data, progress.crc)


def _note(stream: BinaryIO, journal: Any, progress: _Progress) -> None:
    """Writes down what the stream holds; whether that reached the disk, its checksum tells."""
    stream.flush()
    journal.write(json.dumps(asdict(progress)) + "\n")
    journal.flush()


def _recover(folder: Path) -> _Progress:
    """What an interrupted build left, its stream cut where the journal says it is sound; else an empty folder."""
    stream, journal = folder / "tokens.arrow", folder / "journal.jsonl"
    progress = _Progress()
    try:
        with stream.open("rb") as f:
            crc = 0
            for line in journal.read_text().splitlines():
                noted = _Progress(**json.loads(line))
                while some := f.read(min(READ_AT_ONCE, max(0, noted.end - f.tell()))):
                    crc = zlib.crc32(some, crc)
                if f.tell() != noted.end or crc != noted.crc:
                    break
                progress = noted
    except (OSError, ValueError, TypeError):  # nothing there, or its last line is cut short
        pass
    if progress.end:
        os.truncate(stream, progress.end)
        journal.write_text(json.dumps(asdict(progress)) + "\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    return progress


def _fingerprint(digest: bytes, format: str, encoder: ChatEncoder, skip_bad: bool) -> str:
    depends_on = f"{VERSION}\n{format}\n{skip_bad}\n{encoder.fingerprint()}\n".encode()
    return hashlib.sha256(depends_on + digest).hexdigest()[:24]


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Holds a file lock, which the system releases with the process; says so while it has to wait."""
    with path.open("a") as file:
        began = said = time.monotonic()
        while not _try_lock(file, path):
            now = time.monotonic()
            if began == said or now > said + WAIT_WORD_S:
                waited = f" ({now - began:.0f} s)" if said > began else ""
                print(f"waiting for another process, which builds {what}{waited}", file=sys.stderr, flush=True)
                said = now
            time.sleep(0.1)
        yield


def _try_lock(file: Any, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        raise UserError(
            f"the file system of {path.parent} has no locks ({e.strerror}), without which two processes could write "
            "one store. Set data.cache_dir (or $MICE_JAX_CACHE) to another one, such as the host's own disk."
        ) from e
    return True
