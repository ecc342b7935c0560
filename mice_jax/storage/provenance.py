"""Records the versions, command line and git commit that produced a result."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mice_jax import __version__


def environment() -> dict[str, Any]:
    """Returns the versions of packages, the command line and the git commit, as summary.json records them."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "pyarrow")
    versions = {"python": platform.python_version(), "mice_jax": __version__}
    return {
        "versions": versions | {p: version(p) for p in packages},
        "command": [sys.executable, *sys.argv],
        "git_commit": _commit(),
    }


def code_state() -> dict[str, Any]:
    """Returns the git commit of the code and the tracked files that differ from it."""
    return {
        "git_commit": _commit(),
        "git_changed_files": (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines(),
    }


def _commit() -> str | None:
    """Returns the git commit, which a launcher that ships files without their history sets in the environment."""
    return os.environ.get("MICE_JAX_COMMIT") or _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
