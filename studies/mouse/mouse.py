"""Data, base model and recipe that the sweeps of the study at mouse scale share.

The study asks the questions of arXiv 2412.13337 of a model of half a million weights, on three phases of chats. It
takes 81 minutes on two busy CPU cores. The configs' argument names the folder that holds data/ and base/, which
studies/mouse/run.py makes before it runs the sweeps:
  python studies/mouse/run.py --workdir=studies/mouse/runs

Every arm of a sweep sees each sample NUM_EPOCHS times, whatever its batch size, so a large batch makes fewer updates:
132 at LARGE. A seed is an order of the samples; all runs start from the same base. No run is stopped, so that stop
rules can be evaluated on the runs.
"""

from mice_jax.config import Config, Phase, Source

FOLDER = "studies/mouse/runs"
PHASES = ("instructions", "knowledge", "skills")
NUM_EPOCHS = 2.0
SMALL, LARGE = 12, 96  # samples a step
SEEDS = [0, 1, 2]
EVERY_SAMPLES = 2_500  # between two evaluations of the held-out loss, five a run


def sources(folder: str) -> list[Source]:
    """Returns the training data of each phase."""
    return [Source(path=f"{folder}/data/{name}.jsonl") for name in PHASES]


def recipe(folder: str, batch_size: int = LARGE, learning_rate: float = 3e-3) -> Config:
    """Returns the config of a run on stacked data, with a constant learning rate and no warm-up."""
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
