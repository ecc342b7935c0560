"""Whether a process is one of several of a run, told from its flags and environment without importing jax."""

import os

from mice_jax.errors import UserError


def is_multi_process(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether the flags or the environment of a cluster make this process one of several.

    Args:
        coordinator_address: host:port of process 0, or None.
        num_processes: number of processes of the run, or None.
        process_id: number of this process, or None.

    Returns:
        True if the run has more than one process.

    Raises:
        UserError: if only some of the three are given.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{k}" for k, v in given.items() if v is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing: give all of --{', --'.join(given)}, or none of them.")
    return in_cluster() if num_processes is None else num_processes > 1


def in_cluster() -> bool:
    """Whether an environment variable of Slurm, MPI or a TPU pod makes this process one of several."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
