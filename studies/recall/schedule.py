"""Constant rate, decay at the end and cosine, each at two rates: is decay needed where weights are averaged?

Tests H2 and H3 (schedule.toml). Index 0 of the rates is half of the best rate of batch 32, index 1 that rate.
Launch: mice sweep --config=studies/recall/schedule.py --workdir=studies/recall/runs/schedule --workers=2
"""

from mice_jax.config import Sweep
from recall import FOLDER, METRIC, best_rates, claims_of, recipe, scale_of


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    scale, best = scale_of(folder), best_rates(arg or FOLDER)
    rate = best.get(32, best[scale.batch_sizes[0]])
    axes = {"optim.schedule": ["constant", "wsd", "cosine"], "optim.learning_rate": [rate / 2, rate]}
    base = recipe(folder)
    base.optim.decay_ratio = 0.2
    claims = claims_of(folder, "schedule")
    return Sweep(base=base, axes=axes, seeds=scale.seeds, metric=METRIC, stop=None, claims=claims)
