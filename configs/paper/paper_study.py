"""What the study's experiments share: models, data, recipes (arXiv 2412.13337), and the parser of a config's argument.

Facts are the paper's own unless a comment says otherwise. These were not recovered: its maximum length, hardware, exact
checkpoints, the number of epochs of TULU, and the warm-up and batch size of TULU++ (128 is inferred). The maximum
length of 4096 tokens is the limit in the example of the authors' own code.

Data: data/paper/phase00.jsonl (instruction following, 308,343 samples), phase05.jsonl (foundational knowledge,
231,178), phase10.jsonl (complex skills, 285,966): 825,487 together. They are not published; put your own data there.
Models: Hugging Face folders models/<name>. paper_models.py lists them with their meshes and TPUs.
"""

import dataclasses
from collections.abc import Mapping

from mice_jax.config import Config, ConfigError, Phase, Published, Source, nearest
from paper_models import FSDP, MODELS

RECIPES = ("lab", "tulu", "tulu++")
BATCHES = (128, 3840, 7680)
RATES = (1e-6, 5e-6, 2e-5, 3e-5, 4e-5, 6e-5, 8e-5, 1e-4)
WARMUPS = (0, 25, 100)
PHASES = ("phase00", "phase05", "phase10")


def options(arg: str, **defaults: str) -> dict[str, str]:
    """Parses `model=mistral-7b,batch=128` over the defaults; every config accepts model, data and models."""
    known = {"model": "granite-7b", "data": "data/paper", "models": "models"} | defaults
    for part in filter(None, arg.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(f"the config's argument has {name!r}{nearest(name, known)}")
        known[name] = value
    return known


def choice(given: dict[str, str], name: str, allowed: tuple) -> str:
    """Returns an option that must be one of `allowed`; raises ConfigError for any other value."""
    if given[name] not in map(str, allowed):
        raise ConfigError(f"{name}={given[name]} of the config's argument is not one of {', '.join(map(str, allowed))}")
    return given[name]


def sources(given: dict[str, str], names: tuple[str, ...] = PHASES, half: str = "") -> list[Source]:
    return [Source(path=f"{given['data']}/{n}.jsonl", name=f"{n}_{half}" if half else n, half=half) for n in names]


def published(numbers: Mapping[str, float | dict], where: str = "") -> list[Published]:
    """Returns the study's numbers by metric, for the report; a dict holds one number for each value of `where`."""
    found = []
    for metric, value in numbers.items():
        cases = {f"{where}={at}": v for at, v in value.items()} if isinstance(value, dict) else {where: value}
        found += [Published(metric, v, case) for case, v in cases.items()]
    return found


def recipe(given: dict[str, str], name: str) -> Config:
    """Returns a recipe of the study on a model, with all data stacked.

    lab: batch 3,840, 2e-5 (Mistral 1e-6), constant after a warm-up of 25 steps, 10 epochs.
    tulu: batch 128, 2e-5, linear decay, warm-up ratio 0.03; its epochs are unknown, 2 are those of the Tulu paper.
    tulu++: 3e-5 without decay, 4 epochs; its batch is taken as 128; its warm-up is unknown, none here.
    """
    model = choice(given, "model", MODELS)
    c = Config()
    c.model.init_from = f"{given['models']}/{model}"
    c.mesh = dataclasses.replace(FSDP)
    c.data.max_length = 4096
    c.data.validation_fraction = 0.002
    o = c.optim
    if name == "lab":
        o.batch_size, o.learning_rate, o.warmup_steps, epochs = 3840, 2e-5, 25, 10.0
        o.learning_rate = 1e-6 if model == "mistral-7b" else 2e-5
    elif name == "tulu":
        o.batch_size, o.learning_rate, o.schedule, o.warmup_ratio, epochs = 128, 2e-5, "linear", 0.03, 2.0
    else:
        o.batch_size, o.learning_rate, epochs = 128, 3e-5, 4.0
    c.data.phases = [Phase(name="stacked", num_epochs=epochs, sources=sources(given))]
    c.checkpoint.every_samples = c.eval.every_samples = 250_000
    return c
