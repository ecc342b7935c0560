"""What is due after a step: held-out loss, benchmarks, a checkpoint."""

import dataclasses
from collections.abc import Sequence

from mice_jax.config import Config
from mice_jax.training.phases import PhaseSpan, next_starts_from_best
from mice_jax.training.progress import crosses_multiple


@dataclasses.dataclass(frozen=True)
class Due:
    """What has to be done after one step."""

    held_out: bool  # measure the held-out loss
    benchmarks: bool  # score the benchmarks
    checkpoint: bool  # save, with the step's score where checkpoints are selected by one


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The rules by which a run saves and evaluates, all of them functions of the samples seen so far.

    A checkpoint that is saved by the clock, or because the run was asked to stop, is not due by these rules. It never
    has a score, so a run that was interrupted selects the same checkpoints as one that was not.
    """

    total_steps: int
    save_every: int  # samples; 0 = at the end only
    eval_every: int  # samples; 0 = at the end only
    always_saved: frozenset[int] = frozenset()  # ends of phases whose best checkpoint the next phase starts from
    selects: bool = False  # checkpoints are selected by a metric, so each of them needs the held-out loss
    selects_by_benchmark: bool = False  # that metric is a benchmark's, so each of them needs the benchmarks too

    def due(self, step: int, samples_before: int, samples: int) -> Due:
        """Decides what is due after a step.

        Args:
          step: the number of the step that was just done, counted from 1.
          samples_before: samples that the run had seen before the step.
          samples: samples that it has seen since.

        Returns:
          What has to be done before the next step.
        """
        last = step == self.total_steps
        checkpoint = last or step in self.always_saved or crosses_multiple(samples_before, samples, self.save_every)
        evaluation = last or crosses_multiple(samples_before, samples, self.eval_every)
        return Due(
            held_out=evaluation or (checkpoint and self.selects),
            benchmarks=evaluation or (checkpoint and self.selects_by_benchmark),
            checkpoint=checkpoint,
        )


def last_steps_before_warm_start(spans: Sequence[PhaseSpan]) -> frozenset[int]:
    """The last steps of the phases whose best checkpoint, not whose end, the next phase starts from."""
    return frozenset(span.end for i, span in enumerate(spans) if next_starts_from_best(spans, i))


def uses_best_checkpoint(config: Config, spans: Sequence[PhaseSpan]) -> bool:
    """Whether checkpoints are selected by a metric: the best are kept, or a phase starts from the best."""
    return bool(config.checkpoint.keep_best) or any(span.phase.seed_from == "best" for span in spans)
