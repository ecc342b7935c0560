"""The cache directory of the package: token stores, compiled programs and benchmark scores."""

import os
from pathlib import Path


def cache_folder(given: str) -> Path:
    """What is given, or $MICE_JAX_CACHE, or mice_jax in the user's cache folder."""
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # a user may have no home: "~" then
    return Path(os.environ.get("MICE_JAX_CACHE") or Path(base) / "mice_jax")
