"""Two real processes: whether they notice that they do not have the same."""

import os
import socket
import subprocess
import sys

from runs import REPOSITORY

AGREE = """
import sys
from mice_jax import distributed
from mice_jax.errors import UserError
port, number, have = sys.argv[1:]
distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
try:
    distributed.check_same("data", have)
    print("the same")
except UserError as e:
    print(e)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two(haves: tuple[str, str]) -> list[str]:
    """What each of two processes says to what it has."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, port, str(i), have], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i, have in enumerate(haves)
    ]
    return [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]  # gloo has a word before


def test_processes_with_the_same_data_go_on() -> None:
    assert two(("a", "a")) == ["the same", "the same"]


def test_processes_with_other_data_all_say_who_differs() -> None:
    told = two(("a", "b"))
    assert told[0] == told[1] and told[0].startswith("the processes do not have the same data: 1 differ from process 0")
