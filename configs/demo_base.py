"""The base of the demo's ablations: the demo's model, trained on lists in other forms alone.

What it tests: nothing by itself. `configs/full_or_lora.py` and `configs/stacked_phased_osft.py` start from this run,
teach it something else, and measure what is left of the lists.
Expected: nearly all held-out lists right (eval/exact_match).
Cost: about two minutes of two cores.
Data: that of the demo; `make demo` makes it, and so does `python demo/make_data.py demo/data`.
Launch: mice train --config=configs/demo_base.py --workdir=runs/demo_base
"""

import runpy
from pathlib import Path

from mice_jax.config import Config, Phase, Source

STEPS = 300
BASE = "formats"


def get_config(arg: str = "demo/data") -> Config:
    folder = arg or "demo/data"
    c: Config = runpy.run_path(str(Path(__file__).with_name("demo.py")))["get_config"](folder)
    c.data.phases = [Phase(name=BASE, num_steps=STEPS, sources=[Source(path=f"{folder}/{BASE}.jsonl")])]
    c.data.validation = [Source(path=f"{folder}/{BASE}.heldout.jsonl", name=BASE)]
    c.eval.exact_match = True
    return c
