"""Batches of 12 and 96 samples by learning rates from 3e-4 to 1e-2; and whether early signals tell the end.

Tests the study's claims that a large batch ends better than a small one on the same samples, that a low rate is
the better start, and that among such runs a lower gradient norm and a higher loss early promise the better end.
Found (docs/mouse_study.md): at its own best rate the large batch ends lower, 3.775 against 3.850, and is behind early;
at the two lowest rates it ends higher. The lowest rate is not the best one. Early signals do not tell the end as the
study says: a lower loss early goes with a lower loss at the end.
Cost: 24 runs, about 40 minutes on two CPU cores that did other work too.
Launch: mice sweep --config=configs/sweeps/mouse_batch.py --workdir=demo/mouse/batch --workers=2
"""

from mice_jax.config import Sweep
from mouse import FOLDER, LARGE, SEEDS, SMALL, recipe


def get_sweep(arg: str = FOLDER) -> Sweep:
    axes = {"optim.batch_size": [SMALL, LARGE], "optim.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2]}
    return Sweep(base=recipe(arg or FOLDER), axes=axes, seeds=SEEDS)
