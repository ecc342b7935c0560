"""The smallest and the largest batch at the best rates of both, with seven seeds: does the large batch end better?

Tests H1 (final.toml): exact match of the averaged weights, each batch at its better rate. The rate is chosen by two
seeds and compared by the five others, on equal samples.
Launch: mice sweep --config=studies/recall/final.py --workdir=studies/recall/runs/final --workers=2
"""

from mice_jax.config import Sweep
from recall import FOLDER, METRIC, best_rates, claims_of, recipe, scale_of


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    scale, best = scale_of(folder), best_rates(arg or FOLDER)
    ends = [scale.batch_sizes[0], scale.batch_sizes[-1]]
    axes = {"optim.batch_size": ends, "optim.learning_rate": sorted({best[b] for b in ends})}
    claims = claims_of(folder, "final")
    return Sweep(base=recipe(folder), axes=axes, seeds=scale.seeds, metric=METRIC, stop=None, claims=claims)
