"""What the processes of a run agree on, in two real processes; and what is reported of a lost peer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from helpers.runs import REPOSITORY, place_flags
from mice_jax.errors import UserError
from mice_jax.runtime import cluster, distributed, watchdog

# Each process prints one JSON object; a UserError becomes its class and text.
PROGRAM = """
import json, sys
from mice_jax.cli import command
from mice_jax.errors import StoreError, UserError
from mice_jax.runtime import distributed

def outcome(function):
    try:
        return function()
    except UserError as e:
        return f"{type(e).__name__}: {e}"

def raise_on(process, error):
    with distributed.raise_on_all_processes():
        if process in (rank, "both"):
            raise error

distributed.initialize(*command.processes_of(sys.argv[1:]))
rank = 1 - distributed.is_main_process()
print(json.dumps({
    "same": outcome(lambda: distributed.assert_same_on_all_processes("data", "a")),
    "different": outcome(lambda: distributed.assert_same_on_all_processes("data", "ab"[rank])),
    "any": distributed.any_across_processes(rank == 0, rank == 1, False),
    "no error": outcome(lambda: raise_on(None, UserError(""))),
    "error": outcome(lambda: raise_on(1, UserError("no such file"))),
    "store error": outcome(lambda: raise_on(0, StoreError("unreachable"))),
    "two errors": outcome(lambda: raise_on("both", UserError(f"found by {rank}"))),
}))
"""


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, object]]:
    """What each of two processes found."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, *place], env=environment, stdout=subprocess.PIPE, text=True)
        for place in place_flags(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]  # gloo prints lines of its own before


def test_equal_values_pass_and_different_ones_name_the_process(outcomes: list[dict[str, object]]) -> None:
    assert [o["same"] for o in outcomes] == [None, None]
    told = [str(o["different"]) for o in outcomes]
    assert told[0] == told[1]
    assert told[0].startswith("AgreedError: the processes do not have the same data: 1 differ from process 0")


def test_a_flag_of_any_process_is_seen_by_all(outcomes: list[dict[str, object]]) -> None:
    assert [o["any"] for o in outcomes] == [[True, True, False]] * 2


def test_an_error_of_one_process_is_raised_by_all(outcomes: list[dict[str, object]]) -> None:
    assert [o["no error"] for o in outcomes] == [None, None]
    assert [o["error"] for o in outcomes] == [
        "AgreedError: process 1 failed: no such file",
        "AgreedError: no such file",
    ]
    assert [o["store error"] for o in outcomes] == [
        "StoreError: unreachable",
        "StoreError: process 0 failed: unreachable",
    ]
    assert [o["two errors"] for o in outcomes] == ["AgreedError: found by 0", "AgreedError: found by 1"]


def test_another_number_of_devices_than_expected_is_an_error() -> None:
    distributed.check_devices(8)
    distributed.check_devices(None)
    with pytest.raises(UserError, match="--expect_devices=9, but the run has 8 cpu devices in 1 process"):
        distributed.check_devices(9)


@pytest.mark.parametrize("missing", ["coordinator_address", "num_processes", "process_id"])
def test_only_some_of_the_process_flags_is_an_error(missing: str) -> None:
    given = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
    assert cluster.is_multi_process(**given)
    with pytest.raises(UserError, match=f"--{missing} missing"):
        cluster.is_multi_process(**(given | {missing: None}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("checkpoints", "code", "first"), [([], 1, "error"), ([2, 10, 7], 75, "preempted")])
def test_a_lost_peer_is_reported_with_the_checkpoint_to_resume_from(
    checkpoints: list[int], code: int, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in checkpoints:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert watchdog.report_lost_peer(tmp_path, "Gloo closed") == code
    text = capsys.readouterr().err
    assert text.startswith(f"{first}: another process of this run has ended") and "(Gloo closed)" in text
    assert ("checkpoints/10;" in text) == bool(checkpoints)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGABRT, 1)])
def test_a_child_ended_by_a_signal_is_reported_by_its_parent(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JAX ends a process whose peer is lost by SIGABRT."""
    assert watchdog._report_signal(number, tmp_path) == code
    text = capsys.readouterr().err
    assert ("the training process was ended by SIGKILL" in text) == (number == signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:33992: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo ReduceScatter failed: Connection closed by peer"), True),
        (ValueError("the connection of these layers is wrong"), False),  # a mistake in the code
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (OSError("UNKNOWN: connection reset by peer"), False),
    ],
)
def test_errors_of_a_lost_peer(error: Exception, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not distributed.is_lost_peer_error(error), "one process has no peer"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_lost_peer_error(error) == lost
