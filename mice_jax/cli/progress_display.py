"""What a verb tells on the terminal while it prepares data: sentences, and how far it is."""

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mice_jax.data.store import Watch

WORD_EVERY_S = 30.0  # where there is no terminal to draw a bar on


class Display:
    """Sentences, and a bar for each thing that takes long: a line from time to time where it cannot be redrawn."""

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

    def say(self, text: str) -> None:
        self._console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def watch(self, what: str, unit: str = "samples") -> Watch:
        """A function to be told how much of `what` is done (0 to 1), and how many samples, or others, that is."""
        bar = self._bars.add_task(escape(what), total=1.0, count=0, unit=unit, visible=False)
        said = time.monotonic()

        def told(done: float, count: int) -> None:
            nonlocal said
            self._bars.update(bar, completed=done, count=count, visible=done < 1)
            if self._bars.disable and time.monotonic() > said + WORD_EVERY_S:
                said = time.monotonic()
                self.say(f"{what}: {done:.0%}, {count:,} {unit}")

        return told
