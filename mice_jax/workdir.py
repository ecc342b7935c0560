"""A run's folder: who writes it, what config made it, and the small files it leaves."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from mice_jax import __version__
from mice_jax.errors import UserError

METRICS = "metrics.jsonl"


class Workdir:
    """The folder of one run, written by one process at a time; as a context it gives its lock back at the end."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock:
            self._lock.close()

    def lock(self) -> None:
        """Takes the folder; the system gives it back with the process, so a dead writer's lock is never in the way.

        Raises UserError where it cannot be written, or where a live process has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+")
        except OSError as e:
            raise UserError(f"--workdir={self.path} cannot be written: {e.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            writer = file.read().strip()
            file.close()
            raise UserError(
                f"--workdir={self.path} is being written by another live process ({writer}). "
                "Wait for it, end it, or give another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        """A file's content, or None where there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def cut_metrics(self, step: int) -> None:
        """Leaves the lines of steps 1 to `step` in metrics.jsonl, as a resume from there needs them."""
        file = self.path / METRICS
        lines = file.read_text().splitlines() if file.exists() else []
        kept = lines[:step]
        steps = [_step_of(line) for line in kept]
        if steps != list(range(1, step + 1)):
            raise UserError(
                f"{file} does not hold the steps 1 to {step} that the checkpoint of step {step} continues. "
                "Restore the file, or start in another --workdir."
            )
        if len(kept) < len(lines):
            partial = file.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(file)


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
