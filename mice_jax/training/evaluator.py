"""Evaluates the model in memory between two steps of its run: first the held-out loss, then benchmarks."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mice_jax.config import Config
from mice_jax.data.dataset import HeldOut
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture
from mice_jax.models.transformer import Params
from mice_jax.runtime import distributed
from mice_jax.step import StepFunctions, TrainState
from mice_jax.training import averaging, held_out
from mice_jax.training.cadence import HELD_OUT_ALONE, Due, uses_best_checkpoint
from mice_jax.training.metric_names import KEPT
from mice_jax.training.phases import PhaseSpan
from mice_jax.training.record import check_best_metric


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: The values by the names that metrics.jsonl has.
      failure: The error of a benchmark, if any; the step is saved before it is raised.
      answers: What the model answers to held-out prompts, see training/sample_answers.py.
    """

    metrics: dict[str, float | None]
    failure: Exception | None
    answers: list[dict[str, str]]


def check_metrics(
    config: Config, held_out_data: Sequence[HeldOut], spans: Sequence[PhaseSpan], benchmarks: Sequence[str]
) -> None:
    """Checks that the run measures what its config refers to: sources to retain, and the metric of the best checkpoint.

    Args:
      config: The run's config.
      held_out_data: The held-out samples of each source.
      spans: The phases of the run.
      benchmarks: The names of the benchmarks' metrics.

    Raises:
      UserError: A source or a metric is not measured, or two have the same name.
    """
    sources = {held.name for held in held_out_data}
    held_out.check_retained(config.eval.retain, sources)
    measured = held_out.metric_names(held_out_data, _has_phases(config), config.eval.exact_match)
    measured += [KEPT] * bool(config.eval.retain)
    if config.train.ema_half_life:
        averaging.check_source_names(sources)
        measured += [averaging.of_average_name(name) for name in measured]
    if uses_best_checkpoint(config, spans):
        check_best_metric(config, [*benchmarks, *measured], bool(held_out_data))


def _has_phases(config: Config) -> bool:
    """Returns whether the held-out loss is measured by phase too."""
    return len(config.data.phases) > 1


class Evaluator:
    """Measures the held-out loss and scores the benchmarks when they are due."""

    def __init__(
        self,
        config: Config,
        fns: StepFunctions,
        mesh: Mesh,
        held_out_data: Sequence[HeldOut],
        pack: Callable[[Mixture], StepSource],
        score_benchmarks: Callable[[Params], Iterable[dict[str, float | None]]],
        join: Callable[[Params], Params],
        answer: Callable[[Params], list[dict[str, str]]],
    ):
        """Stores the arguments; nothing is computed yet.

        Args:
          config: The run's config.
          fns: The run's step functions.
          mesh: The mesh that they are compiled for.
          held_out_data: The held-out samples of each source.
          pack: Packs the steps of a mixture into rows for this mesh.
          score_benchmarks: Yields the scores of one benchmark after the other.
          join: Adds the frozen parameters, if there are any, to those of a state.
          answer: Returns what parameters answer to held-out prompts.
        """
        self._fns, self._mesh, self._held_out, self._pack = fns, mesh, held_out_data, pack
        self._score_benchmarks, self._join, self._answer = score_benchmarks, join, answer
        self._by_phase, self._exact_match = _has_phases(config), config.eval.exact_match
        self._retain = config.eval.retain

    def before_training(self, state: TrainState) -> tuple[Evaluation, dict[str, float]]:
        """Measures on held-out data before the first step; returns also what is known of the sources to retain."""
        found = self(state, HELD_OUT_ALONE, None)
        return found, held_out.known_before(found.metrics, self._retain) if found.metrics else {}

    def __call__(self, state: TrainState, due: Due, known: Mapping[str, float] | None) -> Evaluation:
        """Measures what is due.

        Args:
          state: The state after a step. Where it has a running average of the parameters, the held-out loss of the
            average is measured too.
          due: The evaluations that are due after that step.
          known: What was known of the sources to retain before the first step, see `held_out.known_before`; None
            before that step.

        Returns:
          The metrics, and the error of a benchmark that could not be scored.
        """
        metrics: dict[str, Any] = {}
        answers: list[dict[str, str]] = []
        if due.held_out and self._held_out:
            measured = self._held_out_metrics(state.params)
            known = held_out.known_before(measured, self._retain) if known is None else known
            metrics |= measured | held_out.kept(measured, known)
            if state.average is not None:
                measured = self._held_out_metrics(state.average)
                metrics |= averaging.of_average(measured | held_out.kept(measured, known))
            answers = self._answer(self._join(state.params))
        failure = None
        if due.benchmarks:
            try:
                for scores in self._score_benchmarks(self._join(state.params)):
                    metrics |= scores
            except Exception as error:  # A task's own code may raise anything.
                # The loss of another process is not an error of the task.
                if distributed.is_lost_peer_error(error):
                    raise
                failure = error
        return Evaluation(metrics, failure, answers)

    def _held_out_metrics(self, params: Params) -> dict[str, float]:
        loss = functools.partial(self._fns.evaluate, self._join(params))
        return held_out.evaluate(
            loss, self._held_out, self._pack, self._mesh, self._by_phase, self._exact_match, self._retain
        )
