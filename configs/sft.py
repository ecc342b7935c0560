"""Fine-tune a 1B to 3B checkpoint on your own chats: the config to copy. docs/tutorial.md walks through it.

What it tests: nothing yet. Replace this docstring with the question that your run answers and the result you expect.
Data: data/chats.jsonl, one conversation per line. Model: one of the Hub, which the first run fetches, or a folder.
Memory: 16 bytes per parameter for weights, moments and gradients (25 GB for 1.5B parameters), and activations.
Check yours: mice plan --config=configs/sft.py --topology=h100:1
Launch:      mice train --config=configs/sft.py --workdir=runs/sft
"""

from mice_jax.config import Config, Phase, Source


def get_config(arg: str = "") -> Config:
    c = Config()

    # The model. "chatml" is the template of Qwen and many others; "" takes the tokenizer's own, if it has one.
    c.model.init_from = arg or "Qwen/Qwen2.5-1.5B"
    c.data.chat_template = "chatml"

    # The data. Samples longer than max_length are dropped and counted.
    c.data.max_length = 4096
    c.data.phases = [Phase(name="chats", num_epochs=3.0, sources=[Source(path="data/chats.jsonl")])]
    c.data.validation_fraction = 0.05

    # The optimizer. A step is exactly batch_size samples, accumulated over as many microbatches as it takes.
    c.optim.batch_size = 128
    c.optim.learning_rate = 2e-5
    c.optim.warmup_ratio = 0.03

    # Held-out loss and checkpoints, in samples, so that runs of different batch sizes compare.
    c.eval.every_samples = 5_000
    c.checkpoint.every_samples = 10_000
    c.checkpoint.keep_last = 1
    c.checkpoint.keep_best = 1
    return c
