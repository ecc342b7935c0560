"""Full fine-tuning against LoRA at a small and a large batch, each at several learning rates.

What it tests: whether the better of the two depends on the batch size, which is said to explain why papers disagree
(arXiv 2602.09492): adapters are to keep up at small batches and to fall behind at large ones, where steps are few.
Each arm sees the same samples. Compare the best learning rate of each arm, since adapters take a higher one; a best
rate at an end of the list means that the list is too short.
Read: eval/skills/loss in results.csv is what is learned; eval/kept in each metrics.jsonl is the share that is kept of
the lists that the base was trained on.
Measured, one seed, each at its best rate: at batch 16 (256 steps) full fine-tuning has 0.91 of the tasks right and
keeps 0.09 of the lists, adapters 0.44 and 0.15; at batch 128 (32 steps) 0.46 and none, adapters 0.24 and none, at the
end of their list of rates. So adapters are behind at both batch sizes here. At the lowest rate and batch 128 they keep
0.99 of the lists, and learn 0.11 of the tasks.
Cost: about eight CPU minutes for all twelve trials.
Data and model: runs/demo_base of configs/demo_base.py, trained further on the demo's small tasks.
Launch: mice sweep --config=configs/full_or_lora.py --workdir=runs/full_or_lora
"""

import runpy
from pathlib import Path

from mice_jax.config import Config, Phase, Source, Sweep

SAMPLES = 4096
RANK = 8
BATCHES = [16, 128]
RATES = [1e-3, 3e-3, 1e-2]


def get_config(arg: str = "runs/demo_base") -> Config:
    folder = "demo/data"
    c: Config = runpy.run_path(str(Path(__file__).with_name("demo.py")))["get_config"](folder)
    c.model.init_from = arg or "runs/demo_base"
    skills = Source(path=f"{folder}/skills.jsonl", max_samples=SAMPLES)
    c.data.phases = [Phase(name="skills", num_epochs=1.0, sources=[skills])]
    c.data.validation = [Source(path=f"{folder}/{n}.heldout.jsonl", name=n) for n in ("skills", "formats")]
    c.eval.retain, c.eval.exact_match = ["formats"], True
    c.optim.warmup_steps, c.optim.warmup_ratio = 0, 0.1  # in samples, it is as long at every batch size
    return c


def get_sweep(arg: str = "runs/demo_base") -> Sweep:
    axes = {"model.lora.rank": [0, RANK], "optim.batch_size": BATCHES, "optim.learning_rate": RATES}
    return Sweep(base=get_config(arg), axes=axes, metric="eval/skills/loss", stop=None)
