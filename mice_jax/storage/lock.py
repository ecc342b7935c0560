"""The lock of a workdir: one process writes at a time, and the lock of a dead process is taken over."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from etils import epath

from mice_jax.errors import StoreError, UserError, one_line
from mice_jax.storage.paths import RunPath, filesystem

FILE = "lock"  # of a folder; it names the process that holds it, or held it last
HEARTBEAT_S = 10.0  # how often the holder of a bucket's lock writes its heartbeat object
DEAD_AFTER_S = 60.0  # a holder without a heartbeat for this long is dead
POLL_S = 1.0
RELEASE_TIMEOUT_S = 5.0  # how long `release` waits for a heartbeat that is being written, as the store may be down


def acquire(path: RunPath, log: Callable[[str], None]) -> "FolderLock | BucketLock":
    """Locks a workdir for this process.

    Args:
        path: the workdir.
        log: receives what a user who waits for the lock of a bucket should know.

    Returns:
        The lock, which the caller releases.

    Raises:
        UserError: if a live process holds the lock, or the workdir cannot be written.
    """
    return FolderLock(path) if isinstance(path, Path) else BucketLock(path, log)


def _locked_error(path: RunPath, holder: str) -> UserError:
    return UserError(
        f"--workdir={path} is being written by another live process ({holder}). Wait for it, end it, or give another "
        "--workdir."
    )


class FolderLock:
    """A lock on a file, which the system releases when the process ends."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / FILE).open("a+")
        except OSError as e:
            raise UserError(
                f"--workdir={folder} cannot be written: {e.strerror}. Give a folder in a place where you may write."
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise _locked_error(folder, holder) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file: TextIO = file

    def check(self) -> None:
        """Does nothing: no other process can take a lock on a file."""

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()


class BucketLock:
    """An object that names its holder, and a heartbeat object that the holder rewrites every HEARTBEAT_S.

    The store lets only one of two processes create the lock. Nobody overwrites it, and it is removed only if it still
    has the generation that was looked at; a holder that was wrongly assumed dead finds the other's name there and
    stops. The lock may be taken over once the heartbeat has not changed for DEAD_AFTER_S, so the clocks of the
    machines do not matter. If the holder was a process of this machine, its death is known at once.
    """

    def __init__(self, folder: epath.Path, log: Callable[[str], None]):
        self._folder, self._id, self._beats = folder, uuid.uuid4().hex, 0
        self._fs, root = filesystem(folder)
        self._object = f"{root}/lock"
        self._done = threading.Event()
        try:
            while not self._create():
                self._break_stale_lock(log)
            self._heartbeat()
        except UserError:
            raise
        except Exception as e:
            raise StoreError(f"--workdir={folder} cannot be written: {one_line(e)}.") from e
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Asks the store who holds the lock, since this process may have been suspended between two heartbeats.

        Raises:
            UserError: if another process has taken the lock over.
            StoreError: if the store cannot be read.
        """
        try:
            _, holder = self._read_lock()
        except Exception as e:
            raise StoreError(f"--workdir={self._folder} cannot be read: {one_line(e)}.") from e
        if holder.get("id") != self._id:
            raise UserError(
                f"--workdir={self._folder} has been taken by another process ({_describe(holder)}), because this one "
                f"had sent no heartbeat for {DEAD_AFTER_S:.0f} s. This process stops; the run belongs to that one."
            )

    def release(self) -> None:
        """Stops the heartbeat and removes the lock, if this process still holds it."""
        self._done.set()
        self._thread.join(RELEASE_TIMEOUT_S)
        generation, holder = self._read_lock()
        if holder.get("id") == self._id:
            self._remove_lock(generation)
        self._remove(self._heartbeat_object(self._id))

    def _heartbeat_object(self, holder: object) -> str:
        """The name of the heartbeat object of a holder."""
        return f"{self._object}.{holder}"

    def _create(self) -> bool:
        try:
            self._fs.pipe_file(self._object, json.dumps(_this_process() | {"id": self._id}).encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def _heartbeat(self) -> None:
        self._beats += 1
        self._fs.pipe_file(self._heartbeat_object(self._id), str(self._beats).encode())

    def _read(self, name: str) -> bytes:
        """Returns the content of an object; empty if the object does not exist."""
        try:
            return self._fs.cat_file(name)
        except FileNotFoundError:
            return b""

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(name)

    def _remove_lock(self, generation: str) -> None:
        """Removes the lock if it still has that generation, which the store compares atomically."""
        bucket, key, _ = self._fs.split_path(self._object)
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # removed, or taken by another process
            self._fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)

    def _read_lock(self) -> tuple[str, dict[str, object]]:
        """Returns the lock's generation, which is unique to it, and its holder; both are empty if there is no lock."""
        try:
            generation = self._fs.info(self._object).get("generation", "")
        except FileNotFoundError:
            return "", {}
        try:
            return generation, dict(json.loads(self._read(self._object) or b"{}"))
        except (ValueError, TypeError):  # not written by this package, so its holder has no heartbeat object
            return generation, {}

    def _break_stale_lock(self, log: Callable[[str], None]) -> None:
        """Removes the lock of a dead holder, or returns because the lock is gone; raises UserError if the holder lives.

        A holder on another machine is watched for DEAD_AFTER_S.
        """
        generation, holder = self._read_lock()
        if not generation:  # released in the meantime
            return
        name = _describe(holder)
        heartbeat = self._heartbeat_object(holder.get("id"))
        if not _ran_here_and_ended(holder):
            log(f"the lock of {self._folder} is held by {name}; watching it for {DEAD_AFTER_S:.0f} s for a heartbeat")
            first, deadline = self._read(heartbeat), time.monotonic() + DEAD_AFTER_S
            while time.monotonic() < deadline:
                self._done.wait(POLL_S)
                if self._read_lock()[0] != generation:  # released, or taken by another process
                    return
                if self._read(heartbeat) != first:
                    raise _locked_error(self._folder, name)
        log(f"taking over the lock of {name}, which ended without releasing it")
        self._remove_lock(generation)
        self._remove(heartbeat)

    def _keep_alive(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            try:
                if self._read_lock()[1].get("id") != self._id:  # another process has taken it: no more heartbeats
                    return
                self._heartbeat()
            except Exception:  # the store cannot be reached; the next heartbeat tries again
                continue


def _describe(holder: dict[str, object]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"


def _this_process() -> dict[str, object]:
    """Returns this process and the boot and PID namespace in which its number is valid; containers have their own."""
    here = {"process": os.getpid(), "host": socket.gethostname(), "machine": uuid.getnode()}
    with contextlib.suppress(OSError):  # outside Linux, no holder is recognised as a process of this machine
        here["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here["numbers"] = os.readlink("/proc/self/ns/pid")
    return here


def _ran_here_and_ended(holder: dict[str, object]) -> bool:
    """Whether a holder was a process of this boot and namespace and is not running any more."""
    here, number = _this_process(), holder.get("process")
    if "numbers" not in here or any(holder.get(key) != here[key] for key in here.keys() - {"process"}):
        return False
    return isinstance(number, int) and (number == os.getpid() or not Path(f"/proc/{number}").exists())
