"""What a model starts from: a Hugging Face folder, a config.json alone, or another run.

A run's workdir keeps its own `model/` (config.json, tokenizer, chat template), so that it can be exported,
asked and started from without what it was started from.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mice_jax.checkpoint import Checkpoints, pick_step
from mice_jax.errors import UserError
from mice_jax.models import hf
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params

RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class Origin:
    """A place that parameters come from, read as far as its config.json."""

    kind: str  # hf | random | run
    folder: Path  # holds config.json and, by default, the tokenizer
    workdir: Path | None  # of a run
    step: int | None  # of one of its checkpoints, where that was named
    config: dict[str, Any]  # config.json
    spec: ModelSpec

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    def stored_dtype(self) -> str:
        """The dtype in which the weights that it goes back to are stored; float32 for a fresh model."""
        return hf.stored_dtype(self.folder) if self.kind == "hf" else self.config.get("dtype", "float32")


def find_origin(init_from: str) -> Origin:
    """Reads what `init_from` names; UserError where it is none of the three."""
    if init_from.startswith(RANDOM):
        file = Path(init_from.removeprefix(RANDOM))
        file = file / "config.json" if file.is_dir() else file
        config = hf.read_config(file) | {"dtype": "float32"}
        return Origin("random", file.parent, None, None, config, hf.spec_from_config(config, file))
    folder, step = Path(init_from), None
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not folder.is_dir():
        raise UserError(
            f"{init_from} is no folder: a model is given as a Hugging Face folder, a run's workdir (or one of its "
            "checkpoints/<step>), or random:path/to/config.json."
        )
    is_run = (folder / "checkpoints").is_dir()
    file = folder / "model" / "config.json" if is_run else folder / "config.json"
    config = hf.read_config(file)
    spec = hf.spec_from_config(config, file)
    if is_run:
        return Origin("run", file.parent, folder, step, config, spec)
    return Origin("hf", folder, None, None, config, spec)


def load_params(
    origin: Origin, decoder: Decoder, shardings: Params, *, seed: int = 0, step: int | None = None
) -> Params:
    """The origin's parameters in float32, laid out as asked; `step` picks among a run's checkpoints."""
    if origin.kind == "random":
        return jax.jit(decoder.init, out_shardings=shardings)(jax.random.key(seed))
    if origin.kind == "hf":
        return hf.load_params(origin.folder, decoder, origin.architecture, shardings)
    assert origin.workdir is not None
    checkpoints = Checkpoints(origin.workdir, read_only=True)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), decoder.abstract, shardings
    )
    params = checkpoints.restore_params(pick_step(checkpoints, origin.step if step is None else step), abstract)
    checkpoints.close()
    return params
