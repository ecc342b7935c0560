"""The bracket rule: small sweeps by hand, a second implementation, and what must hold on any sweep."""

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mice_jax.errors import UserError
from mice_jax.statistics import student_t
from mice_jax.sweeps import BracketRule, Replay, replay
from mice_jax.sweeps.grid import Grid
from mice_jax.sweeps.rule import Runs

pytestmark = pytest.mark.smoke
START = 10.0
RATES = (1e-5, 2e-5, 4e-5, 8e-5, 16e-5, 32e-5)
PROBED = 0.5  # the share of the run to which every arm is probed


def curves_of(probe, final) -> np.ndarray:
    """Returns curves [*, point] of ten points that are at `probe` up to the probe and at `final` from then on."""
    probe, final = np.broadcast_arrays(np.asarray(probe, float), np.asarray(final, float))
    return np.stack([probe] * 5 + [final] * 5, axis=-1)


RULE = BracketRule()


def one_axis(probe, finals, rule: BracketRule = RULE, **options) -> Replay:
    """Replays a rule on a grid of learning rates; `finals` has a row for each seed."""
    curves = curves_of(np.broadcast_to(probe, np.shape(finals)), finals)
    return replay(curves, {"rate": RATES[: curves.shape[1]]}, rule, start=START, **options)


# ---------------------------------------------------------------------------------------- by hand
def test_bracket_walks_down_to_a_winner_that_came_last_in_the_probe() -> None:
    """The probe leaves the last arm alone, and each neighbour on the way to the first one is better."""
    r = one_axis([6, 5, 4, 3, 2, 1], [[1, 2, 3, 4, 5, 6]])
    assert r.chosen == {"rate": 1e-5}
    assert r.ran.tolist() == [[1, 1, 1, 1, 1, 1]] and r.saved == 0.0
    r = one_axis([6, 5, 4, 3, 2, 1], [[1.5, 1, 3, 4, 5, 6]])
    assert r.chosen == {"rate": 2e-5}, "here the end of the axis is the second neighbour of the winner"
    r = one_axis([3.0, 2.9, 2, 3.5, 2.1, 2.2], [[2, 3, 4, 5, 1, 6]])
    assert r.ran[0].tolist() == pytest.approx([PROBED, PROBED, 1, 1, 1, 1]), (
        "the best of the leaders has one neighbour left"
    )
    assert r.saved == pytest.approx(1 / 6)


def test_bracketed_leader_ends_the_sweep() -> None:
    r = one_axis([3, 2, 1, 2, 3, 4], [[3, 2, 1, 2, 3, 4]])
    assert r.chosen == {"rate": 4e-5} and r.notes == ()
    assert r.ran[0].tolist() == pytest.approx([PROBED, 1, 1, 1, PROBED, PROBED]) and r.saved == pytest.approx(0.25)


@pytest.mark.parametrize(("third", "is_finished"), [(1.26, True), (1.28, False)])
def test_arms_that_tie_with_the_best_of_the_probe_are_finished(third: float, is_finished: bool) -> None:
    """The gain of the probe is 9, so the margin is 0.27; the third arm is no neighbour of the best one."""
    r = one_axis([1, 1.1, third, 2, 3, 5], [[1, 2, 3, 4, 5, 6]])
    assert r.ran[0].tolist() == pytest.approx([1, 1, 1 if is_finished else PROBED, PROBED, PROBED, PROBED])


def test_probe_that_has_learned_nothing_rules_out_no_arm() -> None:
    assert one_axis([10, 10.1, 10.2, 10.3, 10.4, 11], [[3, 2, 1, 2, 3, 4]]).saved == 0.0


BY_BATCH = {"batch": [8, 16], "rate": [1, 2, 3, 4]}
NOWHERE = math.nan  # what a run that has diverged is at


