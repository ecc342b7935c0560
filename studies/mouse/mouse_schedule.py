"""Warm-ups of 0, 10 and 50 steps, with a constant rate and with cosine decay, in 132 steps of 96 samples.

Tests the paper's claims that neither warm-up nor decay changes the final loss by much.
Found (README.md): small differences. Cosine decay ends 0.054 higher than a constant rate; ten steps of
warm-up end 0.019 lower than none; for fifty steps the difference is undecided.
Cost: 18 runs, about a quarter of an hour on two busy CPU cores.
Launch: mice sweep --config=studies/mouse/mouse_schedule.py --workdir=studies/mouse/runs/schedule --workers=2
"""

from mice_jax.config import Sweep
from mouse import FOLDER, SEEDS, recipe


def get_sweep(arg: str = FOLDER) -> Sweep:
    axes = {"optim.warmup_steps": [0, 10, 50], "optim.schedule": ["constant", "cosine"]}
    return Sweep(base=recipe(arg or FOLDER), axes=axes, seeds=SEEDS, metric="eval/loss", stop=None)
