"""What each step holds, for every step of small runs, counted by hand."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mice_jax.data.mixture import Mixture, PhasePools, Pool, Step, Trunk
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke


def phase(*pools: tuple[Sequence[int], float], num_epochs: float = 1.0, num_steps: int = 0) -> PhasePools:
    made = (Pool(np.array(ids), weight, str(i)) for i, (ids, weight) in enumerate(pools))
    return PhasePools("stacked", num_epochs, tuple(made), num_steps)


def mix(*phases: PhasePools, batch_size: int, seed: int = 0, **options: Any) -> Mixture:
    return Mixture(phases, batch_size=batch_size, seed=seed, **options)


def steps_of(mixture: Mixture) -> list[Step]:
    return [mixture.step(i) for i in range(len(mixture))]


def drawn(mixture: Mixture, phase: int, epoch: int) -> list[int]:
    """All samples of one epoch, in order."""
    return [int(i) for s in steps_of(mixture) if (s.phase, s.epoch) == (phase, epoch) for i in s.samples]


# ---------------------------------------------------------------------------------------- exact batches
@pytest.mark.parametrize("batch_size", [1, 4, 7, 24])
def test_steps_hold_exact_samples_and_each_sample_once_an_epoch(batch_size: int) -> None:
    ids = range(100, 124)
    mixture = mix(phase((ids, 1.0), num_epochs=2), batch_size=batch_size)
    per_epoch = -(-24 // batch_size)
    assert len(mixture) == 2 * per_epoch
    for epoch in (0, 1):
        sizes = [len(s.samples) for s in steps_of(mixture) if s.epoch == epoch]
        assert sizes[:-1] == [batch_size] * (per_epoch - 1)
        assert sizes[-1] == 24 - batch_size * (per_epoch - 1)  # only the last may hold fewer
        assert sorted(drawn(mixture, 0, epoch)) == list(ids)
    assert drawn(mixture, 0, 0) != drawn(mixture, 0, 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0.5, 1.0, 2.0, 2.5]),
    st.booleans(),
)
def test_steps_never_mix_epochs_and_only_the_last_is_short(
    sizes: list[tuple[int, float]], batch_size: int, num_epochs: float, drop: bool
) -> None:
    first = np.cumsum([0] + [n for n, _ in sizes])
    pools = [(range(a, a + n), w) for a, (n, w) in zip(first, sizes, strict=False)]
    per_epoch = sum(round(n * w) for n, w in sizes)
    longest = max(per_epoch * int(num_epochs >= 1), round(per_epoch * (num_epochs % 1)))
    assume(longest >= (batch_size if drop else 1))
    mixture = mix(phase(*pools, num_epochs=num_epochs), batch_size=batch_size, drop_remainder=drop)
    steps = steps_of(mixture)
    for step, following in itertools.zip_longest(steps, steps[1:]):
        ends = following is None or following.epoch != step.epoch
        assert len(step.samples) == batch_size or (ends and not drop and 0 < len(step.samples) < batch_size)
    assert [s.epoch for s in steps] == sorted(s.epoch for s in steps)
    planned = per_epoch * int(num_epochs) + round(per_epoch * (num_epochs % 1))
    assert sum(len(s.samples) for s in steps) + mixture.samples_left_out == planned


def test_rest_of_an_epoch_is_left_out_and_counted_where_asked() -> None:
    ids = range(10)
    mixture = mix(phase((ids, 1.0), num_epochs=3), batch_size=4, drop_remainder=True)
    assert [len(s.samples) for s in steps_of(mixture)] == [4] * 6
    assert mixture.samples_left_out == 6  # two of each epoch
    assert mix(phase((ids, 1.0), num_epochs=3), batch_size=4).samples_left_out == 0
    # Others every epoch: nothing is left out for good.
    left_out = [set(ids) - set(drawn(mixture, 0, e)) for e in range(3)]
    assert len(set(map(frozenset, left_out))) > 1


def test_batch_larger_than_an_epoch_is_the_epoch() -> None:
    mixture = mix(phase((range(5), 1.0), num_epochs=2), batch_size=100)
    assert [sorted(s.samples.tolist()) for s in steps_of(mixture)] == [list(range(5))] * 2
    assert len(mixture.crowded_phases()) == 1 and "(100 samples per step, 5 per epoch)" in mixture.crowded_phases()[0]
    assert mix(phase((range(5), 1.0)), batch_size=5).crowded_phases() == []
    assert len(mix(phase((range(5), 1.0)), batch_size=5, drop_remainder=True)) == 1


def test_phase_may_have_a_batch_size_of_its_own() -> None:
    own = dataclasses.replace(phase((range(10), 1.0), num_epochs=2), batch_size=5)
    mixture = mix(phase((range(10), 1.0)), own, phase((range(3), 1.0)), batch_size=4)
    assert [(s.phase, len(s.samples)) for s in steps_of(mixture)] == [
        *[(0, 4), (0, 4), (0, 2)],
        *[(1, 5)] * 4,
        (2, 3),
    ]
    assert mixture.phase_ends() == [3, 7, 8]
    for e in range(2):  # every sample once an epoch
        assert sorted(drawn(mixture, 1, e)) == list(range(10))
    assert [(e.steps, e.samples) for e in mixture.epochs(6)] == [(3, 10), (2, 10), (1, 5)]


# ---------------------------------------------------------------------------------------- steps instead of epochs
@pytest.mark.parametrize(
    ("num_steps", "sizes"), [(1, [4]), (3, [4, 4, 2]), (4, [4, 4, 2, 4]), (7, [4, 4, 2] * 2 + [4])]
)
def test_phase_of_fixed_steps_takes_as_many_epochs_as_it_needs(num_steps: int, sizes: list[int]) -> None:
    mixture = mix(phase((range(10), 1.0), num_steps=num_steps), batch_size=4)
    assert [len(s.samples) for s in steps_of(mixture)] == sizes
    assert [s.epoch for s in steps_of(mixture)] == [i // 3 for i in range(num_steps)]
    whole = mix(phase((range(10), 1.0), num_epochs=3), batch_size=4)  # the same samples in the same order
    for i in range(num_steps):
        assert np.array_equal(mixture.step(i).samples, whole.step(i).samples)


def test_steps_are_whole_where_the_remainder_is_left_out() -> None:
    mixture = mix(phase((range(10), 1.0), num_steps=5), batch_size=4, drop_remainder=True)
    assert [len(s.samples) for s in steps_of(mixture)] == [4] * 5
    assert mixture.samples_left_out == 4  # two of each of the two whole epochs; the third is not at its end


@pytest.mark.parametrize("length", [{"num_epochs": 2.0}, {"num_steps": 5}])
def test_phase_without_whole_steps_is_named_and_alone_is_an_error(length: dict) -> None:
    whole, less = phase((range(10), 1.0)), phase((range(3), 1.0), **length)
    beside = mix(whole, less, batch_size=4, drop_remainder=True)
    assert len(beside) == 2 and beside.crowded_phases() == ["'stacked' (4 samples per step, 3 per epoch)"]
    assert mix(whole, whole, batch_size=4, drop_remainder=True).crowded_phases() == []
    with pytest.raises(UserError, match=r"no step .*'stacked': 3 samples .*, optim.batch_size=4\): .*drop_rem"):
        mix(less, batch_size=4, drop_remainder=True)
    with pytest.raises(UserError, match="its batch_size=5"):
        mix(dataclasses.replace(less, batch_size=5), batch_size=3, drop_remainder=True)
    assert len(mix(whole, dataclasses.replace(less, batch_size=3), batch_size=4, drop_remainder=True)) > 2


# ---------------------------------------------------------------------------------------- counts
@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0])), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([{"num_epochs": 0.5}, {"num_epochs": 2.5}, {"num_steps": 1}, {"num_steps": 5}]),
    st.booleans(),
    st.integers(0, 12),
)
def test_what_is_counted_by_epoch_and_source_is_what_is_drawn(
    sizes: list[tuple[int, float]], batch_size: int, length: dict, drop: bool, max_steps: int
) -> None:
    first = np.cumsum([0] + [n for n, _ in sizes])
    pools = [(range(a, a + n), w) for a, (n, w) in zip(first, sizes, strict=False)]
    phases = [phase(*pools, **length), phase((range(100, 109), 1.0))]
    per_epoch = sum(round(n * w) for n, w in sizes)
    assume(not drop or round(per_epoch * min(1, length.get("num_epochs", 1))) >= batch_size)
    mixture = mix(*phases, batch_size=batch_size, drop_remainder=drop)
    max_steps = max_steps or len(mixture)
    counted = mixture.epochs(max_steps)
    steps = steps_of(mixture)[:max_steps]
    assert [(e.phase, e.epoch) for e in counted] == sorted({(s.phase, s.epoch) for s in steps})
    for e in counted:
        mine = [s for s in steps if (s.phase, s.epoch) == (e.phase, e.epoch)]
        samples = [int(i) for s in mine for i in s.samples]
        where = np.searchsorted(first, samples, side="right") - 1 if e.phase == 0 else np.zeros(len(samples), int)
        by_pool = np.bincount(where, minlength=len(e.by_pool)).tolist()
        assert (e.steps, e.samples, list(e.by_pool)) == (len(mine), len(samples), by_pool)


# ---------------------------------------------------------------------------------------- weights
def test_weight_a_half_sees_each_sample_once_in_two_epochs() -> None:
    mixture = mix(phase((range(10), 0.5), (range(10, 14), 1.0), num_epochs=4), batch_size=3)
    for epoch in range(4):
        counts = Counter(drawn(mixture, 0, epoch))
        assert sum(counts[i] for i in range(10)) == 5 and all(counts[i] == 1 for i in range(10, 14))
    for pair in ((0, 1), (2, 3)):
        both = [i for e in pair for i in drawn(mixture, 0, e) if i < 10]
        assert sorted(both) == list(range(10))


def test_weight_two_sees_each_sample_twice_an_epoch() -> None:
    mixture = mix(phase((range(6), 2.0), (range(6, 9), 1.0), num_epochs=2), batch_size=4)
    for epoch in (0, 1):
        assert Counter(drawn(mixture, 0, epoch)) == Counter([*range(6), *range(6), *range(6, 9)])


def test_weight_one_and_a_half_sees_each_sample_three_times_in_two_epochs() -> None:
    mixture = mix(phase((range(8), 1.5), num_epochs=2), batch_size=5)
    both = Counter(drawn(mixture, 0, 0) + drawn(mixture, 0, 1))
    assert both == Counter({i: 3 for i in range(8)})
    assert set(Counter(drawn(mixture, 0, 0)).values()) == {1, 2}


def test_pool_without_samples_draws_none_beside_others() -> None:
    """All samples of a source may be longer than max_length."""
    mixture = mix(phase((range(6), 1.0), ((), 1.0), num_epochs=2.0), batch_size=4)
    assert sorted(drawn(mixture, 0, 0)) == sorted(drawn(mixture, 0, 1)) == list(range(6))


def test_pools_are_mixed_within_an_epoch() -> None:
    first = drawn(mix(phase((range(50), 1.0), (range(50, 100), 1.0)), batch_size=100), 0, 0)
    assert 15 < sum(i < 50 for i in first[:50]) < 35  # 25 on average, with a deviation of 2.5


# ---------------------------------------------------------------------------------------- epochs and phases
def test_part_of_an_epoch_is_a_part_of_its_samples() -> None:
    mixture = mix(phase((range(10), 1.0), num_epochs=2.5), batch_size=4)
    assert [len(s.samples) for s in steps_of(mixture)] == [4, 4, 2, 4, 4, 2, 4, 1]
    last = drawn(mixture, 0, 2)
    assert len(set(last)) == len(last) == 5
    whole = mix(phase((range(10), 1.0), num_epochs=3), batch_size=4)
    assert drawn(whole, 0, 2)[:5] == last  # as the whole epoch would have begun
    assert len(mix(phase((range(10), 1.0), num_epochs=0.25), batch_size=4)) == 1


def test_phases_follow_each_other_and_never_mix() -> None:
    phases = [phase((range(10), 1.0), num_epochs=2), phase((range(10, 17), 1.0))]
    mixture = mix(*phases, batch_size=4)
    assert [(s.phase, s.epoch, len(s.samples)) for s in steps_of(mixture)] == [
        (0, 0, 4), (0, 0, 4), (0, 0, 2), (0, 1, 4), (0, 1, 4), (0, 1, 2), (1, 0, 4), (1, 0, 3),
    ]  # fmt: skip
    for step in steps_of(mixture):
        assert all((i >= 10) == (step.phase == 1) for i in step.samples)


def test_one_source_in_two_phases_is_drawn_in_another_order() -> None:
    mixture = mix(phase((range(20), 1.0)), phase((range(20), 1.0)), batch_size=20)
    assert drawn(mixture, 0, 0) != drawn(mixture, 1, 0)


# ---------------------------------------------------------------------------------------- a pure function
def runs(seed: int, batch_size: int = 3) -> Mixture:
    return mix(
        phase((range(17), 0.5), (range(17, 30), 2.0), num_epochs=2.5),
        phase((range(30), 1.0), num_epochs=2),
        batch_size=batch_size,
        seed=seed,
    )


def test_step_does_not_depend_on_what_was_asked_before() -> None:
    onward, backward, fresh = runs(0), runs(0), [runs(0).step(i) for i in range(len(runs(0)))]
    there = [onward.step(i) for i in range(len(onward))]
    back = [backward.step(i) for i in reversed(range(len(backward)))][::-1]
    for a, b, c in zip(there, back, fresh, strict=True):
        assert (a.phase, a.epoch) == (b.phase, b.epoch) == (c.phase, c.epoch)
        assert a.samples.tolist() == b.samples.tolist() == c.samples.tolist()


def test_another_seed_draws_another_order_of_the_same_samples() -> None:
    a, b = drawn(runs(0), 1, 0), drawn(runs(1), 1, 0)
    assert a != b and sorted(a) == sorted(b)


def test_order_of_an_epoch_does_not_depend_on_the_batch() -> None:
    for at in ((0, 0), (0, 1), (1, 1)):
        assert drawn(runs(0, 3), *at) == drawn(runs(0, 11), *at)


def test_order_is_random() -> None:
    """Places of neighbours are far apart: by about a third of the epoch, and not by one as in no order."""
    order = np.array(drawn(mix(phase((range(300), 1.0)), batch_size=300), 0, 0))
    apart = np.abs(np.diff(np.argsort(order))).mean()
    assert 80 < apart < 120


# ---------------------------------------------------------------------------------------- branches
BRANCHED = (phase((range(40), 1.0), (range(40, 60), 0.5), num_epochs=2.5), phase((range(60, 90), 1.0), num_steps=7))


def equal(a: Step, b: Step) -> bool:
    return (a.phase, a.epoch, a.samples.tolist()) == (b.phase, b.epoch, b.samples.tolist())


@pytest.mark.parametrize("at", [0, 3, 7, 11, 19, 23])  # of 7, 7, 4 and 7 steps: within epochs and at their ends
@pytest.mark.parametrize("batch_size, seed", [(8, 0), (4, 0), (16, 0), (8, 5), (3, 5)])
def test_branch_goes_on_with_what_its_trunk_has_not_seen(at: int, batch_size: int, seed: int) -> None:
    trunk = mix(*BRANCHED, batch_size=8)
    branch = mix(*BRANCHED, batch_size=batch_size, seed=seed, trunk=Trunk(at, 8, 0))
    assert all(equal(branch.step(i), trunk.step(i)) for i in range(at))
    for name in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        ours, theirs = drawn(branch, *name), drawn(trunk, *name)
        assert len(ours) == len(theirs), "every epoch has as many samples"
        if name != (0, 2) or seed == 0:  # the third epoch is a half, and an order of its own has another half of it
            assert sorted(ours) == sorted(theirs), "and the same ones"
        assert (ours == theirs) or seed, "in the same order unless the seed differs"
    sizes = [len(s.samples) for s in steps_of(branch)]
    assert branch.samples_before().tolist() == [0, *itertools.accumulate(sizes)]
    assert set(sizes[at:]) - {batch_size} <= {s for s in sizes if s < batch_size}
    assert sum(e.samples for e in branch.epochs(len(branch))) == sum(sizes)
    by_pool = Counter()
    for epoch in branch.epochs(len(branch)):
        by_pool.update({(epoch.phase, i): n for i, n in enumerate(epoch.by_pool)})
    seen = Counter((s.phase, int(s.phase == 0 and i >= 40)) for s in steps_of(branch) for i in s.samples)
    assert by_pool == seen, "the report counts what the steps hold"
    same = (batch_size, seed) == (8, 0)
    assert same == (len(branch) == len(trunk) and all(map(equal, steps_of(branch), steps_of(trunk))))
    assert not same or all(
        branch.block(i, 16).samples.tolist() == trunk.block(i, 16).samples.tolist() for i in range(len(trunk))
    ), "and it is planned in the same blocks"


def test_samples_of_steps_without_remainder_are_counted_too() -> None:
    mixture = mix(phase((range(10), 1.0), num_epochs=3), batch_size=4, drop_remainder=True, trunk=Trunk(1, 3, 0))
    assert mixture.samples_before().tolist() == [0, 3, 7, 11, 15, 19, 23] and mixture.samples_left_out == 7
