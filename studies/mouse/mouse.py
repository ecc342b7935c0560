"""What the study at mouse scale has in common: its data, its base model and the recipe that each sweep varies.

It asks the questions of arXiv 2412.13337 of a model of half a million weights, on the demo's three phases: 81 minutes
on two CPU cores that did other work too. The folder that the configs' argument names holds data/ and base/, which
`demo/mouse_study.py` makes before it runs the sweeps:
  python demo/mouse_study.py --workdir=demo/mouse

Every arm of a sweep sees each sample NUM_EPOCHS times, whatever its batch: so a large batch makes fewer updates, 132
of them at LARGE. A seed is an order of the samples; all runs start from the same base. No run is stopped, so that the
rules for stopping can be measured on them.
"""

from mice_jax.config import Config, Phase, Source

FOLDER = "demo/mouse"
PHASES = ("instructions", "knowledge", "skills")
NUM_EPOCHS = 2.0
SMALL, LARGE = 12, 96  # samples a step
SEEDS = [0, 1, 2]
EVERY_SAMPLES = 2_500  # held-out loss: five times a run


def sources(folder: str) -> list[Source]:
    return [Source(path=f"{folder}/data/{name}.jsonl") for name in PHASES]


def recipe(folder: str, batch_size: int = LARGE, learning_rate: float = 3e-3) -> Config:
    """Stacked data, a constant rate without warm-up."""
    c = Config()
    c.model.init_from = f"{folder}/base"
    c.model.compute_dtype = "float32"
    c.data.max_length = 1024
    c.data.phases = [Phase(name="stacked", num_epochs=NUM_EPOCHS, sources=sources(folder))]
    c.data.validation = [Source(path=f"{folder}/data/{name}.heldout.jsonl", name=name) for name in PHASES]
    c.optim.batch_size = batch_size
    c.optim.learning_rate = learning_rate
    c.checkpoint.every_samples = c.eval.every_samples = EVERY_SAMPLES
    c.stop.steps = 0
    c.log.trackers = []
    c.log.every_steps = 20
    return c
