"""The demo: train a small Llama from scratch on chat data made from Python's own documentation, stacked.

What it tests: the whole path on real input.
Expected: the held-out loss falls from 5.8 after one epoch to about 4.5, and about a third of the held-out skills are
answered right word for word. Every sample has the same weight, because answers of skills have two or three tokens and
those of knowledge up to 800.
Cost: about three minutes on two CPU cores.
Data: demo/make_data.py.
Launch: make demo
"""

from mice_jax.config import Config, Phase, Source

PHASES = ("instructions", "knowledge", "skills")


def get_config(arg: str = "demo/data") -> Config:
    folder = arg or "demo/data"
    c = Config()
    c.model.init_from = f"random:{folder}/init/config.json"
    c.data.max_length = 1024
    sources = [Source(path=f"{folder}/{name}.jsonl") for name in PHASES]
    c.data.phases = [Phase(name="stacked", num_epochs=5.0, sources=sources)]
    c.data.validation = [Source(path=f"{folder}/{name}.heldout.jsonl", name=name) for name in PHASES]
    c.optim.batch_size = 64
    c.optim.learning_rate = 3e-3
    c.optim.loss_reduction = "sample"
    c.checkpoint.every_samples = 20_000
    c.eval.every_samples = 6_000
    c.log.every_steps = 20
    return c
