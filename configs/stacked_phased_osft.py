"""Stacked against phased against phased with OSFT: two things to learn at once, or one after the other.

What it tests: whether a second phase makes a model forget the first, and what it knew before, and whether freezing the
leading directions of each matrix (OSFT, arXiv 2504.07097) prevents that. Expected: stacked learns both; phased loses
facts while it learns skills; with OSFT it loses less, and may learn a little less in each phase.
Read: eval/facts/exact_match and eval/skills/exact_match at the end, and eval/kept, the share that is kept of the lists
that the base was trained on.
Measured, one seed: after the first phase, phased has 0.24 of the facts and none of the lists, with OSFT 0.39 and 0.17.
After the second, 0.91 and 0.89 of the tasks are right, next to none of the facts in either; the loss of facts is 11.1
and 5.3, that of lists 7.8 and 3.6. So OSFT slows forgetting here, at a rate this high, and does not prevent it.
Cost: about three minutes of two cores for each arm.
Data and model: runs/demo_base of configs/demo_base.py, trained further on the demo's facts and small tasks.
Launch, with stacked, phased and phased_osft:
  mice train --config=configs/stacked_phased_osft.py:phased --workdir=runs/arms/phased
  mice report --workdir=runs/arms/stacked,runs/arms/phased,runs/arms/phased_osft
"""

import runpy
from pathlib import Path

from mice_jax.config import Config, Phase, Source

ARMS = ("stacked", "phased", "phased_osft")
STEPS = 240  # of each phase
RATIO = 0.5


def get_config(arg: str = "stacked") -> Config:
    arm, folder = arg or "stacked", "demo/data"
    if arm not in ARMS:
        raise ValueError(f"{arm!r} is not one of {', '.join(ARMS)}")
    c: Config = runpy.run_path(str(Path(__file__).with_name("demo.py")))["get_config"](folder)
    c.model.init_from = "runs/demo_base"
    facts = Source(path=f"{folder}/facts.jsonl", weight=4.0)  # with this weight, as many in an epoch as the skills
    skills = Source(path=f"{folder}/skills.jsonl", max_samples=4540)
    if arm == "stacked":
        c.data.phases = [Phase(name="stacked", num_steps=2 * STEPS, sources=[facts, skills])]
    else:
        c.data.phases = [
            Phase(name="facts", num_steps=STEPS, sources=[facts]),
            Phase(name="skills", num_steps=STEPS, sources=[skills], optimizer="reset", schedule="restart"),
        ]
    c.optim.osft_rank_ratio = RATIO if arm == "phased_osft" else 0.0
    c.optim.learning_rate = 2e-3
    c.data.validation = [Source(path=f"{folder}/{n}.heldout.jsonl", name=n) for n in ("facts", "skills", "formats")]
    c.eval.retain, c.eval.exact_match = ["formats"], True
    c.eval.at_shares = [0.5]  # the end of the first phase
    return c
