"""How far the preparing is, on a terminal and where there is none."""

import io

import pytest
from rich.console import Console

from mice_jax.cli import progress_display
from mice_jax.cli.progress_display import Display


def shown(terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, quiet=quiet)
    with Display(console) as told:
        told.say("tokens of [a].jsonl")
        watch = told.watch("[a].jsonl")
        for i in range(1, 4):
            watch(i / 4, 1000 * i)
            told._bars.refresh()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_has_a_bar() -> None:
    assert "75 %" in shown(True) and "3,000 samples" in shown(True) and "[a].jsonl" in shown(True)


def test_elsewhere_there_is_a_line_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(False) == "tokens of [a].jsonl\n"  # nothing that takes no time is counted
    monkeypatch.setattr(progress_display, "WORD_EVERY_S", -1)
    assert "[a].jsonl: 75%, 3,000 samples\n" in shown(False)


def test_other_processes_than_the_lead_say_nothing() -> None:
    assert shown(True, quiet=True) == shown(False, quiet=True) == ""
