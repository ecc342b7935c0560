"""A run's folder by its name: a folder of this machine, or one of a bucket (gs://), which knows whole objects only.

A path in a bucket is etils.epath's, as orbax's are. Its small files are worked on in a copy here: see Workdir.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from etils import epath

from mice_jax.errors import StoreError, UserError, one_line

RunPath = Path | epath.Path
# Other processes write there too: a listing that is kept, as etils' own file system would, is soon wrong.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
NOT_MIRRORED = ("checkpoints", "tensorboard")  # what of a run's folders is not fetched
MIN_APPEND_BYTES = 1 << 20  # bytes of an object from which on only what was added to it is sent


def parse_path(name: str) -> RunPath:
    """The place that a name stands for; UserError where it is a bucket that cannot be reached, or another kind."""
    scheme, sign, _ = name.partition("://")
    if not sign:
        return Path(name)
    if scheme != "gs":
        raise UserError(
            f"{name} is in a {scheme}:// store: a run's folder can be on disk or in a gs:// bucket. Give one of these, "
            "or mount the store."
        )
    place = epath.Path(name)
    try:
        list_folder(*filesystem(place))
    except ImportError as e:
        raise UserError(f"{name} needs the package gcsfs: pip install 'mice_jax[gcs]' ({one_line(e)}).") from e
    except Exception as e:  # each store, and each way to its keys, raises its own
        raise StoreError(f"{name} cannot be reached: {one_line(e)}.") from e
    return place


def is_remote(place: RunPath) -> bool:
    return not isinstance(place, Path)


def write_atomically(file: RunPath, text: str) -> None:
    """Writes a file whole or not at all, as a bucket does by itself."""
    if isinstance(file, Path):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text)
        partial.replace(file)
    else:
        file.write_text(text)


def move(folder: RunPath, to: RunPath) -> None:
    """Gives a folder another name; in a bucket object by object, so a move that is cut short leaves some in each."""
    if isinstance(folder, Path):
        to.parent.mkdir(exist_ok=True)
        folder.rename(to)
    else:
        fs, root = filesystem(folder)
        fs.mv(root, filesystem(to)[1], recursive=True)


def list_objects(folder: RunPath) -> dict[str, tuple[int, str]]:
    """For each object of a bucket's folder, by its name in there, its size and the store's own checksum of it."""
    fs, root = filesystem(folder)
    try:
        found = fs.find(root, detail=True)
    except Exception as e:
        raise StoreError(f"{folder} cannot be listed: {one_line(e)}.") from e
    return {
        os.path.relpath(name, root): (int(info["size"] or 0), str(info.get("crc32c", "")))
        for name, info in found.items()
        if not name.endswith("/")
    }


def download_small_files(place: RunPath) -> Path:
    """A new folder here with a run's small files; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="mice_jax_run_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy_small_files(place, folder)
    return folder


def copy_small_files(place: RunPath, folder: Path) -> None:
    """Copies a run's small files from a bucket into a folder; StoreError where it cannot be read."""
    fs, root = filesystem(place)
    try:
        for name in sorted(_small(fs, root)):
            file = folder / os.path.relpath(name, root)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fs.cat_file(name))
    except Exception as e:
        raise StoreError(f"{place} cannot be read: {one_line(e)}.") from e


def list_folder(fs: Any, root: str) -> list[dict[str, Any]]:
    """What a bucket's folder holds. None is no folder; a store that is down raises, where `exists` would say no."""
    try:
        return fs.ls(root, detail=True)
    except FileNotFoundError:
        return []


def upload(place: RunPath, file: str, content: bytes, there: int) -> None:
    """Writes an object of a folder, of which the first `there` bytes are there already, 0 where they are not.

    Where that is much, only what is new is sent, and the store puts it behind the rest. It does so to the generation
    that was looked at alone, so a request that is sent twice adds nothing twice.
    """
    fs, root = filesystem(place)
    name = f"{root}/{file}"
    known = fs.info(name) if there >= MIN_APPEND_BYTES else {}
    if not known or int(known["size"]) != there:
        fs.pipe_file(name, content)
        return
    bucket, key, _ = fs.split_path(name)
    more = fs.split_path(f"{root}/.more")[1]
    fs.pipe_file(f"{root}/.more", content[there:])
    parts = {
        "sourceObjects": [{"name": key}, {"name": more}],
        "destination": {"contentType": "application/octet-stream"},
    }
    fs.call("POST", "b/{}/o/{}/compose", bucket, key, ifGenerationMatch=known["generation"], json=parts)
    fs.rm_file(f"{root}/.more")


def _small(fs: Any, root: str) -> list[str]:
    """The objects of a folder and of those below that are not among NOT_SMALL, which may hold thousands."""
    names: list[str] = []
    for entry in list_folder(fs, root):
        name = entry["name"].rstrip("/")
        if entry["type"] == "file":
            names.append(name)
        elif name != root and os.path.basename(name) not in NOT_MIRRORED:
            names += _small(fs, name)
    return names


def filesystem(place: RunPath) -> tuple[Any, str]:
    """fsspec's file system of a bucket's path, which remembers no listing, and the path in it."""
    fs, path = fsspec.core.url_to_fs(str(place))
    fs.invalidate_cache()
    return fs, path.rstrip("/")
