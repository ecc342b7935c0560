"""The statistics of few seeds: against SciPy or by hand, and by simulation how often they err.

A simulation of R data sets counts a rate r to within a few standard errors, the root of r (1 - r) / R. Each bound here
is 3.5 of them, which a right procedure misses one time in 2,000, and each has a wrong procedure that it tells apart.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mice_jax.statistics import multiplicity, paired, power, rank_correlation, student_t
from mice_jax.statistics.critical_batch import critical_batch

pytestmark = pytest.mark.smoke

REPEATS = 20_000


def near(rate: float, repeats: int = REPEATS) -> float:
    """Returns by how much a counted rate may differ from the true one."""
    return 3.5 * math.sqrt(rate * (1 - rate) / repeats)


# ---------------------------------------------------------------------------------------- Student's t and power
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
def test_student_t_equals_scipy(degrees: int) -> None:
    t = np.array([-40.0, -2.5, -0.3, 0.0, 1.0, 3.2, 12.0])
    assert student_t.cumulative(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), rel=1e-9, abs=1e-14)
    assert student_t.cumulative(t, degrees) != pytest.approx(stats.t.cdf(t, degrees + 1), rel=1e-3)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_power_of_a_difference_equals_scipys_noncentral_t(n: int) -> None:
    effect, bound = 1.3, stats.t.ppf(0.975, n - 1)
    noncentral = stats.nct(n - 1, effect * math.sqrt(n))
    assert power.of_difference(effect, n, 0.05) == pytest.approx(
        noncentral.sf(bound) + noncentral.cdf(-bound), abs=1e-5
    )


def test_detectable_difference_has_a_power_of_80_percent() -> None:
    sizes = [power.detectable_difference(n) for n in (3, 4, 5, 8, 10)]
    assert sizes == pytest.approx([3.26, 2.13, 1.68, 1.16, 1.00], abs=0.011)
    assert power.of_difference(sizes[2], 5, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert power.detectable_difference(5, level=0.01) > 1.4 * sizes[2]


# ---------------------------------------------------------------------------------------- paired differences
def test_paired_comparison_equals_scipys_t_test() -> None:
    a, b = np.array([3.1, 2.9, 3.3, 3.0]), np.array([3.0, 2.7, 3.3, 2.8])
    found, reference = paired.compare(a - b), stats.ttest_rel(a, b)
    assert float(found.p) == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(reference.confidence_interval(0.95), rel=1e-9)
    assert float(found.p) < stats.ttest_ind(a, b).pvalue / 4, "pairing is what finds it"


def test_equivalence_equals_two_one_sided_tests_of_scipy() -> None:
    d, margin = np.array([0.02, -0.01, 0.03, 0.00, 0.02]), 0.04
    found = paired.equivalence(d, margin)
    above, below = (stats.ttest_1samp(d, v, alternative=s).pvalue for v, s in ((-margin, "greater"), (margin, "less")))
    assert float(found.p) == pytest.approx(max(above, below), rel=1e-9)
    assert float(found.p_beyond) == pytest.approx(stats.ttest_1samp(d, margin, alternative="greater").pvalue, rel=1e-9)
    wide = stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((wide.low, wide.high), rel=1e-9)
    at_the_edge = paired.equivalence(d, float(found.high))
    assert float(at_the_edge.p) == pytest.approx(0.05, rel=1e-6), "the interval ends where the test turns"


def test_differences_without_variance_and_too_few_pairs() -> None:
    same, none = paired.compare([0.5, 0.5, 0.5]), paired.compare([0.0, 0.0, 0.0])
    assert (float(same.p), float(same.low), float(same.high)) == (0.0, 0.5, 0.5) and float(none.p) == 1.0
    assert float(paired.equivalence([0.0, 0.0, 0.0], 0.1).p) == 0.0
    with pytest.raises(ValueError, match="2 pairs"):
        paired.compare([0.1, 0.2])
    with pytest.raises(ValueError, match="not finite"):
        paired.compare([0.1, 0.2, math.nan])


@pytest.mark.parametrize("n", [3, 5, 8])
def test_paired_interval_covers_and_detectable_difference_is_found(n: int) -> None:
    """Arms share what a seed does to both of them; the normal distribution's interval is the control."""
    rng = np.random.default_rng(n)
    of_seed = rng.normal(size=(REPEATS, n))
    plus, minus = (of_seed + rng.normal(size=(REPEATS, n)) for _ in range(2))
    found = paired.compare(plus - minus)
    covered = ((found.low <= 0) & (found.high >= 0)).mean()
    assert covered == pytest.approx(0.95, abs=near(0.05)) and (found.p <= 0.05).mean() == pytest.approx(1 - covered)
    control = (np.abs(found.mean) > 1.96 * found.deviation / math.sqrt(n)).mean()
    assert control > 0.05 + 4 * near(0.05)
    effect = power.detectable_difference(n) * math.sqrt(2)  # the deviation of a difference
    assert (paired.compare(plus - minus + effect).p <= 0.05).mean() == pytest.approx(0.8, abs=near(0.8))


