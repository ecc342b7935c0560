"""The directory of a run: its lock, the small files that it holds and, for a bucket, their upload."""

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mice_jax.errors import StoreError, UserError, one_line
from mice_jax.storage import jsonl, lock
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import RunPath, copy_small_files, download_small_files, upload, write_atomically

METRICS = "metrics.jsonl"
LOCK = lock.FILE
ANSWERS = "answers.jsonl"  # one line for each answer to a held-out prompt, with the step after which it was given
EVENTS = "events.jsonl"  # one line each time that a process starts, resumes or ends the run
# One line for each checkpoint that `evaluate` has scored: {"step", "samples", "<task>/<metric>": value}.
SCORES = "eval_scores.jsonl"
CERTIFICATE = "certificate.json"  # what the bracket rule of a sweep found, and what that rests on
BRANCH = "branch.json"  # what a sweep of branches branches off from
CRITICAL_BATCH = "critical_batch.json"  # the critical batch size that branches found
RESULTS = "results.csv"  # results of a sweep, with one row for each trial
DIRECTIONS = "eval_directions.json"  # {"<task>/<metric>": "max" | "min"}: whether a higher or a lower score is better
SYNC_EVERY_S = 30.0
OUTAGE_S = 60.0  # how long `sync` retries, in addition to the retries of the store's own library
TRACKER_FOLDERS = ("wandb", "mlflow", "mlruns")  # the trackers upload the contents of these themselves


class UploadedState(NamedTuple):
    """A local file as it was when its content was last uploaded."""

    size: int  # size of the local file in bytes
    changed_ns: int  # modification time of the file
    count: int  # number of bytes that were uploaded
    crc: int  # CRC-32 of the uploaded bytes


