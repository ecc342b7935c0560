"""Learning rates from 1e-6 to 1e-4 in the LAB recipe, at any of the three batch sizes.

Published: 2e-5 is best on MTBench for Granite 7B. At batch 128 it is as good as 3e-5; at 3,840 and 7,680 it is equal to
or better than every other rate. It has the lower gradient norm and the higher loss early. Mistral 7B: 1e-6 is best
of 1e-6, 5e-6 and 2e-5 (MTBench 7.33 at batch 3,840). The numbers for each rate were not recovered.
Cost: 8.3 million samples each; the whole grid costs eight times that if no trial is stopped.
Topology: v5p:2x2x2.
Launch: mice sweep --config=configs/paper/learning_rate.py:batch=128 --workdir=sweeps/rates
"""

from mice_jax.config import Config, Sweep
from paper_study import BATCHES, RATES, choice, options, published, recipe

VARIANTS = [f"rate={r},batch={b}" for r in RATES for b in BATCHES]


def get_config(arg: str = "") -> Config:
    given = options(arg, rate=str(2e-5), batch="3840")
    c = recipe(given, "lab")
    c.optim.learning_rate = float(choice(given, "rate", RATES))
    c.optim.batch_size = int(choice(given, "batch", BATCHES))
    if given["model"] == "mistral-7b" and given["batch"] == "3840":
        c.published = published({"MTBench": {1e-6: 7.33}}, "optim.learning_rate")
    return c


def get_sweep(arg: str = "") -> Sweep:
    return Sweep(base=get_config(arg), axes={"optim.learning_rate": list(RATES)})
