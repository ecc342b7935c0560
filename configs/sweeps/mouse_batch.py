"""Batches of 12 and 96 samples by learning rates from 3e-4 to 1e-2; and whether early signals tell the end.

Tests the study's claims that a large batch ends better than a small one on the same samples, that a low rate is
the better start, and that among such runs a lower gradient norm and a higher loss early promise the better end.
Found: nothing yet; `demo/mouse_study.py` writes it.
Cost: 24 runs, about half an hour on two CPU cores, by estimate.
Launch: mice sweep --config=configs/sweeps/mouse_batch.py --workdir=demo/mouse/batch --workers=2
"""

from mice_jax.config import Sweep
from mouse import FOLDER, LARGE, SEEDS, SMALL, recipe


def get_sweep(arg: str = FOLDER) -> Sweep:
    axes = {"optim.batch_size": [SMALL, LARGE], "optim.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2]}
    return Sweep(base=recipe(arg or FOLDER), axes=axes, seeds=SEEDS)
