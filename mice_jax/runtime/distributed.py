"""The processes of a run: joining them, knowing the lead, agreeing."""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mice_jax.errors import AgreedError, StoreError, UserError

# Without a word from a peer for so long it is lost, and JAX ends the others: well within two minutes.
HEARTBEAT_S = int(os.environ.get("MICE_JAX_HEARTBEAT_S", "60"))
JOIN_S = 100  # for all processes to come together
MEET_S = 3600  # for those that are alive to come to the same place: they may compile for long
# What the errors say of which a lost peer is the cause, in lower case.
LOST_PEER = ("gloo", "nccl", "connection", "peer", "heartbeat", "coordination service", "barrier timed out")
MAX_MESSAGE_BYTES = 2000  # of a refusal, that the other processes are told


def is_multi_process(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether the flags, or a cluster's environment, make this one of several processes.

    Raises UserError where some of the flags are given and others are not.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{k}" for k, v in given.items() if v is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing: give all of --{', --'.join(given)}, or none of them.")
    return _in_cluster() if num_processes is None else num_processes > 1


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, refusal: str = ""
) -> None:
    """Joins the run's processes, before anything else touches a device.

    With none of the three given JAX looks for a cluster by itself (TPU pod, Slurm, MPI), and one process alone
    is what remains where it finds none. A process that joins with a `refusal` only tells it to the others: they raise
    it as an AgreedError.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if num_processes is not None:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    elif _in_cluster():
        jax.distributed.initialize(initialization_timeout=JOIN_S, heartbeat_timeout_seconds=HEARTBEAT_S)
    told = _allgather_text(refusal)
    if not refusal:
        _raise_remote_errors(told)


def _in_cluster() -> bool:
    """Whether an environment variable says that this is one of several processes."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_main_process() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def is_true_on_any_process(flag: bool) -> bool:
    """Whether the flag is set anywhere; every process must call it."""
    return any_across_processes(flag)[0]


def any_across_processes(*flags: bool) -> list[bool]:
    """For each flag, whether it is set anywhere; every process must call it."""
    return np.any(_allgather(np.array(flags)), axis=0).tolist()


def barrier(where: str) -> None:
    """Waits for all processes, by the coordination service: what else they wait in may give up on a late one.

    Gloo does after 30 s, when processes first compute together, and one that finds fewer programs kept compiles longer.
    """
    ocp.multihost.get_barrier_sync_fn()(key=f"mice_jax_{where}", timeout_ms=MEET_S * 1000)


def assert_same_on_all_processes(what: str, fingerprint: str) -> None:
    """AgreedError where not all of them have the same fingerprint; every process must call it."""
    digests = _allgather(np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8))
    others = [i for i, d in enumerate(digests) if not np.array_equal(d, digests[0])]
    if others:
        raise AgreedError(
            f"the processes do not have the same {what}: {', '.join(map(str, others))} differ from process 0. Give "
            "every host the same files, config and versions."
        )


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """What one process refuses inside, all of them refuse, with its words: so none is left waiting for another.

    Every process must enter and leave it, and nothing inside may wait for another process. A store that fails one of
    them is a StoreError in all of them.
    """
    refusal = None
    try:
        yield
    except UserError as e:
        refusal = e
    told = _allgather_text("" if refusal is None else str(refusal))
    if any(told):
        kind = StoreError if is_true_on_any_process(isinstance(refusal, StoreError)) else AgreedError
        if refusal:
            raise kind(str(refusal)) from refusal
        _raise_remote_errors(told, kind)


def _raise_remote_errors(told: list[str], kind: type[UserError] = AgreedError) -> None:
    for process, text in enumerate(told):
        if text:
            raise kind(f"process {process} failed: {text}")


def _allgather_text(text: str) -> list[str]:
    """What each process says; every process must call it."""
    padded = np.zeros(MAX_MESSAGE_BYTES, np.uint8)
    raw = text.encode()[:MAX_MESSAGE_BYTES]
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in _allgather(padded)]


def _allgather(array: np.ndarray) -> np.ndarray:
    """The array of each process, stacked; every process must call it."""
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def check_devices(expected: int | None) -> None:
    """UserError where the run has not the devices that its launcher counted on, in all processes together."""
    found = jax.devices()
    if expected is not None and len(found) != expected:
        raise UserError(
            f"--expect_devices={expected}, but the run has {len(found)} {found[0].platform} devices in "
            f"{jax.process_count()} process(es): a device or a process is missing, or jax was installed without "
            "support for this hardware. Mend the machine or its installation, or give the number that is meant."
        )


def exit_immediately(error: BaseException) -> NoReturn:
    """Ends this process of several at once, with its word: the others notice, where they would wait for a farewell."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else 1)


def is_lost_peer_error(error: BaseException) -> bool:
    """Whether an exception is what a collective, or the coordination service, makes of a process that is gone."""
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    said = str(error).lower()
    return any(word in said for word in LOST_PEER)