@pytest.mark.parametrize(
    ("probe", "axes", "wanted"),
    [
        ([1, 2, 3, 4, 3.9, 5], {}, [0, 4]),
        ([1, 2, 3, 4, 4.1, 5], {}, [0]),  # the fifth is worse than the fourth
        ([1, 5, 4, 4, 5, 6], {}, [0, 2, 3]),  # two that tie
        ([1, 9, 2, 8, 3, 7], {}, [0, 2, 4]),  # numbers without an order
        ([1, 2, 3, NOWHERE, 4, 5], {}, [0, 4]),  # its neighbour has diverged
        ([1, 2, 3, 3.5, 4, 5], {}, [0]),
        ([1, 2, 3, 4, 5, NOWHERE], {}, [0]),
        ([1, 2, 3, 3.9, 5, 4], {"rate": [1, 2, 3, 6, 4, 5]}, [0, 3]),  # neighbours are those by value
        ([1, 2, 3, 4, 8, 7, 6, 9], BY_BATCH, [0, 6]),  # two batch sizes have no order
        ([NOWHERE] * 6, {}, []),
    ],
)
def test_local_minima_of_the_probe_are_finished(probe: list[float], axes: dict, wanted: list[int]) -> None:
    """The margin is 0, so that only minima are finished."""
    grid = Grid(axes or {"rate": RATES})
    curves = np.array(probe)[None, :, None].repeat(2, axis=2)
    curves = np.where(np.isnan(curves), np.inf, curves)
    runs = Runs(curves, np.ones((1, grid.size), int), np.zeros((1, grid.size), bool), np.array([PROBED, 1.0]), START)
    assert {task.arm for task in BracketRule(seed_margin=0).next_tasks(grid, runs)} == {*wanted}


def test_winner_that_only_leads_its_neighbours_is_found() -> None:
    """The fifth arm is fourth in the probe and wins; where it is worse than the fourth, the control, it is lost."""
    finals = [[2, 3, 4, 4, 1, 5]]
    found = one_axis([1, 2, 3, 4, 3.9, 5], finals)
    assert found.chosen == {"rate": 16e-5}
    assert found.ran[0].tolist() == pytest.approx([1, PROBED, PROBED, 1, 1, 1])
    lost = one_axis([1, 2, 3, 4, 4.1, 5], finals)
    assert lost.chosen == {"rate": 1e-5} and lost.ran[0].tolist() == pytest.approx([1] * 2 + [PROBED] * 4)


def test_second_valley_within_the_margin_is_bracketed_too() -> None:
    """The margin is 0.27: the arm at 1.2 counts as a minimum of its own, one at 1.4 does not."""
    probe = [2, 1, 5, 5, 1.1, 5]
    near = one_axis(probe, [[2, 1, 3, 3, 1.2, 0.5]])
    assert near.chosen == {"rate": 32e-5} and near.ran[0, 3] == 1
    far = one_axis(probe, [[2, 1, 3, 3, 1.4, 0.5]])
    assert far.chosen == {"rate": 2e-5} and far.ran[0, 5] == pytest.approx(PROBED)


def test_two_ordered_axes_are_both_bracketed() -> None:
    final = np.array([[[9, 8, 7], [6, 1, 5], [4, 3, 2]]], float)
    axes = {"batch": [8, 16, 32], "rate": [1, 2, 3]}
    r = replay(curves_of(final, final), axes, BracketRule(seed_margin=0), start=START)
    assert r.chosen == {"batch": 16, "rate": 2}
    finished = [[0, 1], [1, 0], [1, 1], [1, 2], [2, 1], [2, 2]]  # the last one leads its neighbours in the probe
    assert np.argwhere(r.ran[0] == 1).tolist() == finished


def test_seeds_go_to_the_arms_that_one_seed_cannot_tell_apart() -> None:
    """With start 10 and the best at 1, the margin is 0.27 with one seed and 0.19 with two."""
    finals = [[1.0, 1.2, 1.5], [1.0, 1.4, 0.1], [5.0, 0.5, 0.1]]
    r = one_axis(0.0, finals)
    assert r.chosen == {"rate": 1e-5}
    assert r.ran.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]], "the second is 0.3 behind by two seeds"
    r = one_axis(0.0, [[1.0, 1.2, 1.5], [1.0, 1.1, 0.1], [5.0, 0.5, 0.1]])
    assert r.chosen == {"rate": 2e-5}, "0.15 behind by two seeds, it gets the third and wins"


