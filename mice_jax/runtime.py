"""What XLA and the C library are asked for before they start: one table of flags, and huge pages.

Nothing here imports jax: a device's flags are read when it is first touched, the C library's when a process begins.
"""

import os
import platform
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC_TUNABLES = "GLIBC_TUNABLES"

# By backend: the variable that it reads, and what is put there beside what the user has. A flag that the user sets is
# the user's. An unknown flag ends the process, so each was tried with the oldest and the newest jax that we run on.
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Tried, and no faster: vectors of 512 bits, oneDNN, fast math, another scheduler (BUILD_NOTES.md).
    "cpu": ("XLA_FLAGS", ()),
    # Collectives run beside what does not wait for them; what JAX's and NVIDIA's own pages ask for.
    "gpu": ("XLA_FLAGS", ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    # libtpu overlaps collectives by itself.
    "tpu": ("LIBTPU_INIT_ARGS", ()),
}
DETERMINISTIC = {"gpu": ("--xla_gpu_deterministic_ops=true",)}  # CPU and TPU repeat themselves anyway


def set_flags(deterministic: bool) -> None:
    """Sets the table's flags, and those of bit-equal reruns where asked; before anything touches a device."""
    for backend, (variable, flags) in FLAGS.items():
        mine = os.environ.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in mine}
        wanted = (*flags, *(DETERMINISTIC.get(backend, ()) if deterministic else ()))
        added = [flag for flag in wanted if flag.partition("=")[0] not in names]
        if added:
            os.environ[variable] = " ".join([*mine, *added])


def with_huge_pages() -> None:
    """Starts this process anew, its id and arguments kept, with a C library that asks for huge pages.

    XLA takes each program's memory from the system when it is run and gives it back after: hundreds of thousands of
    pages to be zeroed a microbatch, or some hundreds of huge ones. Does nothing where the system gives none or gives
    them unasked, or where $GLIBC_TUNABLES says what the user wants.
    """
    asked = os.environ.get(GLIBC_TUNABLES, "")
    if "glibc.malloc.hugetlb" in asked or not _gives_huge_pages():
        return
    os.environ[GLIBC_TUNABLES] = ":".join(filter(None, (asked, "glibc.malloc.hugetlb=1")))
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _gives_huge_pages() -> bool:
    """Whether the system gives huge pages to those who ask, and the C library can ask."""
    library, version = platform.libc_ver()
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    return library == "glibc" and numbers >= (2, 35) and HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text()
