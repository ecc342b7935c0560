"""A constant learning rate against cosine decay in the LAB recipe.

Published, Granite 7B, constant and cosine: MMLU 0.5242 and 0.5251; MTBench 6.7562 and 6.6813. The study concludes that
decay is not needed.
Cost: 8.3 million samples each.
Topology: v5p:2x2x2.
Launch: mice train --config=configs/paper/schedule.py:schedule=cosine --workdir=runs/cosine
        mice sweep --config=configs/paper/schedule.py --workdir=sweeps/schedule
"""

from mice_jax.config import Config, Sweep
from paper_study import choice, options, published, recipe

SCHEDULES = ("constant", "cosine")
VARIANTS = [f"schedule={s}" for s in SCHEDULES]


def get_config(arg: str = "") -> Config:
    given = options(arg, schedule="constant")
    c = recipe(given, "lab")
    c.optim.schedule = choice(given, "schedule", SCHEDULES)
    if given["model"] == "granite-7b":
        mmlu, mtbench = {"constant": 0.5242, "cosine": 0.5251}, {"constant": 6.7562, "cosine": 6.6813}
        c.published = published({"MMLU": mmlu, "MTBench": mtbench}, "optim.schedule")
    return c


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=get_config(arg), axes={"optim.schedule": list(SCHEDULES)})
