"""A control of the batch comparison: beta2 of 0.95 at every batch size in place of one half-life in samples.

Launch: mice sweep --config=studies/recall/control.py --workdir=studies/recall/runs/control --workers=2
"""

from mice_jax.config import Sweep
from recall import BETA2_HALF_LIFE, FOLDER, METRIC, best_rates, recipe, scale_of


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    scale, best = scale_of(folder), best_rates(arg or FOLDER)
    ends = [scale.batch_sizes[0], scale.batch_sizes[-1]]
    axes = {"optim.batch_size": ends, "optim.beta2_half_life": [BETA2_HALF_LIFE, 0.0]}
    base = recipe(folder, learning_rate=best[ends[-1]])
    return Sweep(base=base, axes=axes, seeds=scale.probe_seeds, metric=METRIC, stop=None, claims="none")
