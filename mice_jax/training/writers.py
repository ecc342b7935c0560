"""Writers of a run's step records: metrics.jsonl, TensorBoard and the terminal.

A record is a JSON object with the metrics of one step; `training.record` describes its fields.
"""

import json
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class Writer(Protocol):
    """A destination of step records."""

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record of one step."""
        ...

    def close(self) -> None:
        """Writes what is still buffered and releases resources."""
        ...


class JsonlWriter:
    """Appends one JSON object per step to a file.

    Each line is flushed as soon as it is written, so a killed process does not lose the steps that it has finished.
    """

    def __init__(self, file: Path):
        self._file: TextIO = file.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends the record as one line and flushes it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Returns the fields of a record whose values are numbers, without booleans."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class TensorBoardWriter:
    """Writes the numbers of every `every_steps`-th record to TensorBoard, with the samples seen as the x-axis."""

    def __init__(self, folder: Path, every_steps: int):
        self._writer, self._every = SummaryWriter(str(folder)), every_steps

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record's numbers if its step is a multiple of `every_steps`."""
        if record["step"] % self._every:
            return
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["samples"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class TerminalWriter:
    """Prints loss, token accuracy, gradient norm, tokens/s and time left.

    On a terminal this is a progress bar. Elsewhere it is a line for every `every_steps`-th step.
    """

    def __init__(self, console: Console, steps_done: int, total_steps: int, every_steps: int):
        """Starts the progress bar if the console is a terminal.

        Args:
          console: The console to print to.
          steps_done: The number of steps that were done before this process started.
          total_steps: The number of the run's last step.
          every_steps: The number of steps between two updates.
        """
        self._console, self._total, self._every = console, total_steps, every_steps
        self._seconds, self._done = 0.0, 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("starting", total=total_steps, completed=steps_done)
            self._bar.start()

    def write(self, record: dict[str, Any]) -> None:
        """Updates the progress bar, or prints a line, if the step is a multiple of `every_steps` or the last one."""
        if record["step"] == 0:  # The evaluation before the first step has neither a loss nor a time.
            if "eval/loss" in record and not self._bar:
                self._console.print(f"step 0/{self._total}  eval/loss {record['eval/loss']:.4f}")
            return
        self._done += 1
        if self._done > 1:  # The first step includes compilation, so it is not part of the mean step time.
            self._seconds += record["step_time_s"]
        step = record["step"]
        if step % self._every and step != self._total:
            return
        numbers = (
            f"loss {record['loss']:.4f}  accuracy {record['token_accuracy']:.3f}  grad_norm {record['grad_norm']:.3f}  "
            f"{record['tokens_per_s']:,.0f} tok/s"
        )
        held_out = f"  eval/loss {record['eval/loss']:.4f}" if "eval/loss" in record else ""
        if "eval/exact_match" in record:
            held_out += f"  eval/exact_match {record['eval/exact_match']:.3f}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=numbers + held_out)
            return
        left = ""
        if self._done > 1:
            left = f"  {(self._total - step) * self._seconds / (self._done - 1):.0f} s left"
        self._console.print(f"step {step}/{self._total}  {numbers}{left}{held_out}")

    def close(self) -> None:
        """Stops the progress bar."""
        if self._bar:
            self._bar.stop()
