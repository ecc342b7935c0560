"""A run's folder: who writes it, what config made it, and the small files it leaves."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mice_jax import __version__, lock
from mice_jax.errors import UserError, one_line
from mice_jax.places import Place, fetch, fetched, filesystem, write_whole

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"  # a line each time that a process begins with the run, or leaves it
# A line a checkpoint that `evaluate` has scored: {"step", "samples", "<task>/<metric>": value}.
SCORES = "eval_scores.jsonl"
PUBLISH_S = 30.0


class Workdir:
    """The folder of one run, written by one process at a time; as a context it gives its lock back at the end.

    What is written lies in `local`: the folder itself, or, for one in a bucket, whose objects cannot be appended to, a
    copy of its small files, of which `publish` puts there what has changed. So a run in a bucket is worked on as any
    other, and what others see of it is whole lines and whole files, at most PUBLISH_S and a step behind.
    """

    def __init__(self, path: Place):
        self.path = path
        self.local = path if isinstance(path, Path) else fetched(path)
        self._lock: lock.FolderLock | lock.BucketLock | None = None
        self._published: dict[Path, tuple[int, int]] = {}  # what is there already: size and time of change
        self._tried = time.monotonic()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close(failing=kind is not None)

    def lock(self, say: Callable[[str], None] = print) -> None:
        """Takes the folder; a dead writer's lock is never in the way.

        Raises UserError where it cannot be written, or where a live process has it.
        """
        self._lock = lock.take(self.path, say)
        if self.local != self.path:
            fetch(self.path, self.local)  # as its writer before has left it
            self._published = self._changed()

    def publish(self, after_s: float = 0.0) -> None:
        """Puts what has changed here where others see it, unless that was tried in the last `after_s` seconds.

        Raises UserError where it cannot be; what is only due by the clock is then tried again later.
        """
        if self.local == self.path or not self._lock or time.monotonic() - self._tried < after_s:
            return
        self._lock.check()
        fs, root = filesystem(self.path)
        try:
            for file, seen in self._changed().items():
                fs.pipe_file(f"{root}/{file.relative_to(self.local)}", file.read_bytes())
                self._published[file] = seen
        except Exception as e:
            if not after_s:
                raise UserError(f"--workdir={self.path} cannot be written: {one_line(e)}.") from e
        self._tried = time.monotonic()

    def _changed(self) -> dict[Path, tuple[int, int]]:
        files = [p for p in self.local.rglob("*") if p.is_file() and p.suffix != ".partial"]
        found = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)}
        return {p: seen for p, seen in found.items() if self._published.get(p) != seen}

    def close(self, failing: bool = False) -> None:
        """Publishes what is left and gives the lock back; where all is `failing` anyway, a failure is only said."""
        if not self._lock:
            return
        try:
            self.publish()
            self._lock.release()
        except Exception as e:
            if not failing:
                raise
            print(f"warning: {one_line(e)}", file=sys.stderr)
        self._lock = None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file whole or not at all."""
        write_whole(self.local / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """A file's content, or None where there is none."""
        file = self.local / name
        return json.loads(file.read_text()) if file.exists() else None

    def tell(self, event: str, step: int) -> None:
        """Adds a line to the run's events."""
        with (self.local / EVENTS).open("a") as file:
            file.write(json.dumps({"event": event, "step": step, "time": time.time()}) + "\n")

    def cut_metrics(self, step: int) -> None:
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
            write_whole(file, "".join(line + "\n" for line in kept))


def environment() -> dict[str, Any]:
    """Versions, command and git commit, for summary.json."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "pyarrow")
    versions = {"python": platform.python_version(), "mice_jax": __version__}
    return {
        "versions": versions | {p: version(p) for p in packages},
        "command": [sys.executable, *sys.argv],
        "git_commit": _git("rev-parse", "HEAD"),
    }


def code_state() -> dict[str, Any]:
    """The commit that the code is of, and what differs from it."""
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines(),
    }


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return None
