"""Several processes of one run: joining them, agreeing on flags and errors, and leaving together."""

import contextlib
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mice_jax.errors import AgreedError, StoreError, UserError
from mice_jax.runtime.cluster import in_cluster
from mice_jax.runtime.devices import find_devices

# JAX ends the other processes once it has not heard from one for this long, which must be well within two minutes.
HEARTBEAT_S = int(os.environ.get("MICE_JAX_HEARTBEAT_S", "60"))
JOIN_TIMEOUT_S = 100
BARRIER_TIMEOUT_S = 3600  # a process may compile for long before it arrives
# Lower-case words of the errors that a lost peer causes.
LOST_PEER_WORDS = ("gloo", "nccl", "connection", "peer", "heartbeat", "coordination service", "barrier timed out")
STATUS = re.compile(r"[A-Z_]+: ")  # how the text of an error of JAX's runtime begins
MAX_MESSAGE_BYTES = 2000  # limit of an error message that is sent to the other processes


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, startup_error: str = ""
) -> None:
    """Joins the processes of the run; must run before anything else touches a device.

    Args:
        coordinator_address: host:port of process 0. If none of the three is given, JAX detects a cluster itself
            (TPU pod, Slurm, MPI); without one, the run has a single process.
        num_processes: number of processes of the run.
        process_id: number of this process.
        startup_error: an error of this process, which joins only to send it to the others. They raise it.

    Raises:
        AgreedError: if another process joined with a `startup_error`.
        UserError: if JAX finds no device of the kind that JAX_PLATFORMS names.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if num_processes is not None:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    elif in_cluster():
        jax.distributed.initialize(initialization_timeout=JOIN_TIMEOUT_S, heartbeat_timeout_seconds=HEARTBEAT_S)
    find_devices()
    errors = _allgather_text(startup_error)
    if not startup_error:
        _raise_remote_errors(errors)


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def is_true_on_any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must call this."""
    return any_across_processes(flag)[0]


def any_across_processes(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any process; every process must call this."""
    return np.any(_allgather(np.array(flags)), axis=0).tolist()


def wait_for_all() -> None:
    """Waits in a collective until every process has called this."""
    any_across_processes(False)


def barrier(name: str) -> None:
    """Waits in the coordination service until every process has arrived at the barrier of this name.

    The first collective of Gloo gives up on a late process after 30 s, and a process that finds fewer programs in the
    compilation cache arrives later than that.
    """
    ocp.multihost.get_barrier_sync_fn()(key=f"mice_jax_{name}", timeout_ms=BARRIER_TIMEOUT_S * 1000)


def assert_same_on_all_processes(what: str, fingerprint: str) -> None:
    """Compares a fingerprint across processes; every process must call this.

    Raises:
        AgreedError: on every process, if the fingerprints differ; `what` names them in the message.
    """
    digests = _allgather(np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8))
    others = [i for i, d in enumerate(digests) if not np.array_equal(d, digests[0])]
    if others:
        raise AgreedError(
            f"the processes do not have the same {what}: {', '.join(map(str, others))} differ from process 0. Give "
            "every host the same files, config and versions."
        )


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raises a UserError of any process on all processes, so that none of them hangs in a later collective.

    Every process must enter and leave the block, and nothing inside may be a collective. Waiting for a lock that
    another process holds is allowed, since that process releases it also if it fails.

    Raises:
        StoreError: if that is what one of the processes raised.
        AgreedError: if it was any other UserError.
    """
    error = None
    try:
        yield
    except UserError as e:
        error = e
    errors = _allgather_text("" if error is None else str(error))
    if any(errors):
        kind = StoreError if is_true_on_any_process(isinstance(error, StoreError)) else AgreedError
        if error:
            raise kind(str(error)) from error
        _raise_remote_errors(errors, kind)


def _raise_remote_errors(errors: list[str], kind: type[UserError] = AgreedError) -> None:
    for process, text in enumerate(errors):
        if text:
            raise kind(f"process {process} failed: {text}")


def _allgather_text(text: str) -> list[str]:
    """The text of each process; every process must call this."""
    padded = np.zeros(MAX_MESSAGE_BYTES, np.uint8)
    raw = text.encode()[:MAX_MESSAGE_BYTES]
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in _allgather(padded)]


def _allgather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked; every process must call this."""
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def check_devices(expected: int | None) -> None:
    """Raises UserError if the run has another number of devices, over all processes, than `expected`."""
    found = find_devices()
    if expected is not None and len(found) != expected:
        raise UserError(
            f"--expect_devices={expected}, but the run has {len(found)} {found[0].platform} devices in "
            f"{jax.process_count()} process(es): a device or a process is missing, or jax was installed without "
            "support for this hardware. Fix the installation or pass the intended number."
        )


def exit_immediately(error: BaseException) -> NoReturn:
    """Prints the error and ends this process without the usual shutdown, which would wait for the other processes."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else 1)


def is_lost_peer_error(error: BaseException) -> bool:
    """Whether a collective or the coordination service raised this error because another process is gone.

    JAX raises the same failure as a JaxRuntimeError or, from some of its paths, as a ValueError, of which it is only
    the text: "UNKNOWN: Gloo AllGather failed: ...".
    """
    text = str(error)
    from_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and STATUS.match(text) is not None
    )
    return jax.process_count() > 1 and from_runtime and any(word in text.lower() for word in LOST_PEER_WORDS)
