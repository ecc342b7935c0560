"""The base model of the study at mouse scale: a small Llama, from scratch on Python's documentation as plain text.

These documents leave out the entries that the held-out knowledge asks about.
Expected: a model that writes text that looks like documentation and answers no question.
Cost: under three minutes on two CPU cores, including the data.
Data: studies/mouse/run.py. Launch: mice train --config=studies/mouse/mouse_base.py --workdir=studies/mouse/runs/base
"""

from mice_jax.config import Config, Phase, Source
from mouse import FOLDER


def get_config(arg: str = FOLDER) -> Config:
    folder = arg or FOLDER
    c = Config()
    c.model.init_from = f"random:{folder}/data/init/config.json"
    c.model.compute_dtype = "float32"
    c.data.max_length = 1024
    documents = Source(path=f"{folder}/data/documents.jsonl")
    c.data.phases = [Phase(name="documents", num_epochs=3.0, sources=[documents])]
    c.data.validation_fraction = 0.02
    c.optim.batch_size = 32
    c.optim.learning_rate = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 20
    c.log.trackers = []
    c.log.every_steps = 20
    return c
