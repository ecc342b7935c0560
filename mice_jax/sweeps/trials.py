"""Derives the trials of a sweep, their configs, its metric and its stop rule from the sweep's settings."""

import copy
import dataclasses
import itertools
from typing import Any

from mice_jax.config import Config, Range, Sweep, is_set, locate
from mice_jax.config_checks import nearest
from mice_jax.data.source_names import held_out_names
from mice_jax.errors import UserError
from mice_jax.sweeps import live_bracket
from mice_jax.sweeps.bracket_rule import BracketRule
from mice_jax.training import stop_rules
from mice_jax.training.metric_names import KEPT, MACRO, MACRO_EXACT_MATCH

AUTO = "auto"


def settled(sweep: Sweep) -> tuple[Sweep, list[str]]:
    """Settles what a sweep leaves to the command: its metric, unless it is set, and the rule where stop is "auto".

    Args:
        sweep: The settings as the sweep's file gives them.

    Returns:
        The sweep with its metric and its rule, and a sentence about each that was chosen.
    """
    notes = []
    metric, stop = sweep.metric, sweep.stop
    num_sources = len(held_out_names(sweep.base.data))
    if not is_set(sweep, "metric") and num_sources > 1:
        metric = MACRO
        notes.append(f"metric: {MACRO}, the mean over the {num_sources} held-out sources (metric= takes another one)")
    if sweep.stop == AUTO:
        stop, note = _chosen_rule(dataclasses.replace(sweep, metric=metric))
        notes.append(note)
    return dataclasses.replace(sweep, metric=metric, stop=stop), notes


def check_metric(sweep: Sweep) -> None:
    """Raises UserError where no run of the sweep can measure its metric, as far as the config tells.

    Only held-out metrics are checked, and only where neither benchmarks nor axes can add others.
    """
    base, metric = sweep.base, sweep.metric
    if not metric.startswith("eval/") or base.eval.tasks or any(a.startswith(("data", "eval")) for a in sweep.axes):
        return
    sources = held_out_names(base.data)
    if not sources:
        raise UserError(
            f"metric={metric!r} of the sweep is measured on held-out data, and its base holds none out. Set "
            "data.validation or data.validation_fraction."
        )
    groups = ["", *(f"{source}/" for source in sources), *(f"phase/{phase.name}/" for phase in base.data.phases)]
    known = [MACRO, MACRO_EXACT_MATCH, KEPT]
    known += [f"eval/{group}{kind}" for group in groups for kind in ("loss", "token_accuracy", "exact_match")]
    known += [name.replace("eval/", "eval/average/", 1) for name in known]
    if metric not in known:
        raise UserError(f"metric={metric!r} of the sweep is not measured in its runs{nearest(metric, known)}")


def _chosen_rule(sweep: Sweep) -> tuple[str | None, str]:
    """Returns "bracket" where that rule can work on a sweep, else None, and a sentence about the choice."""
    try:
        live_bracket.check(sweep, BracketRule())
    except UserError as e:
        return None, f"rule: none, so every trial runs in full. {e}"
    return (
        "bracket",
        "rule: bracket, which runs what it needs to find the best arm (stop=None runs every trial in full)",
    )


def fixed_params(sweep: Sweep) -> list[dict[str, Any]]:
    """Returns the parameters of each trial that are fixed beforehand: all of a grid's, the seeds of a search."""
    seeds = [{"seed": s} for s in sweep.seeds] or [{}]
    if sweep.search != "grid":
        return [seeds[i % len(seeds)] for i in range(sweep.trials)]
    choices = [[{name: label(v)} for v in values] for name, values in sweep.axes.items()]
    return [
        {name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices, seeds)
    ]


def label(value: Any) -> Any:
    """Returns a value as Optuna stores it: plain values unchanged, any other as its repr."""
    return value if isinstance(value, bool | int | float | str) else repr(value)


def trial_config(sweep: Sweep, params: dict[str, Any]) -> Config:
    """Returns the validated config of a trial with these parameters."""
    config = copy.deepcopy(sweep.base)
    for name, value in params.items():
        choices = sweep.seeds if name == "seed" else sweep.axes[name]
        if not isinstance(choices, Range):
            value = next(v for v in choices if label(v) == value)
        part, field = locate(config, name)
        setattr(part, field, copy.deepcopy(value))
    if "optim.rate_for_batch" in params and config.optim.rate_for_batch == "none":
        config.optim.rate_batch_size = 0  # of the other trials
    if rule := bracket_rule(sweep):
        config.eval.at_shares = sorted({*config.eval.at_shares, rule.first})
    config.validate()
    return config


def sibling_rule(sweep: Sweep) -> stop_rules.SiblingRule | None:
    """Returns the rule that stops trials of a sweep for good; raises UserError where its name is unknown."""
    if sweep.stop is None or sweep.stop == "none" or bracket_rule(sweep):
        return None
    if isinstance(sweep.stop, str) and sweep.stop in stop_rules.SIBLING_RULES:
        return stop_rules.SIBLING_RULES[sweep.stop]()
    if isinstance(sweep.stop, stop_rules.SiblingRule):
        return sweep.stop
    raise UserError(
        f"stop={sweep.stop!r} of the sweep is not a stop rule. Give None, one of bracket, "
        f"{', '.join(stop_rules.SIBLING_RULES)}, a BracketRule of mice_jax.sweeps, or a PaperRule, MedianRule or "
        "HalvingRule of mice_jax.training.stop_rules."
    )


def bracket_rule(sweep: Sweep) -> BracketRule | None:
    """Returns the bracket rule of a sweep that has one."""
    if sweep.stop == "bracket":
        return BracketRule()
    return sweep.stop if isinstance(sweep.stop, BracketRule) else None


def uses_rate_rule(sweep: Sweep) -> bool:
    """Returns whether the learning rate of some trials follows their batch size."""
    return "optim.rate_for_batch" in sweep.axes or sweep.base.optim.rate_for_batch != "none"
