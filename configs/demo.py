"""The demo: train a small Llama from scratch on three kinds of chats, stacked.

What it tests: the whole path on real input.
Expected, to the letter: 150 of 150 held-out lists (133 once), 225 to 227 of 227 facts in new words, 295 to 298 of 300
tasks.
Cost: 85 to 250 CPU seconds, including everything else that demo/demo.py does.
Data: demo/make_data.py. A fact is trained in five wordings and drawn seven times an epoch, since there are few of them.
Launch: make demo
"""

from mice_jax.config import Config, Phase, Source

EPOCH_WEIGHTS = {"formats": 1.0, "facts": 7.0, "skills": 1.0}


def get_config(arg: str = "demo/data") -> Config:
    folder = arg or "demo/data"
    c = Config()
    c.model.init_from = f"random:{folder}/init/config.json"
    # One short row at a time is the only shape of a microbatch, so that XLA compiles one program instead of six. The
    # reference attention compiles faster than the blockwise one, and is as fast where rows are this short.
    c.model.attention = "reference"
    c.model.remat = "none"
    c.data.max_length = 128
    c.data.prepare_workers = 1  # a second process would take longer to start than to tokenise so little
    c.train.rows_per_device = 1
    sources = [Source(path=f"{folder}/{name}.jsonl", weight=weight) for name, weight in EPOCH_WEIGHTS.items()]
    c.data.phases = [Phase(name="stacked", num_epochs=1.0, sources=sources)]
    c.data.validation = [Source(path=f"{folder}/{name}.heldout.jsonl", name=name) for name in EPOCH_WEIGHTS]
    # Small batches: when a small model learns to copy words depends on the steps more than on the samples.
    c.optim.batch_size = 16
    c.optim.learning_rate = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 50
    c.log.every_steps = 25
    return c
