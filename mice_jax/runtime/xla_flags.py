"""What XLA and the system's allocator are asked for before they start: a table of flags by backend, and huge pages.

Nothing here imports jax: a device's flags are read when it is first touched.
"""

import os
import sys

# By backend: the variable that it reads, and what is put there beside what the user has; a flag that the user sets is
# the user's. An unknown flag ends the process, so each has to be known to every jax that we run on.
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Tried, and no faster: BUILD_NOTES.md.
    "cpu": ("XLA_FLAGS", ()),
    # Collectives run beside what does not wait for them, as JAX's page on GPU performance advises.
    "gpu": ("XLA_FLAGS", ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    # libtpu overlaps collectives by itself.
    "tpu": ("LIBTPU_INIT_ARGS", ()),
}
# Of glibc: memory comes in pages of 2 MiB. XLA takes a program's memory anew at each run: in pages of 4 KiB, 7 to
# 28 % of a CPU's step (BUILD_NOTES.md).
HUGE_PAGES_ENV = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
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


def reexec_with_huge_pages() -> None:
    """Starts this process's command anew, with the same process id, where glibc was not told of huge pages.

    It reads its settings once, before any Python. What the user has set is kept, and nothing starts anew.
    """
    name = next(iter(HUGE_PAGES_ENV))
    if sys.platform == "linux" and name not in os.environ:
        os.environ |= HUGE_PAGES_ENV
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
