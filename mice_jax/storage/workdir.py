"""A run's folder: who writes it, what config made it, and the small files it leaves."""

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mice_jax.errors import StoreError, UserError, one_line
from mice_jax.storage import lock
from mice_jax.storage.paths import RunPath, copy_small_files, download_small_files, upload, write_atomically

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"  # a line each time that a process begins with the run, or leaves it
# A line a checkpoint that `evaluate` has scored: {"step", "samples", "<task>/<metric>": value}.
SCORES = "eval_scores.jsonl"
RESULTS = "results.csv"  # of a sweep: a row a trial
DIRECTIONS = "eval_directions.json"  # {"<task>/<metric>": "max" | "min"}, which of its scores is the better
SYNC_EVERY_S = 30.0
WAIT_S = 60.0  # for a store that is down, beside what its own library waits
TRACKER_FOLDERS = ("wandb", "mlflow", "mlruns")  # folders of trackers, which send what is in them themselves


class UploadedState(NamedTuple):
    """What was put into a bucket of a file that had this size and time of change."""

    size: int
    changed_ns: int
    count: int  # bytes
    crc: int


class Workdir:
    """The folder of one run, written by one process at a time; as a context it gives its lock back at the end.

    What is written lies in `local`: the folder itself, or, for one in a bucket, whose objects cannot be appended to, a
    copy of its small files, of which `sync` puts there what has changed. So a run in a bucket is worked on as any
    other, and what others see of it is whole lines and whole files, at most SYNC_EVERY_S and a step behind.
    """

    def __init__(self, path: RunPath):
        self.path = path
        self.local = path if isinstance(path, Path) else download_small_files(path)
        self._lock: lock.FolderLock | lock.BucketLock | None = None
        self._sent: dict[Path, UploadedState] = {}  # what is there already
        self._last_attempt = time.monotonic()
        self._upload_thread: threading.Thread | None = None  # publishes while the run goes on

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def lock(self, say: Callable[[str], None] = print) -> None:
        """Takes the folder; a dead writer's lock is never in the way.

        Raises UserError where it cannot be written, or where a live process has it.
        """
        self._lock = lock.acquire(self.path, say)
        if self.local != self.path:
            self._note_sent()  # what was fetched before this one had the lock is never put back
            copy_small_files(self.path, self.local)  # as its writer before has left it
            self._note_sent()

    def check_lock(self) -> None:
        """UserError where the folder is another process's by now."""
        if self._lock:
            self._lock.check()

    def sync(self, after_s: float = 0.0) -> None:
        """Puts what has changed here where others see it: all of it has been when this returns.

        A store that is down is tried again for WAIT_S; then StoreError. With `after_s` it is done while the run goes
        on, unless that was begun in the last `after_s` seconds; what fails is tried again the next time.
        """
        if self.local == self.path or not self._lock:
            return
        if after_s:
            busy = self._upload_thread is not None and self._upload_thread.is_alive()
            if not busy and time.monotonic() - self._last_attempt >= after_s:
                self._last_attempt = time.monotonic()
                self._upload_thread = threading.Thread(target=self._try_to_upload, daemon=True)
                self._upload_thread.start()
            return
        if self._upload_thread:
            self._upload_thread.join()
        until, pause = time.monotonic() + WAIT_S, 1.0
        while failure := self._try_to_upload():
            if not isinstance(failure, StoreError) or time.monotonic() + pause > until:
                raise failure
            time.sleep(pause)
            pause *= 2
        self._last_attempt = time.monotonic()

    def _try_to_upload(self) -> UserError | None:
        """Puts what has changed; returns a UserError where the folder is another's by now, else a StoreError."""
        try:
            self.check_lock()
            for file in self._files():
                before, stat = self._sent.get(file), file.stat()
                if before and (before.size, before.changed_ns) == (stat.st_size, stat.st_mtime_ns):
                    continue
                content = file.read_bytes()
                if file.name == METRICS:  # it may be written at this moment: whole lines only
                    content = content[: content.rfind(b"\n") + 1]
                grown = before and zlib.crc32(content[: before.count]) == before.crc
                name = str(file.relative_to(self.local))
                upload(self.path, name, content, there=before.count if before and grown else 0)
                self._sent[file] = _sent(stat, content)
        except UserError as e:
            return e
        except Exception as e:
            return StoreError(f"--workdir={self.path} cannot be written: {one_line(e)}.")
        return None

    def _note_sent(self) -> None:
        self._sent = {p: _sent(p.stat(), p.read_bytes()) for p in self._files()}

    def _files(self) -> list[Path]:
        files = [p for p in self.local.rglob("*") if p.suffix != ".partial" and p.is_file()]
        return sorted(p for p in files if p.relative_to(self.local).parts[0] not in TRACKER_FOLDERS)

    def close(self) -> None:
        """Publishes what is left, if that can be done at once, and gives the lock back; a failure is only said."""
        if not self._lock:
            return
        try:
            if self._upload_thread:
                self._upload_thread.join()
            if self.local != self.path and (failure := self._try_to_upload()):
                raise failure
            self._lock.release()
        except Exception as e:
            print(f"warning: the lock of {self.path} is not given back: {one_line(e)}", file=sys.stderr)
        self._lock = None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file whole or not at all."""
        write_atomically(self.local / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """A file's content, or None where there is none."""
        file = self.local / name
        return json.loads(file.read_text()) if file.exists() else None

    def log_event(self, event: str, step: int) -> None:
        """Adds a line to the run's events."""
        with (self.local / EVENTS).open("a") as file:
            file.write(json.dumps({"event": event, "step": step, "time": time.time()}) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Leaves the lines of steps 1 to `step` in metrics.jsonl, as a resume from there needs them."""
        file = self.local / METRICS
        lines = file.read_text().splitlines() if file.exists() else []
        kept = lines[:step]
        steps = [_step_of(line) for line in kept]
        if steps != list(range(1, step + 1)):
            raise UserError(
                f"{self.path / METRICS} does not hold the steps 1 to {step} that the checkpoint of step {step} "
                "continues. Restore the file, or start in another --workdir."
            )
        if len(kept) < len(lines):
            write_atomically(file, "".join(line + "\n" for line in kept))


def _sent(stat: os.stat_result, content: bytes) -> UploadedState:
    return UploadedState(stat.st_size, stat.st_mtime_ns, len(content), zlib.crc32(content))


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return None
