"""The token store: a source's samples as token ids and masks, in one memory-mapped Arrow file.

A store's folder in the cache is named by a fingerprint of all that its content depends on: the records, the tokenizer,
the chat template and the format. It is written under another name and renamed when it is complete, so that a partial
store is never read; a lock lets one process build while others wait. `max_length`, weights and held-out splits are
applied later, so runs that differ in those share a store.

Worker processes tokenise one block of records each, and the main process appends their results, in order, to one Arrow
stream. A journal records how much of the stream is valid, and an interrupted build continues from there.
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

from mice_jax.data.bad_records import BadRecord, BadRecords, BadRecordsError
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import open_source
from mice_jax.data.sample_notes import NoteCounter
from mice_jax.data.sources import find_format
from mice_jax.data.tokenise import SCHEMA, TokenisationJob, TokenisedBlock, tokenise
from mice_jax.errors import UserError, one_line

VERSION = 3  # of the layout; part of the fingerprint
JOURNAL_EVERY_S = 2.0  # the time whose work an interrupted build may have to repeat
WAIT_NOTICE_EVERY_S = 30.0
CHECKSUM_CHUNK_BYTES = 16 * 2**20
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# Called with the fraction of the source that has been read (0 to 1), and the number of samples so far.
ProgressCallback = Callable[[float, int], None]


class TokenStore:
    """Read access to a store; its arrays are views of the mapped file, without a copy."""

    def __init__(self, folder: Path, places: Sequence[str]):
        """Maps the store in `folder`.

        Args:
          folder: of a complete store.
          places: the places of the source as they are now; files may have been renamed since the store was built.
        """
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
        """A worker process maps the file itself instead of receiving the arrays."""
        return TokenStore, (self._folder, self._places)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """The key of the store, which identifies its samples."""
        return self._folder.name

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [n]) and mask of trained tokens (uint8 [n]) of sample i."""
        chunk = int(np.searchsorted(self._first, i, side="right")) - 1
        start, stop = self._offsets[chunk][i - self._first[chunk] :][:2]
        return self._tokens[chunk][start:stop], self._trained[chunk][start:stop]

    def num_trained_within(self, most: int) -> np.ndarray:
        """As `num_trained`, for the first `most` tokens of each sample; int32 [samples]."""
        counts = self.num_trained.copy()
        for first, offsets, trained in zip(self._first, self._offsets, self._trained, strict=False):
            (cut,) = np.nonzero(np.diff(offsets) > most)
            if len(cut):
                spans = np.stack([offsets[cut] + 1, offsets[cut] + most], axis=1).ravel()
                # For an empty span, reduceat returns the element at its start.
                counts[first + cut] = np.add.reduceat(trained, spans, dtype=np.int32)[::2] if most > 1 else 0
        return counts

    def notes(self) -> dict[str, dict[str, Any]]:
        """What the encoding left out or changed, by name: `count`, `first` (a place) and `example`."""
        return {
            name: {"count": n["count"], "first": f"{self._places[n['place']]} {n['number']}", "example": n["example"]}
            for name, n in self.meta["notes"].items()
        }

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
    log: Callable[[str], None] = lambda text: None,
    watch: ProgressCallback = lambda done, samples: None,
) -> TokenStore:
    """Opens the store of a source, and builds it first where the cache lacks it.

    Args:
      path: of the source, as in `Source.path`.
      format: as in `Source.format`; another format is used, and reported, where the first record shows it clearly.
      encoder: turns samples into ids and masks.
      skip_bad: whether bad records are counted instead of being an error.
      cache_dir: the folder of all stores.
      workers: number of processes that tokenise; it has no influence on the store.
      log: called with each sentence that the user should read.
      watch: called with the progress of tokenisation.

    Returns:
      The store.

    Raises:
      UserError: a record is bad (unless `skip_bad`), the source has no sample, or the store cannot be written.
    """
    reader = open_source(path)
    format, detected = find_format(path, reader, format)
    if detected:
        log(detected)
    job = TokenisationJob(path, reader, encoder, format, skip_bad, workers)
    key = _fingerprint(reader.digest(cache_dir), format, encoder, skip_bad)
    folder = cache_dir / key
    try:
        if not (folder / "meta.json").exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _lock(cache_dir / f"{key}.lock", what=f"the token store of {path}"):
                if not (folder / "meta.json").exists():
                    partial = cache_dir / f"{key}.partial"
                    _write(partial, job, log, watch)
                    shutil.rmtree(folder, ignore_errors=True)  # a folder without meta.json is not a store
                    partial.rename(folder)
    except OSError as e:  # such as a full disk, or a folder without write permission
        raise UserError(
            f"the token store of {path} cannot be built in {cache_dir}: {one_line(e)}. Free some space there, or set "
            "data.cache_dir (or $MICE_JAX_CACHE) to a writable folder. A new build in this folder continues from here."
        ) from e
    return TokenStore(folder, reader.places)


