"""Phases as spans of steps."""

import pytest

from mice_jax.config import Phase
from mice_jax.training import phases

pytestmark = pytest.mark.smoke

THREE = [Phase(name="a"), Phase(name="b", seed_from="best"), Phase(name="c")]


def test_a_span_is_cut_at_the_last_step_of_the_run() -> None:
    found = phases.phase_spans(THREE, [3, 3, 10], 100)
    assert [(s.phase.name, s.first, s.end) for s in found] == [("a", 0, 3), ("c", 3, 10)]  # b has no step
    cut = phases.phase_spans(THREE, [3, 6, 10], 5)
    assert [(s.phase.name, s.first, s.end) for s in cut] == [("a", 0, 3), ("b", 3, 5)]


def test_every_step_is_in_one_span() -> None:
    found = phases.phase_spans(THREE, [3, 6, 10], 10)
    assert [phases.span_index(found, step) for step in range(10)] == [0] * 3 + [1] * 3 + [2] * 4
    with pytest.raises(StopIteration):
        phases.span_index(found, 10)


def test_the_next_phase_decides_what_it_starts_from() -> None:
    found = phases.phase_spans(THREE, [3, 6, 10], 10)
    assert [phases.next_starts_from_best(found, i) for i in range(3)] == [True, False, False]
