"""Checkpoints every 250,000 samples at any batch size, from which the study reads sample efficiency.

Published: every number of samples in the study's tables is a multiple of about 250,000 (40 times 249,600 = 9,980,259
within 0.1 %), so each "samples to the best" is accurate to a quarter of a million. Here a checkpoint is saved at the
first step at or past each multiple, so runs of all batch sizes are compared at the same samples to within one step.
Cost: 8.3 million samples, 34 checkpoints.
Topology: v5p:2x2x2.
Launch: mice train --config=configs/paper/cadence.py:every=50000 --workdir=runs/cadence
"""

from mice_jax.config import Config
from paper_study import BATCHES, choice, options, recipe

VARIANTS = [f"batch={b}" for b in BATCHES]


def get_config(arg: str = "") -> Config:
    given = options(arg, every="250000", batch="3840")
    c = recipe(given, "lab")
    c.optim.batch_size = int(choice(given, "batch", BATCHES))
    c.checkpoint.every_samples = c.eval.every_samples = int(given["every"])
    return c
