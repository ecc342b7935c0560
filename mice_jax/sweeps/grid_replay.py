"""Replays a rule on the stored curves of a whole grid: what it would have run, and which arm it would have chosen."""

import dataclasses
import heapq
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mice_jax.errors import UserError
from mice_jax.sweeps.grid import Grid, checked_grid
from mice_jax.sweeps.rule import Runs, SweepRule, Task, relative_regret


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a rule did on a stored sweep.

    Attributes:
        saved: The share of the samples of the full grid (all arms, the seeds replayed) that was not run.
        chosen: The value on each axis of the arm that the rule chose.
        ran: The share of each run that was run, float64 [seed, *axes]; its seeds are those replayed, in their order.
        regret: By how much the chosen arm is worse than the one that the full grid would have chosen by the same
            seeds, as a share of the latter's metric. It is the mean over the seeds that were not replayed, so it can be
            negative by chance, and NaN where all seeds were replayed.
        wall_clock: How long the replay took with its number of workers, in units of one whole run.
        notes: Sentences on how far the choice can be trusted, such as that it lies at the end of an axis.
    """

    saved: float
    chosen: dict[str, Any]
    ran: np.ndarray
    regret: float
    wall_clock: float
    notes: tuple[str, ...]


class NoArmLeft(UserError):
    """Every run that the rule did not stop has diverged, so there is no arm to choose."""

    def __init__(self, rule: str, saved: float):
        super().__init__(
            f"curves: {rule} can choose no arm, because every run that it did not stop has diverged (NaN or inf). "
            "Leave out the values of the axes that diverge, or add lower learning rates."
        )
        self.saved = saved


def replay(
    curves: np.ndarray,
    axes: Mapping[str, Iterable[Any]],
    rule: SweepRule,
    *,
    start: float = math.nan,
    seeds: Sequence[int] | None = None,
    signals: Mapping[str, np.ndarray] | None = None,
    workers: int = 1,
) -> Replay:
    """Replays a rule on the curves of a sweep that was run in full.

    The rule sees only what it has run. All runs advance at the same speed.

    Args:
        curves: The metric of each run, float [seed, *axes, point], lower is better, at evenly spaced points of which
            the last is the end of the run. From its first value on that is NaN or inf, a run has diverged.
        axes: The values of each axis by the axis' name, in the order of the array's dims. The values of an axis can be
            in any order.
        rule: The rule, such as `BracketRule()`.
        start: The metric before the first step. `BracketRule` needs it.
        seeds: The positions in the array of the seeds to replay, in their order; all of them by default.
        signals: Other numbers at the same points by name, float arrays of the shape of `curves`. `PaperRule` needs
            "loss" (of training) and "grad_sq_corrected" or "grad_norm".
        workers: How many runs are trained at a time.

    Returns:
        What was saved, the chosen arm, and what was run.

    Raises:
        UserError: An argument is wrong, or every run that the rule did not stop has diverged.
    """
    grid = checked_grid(axes)
    curves = _checked_curves(curves, grid)
    chosen_seeds = _checked_seeds(seeds, curves.shape[0])
    _check_workers(workers)
    by_arm = _mark_divergence(curves.reshape(curves.shape[0], grid.size, -1))
    runs = Runs(
        curves=by_arm[chosen_seeds],
        done=np.zeros((len(chosen_seeds), grid.size), np.int64),
        stopped=np.zeros((len(chosen_seeds), grid.size), bool),
        shares=np.arange(1, by_arm.shape[2] + 1) / by_arm.shape[2],
        start=_checked_start(start),
        signals=_checked_signals(signals or {}, curves, grid, chosen_seeds),
    )
    rule.check(grid, runs)
    runs, wall_clock = _run_all(rule, grid, runs, workers)
    ran = runs.done / runs.num_points
    arm = rule.choose(grid, runs)
    if arm is None:
        raise NoArmLeft(type(rule).__name__, 1.0 - float(ran.mean()))
    return Replay(
        saved=1.0 - float(ran.mean()),
        chosen=grid.values(arm),
        ran=ran.reshape(len(chosen_seeds), *grid.shape),
        regret=_regret(by_arm[..., -1], arm, chosen_seeds),
        wall_clock=wall_clock,
        notes=tuple(rule.notes(grid, runs)),
    )


def _run_all(rule: SweepRule, grid: Grid, runs: Runs, workers: int) -> tuple[Runs, float]:
    """Runs what the rule asks for until nothing is left; returns the state then and the time in whole runs."""
    busy: list[tuple[int, int, Task]] = []  # a heap: when the task will be done, its number, and the task
    now = started = 0
    while True:
        in_progress = {(task.seed, task.arm) for _, _, task in busy}
        for task in rule.next_tasks(grid, runs):
            if len(busy) == workers:
                break
            if (task.seed, task.arm) not in in_progress:
                reached = _points_run(runs, task)
                heapq.heappush(busy, (now + reached - int(runs.done[task.seed, task.arm]), started, task))
                started += 1
        if not busy:
            return runs, now / runs.num_points
        now, _, task = heapq.heappop(busy)
        done = runs.done.copy()
        done[task.seed, task.arm] = _points_run(runs, task)
        runs = dataclasses.replace(runs, done=done)
        if rule.stops(grid, runs, task):
            stopped = runs.stopped.copy()
            stopped[task.seed, task.arm] = True
            runs = dataclasses.replace(runs, stopped=stopped)


def _points_run(runs: Runs, task: Task) -> int:
    """Returns to which evaluation a task takes its run: it ends early where the run diverges."""
    ahead = ~np.isfinite(runs.curves[task.seed, task.arm, : task.until])
    return int(np.argmax(ahead)) + 1 if ahead.any() else task.until


def _mark_divergence(curves: np.ndarray) -> np.ndarray:
    """Returns the curves with inf from the first value on that is not finite."""
    return np.where(np.logical_or.accumulate(~np.isfinite(curves), axis=-1), math.inf, curves)


def _regret(finals: np.ndarray, chosen: int, seeds: Sequence[int]) -> float:
    """Returns the regret of an arm on the seeds that were not replayed; `finals` is float64 [S, A]."""
    others = [s for s in range(len(finals)) if s not in seeds]
    best = int(np.argmin(finals[list(seeds)].mean(axis=0)))
    if not others or not np.isfinite(finals[others][:, best]).all():
        return math.nan
    return relative_regret(finals[others, chosen].mean(), finals[others, best].mean())


# ---------------------------------------------------------------------------------------- checks of the arguments
def _checked_curves(curves: np.ndarray, grid: Grid) -> np.ndarray:
    array = _numbers("curves", curves)
    wanted = f"[seed, {', '.join(grid.axes)}, point]"
    if array.ndim != len(grid.shape) + 2:
        raise UserError(
            f"curves has {array.ndim} dims (shape {array.shape}); with {len(grid.shape)} axes it needs "
            f"{len(grid.shape) + 2}: {wanted}."
        )
    if array.shape[1:-1] != grid.shape:
        raise UserError(
            f"curves has the shape {array.shape}, but the axes have {' and '.join(map(str, grid.shape))} values. Give "
            f"an array {wanted}, with the axes in the order of its dims."
        )
    if not array.size:
        raise UserError(f"curves has the shape {array.shape}, which holds no value. Give at least one seed and point.")
    if np.isneginf(array).any():
        raise UserError(
            "curves contains -inf, which would win as the lowest value. Mark a diverged run with NaN or inf instead."
        )
    return array


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name} is not an array of numbers: {e}. Give one float array.") from None


def _checked_seeds(seeds: Sequence[int] | None, available: int) -> list[int]:
    if seeds is None:
        return list(range(available))
    try:
        chosen = [operator.index(s) for s in seeds]
    except TypeError:
        raise UserError(f"seeds is {seeds!r}. Give the positions of seeds in curves, as in seeds=(0, 1, 2).") from None
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= s < available for s in chosen):
        raise UserError(
            f"seeds is {tuple(chosen)}. Give positions of seeds in curves, each once: from 0 to {available - 1}."
        )
    return chosen


def _checked_start(start: float) -> float:
    array = _numbers("start", start)
    if array.size != 1:
        raise UserError(f"start has {array.size} values. Give one number: the metric before the first step.")
    return float(array.reshape(()))


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise UserError(f"workers is {workers}. Give the number of runs that are trained at a time, at least 1.")


def _checked_signals(
    signals: Mapping[str, np.ndarray], curves: np.ndarray, grid: Grid, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    arrays = {name: _numbers(f"signals[{name!r}]", values) for name, values in signals.items()}
    for name, array in arrays.items():
        if array.shape != curves.shape:
            raise UserError(
                f"signals[{name!r}] has the shape {array.shape}, but curves has {curves.shape}. Give an array of the "
                "same shape."
            )
    return {name: a.reshape(len(a), grid.size, -1)[list(seeds)] for name, a in arrays.items()}
