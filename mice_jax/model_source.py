"""Where a model's parameters come from: a Hugging Face folder or model of the Hub, a config.json, or another run.

A run's workdir has its own `model/` folder (config.json, tokenizer, chat template), so that it can be exported,
evaluated and fine-tuned further without the model that it was started from.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from transformers import PreTrainedTokenizerBase

from mice_jax.checkpoint import CheckpointReader
from mice_jax.cli.flag_checks import check_compute_dtype
from mice_jax.config import Lora
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.readers import file_digests
from mice_jax.errors import UserError
from mice_jax.inference.generation_config import (
    FILE,
    GenerationDefaults,
    defaults_in,
    fields_of_export,
    read_fields,
    read_generation_config,
    stop_ids_in,
)
from mice_jax.models import hf, peft_format, peft_import
from mice_jax.models import lora as lora_trees
from mice_jax.models.lora import LoRA, scale_of
from mice_jax.models.peft_import import PeftAdapter
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params, make_decoder
from mice_jax.runtime.devices import find_devices
from mice_jax.runtime.xla_flags import options_of_init
from mice_jax.sharding import param_shardings
from mice_jax.storage import hub, manifest
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.checkpoint_steps import AVERAGE
from mice_jax.storage.json_file import read_json
from mice_jax.storage.model_names import RANDOM, check_trained_model, missing_model, no_run, random_config
from mice_jax.storage.paths import RunPath, download_small_files, parse_path


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's parameters come from. Only its config.json has been read.

    Attributes:
      kind: "hf" (a Hugging Face folder), "run" (the workdir of a run), "random" (fresh weights from a config.json) or
        "adapter" (an adapter in PEFT's format, and its base).
      folder: The folder with config.json, which is that of the base for an adapter.
      workdir: The run's workdir; None unless kind is "run".
      step: The step of a checkpoint that was named in the path, as in `workdir/checkpoints/400`; else None.
      config: The content of config.json.
      spec: The architecture that config.json describes.
      hosted: The model of the Hub that `folder` is a copy of; None if the source was named by its path.
      averaged: Whether to take the running average of a run's weights instead of the weights.
      adapter: The adapter, if kind is "adapter".
      adapter_base: The model that the adapter is added to.
    """

    kind: str
    folder: Path
    workdir: RunPath | None
    step: int | None
    config: dict[str, Any]
    spec: ModelSpec
    hosted: hub.HubModel | None = None
    averaged: bool = False
    adapter: PeftAdapter | None = None
    adapter_base: "ModelSource | None" = None

    @property
    def base(self) -> "ModelSource":
        """The model without its adapter; the model itself if it has none."""
        return self.adapter_base or self

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, which is an adapter's own if it has one."""
        if self.adapter is not None and any(self.adapter.folder.glob("tokenizer*")):
            return self.adapter.folder
        return self.base.tokenizer_folder if self.adapter_base else self.folder

    @property
    def architecture(self) -> str:
        """The name of transformers' class, such as "LlamaForCausalLM"."""
        return self.config["architectures"][0]

    def stored_dtype(self) -> str:
        """The dtype of the stored weights that training started from; float32 for random weights."""
        if self.adapter_base is not None:
            return self.adapter_base.stored_dtype()
        return hf.stored_dtype(self.folder) if self.kind == "hf" else self.config.get("dtype", "float32")


