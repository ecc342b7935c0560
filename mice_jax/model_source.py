"""What a model starts from: a Hugging Face folder, a config.json alone, or another run.

A run's workdir keeps its own `model/` (config.json, tokenizer, chat template), so that it can be exported,
asked and started from without what it was started from.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from mice_jax.checkpoint import CheckpointReader
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import file_digests
from mice_jax.errors import UserError
from mice_jax.inference.generation_config import GenerationDefaults, read_generation_config, stop_ids_in
from mice_jax.models import hf
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params, make_decoder
from mice_jax.runtime.precision import set_float32_matmul_precision
from mice_jax.sharding import param_shardings
from mice_jax.storage import manifest
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.paths import RunPath, download_small_files, parse_path

RANDOM = "random:"
DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A place that parameters come from, read as far as its config.json."""

    kind: str  # hf | random | run
    folder: Path  # holds config.json and, by default, the tokenizer
    workdir: RunPath | None  # of a run
    step: int | None  # of one of its checkpoints, where that was named
    config: dict[str, Any]  # config.json
    spec: ModelSpec

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    def stored_dtype(self) -> str:
        """The dtype in which the weights that it goes back to are stored; float32 for a fresh model."""
        return hf.stored_dtype(self.folder) if self.kind == "hf" else self.config.get("dtype", "float32")


def resolve_source(init_from: str) -> ModelSource:
    """Reads what `init_from` names; UserError where it is none of the three."""
    if init_from.startswith(RANDOM):
        file = Path(init_from.removeprefix(RANDOM))
        file = file / "config.json" if file.is_dir() else file
        config = hf.read_config(file) | {"dtype": "float32"}
        return ModelSource("random", file.parent, None, None, config, hf.spec_from_config(config, file))
    folder, step = parse_path(init_from), None
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not folder.is_dir():
        raise UserError(
            f"{init_from} is no folder: a model is given as a Hugging Face folder, a run's workdir (or one of its "
            "checkpoints/<step>), or random:path/to/config.json."
        )
    if (folder / "checkpoints").is_dir():
        file = (folder if isinstance(folder, Path) else download_small_files(folder)) / "model" / "config.json"
        config = hf.read_config(file)
        return ModelSource("run", file.parent, folder, step, config, hf.spec_from_config(config, file))
    if not isinstance(folder, Path):
        raise UserError(f"{init_from} is no run's folder; a Hugging Face folder has to lie on disk: copy it here.")
    config = hf.read_config(folder / "config.json")
    return ModelSource("hf", folder, None, None, config, hf.spec_from_config(config, folder / "config.json"))


def resolve_model(model: str, step: int | None) -> ModelSource:
    """What --model and --step name, which must have weights; UserError where they do not."""
    if model.startswith(RANDOM):
        raise UserError(f"--model={model}: random weights have nothing to say. Give a folder with weights.")
    try:
        source = resolve_source(model)
    except UserError as e:
        raise UserError(f"--model: {e}") from None
    if step is not None and source.kind != "run":
        raise UserError(f"--step={step} is for a run's folder; --model={model} is a Hugging Face folder.")
    return source


def compute_dtype(name: str) -> Any:
    """What --compute_dtype says, in which this process then multiplies; auto is float32 on a CPU, else bfloat16."""
    if name not in DTYPES:
        raise UserError(f"--compute_dtype={name} is not one of {', '.join(DTYPES)}.")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    set_float32_matmul_precision(name, jax.default_backend())
    return jnp.dtype(name)


