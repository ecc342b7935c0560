"""Divides the steps of a run into the spans of its phases."""

import dataclasses
from collections.abc import Sequence

from mice_jax.config import Phase


@dataclasses.dataclass(frozen=True)
class PhaseSpan:
    """The steps of one phase, numbered from 0 over the run: `first` up to, but without, `end`."""

    phase: Phase
    first: int
    end: int

    @property
    def saved_steps(self) -> range:
        """The names of this phase's checkpoints: a checkpoint is named by the number of steps that led to it."""
        return range(self.first + 1, self.end + 1)


def phase_spans(phases: Sequence[Phase], ends: Sequence[int], total_steps: int) -> list[PhaseSpan]:
    """Returns the spans of those phases that have steps among the run's first `total_steps`.

    Args:
      phases: The phases of the config, in order.
      ends: The step at which each of them ends, as `Mixture.phase_ends` returns them.
      total_steps: The number of steps of the run, which may end within a phase.
    """
    firsts = [0, *ends]
    spans = [PhaseSpan(p, first, min(end, total_steps)) for p, first, end in zip(phases, firsts, ends, strict=False)]
    return [span for span in spans if span.first < span.end]


def span_index(spans: Sequence[PhaseSpan], step: int) -> int:
    """Returns the index of the span that contains a step (numbered from 0)."""
    return next(i for i, span in enumerate(spans) if span.first <= step < span.end)


def next_starts_from_best(spans: Sequence[PhaseSpan], index: int) -> bool:
    """Returns whether the next phase starts from the best checkpoint of this span rather than from its end."""
    return index + 1 < len(spans) and spans[index + 1].phase.seed_from == "best"


def warm_start_ranges(spans: Sequence[PhaseSpan]) -> list[range]:
    """Returns the steps among whose checkpoints the start of a later phase is selected, one range for each phase."""
    return [span.saved_steps for i, span in enumerate(spans) if next_starts_from_best(spans, i)]
