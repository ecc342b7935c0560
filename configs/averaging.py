"""A constant and a decayed learning rate, each with and without an average of the weights.

What it tests: whether a constant rate with averaging reaches what a decayed rate reaches. A constant rate leaves the
weights noisy, so a comparison of the two schedules without an average is in favour of the decayed one.
Read: eval/loss is that of the weights, eval/average/loss that of their average, in the metrics.jsonl of each run.
Measured after 240 steps, one seed: constant 1.795 and averaged 1.667; cosine 1.661 and averaged 1.690, since its
average holds weights from before the decay. Without averaging, the constant rate would seem to lose 0.134 nats; with
it, 0.005.
Cost: about two minutes of two cores for each schedule.
Data and model: those of the demo (`make demo` makes them), shortened to STEPS steps.
Launch: mice sweep --config=configs/averaging.py --workdir=runs/averaging
"""

import runpy
from pathlib import Path

from mice_jax.config import Sweep

STEPS = 240
HALF_LIFE = 16 * 20  # samples: 20 steps of 16


def get_sweep(arg: str = "demo/data") -> Sweep:
    demo = runpy.run_path(str(Path(__file__).with_name("demo.py")))
    c = demo["get_config"](arg)
    c.optim.max_steps = STEPS
    c.train.ema_half_life = HALF_LIFE
    return Sweep(base=c, axes={"optim.schedule": ["constant", "cosine"]}, metric="eval/loss", stop=None)
