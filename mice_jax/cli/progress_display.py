"""Messages and progress bars on the terminal while data is prepared."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mice_jax.data.store import ProgressCallback

LINE_EVERY_S = 30.0  # between lines of progress where there is no terminal to draw a bar on
STATUS_EVERY_S = 5.0  # between lines of a status, likewise


class Display:
    """Prints messages, and a progress bar for each long task, or a line now and then where there is no terminal."""

    def __init__(self, console: Console):
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        counts = (TextColumn("{task.fields[count]:,} {task.fields[unit]}"), TimeRemainingColumn())
        hidden = console.quiet or not console.is_terminal
        self._bars = Progress(*columns, *counts, console=console, transient=True, disable=hidden)

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bars.stop()

    def log(self, text: str) -> None:
        """Prints a message."""
        self._console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    @contextlib.contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """Provides a function that shows what is being done, in one line that each text replaces.

        Without a terminal, texts are printed as lines, at most one every STATUS_EVERY_S seconds.
        """
        if self._console.is_terminal:
            with self._console.status("") as shown:
                yield lambda text: shown.update(f"[dim]{escape(text)}[/dim]")
            return
        last_line = -STATUS_EVERY_S

        def say(text: str) -> None:
            nonlocal last_line
            if time.monotonic() >= last_line + STATUS_EVERY_S:
                last_line = time.monotonic()
                self.log(text)

        yield say

    def watch(self, what: str, unit: str = "samples") -> ProgressCallback:
        """A callback that updates the progress of `what`: the fraction done, and the number of units done."""
        bar = self._bars.add_task(escape(what), total=1.0, count=0, unit=unit, visible=False)
        last_line = time.monotonic()

        def update(done: float, count: int) -> None:
            nonlocal last_line
            self._bars.update(bar, completed=done, count=count, visible=done < 1)
            if self._bars.disable and time.monotonic() > last_line + LINE_EVERY_S:
                last_line = time.monotonic()
                self.log(f"{what}: {done:.0%}, {count:,} {unit}")

        return update
