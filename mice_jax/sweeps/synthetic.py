"""Synthetic sweeps that are built to mislead a rule over sweeps.

Each is a grid of three batch sizes and six learning rates with six seeds and twenty evaluations, like the stored sweeps
of a toy network (tests/data/lab_curves/), whose gain, widths of valleys and seed noise they imitate.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mice_jax.sweeps.stored_sweeps import StoredSweep

BATCH_SIZES = (16, 64, 256)
RATES = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)
SEEDS, POINTS = 6, 20
START = 3.0  # the metric before the first step
EARLY = POINTS // 5 - 1  # the evaluation at 20 % of the run, where leaders are looked for
SHAPE = (len(BATCH_SIZES), len(RATES))


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """The noise-free metric of each arm.

    Attributes:
        early: What the ranking early in the run adds to the metric, float64 [batch, rate]; it fades out to the end.
        final: The metric at the end, float64 [batch, rate].
    """

    early: np.ndarray
    final: np.ndarray


def sweeps(per_kind: int, seed: int = 0) -> list[StoredSweep]:
    """Returns synthetic sweeps, the same number of each kind.

    Args:
        per_kind: How many of each kind.
        seed: The seed of their random numbers.
    """
    made = []
    for number, (kind, draw) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, number])
        made += [_sweep(f"{kind} {i}", kind, draw, rng) for i in range(per_kind)]
    return made


def _sweep(
    name: str, kind: str, draw: Callable[[np.random.Generator], Surfaces], rng: np.random.Generator
) -> StoredSweep:
    while True:
        means = _means(draw(rng), rng)
        if _misleads(kind, means):
            break
    curves = means + _noise(rng)
    if kind == "diverging":
        curves = _diverge(curves, rng)
    rates = [f"{rate:g}" for rate in RATES] if kind == "names" else list(RATES)
    axes = {"optim.batch_size": list(BATCH_SIZES), "optim.learning_rate": rates}
    loss = curves + 0.01 * rng.normal(size=curves.shape)
    # Norms grow with the rate and shrink while the loss falls, as in the toy network.
    norm = (0.5 + 0.1 * np.arange(len(RATES)))[:, None] * (0.5 + curves / START) * rng.lognormal(0, 0.1, curves.shape)
    return StoredSweep(name, curves, axes, START, {"loss": loss, "grad_norm": norm, "grad_sq_corrected": norm**2}, kind)


def _means(surfaces: Surfaces, rng: np.random.Generator) -> np.ndarray:
    """Returns the noise-free curves [batch, rate, point]: from the start to the final value, past the early ranking."""
    t = np.arange(1, POINTS + 1) / POINTS
    progress = 1 - (1 - t) ** rng.uniform(2, 4)
    fading = (1 - t) ** rng.uniform(0.7, 2)
    final = surfaces.final[..., None]
    return START - (START - final) * progress + surfaces.early[..., None] * fading


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Returns the noise of seeds [seed, batch, rate, point]: smooth over a run, and in part common to all arms."""
    scale = rng.uniform(0.005, 0.03)
    common = rng.uniform(0.2, 0.7)  # the correlation of arms with the same seed, as measured in the toy network
    own = _smooth(rng.normal(size=(SEEDS, *SHAPE, POINTS)))
    shared = _smooth(rng.normal(size=(SEEDS, 1, 1, POINTS)))
    return scale * (np.sqrt(common) * shared + np.sqrt(1 - common) * own)


def _smooth(white: np.ndarray, memory: float = 0.8) -> np.ndarray:
    """Returns an autoregressive process of unit variance over the last dim, from white noise."""
    smooth = white.copy()
    for i in range(1, white.shape[-1]):
        smooth[..., i] = memory * smooth[..., i - 1] + np.sqrt(1 - memory**2) * white[..., i]
    return smooth


def _misleads(kind: str, means: np.ndarray) -> bool:
    """Returns whether noise-free curves have what their kind promises."""
    leader = np.unravel_index(np.argmin(means[..., EARLY]), SHAPE)
    winner = np.unravel_index(np.argmin(means[..., -1]), SHAPE)
    if kind in ("crossing", "two valleys"):
        return leader[1] != winner[1]
    if kind == "batch crossing":
        return leader[0] != winner[0]
    return True


# ---------------------------------------------------------------------------------------- surfaces
def _valley(centres: np.ndarray, width: float) -> np.ndarray:
    """Returns a valley over the rates [batch, rate] around each batch size's own centre, 0 at its bottom.

    It is a parabola near the bottom and a straight line far from it, as loss over the logarithm of the rate is.
    """
    distance = (np.arange(len(RATES)) - centres[:, None]) / width
    return np.sqrt(1 + distance**2) - 1


