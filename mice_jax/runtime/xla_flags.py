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
    # What a TPU needs depends on its generation: see SPARSE_CORE_OPTIONS.
    "tpu": ("LIBTPU_INIT_ARGS", ()),
}
# Options of libtpu for programs on TPUs with SparseCores (v5p, v6e, 7x), which then run collectives while TensorCores
# compute. Without them every collective runs alone. `bench/compiled.py` prints the share of bytes that are sent while
# products run; BUILD_NOTES.md has the figures. Most of the options are those with which MaxText trains on v5p and v6e
# (benchmarks/xla_flags_library.py); no run of ours has measured them.
SPARSE_CORE_OPTIONS = {
    # All-gathers of weights: they must be asynchronous in the first place, and stay all-gathers over several dims of
    # the torus.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    # Reductions of gradients.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    # Without these two, a reduce-scatter over a torus of three dims (v5p:2x2x2) becomes an all-reduce, of twice the
    # bytes.
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
    # How SparseCores run at the same time as both TensorCores of a chip.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_sc_enable_instruction_fusion": "false",
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


def compiler_options(sparse_cores: bool) -> dict[str, str]:
    """Returns the options with which the functions of a step are compiled, without those that the user's flags set.

    Args:
      sparse_cores: Whether the devices are TPUs with SparseCores.
    """
    variable, _ = FLAGS["tpu"]
    names = {flag.partition("=")[0].lstrip("-") for flag in os.environ.get(variable, "").split()}
    options = SPARSE_CORE_OPTIONS if sparse_cores else {}
    return {name: value for name, value in options.items() if name not in names}


def options_of_init(platform: str) -> dict[str, int]:
    """Returns the options of the function that draws random parameters, unless the user's flags set them.

    It runs once, so its code need not be fast. On CPUs LLVM's quick passes take a third of the time of all of them, and
    give the same bits.

    Args:
      platform: The platform of the devices: cpu, gpu or tpu.
    """
    name = "xla_backend_optimization_level"
    return {name: 1} if platform == "cpu" and f"--{name}=" not in os.environ.get("XLA_FLAGS", "") else {}


def reexec_with_huge_pages() -> None:
    """Executes this command again, in the same process, with the setting that makes malloc use huge pages (Linux).

    glibc reads the setting once, before any Python runs. Nothing happens if the user has set GLIBC_TUNABLES. Imports
    made before the call are paid for twice, so commands call this before they import jax.
    """
    (variable,) = HUGE_PAGES_ENV
    if sys.platform == "linux" and variable not in os.environ:
        os.environ |= HUGE_PAGES_ENV
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
