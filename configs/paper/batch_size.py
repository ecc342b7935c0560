"""Batch sizes of 128, 3,840 and 7,680 samples in the LAB recipe.

Published, Granite 7B stacked: MMLU 0.516, 0.526, 0.529; MTBench 6.406, 6.768, 6.831. The small batch is ahead
early; the large ones need more samples and end higher. Mistral 7B (128 and 3,840, at 1e-6): the larger batch has the
better MTBench (7.33) and an equal Leaderboard v2 (18.59). Granite 3B and Llama 3B: numbers by batch size are unknown.
Cost: 8.3 million samples each.
Topology: v5p:2x2x2.
Launch: mice train --config=configs/paper/batch_size.py:batch=7680 --workdir=runs/batch_7680
        mice sweep --config=configs/paper/batch_size.py --workdir=sweeps/batch
"""

from mice_jax.config import Config, Sweep
from paper_study import BATCHES, choice, options, published, recipe

VARIANTS = [f"batch={b}" for b in BATCHES]


def get_config(arg: str = "") -> Config:
    given = options(arg, batch="3840")
    c = recipe(given, "lab")
    c.optim.batch_size = int(choice(given, "batch", BATCHES))
    if given["model"] == "granite-7b":
        mmlu, mtbench = {128: 0.516, 3840: 0.526, 7680: 0.529}, {128: 6.406, 3840: 6.768, 7680: 6.831}
        c.published = published({"MMLU": mmlu, "MTBench": mtbench}, "optim.batch_size")
    elif given["model"] == "mistral-7b":
        c.published = published({"MTBench": {3840: 7.33}, "Leaderboard v2": {3840: 18.59}}, "optim.batch_size")
    return c


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=get_config(arg), axes={"optim.batch_size": list(BATCHES)})