def stop_ids(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer of a model that a run trained: the token that ends a turn, and what its config.json has."""
    turn = ChatEncoder(tokenizer).stop_ids() if tokenizer.chat_template else []
    return list(dict.fromkeys([*turn, *stop_ids_in(config)]))


def generation_config_of(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> GenerationDefaults:
    """How an source's model is to answer: as its folder says, or as the export of a run would say."""
    if source.kind == "run":
        return GenerationDefaults(tuple(stop_ids(source.config, tokenizer)))
    return read_generation_config(source.folder, source.config)


def resolve_step(source: ModelSource, asked: int | None) -> int | None:
    """The checkpoint of a run that is asked for, or else that its path names, or the newest; None of a folder of HF's.

    Raises UserError where it is not there.
    """
    if source.workdir is None:
        return None
    checkpoints = CheckpointReader(source.workdir)
    step = checkpoints.resolve_step(source.step if asked is None else asked)
    checkpoints.close()
    return step


def fingerprint(source: ModelSource, step: int | None) -> str:
    """Of a model's weights, config and tokenizer, by their content; `step` is a run's."""
    own = [p for p in sorted(source.folder.iterdir()) if p.is_file()]
    digests = file_digests(own, cache_folder(""))
    files: dict[str, Any] = {p.name: d.hex() for p, d in zip(own, digests, strict=True)}
    if source.workdir is not None:
        files["checkpoint"] = manifest.fingerprint(source.workdir / "checkpoints" / str(step))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def with_vocabulary(source: ModelSource, ids: dict[str, int], added: Collection[str]) -> ModelSpec:
    """The source's spec with an embedding row for each of a tokenizer's ids.

    Rows beyond the ids, which many models have, stay. Rows that are lacking are added where it is added tokens that
    lack them; a tokenizer whose own vocabulary is larger than the model's belongs to another model: UserError.
    """
    rows = source.spec.vocab_size
    own = max((i for token, i in ids.items() if token not in added), default=-1)
    if own >= rows:
        raise UserError(
            f"the tokenizer's ids go up to {own}, but the model's vocabulary in {source.folder / 'config.json'} has "
            f"{rows} rows. Give the tokenizer that belongs to the model (data.tokenizer)."
        )
    return dataclasses.replace(source.spec, vocab_size=max(rows, *(i + 1 for i in ids.values())))


def check_vocabulary(source: ModelSource, ids: dict[str, int]) -> None:
    """UserError where a tokenizer has an id for which the source has no embedding."""
    token = max(ids, key=lambda token: ids[token])
    if ids[token] >= source.spec.vocab_size:
        raise UserError(
            f"the tokenizer's id {ids[token]} ({token!r}) has no embedding: the model's vocabulary in "
            f"{source.folder / 'config.json'} has {source.spec.vocab_size} rows. Give the tokenizer that belongs to "
            "the model, or train it with this one, which adds the rows."
        )


def load_params(
    source: ModelSource, decoder: Decoder, shardings: Params, *, seed: int = 0, step: int | None = None
) -> Params:
    """The source's parameters in float32, laid out as asked; `step` picks among a run's checkpoints.

    Where the decoder has embedding rows that the source lacks, each is the mean of those there are.
    """
    if source.kind == "random":
        return jax.jit(decoder.init, out_shardings=shardings)(jax.random.key(seed))
    if decoder.spec == source.spec:
        return _stored_params(source, decoder, shardings, step)
    assert decoder.spec == dataclasses.replace(source.spec, vocab_size=decoder.spec.vocab_size)
    mesh = jax.tree.leaves(shardings)[0].mesh
    stored = make_decoder(source.spec, mesh.shape["tensor"])
    params = _stored_params(source, stored, param_shardings(stored.abstract, stored.axes, mesh), step)
    grow = jax.jit(functools.partial(_grown, stored, decoder), donate_argnums=0, out_shardings=shardings)
    return grow(params)


def _grown(stored: Decoder, decoder: Decoder, params: Params) -> Params:
    """Parameters of one decoder as those of another that has more embedding rows."""
    known, wanted = stored.spec.vocab_size, decoder.spec.vocab_size

    def grow(p: jax.Array, axes: tuple[str, ...], abstract: jax.ShapeDtypeStruct) -> jax.Array:
        if "vocab" not in axes:
            return p
        real = p[:known]
        mean = jnp.mean(real, axis=0, keepdims=True)
        grown = jnp.concatenate([real, jnp.repeat(mean, wanted - known, axis=0)])
        return jnp.pad(grown, [(0, w - n) for n, w in zip(grown.shape, abstract.shape, strict=True)])

    return jax.tree.map(grow, params, stored.axes, decoder.abstract)


def _stored_params(source: ModelSource, decoder: Decoder, shardings: Params, step: int | None) -> Params:
    if source.kind == "hf":
        return hf.load_params(source.folder, decoder, source.architecture, shardings)
    assert source.workdir is not None
    checkpoints = CheckpointReader(source.workdir)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), decoder.abstract, shardings
    )
    params = checkpoints.restore_params(checkpoints.resolve_step(source.step if step is None else step), abstract)
    checkpoints.close()
    return params