def resolve_source(init_from: str, *, commit: str = "", weights: bool = True) -> ModelSource:
    """Reads the config.json of the model that `init_from` names; fetches it if it is a model of the Hub.

    Args:
      init_from: A Hugging Face folder, an adapter folder of PEFT, a model of the Hub (`owner/name` or
        `owner/name@revision`), a run's workdir or one of its `checkpoints/<step>`, `checkpoints/<step>/average` for the
        average of the weights that the run kept, or `random:` followed by a config.json or its folder.
      commit: The commit of a model of the Hub, which may be an adapter's base; "" takes the revision in `init_from`, or
        else the newest.
      weights: Whether the weights of a model of the Hub are needed.

    Returns:
      The source, with the architecture that config.json describes.

    Raises:
      UserError: `init_from` is not one of these, cannot be fetched, or has a config.json that cannot be used.
    """
    if init_from.startswith(RANDOM):
        file = random_config(init_from)
        config = hf.read_config(file) | {"dtype": "float32"}
        return ModelSource("random", file.parent, None, None, config, hf.spec_from_config(config, file))
    if hub.is_hub_id(init_from):
        hosted = hub.fetch(init_from, commit, weights=weights)
        file = hosted.folder / "config.json"
        if not file.exists() and (hosted.folder / peft_format.CONFIG).exists():
            raise UserError(
                f"{init_from} is an adapter, and adapters are read from folders only. Download it, as with "
                f"`hf download {hosted.repo} --local-dir=FOLDER`, and give the folder."
            )
        config = hf.read_config(file)
        return ModelSource("hf", hosted.folder, None, None, config, hf.spec_from_config(config, file), hosted)
    folder, step = parse_path(init_from), None
    averaged = folder.name == AVERAGE and folder.parent.name.isdigit() and folder.parent.parent.name == "checkpoints"
    folder = folder.parent if averaged else folder
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not folder.is_dir():
        raise missing_model(init_from)
    if (folder / "checkpoints").is_dir():
        file = (folder if isinstance(folder, Path) else download_small_files(folder)) / "model" / "config.json"
        config = hf.read_config(file)
        spec = hf.spec_from_config(config, file)
        return ModelSource("run", file.parent, folder, step, config, spec, averaged=averaged)
    if not isinstance(folder, Path):
        raise UserError(
            f"{init_from} is not a run's workdir. A Hugging Face folder must be on a local disk: copy it here."
        )
    if peft_import.is_adapter(folder):
        return _resolve_adapter(folder, commit, weights=weights)
    config = hf.read_config(folder / "config.json")
    return ModelSource("hf", folder, None, None, config, hf.spec_from_config(config, folder / "config.json"))


def _resolve_adapter(folder: Path, commit: str, *, weights: bool) -> ModelSource:
    """Reads an adapter folder and the config.json of its base; see `resolve_source`."""
    adapter = peft_import.read_adapter(folder)
    try:
        base = resolve_source(adapter.find_base(), commit=commit, weights=weights)
    except UserError as e:
        raise UserError(
            f"{folder / peft_format.CONFIG} names its base model as base_model_name_or_path={adapter.base!r}, which "
            f"cannot be used. Set it to the base's folder or to its name on the Hub (owner/name): {e}"
        ) from None
    return dataclasses.replace(base, kind="adapter", workdir=None, step=None, adapter=adapter, adapter_base=base)


def resolve_model(model: str, step: int | None = None) -> ModelSource:
    """Reads the config.json of a trained model, whose weights can be loaded.

    Args:
      model: A Hugging Face folder, a model of the Hub, a run's workdir, or one of its `checkpoints/<step>`.
      step: A checkpoint of the run; None takes the one in the path, or else the newest.

    Returns:
      The source. Its `step` is that of the path.

    Raises:
      UserError: There is no such model, it has no weights, or `step` is given for a Hugging Face folder.
    """
    check_trained_model(model, step)
    source = resolve_source(model)
    if step is not None and source.kind != "run":
        raise no_run(model, step)
    return source