class Workdir:
    """The directory of one run, written by one process at a time; as a context manager it releases its lock.

    All files are written below `local`: the directory itself or, since objects of a bucket cannot be appended to, a
    copy of the small files of a run in a bucket. `sync` uploads what has changed in that copy. What others see in the
    bucket is therefore always complete lines and files, at most SYNC_EVERY_S and one step old.

    Attributes:
        path: the directory as the user named it.
        local: the local directory whose files are read and written.
    """

    def __init__(self, path: RunPath):
        self.path = path
        self.local = path if isinstance(path, Path) else download_small_files(path)
        self._lock: lock.FolderLock | lock.BucketLock | None = None
        self._uploaded: dict[Path, UploadedState] = {}
        self._last_attempt = time.monotonic()
        self._upload_thread: threading.Thread | None = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def lock(self, log: Callable[[str], None] = print) -> None:
        """Locks the directory for this process; the lock of a dead process is taken over.

        Raises:
            UserError: if the directory cannot be written, or a live process holds the lock.
        """
        self._lock = lock.acquire(self.path, log)
        if self.local != self.path:
            # The previous writer may have changed files since they were downloaded, and must not be overwritten.
            self._mark_all_uploaded()
            copy_small_files(self.path, self.local)
            self._mark_all_uploaded()

    def check_lock(self) -> None:
        """Raises UserError if another process has taken the lock meanwhile."""
        if self._lock:
            self._lock.check()

    def sync(self, after_s: float = 0.0) -> None:
        """Uploads the files that have changed; does nothing for a directory on disk.

        Args:
            after_s: if positive, the upload runs in the background, unless one began less than `after_s` seconds ago;
                what fails is uploaded by the next call. With 0 everything is in the bucket when this returns.

        Raises:
            UserError: if another process has taken the lock.
            StoreError: if the store cannot be written for OUTAGE_S seconds.
        """
        if self.local == self.path or not self._lock:
            return
        if after_s:
            self._sync_in_background(after_s)
            return
        if self._upload_thread:
            self._upload_thread.join()
        deadline, pause = time.monotonic() + OUTAGE_S, 1.0
        while (failure := self._try_to_upload()) is not None:
            if not isinstance(failure, StoreError) or time.monotonic() + pause > deadline:
                raise failure
            time.sleep(pause)
            pause *= 2
        self._last_attempt = time.monotonic()

    def _sync_in_background(self, after_s: float) -> None:
        busy = self._upload_thread is not None and self._upload_thread.is_alive()
        if not busy and time.monotonic() - self._last_attempt >= after_s:
            self._last_attempt = time.monotonic()
            self._upload_thread = threading.Thread(target=self._try_to_upload, daemon=True)
            self._upload_thread.start()

    def _try_to_upload(self) -> UserError | None:
        """Uploads what has changed; returns the error: a UserError if the lock is lost, a StoreError on an outage."""
        try:
            self.check_lock()
            for file in self._files():
                before, stat = self._uploaded.get(file), file.stat()
                if before and (before.size, before.changed_ns) == (stat.st_size, stat.st_mtime_ns):
                    continue
                content = file.read_bytes()
                if file.name == METRICS:  # the run may be writing a line at this moment
                    content = jsonl.complete_lines(content)
                grown = before is not None and zlib.crc32(content[: before.count]) == before.crc
                name = str(file.relative_to(self.local))
                upload(self.path, name, content, present_bytes=before.count if before and grown else 0)
                self._uploaded[file] = _state_of(stat, content)
        except UserError as e:
            return e
        except Exception as e:
            return StoreError(f"--workdir={self.path} cannot be written: {one_line(e)}.")
        return None

    def _mark_all_uploaded(self) -> None:
        self._uploaded = {p: _state_of(p.stat(), p.read_bytes()) for p in self._files()}

    def _files(self) -> list[Path]:
        files = [p for p in self.local.rglob("*") if p.suffix != ".partial" and p.is_file()]
        return sorted(p for p in files if p.relative_to(self.local).parts[0] not in TRACKER_FOLDERS)

    def close(self) -> None:
        """Uploads what is left, with a single attempt, and releases the lock; a failure is only a warning."""
        if not self._lock:
            return
        try:
            if self._upload_thread:
                self._upload_thread.join()
            if self.local != self.path:
                failure = self._try_to_upload()
                if failure:
                    raise failure
            self._lock.release()
        except Exception as e:
            print(f"warning: the lock of {self.path} could not be released: {one_line(e)}", file=sys.stderr)
        self._lock = None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file atomically."""
        write_atomically(self.local / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None if it does not exist; raises UserError where it is damaged."""
        return read_json(self.local / name)

    def log_event(self, event: str, step: int) -> None:
        """Appends a line with the event, the step and the time to events.jsonl."""
        jsonl.append(self.local / EVENTS, {"event": event, "step": step, "time": time.time()})

    def log_answers(self, step: int, answers: Sequence[Mapping[str, str]]) -> None:
        """Appends a line with the step for each answer of the model to answers.jsonl."""
        for answer in answers:
            jsonl.append(self.local / ANSWERS, {"step": step, **answer})

    def truncate_metrics(self, step: int) -> None:
        """Removes the lines after `step` from metrics.jsonl, as a run that resumes after that step needs.

        A run that starts again from step 0 evaluates again before its first step, so no line is kept then.

        Raises:
            UserError: if the file does not hold every step from 1 to `step`.
        """
        file = self.local / METRICS
        lines = file.read_text().splitlines() if file.exists() else []
        before_training = bool(lines) and _step_of(lines[0]) == 0
        kept = lines[: step + before_training] if step else []
        if [_step_of(line) for line in kept[before_training:]] != list(range(1, step + 1)):
            raise UserError(
                f"{self.path / METRICS} does not hold the steps 1 to {step}, after which the checkpoint of step {step} "
                "resumes. Restore the file, or start in another --workdir."
            )
        if len(kept) < len(lines):
            write_atomically(file, "".join(line + "\n" for line in kept))


def _state_of(stat: os.stat_result, content: bytes) -> UploadedState:
    return UploadedState(stat.st_size, stat.st_mtime_ns, len(content), zlib.crc32(content))


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return None
