"""The persistent compilation cache: compiled programs are stored on disk and reused by later runs."""

import hashlib
import platform
from pathlib import Path

import jax


def enable(folder: Path) -> Path:
    """Makes JAX store compiled programs under `folder`, which processes may share; returns the directory.

    A directory that the user gave to JAX is kept ($JAX_COMPILATION_CACHE_DIR), and $JAX_ENABLE_COMPILATION_CACHE=0
    disables the cache. A program for a CPU uses the features of that CPU, so each kind of machine has a directory of
    its own. JAX's key covers the program, versions, flags and devices. An unreadable entry is compiled again, with a
    warning.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX defines its options at import
    if given:
        return Path(given)
    directory = folder / "programs" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def _machine() -> str:
    """The architecture of this machine and a hash of the features of its CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    described = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    features = " ".join(sorted(described.partition(":")[2].split())) or described
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
