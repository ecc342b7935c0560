"""The process in which a sweep's worker runs its trials: when it is used again, and when there is a new one."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mice_jax.runtime import fork_server
from mice_jax.runtime.fork_server import CommandProcess
from mice_jax.storage.paths import parse_path


@pytest.fixture
def process() -> Iterator[CommandProcess]:
    made = CommandProcess()
    yield made
    made.close()


def run(
    process: CommandProcess, folder: Path, *arguments: str, tiny: str = "", settings: object = None
) -> tuple[int, int]:
    """Runs the tiny command; returns its exit code and the process in which it ran."""
    log, workdir = folder / "log.txt", parse_path(str(folder))
    code = process.run("helpers.tiny_command", arguments, workdir, {"TINY": tiny}, log, settings)
    last = log.read_text().splitlines()[-1]
    pid, printed = last.split(" ", 1)
    assert printed == f"{tiny} {list(arguments)}"
    return code, int(pid)


def test_commands_run_in_one_process_until_one_fails(process: CommandProcess, tmp_path: Path) -> None:
    first, *others = [run(process, tmp_path, code, tiny=code) for code in ("0", "3", "75", "2")]
    assert [code for code, _ in (first, *others)] == [0, 3, 75, 2]
    assert {pid for _, pid in others} == {first[1]}
    code, pid = run(process, tmp_path, "0")
    assert code == 0 and pid != first[1], "after an error there is a new process"
    assert run(process, tmp_path, "0", settings=2)[1] != pid, "for other settings too"


def test_a_killed_process_is_replaced(
    process: CommandProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, pid = run(process, tmp_path, "kill")
    assert code == 128 + signal.SIGKILL and "was ended by SIGKILL" in capsys.readouterr().err
    code, second = run(process, tmp_path, "0")
    assert code == 0 and second != pid
    os.kill(second, signal.SIGKILL)  # while it waits for a command
    while Path(f"/proc/{second}").exists():
        time.sleep(0.01)
    code, third = run(process, tmp_path, "0")
    assert code == 0 and third != second


def test_a_process_that_keeps_large_arrays_is_replaced(process: CommandProcess, tmp_path: Path) -> None:
    assert fork_server.MAX_BYTES_KEPT < 2**25 * 4
    code, pid = run(process, tmp_path, "keep")
    assert code == 0 and run(process, tmp_path, "0") != (0, pid)
