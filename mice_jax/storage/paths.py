"""Paths of workdirs: a directory of this machine or a prefix of a bucket (gs://), which stores whole objects only.

A path in a bucket is an etils epath, as in orbax. Workdir works on a local copy of the small files of such a run.
"""

import atexit
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from etils import epath

from mice_jax.errors import StoreError, UserError, install_command, one_line

RunPath = Path | epath.Path
# Other processes write to the bucket too, so a cached listing, which etils' file system would use, is soon stale.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
NOT_MIRRORED = ("checkpoints", "tensorboard")  # directories of a run that are not downloaded
MIN_APPEND_BYTES = 1 << 20  # only the new bytes are uploaded if an object is at least this large


def parse_path(name: str) -> RunPath:
    """Returns the path that `name` denotes, after checking that a bucket can be reached.

    Raises:
        UserError: if it is in another kind of store, or gcsfs is not installed.
        StoreError: if the bucket cannot be reached.
    """
    check_store(name)
    if "://" not in name:
        return Path(name)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of what is raised here
    path = epath.Path(name)
    try:
        list_folder(*filesystem(path))
    except Exception as e:  # each store and each kind of credentials has different exceptions
        raise StoreError(f"{name} cannot be reached: {one_line(e)}.") from e
    return path


def check_store(name: str) -> None:
    """Raises UserError where a path is in a store that cannot hold a workdir, or the store's package is missing."""
    scheme, separator, _ = name.partition("://")
    if separator and scheme != "gs":
        raise UserError(
            f"{name} is in a {scheme}:// store, but a workdir can be on disk or in a gs:// bucket only. Give one of "
            "these, or mount the store."
        )
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} needs the package gcsfs: {install_command('gcs')}.")


def is_remote(path: RunPath) -> bool:
    """Whether the path is in a bucket."""
    return not isinstance(path, Path)


def write_atomically(file: RunPath, text: str) -> None:
    """Writes a file so that readers see all of it or none of it, as is always the case in a bucket."""
    if isinstance(file, Path):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text)
        partial.replace(file)
    else:
        file.write_text(text)


def move(folder: RunPath, to: RunPath) -> None:
    """Renames a folder. A bucket moves object by object, so an interrupted move leaves some objects in each place."""
    if isinstance(folder, Path):
        to.parent.mkdir(exist_ok=True)
        folder.rename(to)
    else:
        fs, root = filesystem(folder)
        fs.mv(root, filesystem(to)[1], recursive=True)


def list_objects(folder: RunPath) -> dict[str, tuple[int, str]]:
    """Returns the size and the store's checksum of each object below a folder of a bucket, by its relative name.

    Raises:
        StoreError: if the folder cannot be listed.
    """
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


def download_small_files(path: RunPath) -> Path:
    """Copies a run's small files into a temporary directory, which is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mice_jax_run_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy_small_files(path, folder)
    return folder


def copy_small_files(path: RunPath, folder: Path) -> None:
    """Copies a run's small files from a bucket into a local folder.

    Raises:
        StoreError: if the bucket cannot be read.
    """
    fs, root = filesystem(path)
    try:
        for name in sorted(_small_objects(fs, root)):
            file = folder / os.path.relpath(name, root)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fs.cat_file(name))
    except Exception as e:
        raise StoreError(f"{path} cannot be read: {one_line(e)}.") from e


def list_folder(fs: Any, root: str) -> list[dict[str, Any]]:
    """Returns the entries of a folder of a bucket, empty if it does not exist; unlike `exists`, raises on an outage."""
    try:
        return fs.ls(root, detail=True)
    except FileNotFoundError:
        return []


def upload(path: RunPath, file: str, content: bytes, present_bytes: int) -> None:
    """Writes an object of a folder of a bucket.

    A large object that has only grown is not sent again. Its new bytes become a separate object, which the store
    composes with the old one. The store composes only the generation that was read, so that a repeated request does
    not append the bytes twice.

    Args:
        path: the folder.
        file: name of the object below it.
        content: all bytes of the object.
        present_bytes: number of leading bytes that the object in the store is known to have; 0 writes all of it.
    """
    fs, root = filesystem(path)
    name = f"{root}/{file}"
    known = fs.info(name) if present_bytes >= MIN_APPEND_BYTES else {}
    if not known or int(known["size"]) != present_bytes:
        fs.pipe_file(name, content)
        return
    bucket, key, _ = fs.split_path(name)
    more = fs.split_path(f"{root}/.more")[1]
    fs.pipe_file(f"{root}/.more", content[present_bytes:])
    parts = {
        "sourceObjects": [{"name": key}, {"name": more}],
        "destination": {"contentType": "application/octet-stream"},
    }
    fs.call("POST", "b/{}/o/{}/compose", bucket, key, ifGenerationMatch=known["generation"], json=parts)
    fs.rm_file(f"{root}/.more")


def _small_objects(fs: Any, root: str) -> list[str]:
    """Returns the objects below a folder except for those in NOT_MIRRORED, which may hold thousands."""
    names: list[str] = []
    for entry in list_folder(fs, root):
        name = entry["name"].rstrip("/")
        if entry["type"] == "file":
            names.append(name)
        elif name != root and os.path.basename(name) not in NOT_MIRRORED:
            names += _small_objects(fs, name)
    return names


def filesystem(path: RunPath) -> tuple[Any, str]:
    """Returns the fsspec file system of a path in a bucket, with an empty listing cache, and the path inside it."""
    fs, root = fsspec.core.url_to_fs(str(path))
    fs.invalidate_cache()
    return fs, root.rstrip("/")
