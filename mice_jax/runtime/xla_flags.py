"""Settings that must be in the environment before XLA or glibc read them: XLA flags by backend, and huge pages.

This module does not import jax, since a backend reads its flags when a device is first touched.
"""

import os
import sys

# For each backend, the environment variable that it reads and the flags that we add. A flag that the user has set is
# not replaced. Every supported version of JAX must know the flags, because XLA aborts on an unknown one.
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    # None of the flags that were tried made CPUs faster (BUILD_NOTES.md).
    "cpu": ("XLA_FLAGS", ()),
    # Collectives overlap with compute that does not wait for them, as JAX's page on GPU performance advises.
    "gpu": ("XLA_FLAGS", ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    # libtpu overlaps collectives without flags.
    "tpu": ("LIBTPU_INIT_ARGS", ()),
}
# With this setting, glibc's malloc uses pages of 2 MiB. XLA allocates the memory of a program again at each run, and
# pages of 4 KiB cost 7 to 28 % of a step on CPUs (BUILD_NOTES.md).
HUGE_PAGES_ENV = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
DETERMINISTIC = {"gpu": ("--xla_gpu_deterministic_ops=true",)}  # CPU and TPU programs are deterministic without a flag


def set_flags(deterministic: bool) -> None:
    """Adds the flags of the table to the environment, and those of deterministic runs if `deterministic` is set."""
    for backend, (variable, flags) in FLAGS.items():
        present = os.environ.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in present}
        wanted = flags + (DETERMINISTIC.get(backend, ()) if deterministic else ())
        added = [flag for flag in wanted if flag.partition("=")[0] not in names]
        if added:
            os.environ[variable] = " ".join([*present, *added])


def reexec_with_huge_pages() -> None:
    """Executes this command again, in the same process, with the setting that makes malloc use huge pages (Linux).

    glibc reads the setting once, before any Python runs. Nothing happens if the user has set GLIBC_TUNABLES. Imports
    made before the call are paid for twice, so commands call this before they import jax.
    """
    (variable,) = HUGE_PAGES_ENV
    if sys.platform == "linux" and variable not in os.environ:
        os.environ |= HUGE_PAGES_ENV
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
