"""Progress of data preparation, with and without a terminal."""

import io

import pytest
from rich.console import Console

from mice_jax.cli import progress_display
from mice_jax.cli.progress_display import Display

pytestmark = pytest.mark.smoke


def output_of(terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, quiet=quiet)
    with Display(console) as display:
        display.log("tokens of [a].jsonl")
        watch = display.watch("[a].jsonl")
        for i in range(1, 4):
            watch(i / 4, 1000 * i)
            display._bars.refresh()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_a_bar() -> None:
    assert "75 %" in output_of(True) and "3,000 samples" in output_of(True) and "[a].jsonl" in output_of(True)


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_of(False) == "tokens of [a].jsonl\n"  # quick work is not reported
    monkeypatch.setattr(progress_display, "LINE_EVERY_S", -1)
    assert "[a].jsonl: 75%, 3,000 samples\n" in output_of(False)


def test_a_quiet_console_prints_nothing() -> None:
    assert output_of(True, quiet=True) == output_of(False, quiet=True) == ""


def test_status_prints_the_first_text_and_later_ones_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=100)
    with Display(console).status() as say:
        for text, seconds in (("one", 1), ("two", 5), ("three", 0)):
            say(text)
            now[0] += seconds
    assert console.file.getvalue() == "one\nthree\n"  # type: ignore[attr-defined]


def test_status_of_a_terminal_is_shown_in_place() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(console).status() as say:
        say("compiling [a]")
    assert "compiling [a]" in console.file.getvalue()  # type: ignore[attr-defined]
