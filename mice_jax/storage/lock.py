"""Who writes a run's folder: one process at a time, and a dead one is never in the way."""

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

BEAT_S = 10.0  # how often the holder of a bucket's lock writes it anew
DEAD_S = 60.0  # a lock that is not written anew for so long has no holder
LOOK_S = 1.0
LEAVE_S = 5.0  # how long a holder that leaves waits for a sign of life under way, to a store that may be down


def acquire(place: RunPath, say: Callable[[str], None]) -> "FolderLock | BucketLock":
    """The lock of a run's folder; UserError where a live process has it, or where it cannot be written."""
    return FolderLock(place) if isinstance(place, Path) else BucketLock(place, say)


def _held(place: RunPath, writer: str) -> UserError:
    return UserError(
        f"--workdir={place} is being written by another live process ({writer}). Wait for it, end it, or give another "
        "--workdir."
    )


class FolderLock:
    """A file lock: the system gives it back with the process."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "lock").open("a+")
        except OSError as e:
            raise UserError(f"--workdir={folder} cannot be written: {e.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            writer = file.read().strip()
            file.close()
            raise _held(folder, writer) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file: TextIO = file

    def check(self) -> None:
        """Nobody else can have taken it."""

    def release(self) -> None:
        self._file.close()


class BucketLock:
    """An object that names its holder, and one that its holder writes anew every BEAT_S.

    The store sees to it that of two that create the first only one succeeds; nobody writes over it, and it is removed
    only as the generation that was looked at, so one that was taken for dead finds the other's name there and leaves.
    It may be taken once the second has not changed for DEAD_S: only that counts, so the machines' clocks do not matter.
    A holder whose process was here and is gone is known to be dead at once.
    """

    def __init__(self, folder: epath.Path, say: Callable[[str], None]):
        self._folder, self._id, self._beats = folder, uuid.uuid4().hex, 0
        self._fs, root = filesystem(folder)
        self._object = f"{root}/lock"
        self._done = threading.Event()
        try:
            while not self._create():
                self._bury(say)
            self._beat()
        except UserError:
            raise
        except Exception as e:
            raise StoreError(f"--workdir={folder} cannot be written: {one_line(e)}.") from e
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """UserError where another process has taken the lock, as it may where this one was not heard of for long.

        The store is asked each time, since between two signs of life this process may have stood still.
        """
        try:
            _, holder = self._look()
        except Exception as e:
            raise StoreError(f"--workdir={self._folder} cannot be read: {one_line(e)}.") from e
        if holder.get("id") != self._id:
            raise UserError(
                f"--workdir={self._folder} has been taken by another process ({_name(holder)}), since nothing was "
                f"heard of this one for {DEAD_S:.0f} s. It leaves the run to that one."
            )

    def release(self) -> None:
        self._done.set()
        self._thread.join(LEAVE_S)
        generation, holder = self._look()
        if holder.get("id") == self._id:
            self._remove_lock(generation)
        self._remove(self._sign(self._id))

    def _sign(self, holder: object) -> str:
        """The object by which a holder shows that it is alive."""
        return f"{self._object}.{holder}"

    def _create(self) -> bool:
        try:
            self._fs.pipe_file(self._object, json.dumps(_here() | {"id": self._id}).encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        self._beats += 1
        self._fs.pipe_file(self._sign(self._id), str(self._beats).encode())

    def _read(self, name: str) -> bytes:
        """An object's content, nothing where there is none."""
        try:
            return self._fs.cat_file(name)
        except FileNotFoundError:
            return b""

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(name)

    def _remove_lock(self, generation: str) -> None:
        """Removes the lock if it is still that generation: the store compares, so that nothing comes in between."""
        bucket, key, _ = self._fs.split_path(self._object)
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # gone, or another's by now
            self._fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)

    def _look(self) -> tuple[str, dict[str, object]]:
        """The generation of the lock, which no two have in common, and its holder; nothing where there is none."""
        try:
            generation = self._fs.info(self._object).get("generation", "")
        except FileNotFoundError:
            return "", {}
        try:
            return generation, dict(json.loads(self._read(self._object) or b"{}"))
        except (ValueError, TypeError):  # written by something else: only its silence counts
            return generation, {}

    def _bury(self, say: Callable[[str], None]) -> None:
        """Returns once the objects of a dead holder are removed, or gone; UserError as soon as it is known to live."""
        generation, holder = self._look()
        if not generation:  # given back just now
            return
        writer = _name(holder)
        sign = self._sign(holder.get("id"))
        if not _was_here(holder):
            say(f"the lock of {self._folder} is held by {writer}; watching for {DEAD_S:.0f} s whether it is alive")
            last, until = self._read(sign), time.monotonic() + DEAD_S
            while time.monotonic() < until:
                self._done.wait(LOOK_S)
                if self._look()[0] != generation:  # given back, or taken by another
                    return
                if self._read(sign) != last:
                    raise _held(self._folder, writer)
        say(f"the lock of {writer}, which has ended without giving it back, is taken")
        self._remove_lock(generation)
        self._remove(sign)

    def _keep_alive(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                if self._look()[1].get("id") != self._id:  # it is another's, and no sign of this one is to be seen
                    return
                self._beat()
            except Exception:  # the store cannot be reached: the next beat tries again
                continue


def _name(holder: dict[str, object]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"


def _here() -> dict[str, object]:
    """This process, and what tells others of its number from it: a container has numbers of its own."""
    here = {"process": os.getpid(), "host": socket.gethostname(), "machine": uuid.getnode()}
    with contextlib.suppress(OSError):  # not Linux: then no holder is known to be of here
        here["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here["numbers"] = os.readlink("/proc/self/ns/pid")
    return here


def _was_here(holder: dict[str, object]) -> bool:
    """Whether a holder was a process of this machine, since it was started, and of this namespace, and is no more."""
    here, number = _here(), holder.get("process")
    if "numbers" not in here or any(holder.get(key) != here[key] for key in here.keys() - {"process"}):
        return False
    return isinstance(number, int) and (number == os.getpid() or not Path(f"/proc/{number}").exists())