# ---------------------------------------------------------------------------------------- writing
@dataclass
class _Progress:
    """How much of a store's stream is valid: one line of its journal."""

    blocks: int = 0
    end: int = 0  # in bytes
    crc: int = 0  # checksum of the first `end` bytes
    samples: int = 0
    tokens: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # by reason
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `NoteCounter.found`


def _write(folder: Path, job: TokenisationJob, log: Callable[[str], None], watch: ProgressCallback) -> None:
    """Writes the complete store into `folder`, from where an interrupted build ended."""
    progress = _recover(folder)
    if progress.blocks:
        log(f"continuing the token store of {job.path}: {progress.samples:,} samples were tokenised before")
    with (folder / "tokens.arrow").open("ab") as stream, (folder / "journal.jsonl").open("a") as journal:
        if not progress.end:
            _extend(stream, progress, SCHEMA.serialize().to_pybytes())
        written = time.monotonic()
        bad, ended = BadRecords(), ""
        skipped: BadRecord | None = None  # the first one
        try:
            for done, block in tokenise(job, skip=progress.blocks):
                if bad or (block.bad and not job.skip_bad):
                    bad.merge(block.bad)
                    watch(done, progress.samples)
                    continue
                skipped = skipped or next(iter(block.bad.first), None)
                _append(stream, progress, block)
                watch(done, progress.samples)
                if time.monotonic() > written + JOURNAL_EVERY_S:
                    _note(stream, journal, progress)
                    written = time.monotonic()
        except UserError as e:  # what the source holds before its damaged part is wrong too
            if not bad:
                raise
            ended = f" Besides, {e}"
        finally:
            _note(stream, journal, progress)
        if bad:
            raise BadRecordsError(bad, ended)
        stream.write(END_OF_STREAM)
        stream.flush()
        os.fsync(stream.fileno())  # before the folder is renamed, so that every store with its name is complete
    if not progress.samples:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in progress.bad.items())
        why = f": all {sum(progress.bad.values()):,} records are bad ({reasons})" if reasons else ": it has no records"
        first = f" The first: {skipped.sentence()}" if skipped else ""
        shutil.rmtree(folder)
        raise UserError(f"{job.path} holds no sample{why}.{first} A source needs at least one record with a sample.")
    meta = {
        "version": VERSION,
        "path": job.path,
        "format": job.format,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "bad_lines": progress.bad,
        "notes": progress.notes,
    }
    (folder / "journal.jsonl").unlink()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _append(stream: BinaryIO, progress: _Progress, block: TokenisedBlock) -> None:
    progress.blocks += 1
    _extend(stream, progress, block.batch)
    progress.samples += block.samples
    progress.tokens += block.tokens
    progress.bad = dict(Counter(progress.bad) + block.bad.counts)
    notes = NoteCounter(progress.notes)
    notes.merge(block.notes)


def _extend(stream: BinaryIO, progress: _Progress, data: bytes) -> None:
    progress.end += stream.write(data)
    progress.crc = zlib.crc32(data, progress.crc)


def _note(stream: BinaryIO, journal: Any, progress: _Progress) -> None:
    """Adds a line to the journal; its checksum will show whether the stream itself reached the disk."""
    stream.flush()
    journal.write(json.dumps(asdict(progress)) + "\n")
    journal.flush()


def _recover(folder: Path) -> _Progress:
    """Truncates what an interrupted build left to its valid part; where there is none, leaves an empty folder."""
    stream, journal = folder / "tokens.arrow", folder / "journal.jsonl"
    progress = _Progress()
    try:
        with stream.open("rb") as f:
            crc = 0
            for line in journal.read_text().splitlines():
                noted = _Progress(**json.loads(line))
                while chunk := f.read(min(CHECKSUM_CHUNK_BYTES, max(0, noted.end - f.tell()))):
                    crc = zlib.crc32(chunk, crc)
                if f.tell() != noted.end or crc != noted.crc:
                    break
                progress = noted
    except (OSError, ValueError, TypeError):  # there is no journal, or its last line is incomplete
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
    """Holds a file lock, which the system releases when the process ends; prints a notice while it waits."""
    with path.open("a") as file:
        began = noticed = time.monotonic()
        while not _try_lock(file, path):
            now = time.monotonic()
            if began == noticed or now > noticed + WAIT_NOTICE_EVERY_S:
                waited = f" ({now - began:.0f} s)" if noticed > began else ""
                print(f"waiting for another process, which builds {what}{waited}", file=sys.stderr, flush=True)
                noticed = now
            time.sleep(0.1)
        yield


def _try_lock(file: Any, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        raise UserError(
            f"the file system of {path.parent} has no locks ({e.strerror}), so two processes could write one store at "
            "once. Set data.cache_dir (or $MICE_JAX_CACHE) to a folder on another one, such as the host's own disk."
        ) from e
    return True
