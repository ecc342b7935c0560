"""The cost of a run, computed from its config and data before it starts."""

import dataclasses

import numpy as np

from mice_jax.config import Config
from mice_jax.hardware import CHIPS, train_flops
from mice_jax.model_source import resolve_source
from mice_jax.training import build

SAMPLED_STEPS = 64  # the cost is extrapolated from this many steps, which are spread evenly over the run
ASSUMED_MFU = 0.4  # model FLOPs utilisation that `h100_hours` assumes


@dataclasses.dataclass(frozen=True)
class Cost:
    """Steps, samples, tokens and FLOPs of one run or of several."""

    steps: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0  # FLOPs of the model, without recomputation

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def h100_hours(self) -> float:
        """Returns the hours that one H100 takes at ASSUMED_MFU."""
        return self.flops / (ASSUMED_MFU * CHIPS["h100"].peak_flops) / 3600


def open_data(config: Config) -> build.RunData:
    """Opens a run's data, and builds the token stores that do not exist yet; the run will use them too."""
    inputs = build.inputs(config, weights=False)
    return build.data(config, build.encoder(config, inputs.tokenizer))


def run_cost(config: Config) -> Cost:
    """Computes the steps, samples, tokens and model FLOPs of a run from a sample of its steps, spread evenly."""
    data = open_data(config)
    sampled = np.unique(np.linspace(0, data.total_steps - 1, min(data.total_steps, SAMPLED_STEPS)).astype(int))
    lengths = [data.dataset.corpus.lengths[data.mixture.step(int(i)).samples] for i in sampled]
    scale = data.total_steps / len(lengths)
    spec = resolve_source(config.model.init_from, weights=False).spec
    flops = sum(train_flops(spec, n) for n in lengths)
    return Cost(
        steps=data.total_steps,
        samples=scale * sum(map(len, lengths)),
        tokens=scale * sum(float(n.sum()) for n in lengths),
        flops=scale * flops,
    )