def test_noisy_lag_stays_in_contention_by_the_t_test() -> None:
    """With three seeds the margin is 0.156; a lag of 0.3 that one seed made alone is no evidence, a steady one is."""
    noisy = one_axis(0.0, [[1, 1.0, 9], [1, 1.0, 9], [1, 1.9, 9], [1, 1, 9]])
    assert noisy.ran[3].tolist() == [1, 1, 0]
    steady = one_axis(0.0, [[1, 1.20, 9], [1, 1.18, 9], [1, 1.19, 9], [1, 1, 9]])
    assert steady.ran[:, 1].tolist() == [1, 1, 1, 0] and steady.ran[3].tolist() == [0, 0, 0]


def test_other_kinds_of_axes_make_blocks_that_meet_at_the_end() -> None:
    """The probe of the second block is worse than that of any arm of the first, and its best arm wins."""
    probe = np.array([[[1, 2, 3, 4, 5], [6, 7, 8, 9, 9.5]]])
    final = np.array([[[3, 2, 3, 4, 5], [4, 1, 2, 3, 4]]])
    axes = {"schedule": ["constant", "cosine"], "rate": [1, 2, 3, 4, 5]}
    rule = BracketRule(seed_margin=0)
    r = replay(curves_of(probe, final), axes, rule, start=START)
    assert r.chosen == {"schedule": "cosine", "rate": 2}
    assert (r.ran[0] == 1).tolist() == [[True] * 3 + [False] * 2] * 2
    numbers = {"warmup": [0, 100], "rate": [1, 2, 3, 4, 5]}
    assert replay(curves_of(probe, final), numbers, rule, start=START).chosen == {"warmup": 0, "rate": 2}
    named = dataclasses.replace(rule, blocks=("warmup",))
    assert replay(curves_of(probe, final), numbers, named, start=START).chosen == {"warmup": 100, "rate": 2}


def test_blocks_are_those_of_the_axes_named_wherever_they_stand() -> None:
    grid = Grid({"rate": [1, 2], "schedule": ["a", "b"], "model": ["x", "y"]})
    rule = BracketRule()
    assert rule.arms_by_block(grid) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert BracketRule(blocks=("rate",)).arms_by_block(grid) == [[i] for i in range(8)]
    assert rule.arms_by_block(Grid({"rate": [1, 2]})) == [[0, 1]]


def test_axis_of_names_after_the_rates_makes_blocks_too() -> None:
    """The probe of the second schedule is worse than that of any arm of the first, and its best arm wins."""
    probe = np.array([[[1, 6], [2, 7], [3, 8], [4, 9], [5, 9.5]]])
    final = np.array([[[3, 2], [2, 1], [3, 2], [4, 3], [5, 4]]])
    axes = {"rate": [1, 2, 3, 4, 5], "schedule": ["constant", "cosine"]}
    r = replay(curves_of(probe, final), axes, BracketRule(seed_margin=0), start=START)
    assert r.chosen == {"rate": 2, "schedule": "cosine"}


def test_diverged_runs_stop_where_they_diverge_and_do_not_count() -> None:
    curves = curves_of([[1, 2, 3, 4, 5, 6]], [[math.nan, 3, 2, 1, 2, 3]])
    curves[0, 1, 6:] = math.inf  # in the middle of the run
    curves[0, 5] = math.nan  # from its first point on
    r = replay(curves, {"rate": RATES}, BracketRule(), start=START)
    assert r.chosen == {"rate": 8e-5}
    assert r.ran[0].tolist() == pytest.approx([0.6, 0.7, 1, 1, 1, 0.1])


def test_arm_that_diverges_with_a_later_seed_is_out() -> None:
    r = one_axis(
        [1, 2, 3, 4, 5], [[3, 2, 1, 2, 3], [3, 2, math.nan, 2, 3], [3, 2, 1, 2, 3]], BracketRule(seed_margin=0.2)
    )
    assert r.chosen in ({"rate": 2e-5}, {"rate": 8e-5})


def test_best_arm_at_the_end_of_an_axis_is_noted() -> None:
    [note] = one_axis([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]]).notes
    assert "rate=1e-05 is the lowest of its axis" in note
    final = np.array([[3.0, 1.0, 2.0]])
    [note] = replay(curves_of(final, final), {"optim.learning_rate": [1, 4, 16]}, BracketRule(), start=START).notes
    assert "a factor 4 apart" in note


