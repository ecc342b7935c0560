"""Warm-ups of 0, 25 and 100 steps in the LAB recipe.

Published, Granite 7B: MMLU 0.531, 0.528, 0.526; MTBench nearly equal, its numbers unknown. The study concludes that
warm-up is not needed.
Cost: 8.3 million samples each.
Topology: v5p:2x2x2.
Launch: mice train --config=configs/paper/warmup.py:steps=0 --workdir=runs/warmup_0
        mice sweep --config=configs/paper/warmup.py --workdir=sweeps/warmup
"""

from mice_jax.config import Config, Sweep
from paper_study import WARMUPS, choice, options, published, recipe

VARIANTS = [f"steps={w}" for w in WARMUPS]


def get_config(arg: str = "") -> Config:
    given = options(arg, steps="25")
    c = recipe(given, "lab")
    c.optim.warmup_steps = int(choice(given, "steps", WARMUPS))
    if given["model"] == "granite-7b":
        c.published = published({"MMLU": {0: 0.531, 25: 0.528, 100: 0.526}}, "optim.warmup_steps")
    return c


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=get_config(arg), axes={"optim.warmup_steps": list(WARMUPS)})
