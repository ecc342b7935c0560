"""Two real processes: whether they notice that they do not have the same."""

import os
import subprocess
import sys

from helpers.runs import REPOSITORY, place_flags

AGREE = """
import sys
from mice_jax.cli import command
from mice_jax.runtime import distributed
from mice_jax.errors import UserError
have, *place = sys.argv[1:]
distributed.initialize(*command.processes_of(place))
try:
    distributed.assert_same_on_all_processes("data", have)
    print("the same")
except UserError as e:
    print(e)
"""


def two(haves: tuple[str, str]) -> list[str]:
    """What each of two processes says to what it has."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, have, *place], env=environment, stdout=subprocess.PIPE, text=True
        )
        for have, place in zip(haves, place_flags(2), strict=True)
    ]
    return [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]  # gloo has a word before


def test_processes_with_the_same_data_go_on() -> None:
    assert two(("a", "a")) == ["the same", "the same"]


def test_processes_with_other_data_all_say_who_differs() -> None:
    told = two(("a", "b"))
    assert told[0] == told[1] and told[0].startswith("the processes do not have the same data: 1 differ from process 0")