def test_noise_between_seeds_above_the_margin_is_noted() -> None:
    """Two arms that swap by 0.4 differ by 0.4 in one seed less 0.4 in the other: 0.8 over the square root of 2."""
    noisy = one_axis([2, 1, 1.1, 2], [[3, 1.0, 1.2, 3], [3, 1.4, 0.8, 3]])
    assert [n for n in noisy.notes if "varies by 0.566 from seed to seed" in n and "margin of 0.27" in n]
    assert one_axis([2, 1, 1.1, 2], [[3, 1.0, 1.2, 3], [3, 1.1, 1.2, 3]]).notes == ()


def test_regret_is_that_of_the_other_seeds() -> None:
    finals = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 1.5], [3, 1, 1.1]])
    peeked = replay(curves_of(0, finals), {"rate": [1, 2, 3]}, BracketRule(), start=START, seeds=(0, 1))
    assert peeked.regret == 0.0
    probe = [[1, 8, 9, 9.1, 9.2]] * 4
    final = [[2, 3, 4, 4, 1]] * 2 + [[2, 3, 4, 4, 1.6]] * 2
    missed = replay(curves_of(probe, final), {"rate": [1, 2, 3, 4, 5]}, BracketRule(), start=START, seeds=(0, 1))
    assert missed.chosen == {"rate": 1} and missed.regret == pytest.approx(2 / 1.6 - 1)
    assert math.isnan(replay(curves_of(0, finals), {"rate": [1, 2, 3]}, BracketRule(), start=START).regret)


def test_workers_share_the_time_of_the_runs() -> None:
    """Three arms are finished and three are probed: 4.5 runs. Two workers need 3 probes, the leader, then two."""
    finals = [[3, 2, 1, 2, 3, 4]]
    assert one_axis(finals[0], finals).wall_clock == pytest.approx(4.5)
    assert one_axis(finals[0], finals, workers=2).wall_clock == pytest.approx(3 * 0.5 + 0.5 + 0.5)


# ---------------------------------------------------------------------------------------- a second implementation
def reference(curves: np.ndarray, shape: tuple[int, ...], start: float, rule: BracketRule) -> tuple[int, np.ndarray]:
    """Follows the rule stage by stage with all values at hand; ordered axes only, and no arm diverges.

    Args:
        curves: float64 [S, A, P].
        shape: of the grid; each axis has three values or more, in increasing order.

    Returns:
        The arm, and the share of each run that was run, [S, A].
    """
    seeds, arms, points = curves.shape
    at = math.ceil(round(rule.first * points, 6))
    y, end = curves[0, :, at - 1], curves[:, :, -1]
    gain = start - min(y)

    def beside(a: int) -> set[int]:
        found = set()
        for axis, i in enumerate(np.unravel_index(a, shape)):
            stride = math.prod(shape[axis + 1 :])
            found |= ({a - stride} if i else set()) | ({a + stride} if i + 1 < shape[axis] else set())
        return found

    done = {
        a
        for a in range(arms)
        if gain <= 0 or y[a] <= min(y) + rule.seed_margin * gain or y[a] <= min(y[n] for n in beside(a))
    }
    while True:
        low = min(end[0, a] for a in done)
        margin = rule.seed_margin * max(0.0, start - low)
        minima = {
            a for a in done if end[0, a] - low <= margin and all(end[0, a] <= end[0, n] for n in beside(a) & done)
        }
        more = set().union(*(beside(a) for a in minima)) - done
        if not more:
            break
        done |= more
    ran = np.full((seeds, arms), 0.0)
    ran[0] = at / points
    ran[0, sorted(done)] = 1
    n, field = 1, sorted(done)
    while n < seeds and len(field) > 1:
        means = {a: end[:n, a].mean() for a in field}
        best = min(field, key=lambda a: means[a])
        bound = rule.seed_margin * max(0.0, start - means[best]) / n**0.5
        if n >= 3:
            rest = [end[:n, a] - end[:n, best] for a in field if a != best]
            pooled = np.mean([np.var(r, ddof=1) for r in rest])
            bound = max(bound, stats.t.ppf(0.9, len(rest) * (n - 1)) * (pooled / n) ** 0.5)
        field = [a for a in field if means[a] - means[best] <= bound]
        if len(field) > 1:
            ran[n, field] = 1
            n += 1
    return min(field, key=lambda a: end[:n, a].mean()), ran


