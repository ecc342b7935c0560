"""Signals and stop rules, on records small enough to compute by hand."""

import math

import pytest

from mice_jax.training import stop_rules
from mice_jax.training.stop_rules import (
    DeadModelRule,
    DivergenceRule,
    HalvingRule,
    MedianRule,
    Objective,
    PaperRule,
    reason_among_siblings,
    signal,
)

pytestmark = pytest.mark.smoke


def run(losses: list[float], norms: list[float] | None = None, batch: int = 10, **more: list) -> list[dict]:
    norms = norms or [1.0] * len(losses)
    lines = [
        {"step": i, "phase": "one", "samples": batch * i, "loss": x, "grad_norm": n, "grad_sq_corrected": n * n}
        for i, (x, n) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    for name, values in more.items():
        for line, value in zip(lines, values, strict=True):
            if value is not None:
                line[name.replace("__", "/")] = value
    return lines


# ---------------------------------------------------------------------------------------- signals
def test_signal_is_the_mean_of_the_latest_quarter_of_the_samples() -> None:
    assert signal(run([9.0] * 6 + [1.0, 3.0]), "loss") == 2.0
    assert signal(run([9.0] * 6 + [1.0, 3.0]), "loss", window=1.0) == 58 / 8
    assert math.isnan(signal([], "loss")) and math.isnan(signal(run([1.0]), "noise_scale"))


def test_corrected_norm_is_the_root_of_mean_squares_and_at_least_zero() -> None:
    lines = run([1.0] * 8, [1.0] * 6 + [1.0, 7.0])
    assert signal(lines, "grad_norm_corrected") == 5.0
    assert signal(lines, "grad_norm") == 4.0
    lines[-1]["grad_sq_corrected"] = -3.0
    assert signal(lines, "grad_norm_corrected") == 0.0
    for line in lines[-2:]:  # where the window holds no value, the latest one counts
        line["grad_sq_corrected"] = None
    assert signal(lines, "grad_norm_corrected") == 1.0


def test_held_out_signal_is_the_latest_value() -> None:
    assert signal(run([1.0] * 4, eval__loss=[5.0, None, 3.0, None]), "eval/loss") == 3.0


# ---------------------------------------------------------------------------------------- rules of every run
def test_loss_above_its_start_by_the_margin_is_divergence() -> None:
    rule = DivergenceRule(margin=1.0, steps=3)
    assert "diverged" in rule.reason_to_stop(run([2.0, 1.5, 3.1, 3.2, 9.0]))
    assert rule.reason_to_stop(run([2.0, 1.5, 3.1, 2.9, 9.0])) == "", "one step is below it"
    assert rule.reason_to_stop(run([2.0, 3.1, 9.0])) == "", "too few steps"
    assert rule.reason_to_stop(run([2.0, 3.0, 3.0, 3.0])) == "", "not above the margin"


def test_start_of_a_phase_averages_its_first_eight_samples() -> None:
    rule = DivergenceRule(margin=1.0, steps=3)
    losses = [0.3, *[2.2] * 7, *[2.3] * 3]
    assert rule.reason_to_stop(run(losses, batch=1)) == ""
    assert "its start of 0.3" in rule.reason_to_stop(run(losses, batch=8)), "a step of eight is a start by itself"


def test_phase_of_harder_data_is_not_divergence() -> None:
    rule = DivergenceRule(margin=1.0, steps=3)
    lines = run([0.5, 0.5, 0.5, 2.5, 2.6, 2.7, 2.5, 9.0, 9.0, 9.0])
    for line in lines[3:]:
        line["phase"] = "two"
    assert not any(rule.reason_to_stop(lines[:n]) for n in range(1, 10))
    assert "its start of 2.5" in rule.reason_to_stop(lines)


def test_loss_at_log_vocabulary_without_gradient_is_a_dead_model() -> None:
    level = math.log(300)
    rule = DeadModelRule(300, steps=3)
    assert "dead" in rule.reason_to_stop(run([6.0] + [level] * 3, [2.0] + [1e-5] * 3))
    assert rule.reason_to_stop(run([level] * 4, [2.0, 1.5, 1.4, 1.0])) == "", "a fresh model starts there, and learns"
    assert rule.reason_to_stop(run([6.0] + [0.01] * 3, [2.0] + [1e-5] * 3)) == "", (
        "a model that has learnt everything has no gradient"
    )
    assert rule.reason_to_stop(run([6.0, level, level, level + 1], [2.0] + [1e-5] * 3)) == ""


def test_zero_steps_turn_the_rules_of_every_run_off() -> None:
    assert len(stop_rules.rules_of_every_run(1.0, 10, 300)) == 2 and stop_rules.rules_of_every_run(1.0, 0, 300) == []


# ---------------------------------------------------------------------------------------- rules among siblings
POOR = run([2.0] * 8, [3.0] * 8)
FAIR = run([2.5] * 8, [2.0] * 8)
GOOD = run([3.0] * 8, [1.0] * 8)


def test_paper_rule_stops_a_run_of_higher_norm_and_lower_loss() -> None:
    objective, rule = Objective(), PaperRule()
    assert "lower grad_norm_corrected (1 to 3)" in rule.reason_to_stop(POOR, [GOOD], objective)
    assert rule.reason_to_stop(GOOD, [POOR, FAIR], objective) == ""
    assert rule.reason_to_stop(POOR, [run([1.0] * 8, [1.0] * 8)], objective) == "", "a lower norm alone is not enough"
    assert rule.reason_to_stop(POOR, [run([3.0] * 8, [4.0] * 8)], objective) == "", "neither is a higher loss"
    assert PaperRule(margin=0.6).reason_to_stop(POOR, [GOOD], objective) == "", "3.0 is not 60 % above 2.0"


def test_best_run_by_the_measured_metric_is_never_stopped() -> None:
    best = run([2.0] * 8, [3.0] * 8, eval__loss=[None] * 7 + [0.5])
    other = run([3.0] * 8, [1.0] * 8, eval__loss=[None] * 7 + [0.6])
    assert PaperRule().reason_to_stop(best, [other], Objective()), "the bare rule would"
    assert reason_among_siblings(PaperRule(), best, [other], Objective()) == ""
    assert reason_among_siblings(PaperRule(), best, [other], Objective(mode="max")) != "", (
        "where higher is better it is not the best"
    )


def test_training_loss_decides_before_the_metric_is_measured() -> None:
    assert reason_among_siblings(PaperRule(), POOR, [FAIR, GOOD], Objective()) == ""
    assert reason_among_siblings(PaperRule(), FAIR, [POOR, GOOD], Objective()) != ""


def test_runs_are_compared_at_equal_samples_whatever_their_batches() -> None:
    late = run([9.0] * 8 + [0.1] * 8, batch=5)  # worse up to 40 samples, better after
    mine = run([5.0] * 4, batch=10)  # 40 samples
    assert reason_among_siblings(MedianRule(min_siblings=1), mine, [late], Objective()) == ""
    assert reason_among_siblings(MedianRule(min_siblings=1), run([5.0] * 8, batch=10), [late], Objective()) != ""
    assert reason_among_siblings(MedianRule(min_siblings=1), mine, [run([0.1] * 3)], Objective()) == "", (
        "a sibling that has not come this far"
    )


def test_median_rule_stops_a_run_worse_than_enough_siblings() -> None:
    rule, objective = MedianRule(), Objective()
    assert rule.reason_to_stop(GOOD, [POOR], objective) == ""
    assert "worse than the median of 2" in rule.reason_to_stop(GOOD, [POOR, FAIR], objective)
    assert rule.reason_to_stop(run([2.2] * 8), [POOR, FAIR], objective) == ""


@pytest.mark.parametrize(
    "rule, steps", [(PaperRule(), {2, 5, 10, 20, 50}), (HalvingRule(0.05, 4), {5, 20, 80}), (HalvingRule(0.5, 2), {50})]
)
def test_decision_steps_are_fractions_of_the_run_but_not_its_end(rule, steps: set[int]) -> None:
    assert stop_rules.decision_steps(rule, 100) == steps
    assert stop_rules.decision_steps(PaperRule(), 1) == set()
    assert stop_rules.decision_steps(HalvingRule(0.05, 4), 76) == {4, 16, 64}, "each rung is four times the one before"
