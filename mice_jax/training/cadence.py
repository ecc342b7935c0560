"""Decides what is due after a step: the held-out loss, benchmarks or a checkpoint."""

import dataclasses
from collections.abc import Collection, Sequence

from mice_jax.config import Config
from mice_jax.training.phases import PhaseSpan, next_starts_from_best
from mice_jax.training.progress import crosses_multiple
from mice_jax.training.stop_rules import step_at_fraction


@dataclasses.dataclass(frozen=True)
class Due:
    """The work that is due after one step.

    Attributes:
      held_out: Whether to measure the held-out loss.
      benchmarks: Whether to score the benchmarks.
      checkpoint: Whether to save a checkpoint, with the step's score if checkpoints are selected by one.
    """

    held_out: bool
    benchmarks: bool
    checkpoint: bool


HELD_OUT_ALONE = Due(held_out=True, benchmarks=False, checkpoint=False)  # before the first step


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The rules by which a run saves and evaluates. They depend only on the samples seen so far.

    A checkpoint that is saved by the clock, or because the run was asked to stop, is not due by these rules. It never
    has a score, so a run that was interrupted selects the same checkpoints as one that was not.

    Attributes:
      total_steps: The number of steps of the run.
      save_every: The number of samples between two checkpoints; 0 saves at the end only.
      eval_every: The number of samples between two evaluations; 0 evaluates at the end only.
      always_saved: The last steps of phases whose best checkpoint the next phase starts from.
      selects: Whether checkpoints are selected by a metric, so that each of them needs the held-out loss.
      selects_by_benchmark: Whether that metric is a benchmark's, so that each of them needs the benchmarks too.
      eval_at: Steps after which an evaluation is due besides.
    """

    total_steps: int
    save_every: int
    eval_every: int
    always_saved: frozenset[int] = frozenset()
    selects: bool = False
    selects_by_benchmark: bool = False
    eval_at: frozenset[int] = frozenset()

    def due(self, step: int, samples_before: int, samples: int) -> Due:
        """Decides what is due after a step.

        Args:
          step: The number of the step that was just done, counted from 1.
          samples_before: The number of samples that the run had seen before the step.
          samples: The number of samples that it has seen after the step.

        Returns:
          The work to do before the next step.
        """
        last = step == self.total_steps
        checkpoint = last or step in self.always_saved or crosses_multiple(samples_before, samples, self.save_every)
        evaluation = last or step in self.eval_at or crosses_multiple(samples_before, samples, self.eval_every)
        return Due(
            held_out=evaluation or (checkpoint and self.selects),
            benchmarks=evaluation or (checkpoint and self.selects_by_benchmark),
            checkpoint=checkpoint,
        )


def make_cadence(config: Config, spans: Sequence[PhaseSpan], total_steps: int, benchmarks: Collection[str]) -> Cadence:
    """Returns the cadence of a run.

    Args:
      config: The run's config.
      spans: The phases of the run.
      total_steps: The number of steps of the run.
      benchmarks: The names of the benchmarks' metrics.
    """
    selects = uses_best_checkpoint(config, spans)
    return Cadence(
        total_steps=total_steps,
        save_every=config.checkpoint.every_samples,
        eval_every=config.eval.every_samples,
        eval_at=frozenset(step_at_fraction(share, total_steps) for share in config.eval.at_shares),
        always_saved=last_steps_before_warm_start(spans),
        selects=selects,
        selects_by_benchmark=selects and config.checkpoint.best_metric in benchmarks,
    )


def last_steps_before_warm_start(spans: Sequence[PhaseSpan]) -> frozenset[int]:
    """Returns the last steps of the phases whose best checkpoint, instead of their end, starts the next phase."""
    return frozenset(span.end for i, span in enumerate(spans) if next_starts_from_best(spans, i))


def uses_best_checkpoint(config: Config, spans: Sequence[PhaseSpan]) -> bool:
    """Returns whether checkpoints are selected by a metric: the best are kept, or a phase starts from the best."""
    return bool(config.checkpoint.keep_best) or any(span.phase.seed_from == "best" for span in spans)
