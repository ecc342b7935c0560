"""The rules that the bracket rule is compared with, by hand and against Optuna's own pruner."""

import math

import numpy as np
import optuna
import pytest

from mice_jax.errors import UserError
from mice_jax.sweeps import replay
from mice_jax.sweeps.baselines import ArmHalving, ConstantShare, FullGrid, StopRuns
from mice_jax.training.stop_rules import HalvingRule, MedianRule, PaperRule

pytestmark = pytest.mark.smoke
RATES = {"rate": [1, 2, 3, 4, 5]}


def curves_of(*levels) -> np.ndarray:
    """Returns curves [seed, arm, 10] of two seeds; each level is that of one fifth of the run, for every arm."""
    return np.stack([np.repeat(np.array(levels, float).T, 2, axis=-1)] * 2)


def test_full_grid_runs_everything_and_takes_the_best_mean() -> None:
    r = replay(curves_of([5] * 5, [4] * 5, [3] * 5, [2] * 5, [3, 1, 2, 4, 5]), RATES, FullGrid())
    assert r.saved == 0.0 and r.chosen == {"rate": 2} and r.wall_clock == pytest.approx(10)


def test_constant_share_finishes_the_leaders_with_every_seed() -> None:
    """Two seeds of five arms: five probes of a fifth, then two whole runs and two of four fifths."""
    curves = curves_of([1, 2, 3, 4, 5], [9] * 5, [9] * 5, [9] * 5, [5, 4, 3, 2, 1])
    r = replay(curves, RATES, ConstantShare(0.2, 2))
    assert r.chosen == {"rate": 2}, "the winner at the end was last in the probe"
    assert r.ran.tolist() == [pytest.approx([1, 1, 0.2, 0.2, 0.2]), [1, 1, 0, 0, 0]]
    curves[0, 0, 3:] = math.nan
    assert replay(curves, RATES, ConstantShare(0.2, 2)).chosen == {"rate": 3}, "the next takes a diverged one's place"


def test_arm_halving_promotes_half_of_the_arms_at_each_rung() -> None:
    """Rungs at 10, 20, 40 and 80 % leave 3, 2, 1 and 1 of five arms; a point is a tenth of the run."""
    curves = curves_of([1, 2, 3, 4, 5], [2, 1, 9, 9, 9], [9] * 5, [9] * 5, [5, 4, 3, 2, 1])
    r = replay(curves, RATES, ArmHalving(0.1, 2))
    assert r.ran.tolist() == [pytest.approx([0.4, 1, 0.2, 0.1, 0.1])] * 2 and r.chosen == {"rate": 2}
    assert r.saved == pytest.approx(1 - (1 + 0.4 + 0.2 + 0.1 + 0.1) / 5)


def test_arms_are_judged_by_the_mean_of_their_seeds() -> None:
    curves = curves_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    curves[1, 0] += 10  # The first arm leads with the first seed only.
    assert replay(curves, RATES, ArmHalving()).chosen == {"rate": 2}
    assert replay(curves, RATES, ArmHalving(), seeds=(0,)).chosen == {"rate": 1}


def test_median_rule_stops_runs_one_after_another() -> None:
    """One worker: two siblings are needed before the third run can be stopped, at its first decision point."""
    curves = curves_of(*[[1, 2, 3, 4, 0.5]] * 5)[:1]
    r = replay(curves, RATES, StopRuns(MedianRule()))
    assert r.ran.tolist() == [pytest.approx([1, 1, 0.1, 0.1, 1])] and r.chosen == {"rate": 5}
    later = replay(curves, RATES, StopRuns(MedianRule((0.5,))))
    assert later.ran.tolist() == [pytest.approx([1, 1, 0.5, 0.5, 1])]


def test_paper_rule_reads_norms_and_losses_of_siblings() -> None:
    curves = curves_of(*[[1, 2, 3, 4, 5]] * 5)[:1]
    signals = {"loss": 6 - curves, "grad_norm": curves}
    r = replay(curves, RATES, StopRuns(PaperRule((0.2,), norm="grad_norm")), signals=signals)
    assert r.ran.tolist() == [pytest.approx([1, 0.2, 0.2, 0.2, 0.2])]
    with pytest.raises(UserError, match="signals has no 'grad_sq_corrected'"):
        replay(curves, RATES, StopRuns(PaperRule()), signals=signals)


@pytest.mark.parametrize("reduction", [2, 4])
def test_halving_stops_the_runs_that_optuna_stops(reduction: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(reduction)
    curves = rng.normal(size=(3, 8, 20)).cumsum(axis=-1)
    rule = HalvingRule(0.05, reduction)
    r = replay(curves, {"rate": range(8)}, StopRuns(rule))
    study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(1, reduction))
    ran = np.ones((3, 8))
    for arm, seed in np.ndindex(8, 3):
        trial = study.ask()
        for point in (reduction**i for i in range(5) if reduction**i < 20):
            trial.report(curves[seed, arm, point - 1], point)
            if trial.should_prune():
                ran[seed, arm] = point / 20
                break
        study.tell(trial, curves[seed, arm, -1] if ran[seed, arm] == 1 else None, state=_state(ran[seed, arm]))
    assert r.ran.tolist() == ran.tolist() and 0.3 < r.saved < 1
    other = replay(curves, {"rate": range(8)}, StopRuns(HalvingRule(0.05, 3)))
    assert other.ran.tolist() != ran.tolist()


def _state(share: float) -> optuna.trial.TrialState:
    return optuna.trial.TrialState.COMPLETE if share == 1 else optuna.trial.TrialState.PRUNED


@pytest.mark.parametrize(
    "rule", [FullGrid(), ConstantShare(), ArmHalving(), StopRuns(MedianRule()), StopRuns(HalvingRule())], ids=repr
)
def test_no_rule_chooses_a_diverged_arm(rule) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        curves = rng.normal(size=(2, 6, 10))
        bad = rng.random(6) < 0.4
        bad[rng.integers(6)] = False
        curves[:, bad, int(rng.integers(10)) :] = np.nan
        curves[:, bad] += 9  # else a rule may stop all the others before the best one diverges
        r = replay(curves, {"rate": range(6)}, rule, workers=3)
        assert not bad[r.chosen["rate"]] and 0 <= r.saved < 1
    with pytest.raises(UserError, match="has diverged"):
        replay(np.full((2, 6, 10), np.nan), {"rate": range(6)}, rule)
