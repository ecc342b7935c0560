"""The phases of a run as stretches of its steps: where each begins, what seeds it, how its learning rate goes."""

import dataclasses
from collections.abc import Sequence

from mice_jax.config import Phase


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The steps of one phase, numbered from 0 over the run: `first` to `end`, which is the next one's first."""

    phase: Phase
    first: int
    end: int

    @property
    def saved_steps(self) -> range:
        """The names of its steps' checkpoints: a state is named by the steps that led to it."""
        return range(self.first + 1, self.end + 1)


def stretches(phases: Sequence[Phase], ends: Sequence[int], total_steps: int) -> list[Stretch]:
    """Those phases that have steps among the run's `total_steps`, in order; `ends` as Mixture.phase_ends gives them."""
    firsts = [0, *ends]
    whole = [Stretch(p, first, min(end, total_steps)) for p, first, end in zip(phases, firsts, ends, strict=False)]
    return [s for s in whole if s.first < s.end]


def at(stretches: Sequence[Stretch], step: int) -> int:
    """The number of the stretch that holds a step."""
    return next(i for i, s in enumerate(stretches) if s.first <= step < s.end)


def seeds_by_best(stretches: Sequence[Stretch], number: int) -> bool:
    """Whether the best of this stretch's checkpoints, not its end, is where the next one starts."""
    return number + 1 < len(stretches) and stretches[number + 1].phase.seed_from == "best"
