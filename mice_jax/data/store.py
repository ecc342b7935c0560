"""The token store: a source's samples as token ids and trained marks, in one memory-mapped Arrow file.

A store lies in the cache under a fingerprint of whatever its content depends on: the bytes of the files, the
tokenizer, the chat template, the format. It is written beside its place and renamed once whole, so that a
half-written store is never read; a lock lets one process build while others wait. `max_length`, weights and
held-out splits are applied later, so runs that differ in those share a store.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import Sample, files_of, read_samples
from mice_jax.errors import UserError

VERSION = 1  # of the layout and of the encoding; part of the fingerprint
ENCODE_AT_ONCE = 2048  # samples a record batch

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),  # 1 = this token is trained on
        ("content_hash", pa.uint64()),  # of the sample as read: decides what is held out
    ]
)


class TokenStore:
    """Read access to a store; arrays are views of the mapped file, nothing is copied."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        table = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow"))).read_all()
        self._tokens = [c.values.to_numpy(zero_copy_only=True) for c in table["tokens"].chunks]
        self._trained = [c.values.to_numpy(zero_copy_only=True) for c in table["trained"].chunks]
        offsets = [c.offsets.to_numpy(zero_copy_only=True) for c in table["tokens"].chunks]
        self._offsets = offsets
        self._first = np.cumsum([0] + [len(o) - 1 for o in offsets])  # first sample of each chunk
        self.content_hashes = np.asarray(table["content_hash"])
        self.lengths = _joined([np.diff(o) for o in offsets], np.int32)
        self.num_trained = _joined(list(map(_count_trained, self._trained, offsets)), np.int32)

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        """A worker process maps the file itself; nothing is sent to it."""
        return TokenStore, (self._folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and trained marks (uint8) of sample i."""
        chunk = int(np.searchsorted(self._first, i, side="right")) - 1
        start, stop = self._offsets[chunk][i - self._first[chunk] :][:2]
        return self._tokens[chunk][start:stop], self._trained[chunk][start:stop]


def build_store(path: str, *, format: str, encoder: ChatEncoder, skip_bad: bool, cache_dir: Path) -> TokenStore:
    """The store of the files that `path` names, built first where the cache lacks it.

    Raises UserError for a bad line (unless `skip_bad`, which counts it), and for files without a sample.
    """
    files = files_of(path)
    key = _fingerprint(files, format, encoder, skip_bad)
    folder = cache_dir / key
    if not (folder / "meta.json").exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{key}.lock", what=f"the token store of {path}"):
            if not (folder / "meta.json").exists():
                partial = cache_dir / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # left by a process that died
                partial.mkdir()
                _write(partial, path, files, format, encoder, skip_bad)
                partial.rename(folder)
    return TokenStore(folder)


def default_cache_dir() -> Path:
    """$MICE_JAX_CACHE, or mice_jax in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MICE_JAX_CACHE") or Path(base) / "mice_jax")


def _write(
    folder: Path,
    path: str,
    files: Sequence[Path],
    format: str,
    encoder: ChatEncoder,
    skip_bad: bool,
) -> None:
    bad: Counter[str] | None = Counter() if skip_bad else None
    samples, tokens = 0, 0
    with (
        pa.OSFile(str(folder / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for group in _groups(read_samples(files, format, bad), ENCODE_AT_ONCE):
            encoded = encoder.encode(group)
            ids = [e.ids for e in encoded]
            columns = [
                _list_array(ids, pa.int32()),
                _list_array([e.trained for e in encoded], pa.uint8()),
                pa.array([_content_hash(s) for s in group], pa.uint64()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            samples, tokens = samples + len(group), tokens + sum(map(len, ids))
    if not samples:
        skipped = f": all {sum(bad.values())} lines are bad ({dict(bad)})" if bad else ""
        raise UserError(f"{path} holds no sample{skipped}. A source needs at least one line with a sample.")
    meta = {
        "version": VERSION,
        "files": [str(f) for f in files],
        "format": format,
        "samples": samples,
        "tokens": tokens,
        "bad_lines": dict(bad or {}),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _fingerprint(files: Sequence[Path], format: str, encoder: ChatEncoder, skip_bad: bool) -> str:
    digest = hashlib.sha256(f"{VERSION}\n{format}\n{skip_bad}\n{encoder.fingerprint()}\n".encode())
    for file in files:
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:24]


def _content_hash(sample: Sample) -> int:
    text = json.dumps([sample.messages, sample.tools, sample.unmask], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _count_trained(trained: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Trained tokens of each sample that can be predicted: all but a trained first token."""
    sums = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    first = trained[offsets[:-1]] if len(trained) else np.zeros(0, np.int64)
    return np.diff(sums[offsets]) - first


def _list_array(arrays: Sequence[np.ndarray], dtype: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(a) for a in arrays], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), dtype))


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype)


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Holds a file lock, which the system releases with the process; says so when it has to wait."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which builds {what}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