def random_sweep(seed: int, noise: float = 0.1) -> tuple[np.ndarray, dict, float]:
    """Returns curves of a random sweep whose ranking changes on the way, its axes, and the metric at its start."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 6, rng.integers(1, 3)))
    size = (int(rng.integers(1, 6)), *shape)
    early, late = rng.normal(size=(2, *shape)).cumsum(axis=-1) if seed % 2 else rng.normal(size=(2, *shape))
    t = np.linspace(0, 1, 10)
    means = 5 + early[..., None] * (1 - t) + late[..., None] * t
    curves = means + noise * rng.normal(size=(*size, 10))
    axes = {f"axis{i}": list(np.cumsum(rng.integers(1, 5, n))) for i, n in enumerate(shape)}
    return curves, axes, float(means[..., 0].min() + rng.uniform(-0.5, 6))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([0.0, 0.03, 0.2]), st.integers(1, 5))
def test_rule_equals_a_second_implementation(seed: int, noise: float, margin: float, workers: int) -> None:
    """The number of workers changes the order in which runs come in, and so must not change the answer."""
    curves, axes, start = random_sweep(seed, noise)
    rule = BracketRule(seed_margin=margin)
    arm, ran = reference(curves.reshape(len(curves), -1, 10), curves.shape[1:-1], start, rule)
    r = replay(curves, axes, rule, start=start, workers=workers)
    assert r.ran.reshape(ran.shape) == pytest.approx(ran, abs=1e-12)
    assert r.chosen == Grid(axes).values(arm)


def test_second_implementation_tells_other_constants_apart() -> None:
    differences = 0
    for seed in range(40):
        curves, axes, start = random_sweep(seed)
        _, ran = reference(curves.reshape(len(curves), -1, 10), curves.shape[1:-1], start, BracketRule(seed_margin=0.1))
        differences += bool(np.any(ran != replay(curves, axes, BracketRule(), start=start).ran.reshape(ran.shape)))
    assert differences > 0


# ---------------------------------------------------------------------------------------- on any sweep
def with_divergence(curves: np.ndarray, seed: int) -> np.ndarray:
    """Returns the curves with some runs NaN from some point on, all of one arm's never."""
    rng = np.random.default_rng(seed)
    from_point = np.where(rng.random(curves.shape[:-1]) < 0.3, rng.integers(0, 10, curves.shape[:-1]), 10)
    from_point[(slice(None), *[0] * (curves.ndim - 2))] = 10
    return np.where(np.arange(10) >= from_point[..., None], np.nan, curves)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.booleans(), st.integers(1, 4))
def test_chosen_arm_was_run_to_its_end_and_did_not_diverge(seed: int, diverging: bool, workers: int) -> None:
    curves, axes, start = random_sweep(seed)
    curves = with_divergence(curves, seed) if diverging else curves
    r = replay(curves, axes, BracketRule(), start=start, workers=workers)
    index = (slice(None), *[axes[name].index(value) for name, value in r.chosen.items()])
    assert r.ran[index][0] == 1.0 and np.isfinite(curves[index][r.ran[index] > 0]).all()
    assert 0 <= r.saved < 1 and r.saved == pytest.approx(1 - r.ran.mean())
    assert r.ran.shape == curves.shape[:-1] and (r.ran[0] > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.booleans())
def test_rule_sees_only_what_it_has_run(seed: int, diverging: bool) -> None:
    curves, axes, start = random_sweep(seed)
    curves = with_divergence(curves, seed) if diverging else curves
    r = replay(curves, axes, BracketRule(), start=start)
    unseen = np.arange(1, 11) > np.round(r.ran * 10)[..., None]
    changed = replay(np.where(unseen, -1e6, curves), axes, BracketRule(), start=start)
    assert changed.chosen == r.chosen and (changed.ran == r.ran).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20))
def test_order_of_axes_and_of_their_values_does_not_matter(seed: int) -> None:
    curves, axes, start = random_sweep(seed)
    expected = replay(curves, axes, BracketRule(), start=start)
    rng = np.random.default_rng(seed)
    shuffled = curves
    values = {}
    for i, (name, listed) in enumerate(axes.items()):
        order = rng.permutation(len(listed))
        shuffled, values[name] = np.take(shuffled, order, axis=i + 1), [listed[j] for j in order]
    turned = np.moveaxis(shuffled, range(1, curves.ndim - 1), range(curves.ndim - 2, 0, -1))
    r = replay(turned, dict(reversed(values.items())), BracketRule(), start=start)
    assert r.chosen == expected.chosen and r.saved == pytest.approx(expected.saved)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20))