def test_equivalence_errs_in_one_of_twenty_at_the_margin_and_has_its_power() -> None:
    """Taking no significant difference for "alike", the control, errs far more often."""
    rng, n = np.random.default_rng(0), 5
    margin = power.detectable_margin(n)
    noise = rng.normal(size=(REPEATS, n))
    at_the_margin = paired.equivalence(noise + margin, margin)
    assert (at_the_margin.p <= 0.05).mean() == pytest.approx(0.05, abs=near(0.05))
    assert (at_the_margin.p_beyond <= 0.05).mean() == pytest.approx(0.05, abs=near(0.05))
    assert (paired.compare(noise + margin).p > 0.05).mean() > 0.15
    assert (paired.equivalence(noise, margin).p <= 0.05).mean() == pytest.approx(0.8, abs=near(0.8))
    covered = (at_the_margin.low <= margin) & (at_the_margin.high >= margin)
    assert covered.mean() == pytest.approx(0.9, abs=near(0.1))


def test_setting_chosen_by_other_seeds_leaves_no_bias() -> None:
    """One arm chooses among 8 settings that are all alike; by the seeds that are compared, it seems to win."""
    rng, repeats = np.random.default_rng(2), 3000
    values, other = rng.normal(size=(repeats, 8, 8)), rng.normal(size=(repeats, 8))
    chosen = [paired.choose(v, (0, 1, 2)) for v in values]
    held_out = np.stack([v[c] for v, c in zip(values, chosen, strict=True)]) - other
    fair, unfair = paired.compare(held_out[:, 3:]), paired.compare(held_out[:, :3])
    assert (fair.p <= 0.05).mean() == pytest.approx(0.05, abs=near(0.05, repeats))
    assert abs(fair.mean.mean()) < 3.5 * math.sqrt(2 / 5 / repeats) and unfair.mean.mean() < -0.6
    assert paired.choose([[1.0, 2.0], [math.nan, 0.0], [1.0, 1.0]], (0, 1)) == 2
    assert paired.choose([[1.0, math.nan]], (0, 1)) is None


def test_interval_over_bases_covers_where_bases_differ() -> None:
    """Counting each seed of a base as an observation, the control, is overconfident."""
    rng, repeats, bases, seeds = np.random.default_rng(3), 3000, 4, 5
    of_base = rng.normal(size=(repeats, bases, 1))
    d = of_base + rng.normal(size=(repeats, bases, seeds))
    reduced = [paired.base_means(list(one)) for one in d]
    assert (paired.compare([m for m, _ in reduced]).p <= 0.05).mean() == pytest.approx(0.05, abs=near(0.05, repeats))
    assert (paired.compare(d.reshape(repeats, -1)).p <= 0.05).mean() > 0.2
    between, within = np.mean([(c.between**2, c.within**2) for _, c in reduced], axis=0)
    assert within == pytest.approx(1, abs=0.03) and 0.95 < between < 1.15, "between is cut at 0, so it is too high"
    means, parts = paired.base_means([[1.0, 3.0], [5.0], [2.0, 2.0]])
    assert means == pytest.approx([2, 5, 2]) and parts.within == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- several tests
