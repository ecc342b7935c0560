"""The persistent compilation cache: compiled programs are kept on disk from run to run."""

import hashlib
import platform
from pathlib import Path
from typing import Any

import jax


def enable(folder: Path) -> Path:
    """Has jax keep compiled programs under `folder`, which processes may share; returns where.

    A folder that the user gives to jax stays ($JAX_COMPILATION_CACHE_DIR), and $JAX_ENABLE_COMPILATION_CACHE=0 keeps
    none. Programs for a CPU use what that CPU has, so each kind of machine has a folder of its own; jax's key knows the
    program, the versions, the flags and the devices. One that cannot be read is compiled anew, with a warning.
    """
    settings: Any = jax.config  # its attributes are made when it is imported
    if given := settings.jax_compilation_cache_dir:
        return Path(given)
    kept = folder / "programs" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return kept


def _machine() -> str:
    """This machine's architecture and what its CPU can do, in short."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    can = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    features = " ".join(sorted(can.partition(":")[2].split())) or can
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
