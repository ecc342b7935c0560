"""The recipe that all sweeps of the study share, and how much of it a sitting of the smallest size runs.

Every run starts from a base model that knows an old world, sees each of 8,190 samples twice, and is scored by
greedy exact match on what it was to learn (formats, knowledge, skills) and on what it knew before (eval.retain). The
learning rate belongs to 128 samples and follows the batch size by its square root; Adam's second moment remembers
equally many samples at every batch size. The weights are averaged with a half-life of 5 % of a run, so that a constant
rate is read without its noise floor too.
"""

import csv
import statistics
from pathlib import Path
from typing import NamedTuple

from mice_jax.config import Config, Phase, Source
from mice_jax.errors import UserError

FOLDER = "studies/recall/runs"
PHASES = ("formats", "knowledge", "skills")  # what runs are to learn
OLD = ("old_facts", "old_sums", "old_strings")  # what the base model knows
NUM_EPOCHS = 2.0
METRIC = "eval/average/macro_loss"  # of the averaged weights, over what is to be learned
RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]  # at RATE_BATCH_SIZE samples a step
RATE_BATCH_SIZE = 128
BETA2_HALF_LIFE = 1_728.0  # samples: 0.95 at 128
SEEDS = [0, 1, 2, 3, 4, 5, 6]  # the first two choose rates, the five others compare


class Size(NamedTuple):
    """How much there is of the world."""

    facts: int  # old ones, and as many new ones
    drawn: int  # samples of each kind that are drawn anew: strings and sums
    phase: int  # samples of each phase of fine-tuning
    held_out: int  # of each source


SIZES = {"study": Size(300, 12_000, 2_730, 120), "smoke": Size(8, 60, 40, 6)}


class Scale(NamedTuple):
    """How much of each sweep is run."""

    batch_sizes: list[int]
    rates: list[float]
    probe_seeds: list[int]
    seeds: list[int]
    base_epochs: float
    claims: bool


SCALES = {
    "study": Scale([8, 32, 128, 512], RATES, SEEDS[:3], SEEDS, 6.0, True),
    "smoke": Scale([8, 512], RATES[2:5], [0], [0], 1.0, False),
}


def scale_of(folder: str) -> Scale:
    """Returns the scale that run.py wrote when the study began."""
    file = Path(folder) / "scale.txt"
    return SCALES[file.read_text().strip() if file.exists() else "study"]


def claims_of(folder: str, name: str) -> str:
    return f"{name}.toml" if scale_of(folder).claims else "none"


def sources(folder: str) -> list[Source]:
    return [Source(path=f"{folder}/data/{name}.jsonl") for name in PHASES]


def held_out(folder: str, names: tuple[str, ...]) -> list[Source]:
    return [Source(path=f"{folder}/data/{name}.heldout.jsonl", name=name) for name in names]


def recipe(folder: str, batch_size: int = 32, learning_rate: float = 1e-3) -> Config:
    """Returns the config of a run on stacked data at a constant rate."""
    c = Config()
    c.model.init_from = f"{folder}/base"
    c.model.compute_dtype = "float32"
    c.data.max_length = 256
    c.data.phases = [Phase(name="stacked", num_epochs=NUM_EPOCHS, sources=sources(folder))]
    c.data.validation = held_out(folder, (*PHASES, *OLD))
    c.optim.batch_size, c.optim.learning_rate = batch_size, learning_rate
    c.optim.rate_for_batch, c.optim.rate_batch_size = "sqrt", RATE_BATCH_SIZE
    c.optim.beta2_half_life = BETA2_HALF_LIFE
    c.train.ema_half_life = 819.0
    c.eval.retain, c.eval.exact_match = list(OLD), True
    c.eval.at_shares = [0.1, 0.2, 0.5, 0.7]
    c.checkpoint.every_samples, c.checkpoint.keep_last = 0, 1
    c.stop.steps = 0
    c.log.trackers, c.log.every_steps = [], 100
    return c


def best_rates(folder: str) -> dict[int, float]:
    """Returns the best finished rate of each batch size in the batch sweep, at RATE_BATCH_SIZE samples."""
    file = Path(folder) / "batch" / "results.csv"
    found: dict[tuple[int, float], list[float]] = {}
    for row in csv.DictReader(file.read_text().splitlines() if file.exists() else []):
        if row["status"] == "completed":
            arm = int(row["optim.batch_size"]), float(row["optim.learning_rate"])
            found.setdefault(arm, []).append(float(row["metric"]))
    best: dict[int, float] = {}
    for batch_size in {b for b, _ in found}:
        of_batch = {rate: statistics.fmean(values) for (b, rate), values in found.items() if b == batch_size}
        best[batch_size] = min(of_batch, key=lambda rate: of_batch[rate])
    if not best:
        raise UserError(f"{file} has no finished run. Run the batch sweep first, as studies/recall/run.py does.")
    return best