def test_adjusted_p_values_by_hand_and_by_scipy() -> None:
    p = np.array([0.04, 0.01, 0.03, 0.005])
    assert multiplicity.holm(p) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert multiplicity.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert multiplicity.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0]) and multiplicity.holm([]).shape == (0,)


def test_holm_bounds_any_false_finding_and_bh_their_share() -> None:
    """Of 10 tests, 6 have nothing to find. Unadjusted p-values, the control, find something in one of four cases."""
    rng, num_null = np.random.default_rng(4), 6
    effects = np.array([0.0] * num_null + [2.0, 2.0, 3.0, 4.0])
    p = paired.compare(rng.normal(size=(REPEATS, 10, 5)) + effects[:, None]).p
    any_false = [(q[:, :num_null] <= 0.05).any(axis=1).mean() for q in (multiplicity.holm(p), p)]
    assert any_false[0] < 0.05 + near(0.05) and any_false[1] > 0.2
    found = multiplicity.benjamini_hochberg(p) <= 0.05
    share_false = (found[:, :num_null].sum(axis=1) / np.maximum(found.sum(axis=1), 1)).mean()
    assert share_false == pytest.approx(0.05 * num_null / 10, abs=near(0.05)), "for independent tests it is known"
    assert found[:, num_null:].mean() > (multiplicity.holm(p) <= 0.05)[:, num_null:].mean() + 0.05


# ---------------------------------------------------------------------------------------- rank correlation
def test_rank_correlation_over_arms_equals_scipys() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 6, (12, 3)).astype(float), rng.normal(size=(12, 3))
    found = rank_correlation.over_arms(x, y)
    assert found.rho == pytest.approx(stats.spearmanr(x.mean(axis=1), y.mean(axis=1)).statistic, abs=1e-12)
    assert found.rho != pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic, abs=1e-3)


def test_p_value_of_a_rank_correlation_is_that_of_all_orders_of_arms() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0, 4.0, 6.0]), np.array([2.0, 1.0, 4.0, 3.0, 6.0, 5.0])
    all_orders = [abs(np.corrcoef(order, y)[0, 1]) for order in itertools.permutations(x)]
    found = rank_correlation.over_arms(x, y)
    exact = np.mean(np.array(all_orders) >= abs(found.rho) - 1e-9)
    assert found.p == pytest.approx(exact, abs=near(exact, rank_correlation.PERMUTATIONS))
    assert 0.02 < exact < 0.3


def test_relation_between_strata_does_not_count() -> None:
    rng, batch = np.random.default_rng(6), np.repeat([8, 512], 6)
    shifted = [batch + rng.permutation(12) for _ in range(2)]
    by_stratum = [[stats.rankdata(v[at]) - 3.5 for at in (batch == 8, batch == 512)] for v in shifted]
    pooled = np.corrcoef(*(np.concatenate(ranks) for ranks in by_stratum))[0, 1]
    assert rank_correlation.over_arms(*shifted, strata=list(batch)).rho == pytest.approx(pooled)
    assert rank_correlation.over_arms(*shifted).rho > abs(pooled) + 0.3


def test_partial_rank_correlation_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(9)
    rate = np.arange(12.0)
    x, y = (rate + rng.normal(scale=3, size=12) for _ in range(2))
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, rate), (y, rate)))
    partial = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert rank_correlation.over_arms(x, y, covariates=[rate]).rho == pytest.approx(partial)
    assert abs(partial - xy) > 0.3
    assert math.isnan(rank_correlation.over_arms([1.0] * 5, range(5)).rho)
    assert math.isnan(rank_correlation.over_arms(range(3), range(3), covariates=[range(3)]).p), "too few arms"