def compute_dtype(name: str, platform: str | None = None) -> Any:
    """Returns the dtype that a name stands for.

    Args:
      name: "float32", "bfloat16", or "auto", which is float32 on a CPU and bfloat16 elsewhere.
      platform: The devices' platform; by default that of JAX's default backend.

    Returns:
      The dtype.

    Raises:
      UserError: The name is not one of these.
    """
    check_compute_dtype(name)
    if name == "auto":
        name = "float32" if (platform or find_devices()[0].platform) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def stop_ids(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end an answer: the chat template's end of a turn, and the eos_token_id of config.json."""
    turn = ChatEncoder(tokenizer).stop_ids() if tokenizer.chat_template else []
    return list(dict.fromkeys([*turn, *stop_ids_in(config)]))


def generation_config_of(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> GenerationDefaults:
    """Returns the model's own generation defaults, which are those of the exported model for a run."""
    source = source.base
    if source.kind == "run":
        return defaults_in(exported_generation_config(source, tokenizer), source.folder / FILE)
    return read_generation_config(source.folder, source.config)


def exported_generation_config(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the generation_config.json of a run's export: the fields of its base, and the tokens that end answers."""
    stops, bos_id = stop_ids(source.config, tokenizer), source.config.get("bos_token_id")
    pad_id: Any = tokenizer.pad_token_id
    return fields_of_export(read_fields(source.folder), stops, bos_id=bos_id, pad_id=pad_id)


def resolve_step(source: ModelSource, asked: int | None) -> int | None:
    """Returns the step of the checkpoint to load: `asked`, else the one in the path, else the newest.

    Args:
      source: The model.
      asked: The step that the user has chosen, if any.

    Returns:
      The step, or None for a Hugging Face folder.

    Raises:
      UserError: The run has no such checkpoint.
    """
    if source.workdir is None:
        return None
    checkpoints = CheckpointReader(source.workdir)
    step = checkpoints.resolve_step(source.step if asked is None else asked)
    checkpoints.close()
    return step


def fingerprint(source: ModelSource, step: int | None) -> str:
    """Returns a hash of a model's weights (at `step` of a run), config and tokenizer."""
    own = [p for p in sorted(source.folder.iterdir()) if p.is_file()]
    digests = file_digests(own, cache_folder(""))
    files: dict[str, Any] = {p.name: d.hex() for p, d in zip(own, digests, strict=True)}
    if source.workdir is not None:
        files["checkpoint"] = manifest.fingerprint(source.workdir / "checkpoints" / str(step))
        files |= {"item": AVERAGE} if source.averaged else {}
        if (run := adapter_run(source)) is not None:
            files["base"] = fingerprint(run.base, resolve_step(run.base, None))
    if source.adapter is not None:
        stored = [p for p in sorted(source.adapter.folder.iterdir()) if p.is_file()]
        digests = file_digests(stored, cache_folder(""))
        files |= {f"adapter/{p.name}": d.hex() for p, d in zip(stored, digests, strict=True)}
        files["base"] = fingerprint(source.base, resolve_step(source.base, None))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def with_vocabulary(source: ModelSource, ids: dict[str, int], added: Collection[str]) -> ModelSpec:
    """Returns the source's spec with an embedding row for each of a tokenizer's ids.

    Many models have more rows than the tokenizer has ids; these rows stay.

    Args:
      source: The model.
      ids: The tokenizer's ids by token.
      added: The tokens that were added to the tokenizer's own vocabulary. Missing rows are added for these only.

    Returns:
      The spec, whose vocabulary may be larger.

    Raises:
      UserError: The tokenizer's own vocabulary is larger than the model's, so it belongs to another model.
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
    """Raises UserError if a tokenizer has an id for which the model has no embedding."""
    token = max(ids, key=lambda token: ids[token])
    if ids[token] >= source.spec.vocab_size:
        raise UserError(
            f"the tokenizer's id {ids[token]} ({token!r}) has no embedding: the model's vocabulary in "
            f"{source.folder / 'config.json'} has {source.spec.vocab_size} rows. Give the tokenizer that belongs to "
            "the model, or train it with this one, which adds the rows."
        )


def check_weights(source: ModelSource) -> None:
    """Checks what can be known of weights in Hugging Face's or PEFT's format without reading them; others pass.

    Raises:
      UserError: A file is missing or truncated, or its tensors do not fit config.json.
    """
    if source.adapter is not None:
        peft_import.check_tensors(source.adapter, source.spec, source.architecture)
        check_weights(source.base)
    if source.kind == "hf":
        hf.check_weights(source.folder, make_decoder(source.spec, 1), source.architecture)


def load_params(
    source: ModelSource, decoder: Decoder, shardings: Params, *, seed: int = 0, step: int | None = None
) -> Params:
    """Loads the source's parameters in float32.

    Args:
      source: The model.
      decoder: The decoder of the source's spec, or of that spec with more embedding rows. Each added row is the mean of
        the stored rows.
      shardings: The sharding of each parameter.
      seed: The seed of random weights.
      step: The checkpoint of a run; None takes the one in the path, or else the newest.

    Returns:
      The parameters, in the decoder's structure.

    Raises:
      UserError: The stored weights are missing, damaged or of other shapes.
    """
    if source.kind == "random":
        leaves, tree = jax.tree.flatten(shardings)
        return _random_init(decoder, tree, tuple(leaves))(jax.random.key(seed))
    if decoder.spec == source.spec:
        return _stored_params(source, decoder, shardings, step)
    assert decoder.spec == dataclasses.replace(source.spec, vocab_size=decoder.spec.vocab_size)
    mesh = jax.tree.leaves(shardings)[0].mesh
    stored = make_decoder(source.spec, mesh.shape["tensor"])
    params = _stored_params(source, stored, param_shardings(stored.abstract, stored.axes, mesh), step)
    return _grown(stored, decoder, params, shardings)


@functools.lru_cache(maxsize=4)
def _random_init(decoder: Decoder, tree: Any, shardings: tuple[NamedSharding, ...]) -> Callable[[jax.Array], Params]:
    """Jits the initialisation of a decoder, once for all runs of a process.

    Args:
      decoder: The decoder.
      tree: The structure of its parameters.
      shardings: Their shardings.

    Returns:
      A function from a key to parameters.
    """
    (platform,) = {device.platform for device in shardings[0].device_set}
    return jax.jit(decoder.init, out_shardings=tree.unflatten(shardings), compiler_options=options_of_init(platform))


def _grown(stored: Decoder, decoder: Decoder, params: Params, shardings: Params) -> Params:
    """Appends embedding rows to the parameters of `stored`, so that they fit `decoder`; the others stay as they are."""
    known, wanted = stored.spec.vocab_size, decoder.spec.vocab_size

    def grow(p: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        real = p[:known]
        mean = jnp.mean(real, axis=0, keepdims=True)
        grown = jnp.concatenate([real, jnp.repeat(mean, wanted - known, axis=0)])
        return jnp.pad(grown, [(0, w - n) for n, w in zip(grown.shape, abstract.shape, strict=True)])

    def grown_or_same(p: jax.Array, axes: Any, abstract: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        if "vocab" not in axes:
            return p
        return jax.jit(functools.partial(grow, abstract=abstract), out_shardings=sharding)(p)

    return jax.tree.map(grown_or_same, params, stored.axes, decoder.abstract, shardings)


def _stored_params(source: ModelSource, decoder: Decoder, shardings: Params, step: int | None) -> Params:
    """Loads the weights of a Hugging Face folder or of a run's checkpoint, whose vocabulary is the decoder's."""
    if source.adapter is not None:
        return _with_adapter(source, decoder, shardings)
    if source.kind == "hf":
        return hf.load_params(source.folder, decoder, source.architecture, shardings)
    if (run := adapter_run(source)) is not None:
        return _merged_params(run, source, decoder, shardings, step)
    return _restore(source, decoder.abstract, shardings, step)


def _restore(source: ModelSource, shapes: Params, shardings: Params, step: int | None) -> Params:
    """Restores the parameters of a run's checkpoint, or their average."""
    assert source.workdir is not None
    checkpoints = CheckpointReader(source.workdir)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    step = checkpoints.resolve_step(source.step if step is None else step)
    params = checkpoints.restore_params(step, abstract, AVERAGE if source.averaged else "params")
    checkpoints.close()
    return params


# ---------------------------------------------------------------------------------------- runs that train adapters
@dataclasses.dataclass(frozen=True)
class AdapterRun:
    """What a run that trains adapters says of them: its checkpoints hold adapters alone.

    Attributes:
      lora: The adapters.
      base: The model whose weights the adapters are added to.
      seed: The seed of the run, from which random base weights are drawn again.
      alpha: alpha, as the config has it.
      rslora: Whether the scale is alpha / sqrt(rank).
    """

    lora: LoRA
    base: ModelSource
    seed: int
    alpha: float
    rslora: bool


def adapter_run(source: ModelSource) -> AdapterRun | None:
    """Reads the adapters of a run from its config.json; returns None if the source has none.

    Raises:
      UserError: The base model, which the run's model.init_from names, is not there any more.
    """
    file = source.folder.parent / "config.json"
    config = (read_json(file) or {}) if source.kind == "run" else {}
    made: dict[str, Any] = config.get("model", {}).get("lora", {})
    if not made.get("rank"):
        return None
    init_from, hosted = config["model"]["init_from"], config.get("resolved", {}).get("hub", {})
    try:
        base = resolve_source(init_from, commit=hosted.get("model.init_from", {}).get("commit", "")).base
    except UserError as e:
        raise UserError(
            f"{source.workdir} holds adapters only, which are added to the weights of model.init_from={init_from!r} "
            f"({file}): {e}"
        ) from None
    targets = peft_format.find_targets(source.spec, source.architecture, made["targets"])
    scale = scale_of(made["rank"], made["alpha"], made["rslora"])
    lora = LoRA(made["rank"], scale, targets, made.get("dora", False))
    return AdapterRun(lora, base, config["seed"], made["alpha"], made["rslora"])


def load_adapters(source: ModelSource, lora: LoRA, mesh: jax.sharding.Mesh, step: int | None = None) -> Params:
    """Loads the adapters of a run's checkpoint.

    Args:
      source: The run.
      lora: Its adapters.
      mesh: The devices.
      step: The checkpoint; None takes the one in the path, or else the newest.

    Returns:
      The adapters alone, float32.
    """
    decoder = make_decoder(source.spec, mesh.shape["tensor"], lora)
    abstract, axes = decoder.split(decoder.abstract)[0], decoder.split(decoder.axes)[0]
    return _restore(source, abstract, param_shardings(abstract, axes, mesh), step)


def _merged_params(
    run: AdapterRun, source: ModelSource, decoder: Decoder, shardings: Params, step: int | None
) -> Params:
    """Loads the base of a run that trains adapters and adds the adapters to it."""
    adapters = load_adapters(source, run.lora, jax.tree.leaves(shardings)[0].mesh, step)
    base = load_params(run.base, decoder, shardings, seed=run.seed)
    merge = jax.jit(functools.partial(lora_trees.merge, run.lora), donate_argnums=1, out_shardings=shardings)
    return merge(adapters, base)


# ---------------------------------------------------------------------------------------- adapters in PEFT's format
def check_continues(source: ModelSource, made: Lora) -> None:
    """Checks that a run with these adapters can train those of a source further.

    Args:
      source: The model that the run starts from; one without an adapter passes.
      made: The config's `model.lora`; rank 0 passes, since the adapter is then merged.

    Raises:
      UserError: The adapter differs from what the config says.
    """
    if source.adapter is None or not made.rank:
        return
    held, adapter = peft_import.load_adapters(source.adapter, source.spec, source.architecture), source.adapter
    if held.obstacle:
        raise UserError(
            f"model.lora.rank={made.rank} trains the adapter in {adapter.folder} further, but {held.obstacle}. Set "
            "model.lora.rank=0 to train the weights that it is merged into."
        )
    names = peft_format.target_names(source.spec, source.architecture, held.lora.targets)
    wanted = peft_format.find_targets(source.spec, source.architecture, made.targets)
    stored = {"rank": adapter.rank, "alpha": adapter.alpha, "rslora": adapter.rslora, "dora": adapter.dora}
    stored |= {"targets": names}
    differing = [k for k, v in stored.items() if k != "targets" and getattr(made, k) != v]
    differing += ["targets"] if wanted != held.lora.targets else []
    if differing:
        raise UserError(
            f"model.lora.rank={made.rank} trains the adapter in {adapter.folder} further, but "
            f"{', '.join(f'model.lora.{k}={getattr(made, k)!r}' for k in differing)} differs from the adapter. Set "
            f"{', '.join(f'model.lora.{k}={stored[k]!r}' for k in differing)}; or set model.lora.rank=0 to train the "
            "weights that the adapter is merged into."
        )


def stored_adapters(source: ModelSource, shardings: Params) -> Params | None:
    """Reads the adapters that a run continues to train; None if its source has none.

    Args:
      source: The model that the run starts from, which `check_continues` has passed.
      shardings: The sharding of each adapter.
    """
    if source.adapter is None:
        return None
    held = peft_import.load_adapters(source.adapter, source.spec, source.architecture)
    return _placed(held.arrays, shardings)


def _with_adapter(source: ModelSource, decoder: Decoder, shardings: Params) -> Params:
    """Loads the base of an adapter and adds the adapter to it."""
    assert source.adapter is not None
    held = peft_import.load_adapters(source.adapter, source.spec, source.architecture)
    mesh = jax.tree.leaves(shardings)[0].mesh
    with_adapters = make_decoder(decoder.spec, mesh.shape["tensor"], held.lora)
    axes = with_adapters.split(with_adapters.axes)[0]
    adapters = _placed(held.arrays, param_shardings(held.arrays, axes, mesh))
    base = load_params(source.base, decoder, shardings)
    merge = jax.jit(functools.partial(lora_trees.merge, held.lora), donate_argnums=1, out_shardings=shardings)
    return merge(adapters, base)


def _placed(arrays: Params, shardings: Params) -> Params:
    """Puts arrays that every process has onto the devices."""
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), arrays, shardings)
