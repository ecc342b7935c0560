"""The evaluation of signals and stop rules, on runs small enough to compute by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mice_jax.report_page.rule_evaluation import FinishedRun, correlations, verdicts
from mice_jax.statistics import rank_correlation
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


def test_signal_that_ranks_runs_as_their_end_correlates_fully() -> None:
    found = {(c.signal, c.fraction): c for c in correlations(RUNS, (0.1, 0.5), ("loss", "grad_norm", "noise_scale"))}
    assert found["grad_norm", 0.1].rho == pytest.approx(1.0) and found["loss", 0.5].rho == pytest.approx(-1.0)
    assert found["noise_scale", 0.1].arms == 0 and math.isnan(found["noise_scale", 0.1].rho)


def test_correlation_is_over_arms_within_their_batch_size() -> None:
    """Six arms of three runs each; runs as observations, the control, give another number."""
    rng, runs = np.random.default_rng(0), []
    for arm, (batch, rate) in enumerate(itertools.product((10, 40), (1e-3, 2e-3, 4e-3))):
        for seed in range(3):
            norm, final = rng.normal(5.0, 1.0, 2) + batch
            run = finished(f"{arm}.{seed}", 1.0, float(norm), float(final), batch)
            runs.append(dataclasses.replace(run, arm=str(rate), learning_rate=rate))
    norms, finals = (
        np.array(v).reshape(6, 3).mean(axis=1)
        for v in zip(*((signal(r.records, "grad_norm"), r.final) for r in runs), strict=True)
    )
    wanted = rank_correlation.over_arms(norms, finals, [10] * 3 + [40] * 3)
    by_group = {c.group: c for c in correlations(runs, (0.5,), ("grad_norm",))}
    assert by_group["all"].arms == 6 and by_group["all"].rho == pytest.approx(wanted.rho)
    assert by_group["all"].p == wanted.p == by_group["all"].q, "of one test, q is p"
    assert by_group["all"].given_rate != pytest.approx(wanted.rho) and by_group["batch 10"].arms == 3
    apart = [dataclasses.replace(r, arm="") for r in runs]
    assert correlations(apart, (0.5,), ("grad_norm",))[0].arms == 18


def test_q_values_are_adjusted_to_all_signals_and_fractions() -> None:
    rng = np.random.default_rng(1)
    runs = [finished(str(i), *v) for i, v in enumerate(np.abs(rng.normal(size=(8, 3))) + 1)]
    found = correlations(runs, (0.2,), ("loss", "grad_norm"))
    p = np.array([c.p for c in found])
    assert [c.q for c in found] == pytest.approx(stats.false_discovery_control(p)) and len(set(p)) == 2
    assert math.isnan(found[0].given_rate), "the rates are unknown"


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
    assert rho["batch 10"] == rho["batch 40"] == rho["all"] == pytest.approx(-1.0)
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
