"""What a run says while it runs: metrics.jsonl, TensorBoard, the terminal; and its share of the machine's peak."""

import json
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Writer(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One object a step; a line is handed to the system whole, so a killed process leaves no half of one."""

    def __init__(self, file: Path):
        self._file: TextIO = file.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a number."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class TensorBoardWriter:
    """Every number of a record, by samples seen."""

    def __init__(self, folder: Path, every_steps: int):
        from tensorboardX import SummaryWriter  # slow to import

        self._writer, self._every = SummaryWriter(str(folder)), every_steps

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] % self._every:
            return
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["samples"])

    def close(self) -> None:
        self._writer.close()


class TerminalWriter:
    """A bar on a terminal, a line every so many steps elsewhere: loss, gradient norm, tokens/s, time left."""

    def __init__(self, console: Console, first_step: int, total_steps: int, every_steps: int):
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
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
            self._bar.start()

    def write(self, record: dict[str, Any]) -> None:
        self._done += 1
        if self._done > 1:  # the first step compiles
            self._seconds += record["step_time_s"]
        step = record["step"]
        if step % self._every and step != self._total:
            return
        numbers = f"loss {record['loss']:.4f}  grad_norm {record['grad_norm']:.3f}  {record['tokens_per_s']:,.0f} tok/s"
        held_out = f"  eval/loss {record['eval/loss']:.4f}" if "eval/loss" in record else ""
        if self._bar:
            self._bar.update(self._task, completed=step, description=numbers + held_out)
            return
        left = ""
        if self._done > 1:
            left = f"  {(self._total - step) * self._seconds / (self._done - 1):.0f} s left"
        self._console.print(f"step {step}/{self._total}  {numbers}{left}{held_out}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
