"""How many devices a run on a CPU has: by default one for each core that its process may use.

XLA computes a matrix product with all cores, but much of the rest of a program with one core a device. The number is
fixed when JAX starts its backend. This module does not import jax, since the workers of a sweep use it.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mice_jax.config import Config
from mice_jax.errors import UserError, format_count
from mice_jax.runtime.cluster import in_cluster

VARIABLE = "JAX_NUM_CPU_DEVICES"
XLA_FLAG = "xla_force_host_platform_device_count"
MOST = 8  # by default; whether more are faster was never measured
CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Returns the number of cores that this process may use by its affinity and by its control group's quota.

    Args:
      cgroup: The folder of the control group, of version 2 or 1.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Returns the cores that the quota of a control group amounts to; infinity if there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except OSError:
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf


def choose(limit: int, mesh_sizes: Sequence[int]) -> int:
    """Returns the number of devices of a mesh.

    Args:
      limit: The largest number of devices.
      mesh_sizes: The sizes of the mesh's axes, of which one may be -1 for the devices that are left.

    Returns:
      The largest number that the sizes divide, or their product if none is -1; 1 where that is above the limit.
    """
    given = math.prod(size for size in mesh_sizes if size != -1)
    if given > limit:
        return 1
    return limit // given * given if -1 in mesh_sizes else given


def default_count(
    mesh_sizes: Sequence[int],
    batch_size: int,
    recorded: int | None,
    *,
    cores: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int | None:
    """Returns how many CPU devices a run of one process should have; None if the user has said how many.

    Args:
      mesh_sizes: The sizes of the mesh's axes data and fsdp, and then of those that do not split samples.
      batch_size: The number of samples of a step, since each device should have one.
      recorded: The number of CPU devices that a resumed run last had, which it keeps; None for other runs.
      cores: The number of cores; None finds it out.
      environment: The environment variables of this process.
    """
    said = VARIABLE in environment or XLA_FLAG in environment.get("XLA_FLAGS", "")
    if said or environment.get("JAX_PLATFORMS", "") not in ("", "cpu") or in_cluster():
        return None
    return choose(_limit(mesh_sizes, batch_size, recorded, cores or usable_cores()), mesh_sizes)


def _limit(mesh_sizes: Sequence[int], batch_size: int, recorded: int | None, cores: int) -> int:
    """Returns the largest number of devices that `default_count` chooses."""
    return recorded or min(cores, MOST, batch_size * math.prod(max(1, size) for size in mesh_sizes[2:]))


def count_of_run(config: Config, recorded: int | None) -> int | None:
    """Returns `default_count` for the mesh and the batch size of a run's config."""
    mesh = config.mesh
    return default_count((mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence), config.optim.batch_size, recorded)


def check_mesh(
    config: Config, recorded: int | None, *, cores: int | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """Checks that the mesh of a run of one process fits the devices of its CPU, where JAX will find no other devices.

    Args:
      config: The run's config.
      recorded: As in `default_count`.
      cores: As in `default_count`.
      environment: As in `default_count`.

    Raises:
      UserError: The sizes of the mesh do not multiply to the number of devices.
    """
    mesh, cores = config.mesh, cores or usable_cores()
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor, "sequence": mesh.sequence}
    named = environment.get(VARIABLE, "")
    limit = int(named) if named.isdigit() else _limit(tuple(sizes.values()), config.optim.batch_size, recorded, cores)
    given = math.prod(size for size in sizes.values() if size != -1)
    fits = limit % given == 0 if -1 in sizes.values() else limit == given
    other = in_cluster() or XLA_FLAG in environment.get("XLA_FLAGS", "") or not _is_cpu_only(environment)
    if fits or (not named and given <= limit) or other:
        return
    if named:
        there = f"{VARIABLE}={named} is set"
    elif recorded:
        there = f"this run has had {recorded} so far, which a resumed run keeps"
    else:
        there = (
            f"this CPU counts as {limit}: one for each core that the run may use, of which there are {cores}, up to "
            f"{MOST} and to one for each sample of a step"
        )
    asked = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    raise UserError(
        f"{asked} needs {'a multiple of ' * (-1 in sizes.values())}{format_count(given, 'device')}, and {there}. Set "
        f"the environment variable {VARIABLE}={given}, or change the sizes; one of them may be -1 for the devices that "
        "are left."
    )


def _is_cpu_only(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX can find no devices but CPUs; False where that cannot be told without importing it."""
    if platforms := environment.get("JAX_PLATFORMS", ""):
        return platforms == "cpu"
    packages = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not packages and not entry_points(group="jax_plugins")


def recorded_count(run_config: Mapping[str, Any]) -> int | None:
    """Returns the number of devices that a run last had on a CPU; None for a new run, or one on other devices.

    Args:
      run_config: The content of the run's config.json; empty for a new run.
    """
    resolved = run_config.get("resolved", {})
    return math.prod(resolved["mesh"].values()) if resolved.get("device") == "cpu" else None


def describe(count: int) -> str:
    """Returns a sentence about a number of CPU devices that the user did not choose."""
    return f"the CPU is used as {count} device{'s' * (count > 1)}; {VARIABLE} sets another number"
