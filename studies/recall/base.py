"""The base model of the study: 0.5 million weights, from scratch on the old world until it knows it.

Expected: exact match of 80 % or more on held-out wordings of old facts, on sums and on operations; run.py checks it.
Launch: mice train --config=studies/recall/base.py --workdir=studies/recall/runs/base
"""

from mice_jax.config import Config, Phase, Source
from recall import FOLDER, OLD, held_out, scale_of


def get_config(arg: str = FOLDER) -> Config:
    folder = arg or FOLDER
    c = Config()
    c.model.init_from = f"random:{folder}/data/init/config.json"
    c.model.compute_dtype = "float32"
    c.data.max_length = 256
    # Facts are few, so they are drawn four times an epoch.
    old = [Source(path=f"{folder}/data/{n}.jsonl", weight=4.0 if n == "old_facts" else 1.0) for n in OLD]
    c.data.phases = [Phase(name="old", num_epochs=scale_of(folder).base_epochs, sources=old)]
    c.data.validation = held_out(folder, OLD)
    c.optim.batch_size, c.optim.learning_rate = 128, 3e-3
    c.optim.schedule, c.optim.warmup_ratio, c.optim.grad_clip = "cosine", 0.02, 1.0
    c.optim.beta2_half_life = 1_728.0
    c.eval.exact_match, c.eval.at_shares = True, [0.2, 0.4, 0.7]
    c.checkpoint.every_samples, c.checkpoint.keep_last = 100_000, 1
    c.stop.steps = 0
    c.log.trackers, c.log.every_steps = [], 100
    return c
