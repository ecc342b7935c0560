"""Batches of 12 and 96 samples, with learning rates from 3e-4 to 1e-2.

Tests the paper's claims that a large batch ends better than a small one on the same samples, that a low learning rate
is the better start, and that a lower gradient norm and a higher loss early in a run predict a better end.
Found (README.md): each at its best rate, the large batch ends lower, 3.775 against 3.850, and is behind early in the
run; at the two lowest rates it ends higher. The lowest rate is not the best one. Early signals do not predict the end
as the paper says: a lower loss early goes with a lower loss at the end.
Cost: 24 runs, about 40 minutes on two busy CPU cores.
Launch: mice sweep --config=studies/mouse/mouse_batch.py --workdir=studies/mouse/runs/batch --workers=2
"""

from mice_jax.config import Sweep
from mouse import FOLDER, LARGE, SEEDS, SMALL, recipe


def get_sweep(arg: str = FOLDER) -> Sweep:
    axes = {"optim.batch_size": [SMALL, LARGE], "optim.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2]}
    return Sweep(base=recipe(arg or FOLDER), axes=axes, seeds=SEEDS, metric="eval/loss", stop=None)
