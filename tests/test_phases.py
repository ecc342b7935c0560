"""Phases as stretches of steps."""

import pytest

from mice_jax.config import Phase
from mice_jax.training import phases

THREE = [Phase(name="a"), Phase(name="b", seed_from="best"), Phase(name="c")]


def test_a_stretch_is_what_the_run_takes_of_a_phase() -> None:
    found = phases.stretches(THREE, [3, 3, 10], 100)
    assert [(s.phase.name, s.first, s.end) for s in found] == [("a", 0, 3), ("c", 3, 10)]  # b has no step
    cut = phases.stretches(THREE, [3, 6, 10], 5)
    assert [(s.phase.name, s.first, s.end) for s in cut] == [("a", 0, 3), ("b", 3, 5)]


def test_every_step_is_in_one_stretch() -> None:
    found = phases.stretches(THREE, [3, 6, 10], 10)
    assert [phases.at(found, step) for step in range(10)] == [0] * 3 + [1] * 3 + [2] * 4
    with pytest.raises(StopIteration):
        phases.at(found, 10)


def test_it_is_the_next_phase_that_says_what_seeds_it() -> None:
    found = phases.stretches(THREE, [3, 6, 10], 10)
    assert [phases.seeds_by_best(found, i) for i in range(3)] == [True, False, False]
