"""Applies the bracket rule to the trials of a sweep that is running, from the files of their runs.

Trials are numbered with the seeds innermost, so trial `arm * num_seeds + seed` is the run of an arm with a seed. What a
trial's files say never changes once it is there, so it is read once.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mice_jax.config import Sweep, holds_data_out
from mice_jax.errors import UserError
from mice_jax.sweeps import certificate
from mice_jax.sweeps.bracket_rule import BracketRule
from mice_jax.sweeps.certificate import Certificate
from mice_jax.sweeps.grid import checked_grid
from mice_jax.sweeps.rule import Runs
from mice_jax.training.stop_monitor import read_run
from mice_jax.training.stop_rules import step_at_fraction

# Fields that change how long a run is; runs of one block must be equally long.
HORIZON_FIELDS = ("max_steps", "num_epochs", "num_steps", "replay")


class TrialTask(NamedTuple):
    """A trial that is to be run, from where it is."""

    number: int
    until: float  # the share of the run after which it is paused; 1 for a whole run


class LiveBracket:
    """The bracket rule at work on the trials of a sweep.

    Args:
        sweep: The sweep's settings.
        rule: The rule.
        runs: The folder with the runs of all trials.
        total_steps: Returns the planned number of steps of a trial; 0 before it has started.

    Raises:
        UserError: The rule cannot work on this sweep.
    """

    def __init__(self, sweep: Sweep, rule: BracketRule, runs: Path, total_steps: Callable[[int], int]):
        check(sweep, rule)
        self.rule, self.grid = rule, checked_grid(sweep.axes)
        self._folder, self._metric, self._total_steps = runs, sweep.metric, total_steps
        self._sign = -1.0 if sweep.mode == "max" else 1.0
        self._num_seeds = max(len(sweep.seeds), 1)
        self._at_probe: dict[int, float] = {}
        self._starts: dict[int, float] = {}

    def tasks(self, finals: Mapping[int, float], failed: Collection[int]) -> list[TrialTask]:
        """Returns the trials that can be run now, the most urgent first; those that are running are among them.

        Args:
            finals: The metric of each completed trial.
            failed: The trials that ended otherwise.
        """
        runs = self.state(finals, failed)
        tasks = self.rule.next_tasks(self.grid, runs)
        numbered = [(task.arm * self._num_seeds + task.seed, task.until) for task in tasks]
        return [TrialTask(number, float(runs.shares[until - 1])) for number, until in numbered]

    def state(self, finals: Mapping[int, float], failed: Collection[int]) -> Runs:
        """Returns what has been measured so far; see `tasks`. Runs are evaluated at the probe and at their end."""
        shape = (self._num_seeds, self.grid.size)
        curves, done = np.full((*shape, 2), math.nan), np.zeros(shape, np.int64)
        for number in range(shape[0] * shape[1]):
            arm, seed = divmod(number, self._num_seeds)
            self._read(number)
            if number in self._at_probe:
                curves[seed, arm, 0], done[seed, arm] = self._at_probe[number], 1
            if number in finals:
                curves[seed, arm, 1], done[seed, arm] = self._sign * finals[number], 2
            elif number in failed:
                curves[seed, arm, done[seed, arm]], done[seed, arm] = math.inf, done[seed, arm] + 1
        start = float(np.mean(list(self._starts.values()))) if self._starts else math.nan
        shares = np.array([self.rule.first, 1.0])
        return Runs(np.where(np.isnan(curves), math.inf, curves), done, np.zeros(shape, bool), shares, start)

    def _read(self, number: int) -> None:
        """Reads what a trial has measured before its first step and at the probe, unless it is known."""
        if number in self._at_probe or not (steps := self._total_steps(number)):
            return
        before, records = read_run(self._folder / str(number))
        if before.get(self._metric) is not None:
            self._starts[number] = self._sign * before[self._metric]
        at = step_at_fraction(self.rule.first, steps)
        if len(records) >= at and records[at - 1].get(self._metric) is not None:
            self._at_probe[number] = self._sign * records[at - 1][self._metric]

    def reason(self, number: int) -> str:
        """Returns why a trial is not run any further, once the rule has nothing left to run."""
        if number in self._at_probe:
            return f"paused at {self.rule.first:.0%}: the bracket rule has found the best arm without it"
        return "not run: the bracket rule has found the best arm without it"

    def certificate(self, finals: Mapping[int, float], failed: Collection[int]) -> Certificate | None:
        """Returns what the rule found and what that rests on; None if every run has failed or diverged; see `tasks`."""
        return certificate.of_sweep(self.rule, self.grid, self.state(finals, failed), self._metric, self._sign)

    def conclusion(self, finals: Mapping[int, float], failed: Collection[int]) -> list[str]:
        """Returns what the rule found, a sentence each: the best arm, what was saved, and notes; see `tasks`."""
        found = self.certificate(finals, failed)
        if found is None:
            return ["The bracket rule found no arm, because every run has failed or diverged."]
        return [found.sentence(), *found.notes]


def check(sweep: Sweep, rule: BracketRule) -> None:
    """Raises UserError where the rule cannot work on a sweep."""
    if sweep.search != "grid":
        raise UserError(
            f"stop={rule} of the sweep needs a grid, whose arms have neighbours; search={sweep.search!r} has none. "
            "Leave search at its default, or use another rule."
        )
    rule.check_axes(checked_grid(sweep.axes))
    if not sweep.metric.startswith("eval/") or not sweep.metric.endswith("loss"):
        raise UserError(
            f"metric={sweep.metric!r} of the sweep is not measured before the first step, from where BracketRule "
            "measures the gain. Use a held-out loss such as eval/loss, or another rule."
        )
    if not holds_data_out(sweep.base):
        raise UserError(
            f"The sweep holds no data out, so no run has {sweep.metric}. Set data.validation or "
            "data.validation_fraction of its base, or use another rule than BracketRule."
        )
    _check_horizons(sweep, rule)


def _check_horizons(sweep: Sweep, rule: BracketRule) -> None:
    """Raises UserError where an axis inside the blocks makes some runs longer than others."""
    by_steps = sweep.base.optim.max_steps or any(phase.num_steps for phase in sweep.base.data.phases)
    for name in rule.axes_inside_blocks(checked_grid(sweep.axes)):
        field = name.rpartition(".")[2]
        if field in HORIZON_FIELDS or (field == "batch_size" and by_steps):
            why = " at a fixed number of steps" if field == "batch_size" else ""
            raise UserError(
                f"The axis {name!r} of the sweep makes some runs longer than others{why}. BracketRule compares arms at "
                f"equal shares of one horizon: name it in blocks, as in BracketRule(blocks=({name!r},)), so that they "
                "are compared at their ends only."
            )
