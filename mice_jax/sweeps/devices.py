"""Shares a machine's accelerators among the workers of a sweep, without initialising them."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mice_jax.errors import UserError
from mice_jax.runtime import cpu_devices


def share_of_devices(workers: int, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Splits the devices of this machine evenly among workers.

    The operating system shares CPU cores among the workers, so each gets its share of JAX's CPU devices: of as many as
    JAX_NUM_CPU_DEVICES says, or as there are cores.

    Args:
        workers: number of workers.
        environment: environment variables of this process.

    Returns:
        The environment variables that give each worker its devices.

    Raises:
        UserError: the devices cannot be split evenly.
    """
    if workers == 1:
        return [{}]
    platform = environment.get("JAX_PLATFORMS", "")
    if platform in ("", "cuda", "gpu") and (ids := _gpus(environment)):
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in _split(ids, workers, "GPUs")]
    if platform in ("", "tpu") and (ids := _tpus(environment)):
        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": f"1,{len(ids) // workers},1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return [bounds | {"TPU_VISIBLE_CHIPS": ",".join(part)} for part in _split(ids, workers, "TPU chips")]
    count = int(environment.get(cpu_devices.VARIABLE, 0)) or cpu_devices.usable_cores()
    return [{cpu_devices.VARIABLE: str(max(1, count // workers))} for _ in range(workers)]


def _split(ids: list[str], workers: int, kind: str) -> list[list[str]]:
    if len(ids) % workers:
        raise UserError(f"--workers={workers} does not divide the {len(ids)} {kind} of this machine.")
    size = len(ids) // workers
    return [ids[i * size : (i + 1) * size] for i in range(workers)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the ids of the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [i for i in environment["CUDA_VISIBLE_DEVICES"].split(",") if i]
    if not shutil.which("nvidia-smi"):
        return []
    lines = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in lines))]


def _tpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the ids of the TPU chips that this process may use."""
    if "TPU_VISIBLE_CHIPS" in environment:
        return [i for i in environment["TPU_VISIBLE_CHIPS"].split(",") if i]
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return [str(i) for i in range(len(chips))]
