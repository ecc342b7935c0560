"""Integrity manifests of checkpoints: the size and the CRC-32 of every file, to detect damage before restoring."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mice_jax.storage.paths import RunPath, list_objects, write_atomically

MANIFEST = "manifest.json"
READ_BYTES = 1 << 24


def write_manifest(folder: RunPath) -> None:
    """Records the files of a committed checkpoint."""
    write_atomically(folder / MANIFEST, json.dumps({"files": _digests(folder)}))


def verify(folder: RunPath, item: str = "") -> str | None:
    """Compares a checkpoint's files with its manifest.

    A process that is killed between a save and its manifest leaves a checkpoint without a manifest. Damage to it is
    only found when it is read.

    Args:
        folder: The checkpoint.
        item: The folder in it whose files are compared, such as "params"; all files by default.

    Returns:
        A description of the first difference, or None if the files agree or there is no manifest.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        expected = json.loads(file.read_text())["files"]
        expected = {name: digest for name, digest in expected.items() if name.startswith(f"{item}/" if item else "")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    found = _digests(folder, item)
    missing = sorted(expected.keys() - found)
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, crc) in expected.items():
        if found[name][0] != size:
            return f"{name} has {found[name][0]:,} bytes, not {size:,}"
        if found[name][1] != crc:
            return f"{name} has other bytes than were written"
    return None


def fingerprint(folder: RunPath) -> dict[str, list[Any]]:
    """Returns a checkpoint's files with their sizes and checksums, which identify it."""
    file = folder / MANIFEST
    return json.loads(file.read_text())["files"] if file.exists() else _digests(folder)


def _digests(folder: RunPath, item: str = "") -> dict[str, list[Any]]:
    """Returns the size and CRC-32 of each file by its path in the folder; in a bucket, the store's own checksum.

    Args:
        folder: The checkpoint.
        item: The folder in it whose files are read, where it is no bucket; all files by default.
    """
    if not isinstance(folder, Path):
        return {name: list(known) for name, known in list_objects(folder).items() if name != MANIFEST}
    not_data = (MANIFEST, f".{MANIFEST}.partial")
    files = [p for p in sorted((folder / item).rglob("*")) if p.is_file() and p.name not in not_data]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # crc32 releases the interpreter's lock
        return {str(p.relative_to(folder)): d for p, d in zip(files, threads.map(_digest, files), strict=True)}


def _digest(file: Path) -> list[Any]:
    size = crc = 0
    with file.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