def _centres(rng: np.random.Generator, low: float = 0.5, high: float = 4.5) -> np.ndarray:
    """Returns the best rate of each batch size [batch] in steps of the axis; it grows with the batch size."""
    return rng.uniform(low, high) + rng.uniform(0, 0.8) * (np.arange(len(BATCH_SIZES)) - 1)


def _final(rng: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    by_batch = rng.uniform(0, 0.08) * np.arange(len(BATCH_SIZES))
    ordered = by_batch if rng.random() < 0.7 else by_batch[::-1]
    return rng.uniform(1.7, 2.2) + ordered[:, None] + rng.uniform(0.05, 0.3) * _valley(centres, rng.uniform(1, 2))


def _crossing(rng: np.random.Generator) -> Surfaces:
    """The rate that leads early is one to three steps from the one that wins."""
    centres = _centres(rng)
    shifted = centres + rng.choice([-1, 1]) * rng.uniform(1, 3)
    return Surfaces(rng.uniform(0.1, 0.5) * _valley(shifted, rng.uniform(1, 2)), _final(rng, centres))


def _batch_crossing(rng: np.random.Generator) -> Surfaces:
    """The batch size that leads early, by its many updates, is not the one that wins."""
    centres = _centres(rng)
    final = rng.uniform(1.7, 2.2) + rng.uniform(0.02, 0.1) * np.arange(len(BATCH_SIZES))[::-1, None]
    final = final + rng.uniform(0.05, 0.3) * _valley(centres, rng.uniform(1, 2))
    early = rng.uniform(0.05, 0.4) * np.arange(len(BATCH_SIZES))[:, None] + 0.1 * _valley(centres, 2)
    return Surfaces(early, final)


def _plateau(rng: np.random.Generator) -> Surfaces:
    """Many arms end almost alike, so that noise ranks them."""
    final = rng.uniform(1.7, 2.2) + 0.2 * np.maximum(_valley(_centres(rng), 1) - 1, 0) + rng.uniform(0, 0.01, SHAPE)
    return Surfaces(rng.uniform(0.1, 0.4) * _valley(_centres(rng), 1.5), final)


def _two_valleys(rng: np.random.Generator) -> Surfaces:
    """The final metric has two valleys over the rates, and the early leader is in the worse one."""
    low, high = _centres(rng, 0.3, 1), _centres(rng, 3.8, 4.7)
    worse, better = (low, high) if rng.random() < 0.5 else (high, low)
    width, depth = rng.uniform(0.7, 1.2), rng.uniform(0.1, 0.3)
    final = np.minimum(depth * _valley(better, width), depth * _valley(worse, width) + rng.uniform(0.01, 0.06))
    by_batch = rng.uniform(0, 0.08) * np.arange(len(BATCH_SIZES))[:, None]
    return Surfaces(rng.uniform(0.05, 0.3) * _valley(worse, 1.5), rng.uniform(1.7, 2.2) + by_batch + final)


def _unordered(rng: np.random.Generator) -> Surfaces:
    """The numbers of an axis have no order, so that neighbours say nothing about one another."""
    order = rng.permutation(len(RATES))
    crossing = _crossing(rng)
    return Surfaces(crossing.early[:, order], crossing.final[:, order])


def _diverge(curves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns curves of which the highest rates diverge, at random times, and some arm with some seeds."""
    first = int(rng.integers(3, len(RATES)))
    time = rng.integers(0, POINTS, curves.shape[:-1])
    never = np.arange(len(RATES)) < first
    sometimes = (np.arange(len(RATES)) == first - 1) & (rng.random(curves.shape[:-1]) < 0.2)
    time = np.where(never & ~sometimes, POINTS, time)
    return np.where(np.arange(POINTS) >= time[..., None], np.nan, curves)


KINDS: dict[str, Callable[[np.random.Generator], Surfaces]] = {
    "crossing": _crossing,
    "batch crossing": _batch_crossing,
    "plateau": _plateau,
    "diverging": _crossing,
    "names": _unordered,  # the values of the unordered axis are texts, so that no rule takes them as ordered
    "two valleys": _two_valleys,
    "unordered numbers": _unordered,
}
# What BracketRule assumes (one valley, numbers that have an order) does not hold in these.
BROKEN_ASSUMPTIONS = ("two valleys", "unordered numbers")