def test_rank_test_over_arms_errs_in_one_of_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight arms of three runs that resemble one another, and no relation; runs as observations are the control."""
    monkeypatch.setattr(rank_correlation, "PERMUTATIONS", 199)  # the test is exact with any number
    rng, repeats = np.random.default_rng(7), 600
    p, of_runs, partial = [], [], []
    rate, batch = np.tile(np.arange(4.0), 2), [8] * 4 + [512] * 4
    for _ in range(repeats):
        x, y = rng.normal(size=(2, 8, 1)) + 0.15 * rng.normal(size=(2, 8, 3))
        p.append(rank_correlation.over_arms(x, y).p)
        of_runs.append(np.corrcoef(*(v.ravel().argsort().argsort() for v in (x, y)))[0, 1])
        x, y = x + 3 * rate[:, None], y + 3 * rate[:, None]
        partial.append(rank_correlation.over_arms(x, y, batch, [rate]).p)
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=near(0.05, repeats))
    rho = np.array(of_runs)
    p_of_runs = 2 * student_t.cumulative(-np.abs(rho) * np.sqrt(22 / (1 - rho**2)), 22)
    assert np.mean(p_of_runs <= 0.05) > 0.2
    assert np.mean(np.array(partial) <= 0.05) < 0.05 + near(0.05, repeats)


def test_rank_interval_covers_the_populations_correlation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_correlation, "PERMUTATIONS", 1)  # the interval needs none
    rng, repeats, true = np.random.default_rng(8), 1000, 0.7
    x, noise = rng.normal(size=(2, repeats, 12))
    y = true * x + math.sqrt(1 - true**2) * noise
    spearman = 6 / math.pi * math.asin(true / 2)  # of a normal distribution
    found = [rank_correlation.over_arms(a, b) for a, b in zip(x, y, strict=True)]
    covered = np.mean([f.low <= spearman <= f.high for f in found])
    # The interval is an approximation for large numbers of arms: at 12, it may cover 2 % less or more.
    assert covered == pytest.approx(0.95, abs=near(0.05, repeats) + 0.02)
    assert np.mean([f.low <= true + 0.25 <= f.high for f in found]) < 0.8


# ---------------------------------------------------------------------------------------- the critical batch size
BATCH_SIZES = (16, 32, 64, 128)


def test_critical_batch_of_clear_differences_is_told_by_hand() -> None:
    noise = np.array([0.001, -0.001, 0.0])
    held = np.array([0.0, 0.004, 0.012, 0.05])[:, None] + 2.0 + noise * np.array([0, 1, -1, 1])[:, None]
    found = critical_batch({"eval/loss": held}, BATCH_SIZES, 0.01)
    assert (found.low, found.high) == (32, 128), "64 is too close to the tolerance to tell"
    assert found.estimate == pytest.approx(32 * 2 ** (0.006 / 0.008), rel=1e-9)
    train = held.copy()
    train[1] += 0.1  # the training loss alone rules 32 out
    both = critical_batch({"eval/loss": held, "loss": train}, BATCH_SIZES, 0.01)
    assert both.low == 16 and both.estimate == pytest.approx(16 * 2 ** (0.01 / 0.104), rel=1e-9)
    two = critical_batch({"eval/loss": held[:, :2]}, BATCH_SIZES, 0.01)
    assert (two.low, two.high) == (None, None) and 32 < two.estimate < 64
    held[2:] = math.inf
    diverged = critical_batch({"eval/loss": held}, BATCH_SIZES, 0.01)
    assert (diverged.low, diverged.high, diverged.estimate) == (32, 64, 32)
    flat = critical_batch({"eval/loss": np.zeros((4, 3)) + noise}, BATCH_SIZES, 0.01)
    assert (flat.low, flat.high, flat.estimate) == (128, math.inf, math.inf)


def test_interval_of_the_critical_batch_covers_it() -> None:
    """32 is critical: 64 is just beyond the tolerance, where it is hardest to tell, and 32 just within it."""
    rng, repeats, missed, single = np.random.default_rng(3), 3000, 0, 0
    mean = np.array([0.0, 0.01, 0.01 + 1e-9, 0.03])[:, None]
    for _ in range(repeats):
        values = {m: mean + 0.01 * rng.normal(size=(4, 5)) for m in ("held", "train")}
        found = critical_batch(values, BATCH_SIZES, 0.01)
        missed += found.low > 32 or found.high <= 32
        bound = critical_batch({"held": values["held"]}, BATCH_SIZES, 0.01, level=0.5)
        single += bound.low > 32 or bound.high <= 32
    assert missed / repeats <= 0.05 + near(0.05, repeats)
    assert single / repeats > 0.1, "an interval at half the confidence misses more often"