def test_seeds_are_replayed_in_the_order_given(seed: int) -> None:
    curves, axes, start = random_sweep(seed)
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(curves))]
    a = replay(curves, axes, BracketRule(), start=start, seeds=order)
    b = replay(curves[order], axes, BracketRule(), start=start)
    assert a.chosen == b.chosen and (a.ran == b.ran).all()


# ---------------------------------------------------------------------------------------- Student's t
def test_quantiles_of_student_s_t_equal_scipy_s() -> None:
    """Both are float64; bisection ends at the last bit and the sums have at most 50 terms."""
    for degrees, p in itertools.product((1, 2, 3, 4, 5, 8, 9, 30, 101), (0.01, 0.3, 0.9, 0.975, 0.999)):
        assert student_t.quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9)
    assert student_t.quantile(0.9, 4) != pytest.approx(stats.t.ppf(0.9, 5), rel=1e-3)


# ---------------------------------------------------------------------------------------- bad input
GOOD = curves_of([[3, 2, 1], [3, 2, 1]], 1.0)
BAD_INPUT = [
    ({"curves": GOOD[0]}, "curves has 2 dims.*needs 3: .seed, rate, point."),
    ({"curves": GOOD[:, :2]}, r"curves has the shape \(2, 2, 10\), but the axes have 3 values"),
    ({"curves": GOOD[..., :0]}, "holds no value"),
    ({"curves": [[["a"]]]}, "curves is not an array of numbers"),
    ({"curves": np.where(GOOD == 1, -np.inf, GOOD)}, "contains -inf"),
    ({"curves": GOOD * np.nan}, "BracketRule can choose no arm, because every run that it did not stop has diverged"),
    ({"axes": {}}, "names no axis"),
    ({"axes": {"rate": "abc"}}, "Give the list of the axis' values"),
    ({"axes": {"rate": []}}, "is empty"),
    ({"axes": {"rate": [1, 2, 2]}}, "has the value 2 twice"),
    ({"axes": {"rate": [1, 2, math.nan]}}, "has the value nan"),
    ({"axes": {"rate": [1, 2]}, "curves": GOOD[:, :2]}, "cannot bracket the axis 'rate': it has 2 values"),
    ({"axes": {"rate": ["a", "b", "c"]}}, "no axis to bracket"),
    ({"rule": BracketRule(axes=("batch",))}, "names the axis 'batch', which the sweep does not have"),
    ({"rule": BracketRule(axes=("rate",), blocks=("rate",))}, "both in axes and in blocks"),
    ({"rule": BracketRule(axes=("rate",)), "axes": {"rate": ["a", "b", "c"]}}, "are not all numbers"),
    ({"rule": BracketRule(first=0)}, "first must be above 0"),
    ({"start": math.nan}, "start is nan"),
    ({"start": [1.0, 2.0]}, "start has 2 values"),
    ({"seeds": (0, 2)}, r"seeds is \(0, 2\).*from 0 to 1"),
    ({"seeds": (0, 0)}, "each once"),
    ({"seeds": ()}, "Give positions of seeds"),
    ({"seeds": 3}, "seeds is 3"),
    ({"signals": {"loss": GOOD[0]}}, "signals.'loss'. has the shape"),
    ({"workers": 0}, "workers is 0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_INPUT, ids=[m[:30] for _, m in BAD_INPUT])
def test_bad_input_of_a_replay_is_named(wrong: dict, message: str) -> None:
    arguments = {"curves": GOOD, "axes": {"rate": [1, 2, 3]}, "rule": BracketRule(), "start": START} | wrong
    with pytest.raises(UserError, match=message) as error:
        replay(**arguments)
    assert "\n" not in str(error.value)
    replay(GOOD, {"rate": [1, 2, 3]}, BracketRule(), start=START, seeds=(1,))


def test_sweeps_import_neither_jax_nor_optuna() -> None:
    code = "import sys, mice_jax.sweeps; print({'jax', 'optuna', 'scipy', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
