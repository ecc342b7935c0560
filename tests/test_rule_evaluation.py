"""The evaluation of signals and stop rules, on runs small enough to compute by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from mice_jax.report_page.rule_evaluation import FinishedRun, correlations, spearman, verdicts
from mice_jax.training.stop_rules import (
    ColumnarRecords,
    HalvingRule,
    MedianRule,
    Objective,
    PaperRule,
    column,
    first_samples,
    signal,
)
from test_stop_rules import run

pytestmark = pytest.mark.smoke


def finished(name: str, loss: float, norm: float, final: float, batch: int = 10) -> FinishedRun:
    steps = 400 // batch
    return FinishedRun(name, batch, run([loss] * steps, [norm] * steps, batch=batch), final)


RUNS = [
    finished("a", 4.0, 1.0, 0.1),
    finished("b", 3.0, 2.0, 0.2),
    finished("c", 2.0, 3.0, 0.4),
    finished("d", 1.0, 4.0, 0.8),
]


def test_spearman_equals_scipy_s_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, 12).astype(float), rng.normal(size=12)
        assert spearman(x, y) == pytest.approx([stats.spearmanr(x, y).statistic], abs=1e-12)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0))).all()


def test_spearman_counts_each_pair_as_often_as_given() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 4, 9).astype(float), rng.normal(size=9)
    times = rng.integers(0, 4, (20, 9))
    wanted = [stats.spearmanr(np.repeat(x, t), np.repeat(y, t)).statistic for t in times]
    assert spearman(x, y, times.astype(float)) == pytest.approx(wanted, abs=1e-12)
    assert spearman(x, y) != pytest.approx(wanted[:1], abs=1e-3), "they count"


def test_signal_that_ranks_runs_as_their_end_correlates_fully() -> None:
    found = {(c.signal, c.fraction): c for c in correlations(RUNS, (0.1, 0.5), ("loss", "grad_norm", "noise_scale"))}
    assert found["grad_norm", 0.1].rho == pytest.approx(1.0) and found["loss", 0.5].rho == pytest.approx(-1.0)
    assert found["noise_scale", 0.1].runs == 0 and math.isnan(found["noise_scale", 0.1].rho)


@pytest.mark.parametrize(("count", "has_interval"), [(4, False), (5, True)])
def test_fewer_than_five_runs_have_no_interval(count: int, has_interval: bool) -> None:
    runs = [finished(str(i), 1.0, float(i), float(i)) for i in range(count)]
    [c] = correlations(runs, (0.2,), ("grad_norm",))
    assert c.rho == pytest.approx(1.0)
    assert (c.low <= 1.0 <= c.high + 1e-12) == has_interval and math.isnan(c.low) != has_interval


def test_bootstrap_interval_of_unrelated_numbers_contains_zero() -> None:
    rng = np.random.default_rng(1)
    runs = [finished(str(i), 1.0, n, f) for i, (n, f) in enumerate(rng.normal(size=(30, 2)) ** 2)]
    [c] = correlations(runs, (0.2,), ("grad_norm",))
    assert c.low < 0 < c.high and c.low < c.rho < c.high


def test_paper_rule_saves_the_samples_that_stopped_runs_had_left() -> None:
    """At half of the run it stops b and c; a has the lower norm and higher loss, d the lowest loss and so is spared."""
    [v] = verdicts(RUNS, [PaperRule()], Objective(), (0.5,))
    assert v.stopped == ("b", "c") and v.saved == pytest.approx(2 * 0.5 / 4)
    assert v.regret == 0.0 and not v.winner_killed


def test_rule_that_stops_the_winner_has_a_regret() -> None:
    """By the loss so far, a and b are the worst; they end best."""
    [v] = verdicts(RUNS, [MedianRule()], Objective(), (0.1,))
    assert v.stopped == ("a", "b") and v.winner_killed
    assert v.regret == pytest.approx(0.4 - 0.1) and v.saved == pytest.approx(2 * 0.9 / 4)
    [v] = verdicts(RUNS, [MedianRule()], Objective(mode="max"), (0.1,))
    assert not v.winner_killed and v.regret == 0.0, "where higher is better d wins, and goes on"


def test_halving_keeps_the_best_of_four() -> None:
    [v] = verdicts(RUNS, [HalvingRule(reduction=4)], Objective(), (0.2,))
    assert v.stopped == ("a", "b", "c") and v.winner_killed and v.saved == pytest.approx(3 * 0.8 / 4)


def test_batch_sizes_are_evaluated_apart_and_together() -> None:
    runs = [*RUNS, finished("e", 1.0, 0.5, 0.3, 40), finished("f", 2.0, 0.4, 0.2, 40), finished("g", 3.0, 0.3, 0.1, 40)]
    rho = {c.group: c.rho for c in correlations(runs, (0.5,), ("loss",))}
    assert rho.keys() == {"all", "batch 10", "batch 40"}
    assert rho["batch 10"] == rho["batch 40"] == pytest.approx(-1.0)
    assert rho["all"] != pytest.approx(-1.0)
    assert {v.group: v.runs for v in verdicts(runs, [PaperRule()], Objective(), (0.5,))} == {
        "all": 7,
        "batch 10": 4,
        "batch 40": 3,
    }


def test_columnar_records_equal_plain_records() -> None:
    assert verdicts(RUNS, [PaperRule(), MedianRule()], Objective()) == verdicts(
        [FinishedRun(r.name, r.batch_size, in_columns(r.records), r.final) for r in RUNS],
        [PaperRule(), MedianRule()],
        Objective(),
    )
    lines = run([1.0, 2.0, 4.0, 8.0], eval__loss=[None, 3.0, None, None])
    columns = in_columns(lines)
    assert list(columns) == lines and list(columns[1:3]) == lines[1:3] and columns[-1] == lines[-1]
    for samples in (5, 10, 29, 30, 99):
        cut = first_samples(columns, samples)
        assert list(cut) == first_samples(lines, samples) and cut is first_samples(columns, samples)
        for name in ("loss", "eval/loss", "grad_norm_corrected", "noise_scale"):
            assert signal(cut, name) == pytest.approx(signal(first_samples(lines, samples), name), nan_ok=True, abs=0)


def in_columns(records) -> ColumnarRecords:
    names = {k for r in records for k in r} - {"phase"}
    return ColumnarRecords({n: column(records, n) for n in names}, [r["phase"] for r in records])
