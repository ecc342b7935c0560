"""Shows in the terminal how far the trials of a sweep are."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mice_jax.errors import format_count
from mice_jax.sweeps.study import Study, status_of
from mice_jax.training.stop_monitor import last_record

COLOURS = {"completed": "green", "stopped": "yellow", "failed": "red", "running": "cyan"}
LINES_AROUND_TABLE = 6  # terminal lines that the table's head and the summary below it need
MIN_ROWS = 4


class ProgressTable:
    """A table of the trials that is redrawn on a terminal; elsewhere, a line when a trial begins and when it ends.

    Args:
        console: where to print.
        study: the study to show.
        column_names: short names of the sweep's axes and its seed.
    """

    def __init__(self, console: Console, study: Study, column_names: Sequence[str]):
        self._console, self._study, self._column_names = console, study, column_names
        self._started = time.monotonic()
        self._steps_at_start: int | None = None
        self._begun: set[int] = set()
        self._reported = {t.number for t in study.trials() if t.state.is_finished()}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "ProgressTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def update(self) -> None:
        """Shows the present state of the study."""
        if self._live:
            self._live.update(self.table(), refresh=True)
            return
        trials = self._study.trials()
        for trial in trials:
            if status_of(trial) == "running" and trial.number not in self._begun:
                self._begun.add(trial.number)
                log = self._study.run_folder(trial.number) / "log.txt"
                self._console.print(escape(f"trial {trial.number}: running, its log is {log}"))
            if trial.state.is_finished() and trial.number not in self._reported:
                self._reported.add(trial.number)
                count = f"({len(self._reported)} of {len(trials)} ended)"
                self._console.print(escape(f"{_ending(trial, self._study.sweep.metric)}  {count}"))

    # -------------------------------------------------------------------- the table
    def table(self) -> Group:
        """Returns the table of the trials that fit on the screen, and the summary of all of them below it."""
        study, trials = self._study, self._study.trials()
        best = study.best()
        best_number = best.number if best else None
        records = [last_record(study.run_folder(t.number)) for t in trials]
        totals = [study.total_steps(t.number) for t in trials]
        room = max(MIN_ROWS, self._console.height - LINES_AROUND_TABLE)
        shown = trials_to_show([status_of(t) for t in trials], best_number, room)
        table = self._empty_table()
        for trial, record, total in zip(trials, records, totals, strict=True):
            if trial.number in shown:
                is_best = trial.number == best_number
                table.add_row(*self._cells(trial, record, total, is_best), style="bold" if is_best else "")
        counts = Counter(map(status_of, trials))
        parts = [", ".join(f"{n} {status}" for status, n in counts.items())]
        if best:
            parts.append(f"best: trial {best.number}, {study.sweep.metric} {best.value:.4g}")
        parts.append(self._time_left(trials, records, totals))
        return Group(table, Text("  ·  ".join(parts)))

    def _empty_table(self) -> Table:
        metrics = dict.fromkeys(["loss", self._study.sweep.metric])
        columns = ["trial", *self._column_names, "", "step", *metrics, "status"]
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        # In a narrow terminal, only the reason beside a status is shortened.
        table.columns[-1].min_width = len("completed (best)")
        for column in table.columns[:-1]:
            column.no_wrap = True
        return table

    def _cells(self, trial: FrozenTrial, record: dict[str, Any], total_steps: int, is_best: bool) -> list[Any]:
        step = record.get("step", 0)
        metrics = [f"{record['loss']:.4f}" if record else ""]
        if self._study.sweep.metric != "loss":
            metrics.append(f"{trial.value:.4g}" if trial.value is not None else "")
        status = Text(
            status_of(trial) + (" (best)" if is_best else ""),
            COLOURS.get(status_of(trial), "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )
        status.append(f" {trial.user_attrs.get('reason', '')}".rstrip(), "dim")
        bar = ProgressBar(total=total_steps or 1, completed=step, width=12)
        params = [escape(str(v)) for v in self._study.params(trial).values()]
        return [str(trial.number), *params, bar, str(step), *metrics, status]

    def _time_left(
        self, trials: Sequence[FrozenTrial], records: Sequence[dict[str, Any]], totals: Sequence[int]
    ) -> str:
        """Returns the steps done and an estimate of the time left, for which no trial is assumed to be stopped."""
        known_totals = [n for n in totals if n] or [0]
        typical_total = sum(known_totals) // len(known_totals)
        done = sum(r.get("step", 0) for r in records)
        left = sum(
            max(0, (total or typical_total) - record.get("step", 0))
            for trial, record, total in zip(trials, records, totals, strict=True)
            if not trial.state.is_finished()
        )
        if self._steps_at_start is None:
            self._steps_at_start = done
        rate = (done - self._steps_at_start) / max(1e-9, time.monotonic() - self._started)
        return f"{format_count(done, 'step')} done" + (f", at most {left / rate:,.0f} s left" if rate and left else "")


def trials_to_show(statuses: Sequence[str], best: int | None, room: int) -> set[int]:
    """Chooses the trials that a screen has room for.

    These are the running ones and the best one, then those that ended last, then those that wait.

    Args:
        statuses: the status of each trial.
        best: number of the best trial, if there is one.
        room: how many trials can be shown.
    """
    running = [i for i, s in enumerate(statuses) if s == "running"]
    waiting = [i for i, s in enumerate(statuses) if s == "waiting"]
    newest_ended = [i for i, s in enumerate(statuses) if s not in ("running", "waiting")][::-1]
    first = running if best is None else [*running, best]
    half = room // 2 + room % 2
    ordered = dict.fromkeys([*first, *newest_ended[:half], *waiting, *newest_ended])
    return set(list(ordered)[:room])


def _ending(trial: FrozenTrial, metric: str) -> str:
    reason = trial.user_attrs.get("reason", "")
    value = "" if trial.value is None else f", {metric} {trial.value:.4g}"
    return f"trial {trial.number}: {status_of(trial)}{f', {reason}' if reason else ''}{value}"
