"""The configs of `configs/` itself: each is valid in every variant, says what it costs, and is in the docs."""

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import REPOSITORY
from mice_jax.config import Config
from mice_jax.sweeps.trials import label, trial_config

pytestmark = pytest.mark.smoke

FILES = sorted((REPOSITORY / "configs").glob("*.py"))
ARMS = {"stacked_phased_osft": ("stacked", "phased", "phased_osft")}


def configs_of(file: Path) -> list[Config]:
    """Every config that a file stands for: that of each arm, or of each trial of its sweep."""
    made: dict[str, Any] = runpy.run_path(str(file))
    found = [made["get_config"](arm) for arm in ARMS.get(file.stem, ("",))] if "get_config" in made else []
    if "get_sweep" not in made:
        return found
    sweep = made["get_sweep"]("")
    sweep.validate()
    labels = itertools.product(*([label(v) for v in values] for values in sweep.axes.values()))
    return found + [trial_config(sweep, dict(zip(sweep.axes, taken, strict=True))) for taken in labels]


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_lab_note_is_valid_in_every_variant_and_says_what_it_costs(file: Path) -> None:
    configs = configs_of(file)
    assert configs
    for config in configs:
        config.validate()
    told = runpy.run_path(str(file))["__doc__"]
    assert all(part in told for part in ("What it tests: ", "Launch")) and ("Cost: " in told or file.stem == "sft")
    assert f"configs/{file.name}" in (REPOSITORY / "docs" / "configs.md").read_text()


def test_arms_of_phases_see_the_same_samples_and_osft_is_in_one_alone() -> None:
    stacked, phased, osft = configs_of(REPOSITORY / "configs" / "stacked_phased_osft.py")
    steps = [[phase.num_steps for phase in c.data.phases] for c in (stacked, phased, osft)]
    assert sum(steps[0]) == sum(steps[1]) and steps[1] == steps[2]
    assert [c.optim.osft_rank_ratio for c in (stacked, phased, osft)] == [0.0, 0.0, 0.5]
