"""Warm-ups of 0, 10 and 50 steps, with a constant rate and with cosine decay, in 132 steps of 96 samples.

Tests the study's claims that neither warm-up nor decay changes the end by much.
Found: nothing yet; `demo/mouse_study.py` writes it.
Cost: 18 runs, about 20 minutes on two CPU cores, by estimate.
Launch: mice sweep --config=configs/sweeps/mouse_schedule.py --workdir=demo/mouse/schedule --workers=2
"""

from mice_jax.config import Sweep
from mouse import FOLDER, SEEDS, recipe


def get_sweep(arg: str = FOLDER) -> Sweep:
    axes = {"optim.warmup_steps": [0, 10, 50], "optim.schedule": ["constant", "cosine"]}
    return Sweep(base=recipe(arg or FOLDER), axes=axes, seeds=SEEDS)
