"""The LAB recipe on 512 chips, where large batches let a run use many chips.

Published: batches of 3,840 and 7,680 reach at least the quality of 128 (batch_size.py has the numbers). Nothing is
published about how long a run took. A batch of 128 has less than one sample per chip; one of 7,680 has fifteen, which
is about two rows.
Expected: the losses of batch_size.py, step by step, since a step has the same samples on any mesh.
Cost: 8.3 million samples each.
Topology: v5p:8x8x8, as eight copies of the model over 64 chips each.
Launch: mice train --config=configs/paper/pod.py:batch=7680 --workdir=gs://bucket/runs/pod_7680
        mice plan --config=configs/paper/pod.py --topology=v5p:8x8x8
"""

import dataclasses

from mice_jax.config import Config
from paper_models import POD
from paper_study import choice, options, recipe

BATCHES = (3840, 7680)
VARIANTS = [f"batch={b}" for b in BATCHES]


def get_config(arg: str = "") -> Config:
    given = options(arg, batch="7680")
    c = recipe(given, "lab")
    c.mesh = dataclasses.replace(POD)
    c.optim.batch_size = int(choice(given, "batch", BATCHES))
    return c
