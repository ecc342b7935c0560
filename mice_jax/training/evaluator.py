"""Evaluates the model in memory between two steps of its run: first the held-out loss, then benchmarks."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mice_jax.data.dataset import HeldOut
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture
from mice_jax.models.transformer import Params
from mice_jax.runtime import distributed
from mice_jax.step import StepFunctions
from mice_jax.training import averaging, held_out
from mice_jax.training.cadence import Due


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: The values by the names that metrics.jsonl has.
      failure: The error of a benchmark, if any; the step is saved before it is raised.
    """

    metrics: dict[str, float | None]
    failure: Exception | None


class Evaluator:
    """Measures the held-out loss and scores the benchmarks when they are due."""

    def __init__(
        self,
        fns: StepFunctions,
        mesh: Mesh,
        held_out_data: Sequence[HeldOut],
        pack: Callable[[Mixture], StepSource],
        by_phase: bool,
        score_benchmarks: Callable[[Params], Iterable[dict[str, float | None]]],
        exact_match: bool = False,
        retain: Collection[str] = (),
    ):
        """Stores the arguments; nothing is computed yet.

        Args:
          fns: The run's step functions.
          mesh: The mesh that they are compiled for.
          held_out_data: The held-out samples of each source.
          pack: Packs the steps of a mixture into rows for this mesh.
          by_phase: Whether to measure the held-out loss of each phase too.
          score_benchmarks: Yields the scores of one benchmark after the other.
          exact_match: Whether the step functions count exact matches of held-out samples.
          retain: The names of held-out sources that the means over sources leave out.
        """
        self._fns, self._mesh, self._held_out, self._pack = fns, mesh, held_out_data, pack
        self._by_phase, self._score_benchmarks, self._exact_match = by_phase, score_benchmarks, exact_match
        self._retain = retain

    def __call__(self, params: Params, due: Due, average: Params | None = None) -> Evaluation:
        """Measures what is due.

        Args:
          params: The parameters after a step.
          due: The evaluations that are due after that step.
          average: The running average of the parameters, whose held-out loss is measured too; None if there is none.

        Returns:
          The metrics, and the error of a benchmark that could not be scored.
        """
        metrics: dict[str, Any] = {}
        if due.held_out and self._held_out:
            metrics |= self._held_out_metrics(params)
            if average is not None:
                metrics |= averaging.of_average(self._held_out_metrics(average))
        failure = None
        if due.benchmarks:
            try:
                for scores in self._score_benchmarks(params):
                    metrics |= scores
            except Exception as error:  # A task's own code may raise anything.
                # The loss of another process is not an error of the task.
                if distributed.is_lost_peer_error(error):
                    raise
                failure = error
        return Evaluation(metrics, failure)

    def _held_out_metrics(self, params: Params) -> dict[str, float]:
        loss = functools.partial(self._fns.evaluate, params)
        return held_out.evaluate(
            loss, self._held_out, self._pack, self._mesh, self._by_phase, self._exact_match, self._retain
        )
