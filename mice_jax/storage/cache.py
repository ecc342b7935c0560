"""The cache directory of the package: token stores, compiled programs and benchmark scores."""

import os
from pathlib import Path


def cache_folder(given: str) -> Path:
    """Returns the given directory, else $MICE_JAX_CACHE, else mice_jax in the user's cache directory."""
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # stays "~/..." for a user without a home
    return Path(os.environ.get("MICE_JAX_CACHE") or Path(base) / "mice_jax")
