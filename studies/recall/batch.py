"""Batches of 8 to 512 samples, each with its own bracket of six learning rates; it chooses, and tests nothing.

Each batch size is a block of the bracket rule, so each gets a best rate with worse ones on both sides, or a note.
Launch: mice sweep --config=studies/recall/batch.py --workdir=studies/recall/runs/batch --workers=2
"""

from mice_jax.config import Sweep
from mice_jax.sweeps import BracketRule
from recall import FOLDER, METRIC, recipe, scale_of


def get_sweep(arg: str = FOLDER) -> Sweep:
    folder = arg or FOLDER
    scale = scale_of(folder)
    axes = {"optim.batch_size": scale.batch_sizes, "optim.learning_rate": scale.rates}
    rule = BracketRule(blocks=("optim.batch_size",))
    return Sweep(base=recipe(folder), axes=axes, seeds=scale.probe_seeds, metric=METRIC, stop=rule, claims="none")
