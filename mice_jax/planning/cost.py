"""What a run would cost, from its config and its data, before any of it is run."""

import dataclasses

import numpy as np

from mice_jax.config import Config
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.mixture import Mixture
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.hardware import CHIPS, train_flops
from mice_jax.model_source import resolve_source

SAMPLED_STEPS = 64  # steps, evenly over the run, that stand for all of them
ASSUMED_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Cost:
    steps: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0  # of the model, recomputation not counted

    def __add__(self, other: "Cost") -> "Cost":
        mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, its, strict=True)))

    def h100_hours(self) -> float:
        return self.flops / (ASSUMED_MFU * CHIPS["h100"].peak_flops) / 3600


def open_data(config: Config) -> tuple[Dataset, Mixture, int]:
    """A run's data, and its steps and their number.

    Builds the token stores where there are none yet: they are those that the run will use.
    """
    origin = resolve_source(config.model.init_from)
    tokenizer = load_tokenizer(config.data.tokenizer or str(origin.folder), config.data.chat_template)
    data = build_dataset(config.data, ChatEncoder(tokenizer, train_on=config.data.train_on))
    o = config.optim
    mixture = Mixture(data.phases, batch_size=o.batch_size, seed=config.seed, drop_remainder=config.data.drop_remainder)
    return data, mixture, min(len(mixture), o.max_steps or len(mixture))


def run_cost(config: Config) -> Cost:
    data, mixture, steps = open_data(config)
    looked = np.unique(np.linspace(0, steps - 1, min(steps, SAMPLED_STEPS)).astype(int))
    lengths = [data.corpus.lengths[mixture.step(int(i)).samples] for i in looked]
    share = steps / len(lengths)
    spec = resolve_source(config.model.init_from).spec
    flops = sum(train_flops(spec, n) for n in lengths)
    return Cost(steps, share * sum(map(len, lengths)), share * sum(float(n.sum()) for n in lengths), share * flops)
