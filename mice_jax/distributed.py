"""The processes of a run: joining them, knowing the lead, agreeing."""

import hashlib
import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from mice_jax.errors import UserError


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the run's processes, before anything else touches a device.

    With none of the three given JAX looks for a cluster by itself (TPU pod, Slurm, MPI), and one process alone
    is what remains where it finds none.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{k}" for k, v in given.items() if v is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing: give all of --{', --'.join(given)}, or none of them.")
    if not missing:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif _in_cluster():
        jax.distributed.initialize()


def ask_for_determinism() -> None:
    """Bit-equal reruns on GPU, at some cost; CPU and TPU have them anyway. Before anything touches a device."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"


def _in_cluster() -> bool:
    """Whether an environment variable says that this is one of several processes."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set anywhere; every process must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same(what: str, fingerprint: str) -> None:
    """UserError, in every process, where not all of them have the same fingerprint; every process must call it."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [i for i, d in enumerate(digests) if not np.array_equal(d, digests[0])]
    if others:
        raise UserError(
            f"the processes do not have the same {what}: {', '.join(map(str, others))} differ from process 0. Give "
            "every host the same files, config and versions."
        )


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class LeaveRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked this process to save and leave; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}

    def forget(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_devices(expected: int | None) -> None:
    """UserError where the run has not the devices that its launcher counted on, in all processes together."""
    found = jax.devices()
    if expected is not None and len(found) != expected:
        raise UserError(
            f"--expect_devices={expected}, but the run has {len(found)} {found[0].platform} devices in "
            f"{jax.process_count()} process(es): a device or a process is missing, or jax was installed without "
            "support for this hardware. Mend the machine or its installation, or give the number that is meant."
        )
