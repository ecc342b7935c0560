"""Builds the parts of a run from its config: inputs, data, model and step functions.

Every command that needs one of these builds it here, so that `mice plan` plans what `mice train` runs. Each part of
the config is read in one function only.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from transformers import PreTrainedTokenizerBase

from mice_jax.config import Config, Phase, is_set
from mice_jax.config_checks import beta2_of, rate_for_batch, row_problem
from mice_jax.data import statistics
from mice_jax.data.batch_size import check_default_batch_size
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture, Trunk
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.data.source_names import source_names
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError, format_count
from mice_jax.hardware import find_chip
from mice_jax.inference.sampler import cast_params
from mice_jax.model_source import (
    ModelSource,
    check_continues,
    load_params,
    resolve_source,
    stop_ids,
    with_vocabulary,
)
from mice_jax.models import hf, peft_format
from mice_jax.models.attention import AttentionRequirements, choose_backend
from mice_jax.models.lora import LoRA, scale_of
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder
from mice_jax.numerics.offload import check_host_memory_kind
from mice_jax.optim import Schedule, make_optimizer, make_phase_schedule
from mice_jax.runtime.xla_flags import compiler_options
from mice_jax.sharding import LENGTH_AXIS, local_shards, make_mesh, num_shards, param_shardings
from mice_jax.step import StepFunctions, make_abstract_base, make_abstract_state, make_step
from mice_jax.storage import hub
from mice_jax.training import held_out, memory_model, osft, sample_answers
from mice_jax.training.phases import PhaseSpan, phase_spans


# ---------------------------------------------------------------------------------------- devices
def run_mesh(config: Config) -> Mesh:
    """Makes the mesh of a run.

    Raises:
      UserError: The sizes of its axes do not fit the devices or the rows, or the config asks for arrays in host memory
        and the devices cannot keep them there.
    """
    for setting in offloading_settings(config):
        check_host_memory_kind(jax.local_devices(), setting)
    sizes = config.mesh
    made = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sequence=sizes.sequence)
    problem = row_problem(config.data.max_length, made.shape[LENGTH_AXIS])
    if problem:
        raise UserError(f"{problem}.")
    return made


# ---------------------------------------------------------------------------------------- inputs
class Inputs(NamedTuple):
    """The model and the tokenizer that a run starts from. No weights are loaded yet.

    Attributes:
      source: The model's config and where its weights are stored.
      tokenizer: The tokenizer, with the chat template to use.
      notes: Sentences about the tokenizer for the user.
      hosted: The models of the Hub, by the config field that names them: {"model.init_from": {"repo", "commit"}}.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]
    hosted: dict[str, dict[str, str]]

    def spec(self) -> ModelSpec:
        """Returns the model's spec with an embedding row for each token of the tokenizer.

        Raises:
          UserError: The tokenizer belongs to another model.
        """
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return with_vocabulary(self.source, self.tokenizer.get_vocab(), added)


def inputs(config: Config, recorded: Mapping[str, Mapping[str, str]] | None = None, *, weights: bool = True) -> Inputs:
    """Reads the model and tokenizer that the config names; raises UserError if one of them cannot be read.

    Args:
      config: The run's config.
      recorded: `Inputs.hosted` of the run when it began, whose commits are taken again; None or {} for a new run.
      weights: Whether the weights of a model of the Hub are needed.
    """
    commits = {field: entry["commit"] for field, entry in (recorded or {}).items()}
    source = resolve_source(config.model.init_from, commit=commits.get("model.init_from", ""), weights=weights)
    check_continues(source, config.model.lora)
    hosted = {"model.init_from": source.hosted.record()} if source.hosted else {}
    data, folder = config.data, config.data.tokenizer or str(source.tokenizer_folder)
    if hub.is_hub_id(folder):
        tokenizer_model = hub.fetch(folder, commits.get("data.tokenizer", ""), weights=False)
        hosted["data.tokenizer"] = tokenizer_model.record()
        folder = str(tokenizer_model.folder)
    notes: list[str] = []
    tokenizer = load_tokenizer(folder, data.chat_template, notes, data.template_kwargs)
    found = Inputs(source, tokenizer, notes, hosted)
    if config.model.lora.rank:
        _check_all_tokens_have_rows(found)
    return found


def _check_all_tokens_have_rows(found: Inputs) -> None:
    """Raises UserError if the tokenizer has tokens without embedding rows: LoRA does not train rows that are added."""
    rows, ids = found.source.spec.vocab_size, found.tokenizer.get_vocab()
    if found.spec().vocab_size == rows:
        return
    new = sorted((token for token in ids if ids[token] >= rows), key=ids.__getitem__)
    raise UserError(
        f"the tokenizer has {format_count(len(new), 'token')} beyond the model's {rows:,} embedding rows, "
        f"{', '.join(map(repr, new[:3]))}{' and more' if len(new) > 3 else ''}, and model.lora trains adapters alone: "
        "the rows that are added for them would stay equal, so that the model could not tell these tokens apart or end "
        "an answer with one. Set data.chat_template to a template whose tokens the model has, or model.lora.rank=0."
    )


def length_warnings(config: Config, source: ModelSource) -> list[str]:
    """Returns a sentence if rows may be longer than the model was made for, else nothing.

    Args:
      config: The run's config.
      source: The model that the run starts from.
    """
    if config.data.max_length <= source.spec.max_positions:
        return []
    return [
        f"data.max_length={config.data.max_length} is beyond the max_position_embeddings={source.spec.max_positions} "
        "that the model was made for, which stays the limit of what `generate` takes: lower data.max_length to it, or "
        "start from a model with more positions"
    ]


def encoder(config: Config, tokenizer: PreTrainedTokenizerBase, today: datetime.date | None = None) -> ChatEncoder:
    """Returns the encoder of the run's chats.

    Args:
      config: The run's config.
      tokenizer: The run's tokenizer.
      today: The date for chat templates that write one; None takes the current date.
    """
    return ChatEncoder(tokenizer, train_on=config.data.train_on, today=today, reasoning=config.data.reasoning)


# ---------------------------------------------------------------------------------------- data
class RunData(NamedTuple):
    """A run's data and its division into steps.

    Attributes:
      dataset: The tokenised samples.
      mixture: The samples of each step.
      total_steps: The number of steps of the run.
      spans: The steps of each phase.
      warnings: Sentences about likely mistakes in the data and its division into steps.
    """

    dataset: Dataset
    mixture: Mixture
    total_steps: int
    spans: list[PhaseSpan]
    warnings: list[str]

    @property
    def mean_length(self) -> float:
        """The mean number of tokens of a sample."""
        return statistics.mean_length(self.dataset.report)


def data(
    config: Config,
    encoder: ChatEncoder,
    log: Callable[[str], None] = lambda text: None,
    watch: Callable[[str], Callable[[float, int], None]] = lambda what: lambda done, samples: None,
) -> RunData:
    """Opens the token stores of a run, or builds them, and plans which samples each step has.

    Args:
      config: The run's config.
      encoder: The encoder of its chats.
      log: Called with each message for the user.
      watch: Returns, for the path of a source, a callback that is called with the fraction and the number of samples
        that are tokenised.

    Returns:
      The data.

    Raises:
      UserError: The data cannot be read, a phase has no sample, or a batch of the default size is larger than an epoch.
    """
    dataset = build_dataset(config.data, encoder, log, watch)
    branch = config.branch
    if branch.step and branch.data not in ("", dataset.fingerprint):
        raise UserError(
            f"the data is not that of the run that this one branches off from (branch.data={branch.data[:12]}, here "
            f"{dataset.fingerprint[:12]}), so its order cannot be continued. Restore the files of data.phases, and the "
            "tokenizer, as they were."
        )
    mixture = Mixture(
        dataset.phases,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        drop_remainder=config.data.drop_remainder,
        trunk=Trunk(branch.step, branch.batch_size, branch.seed) if branch.step else None,
    )
    if not is_set(config.optim, "batch_size"):
        check_default_batch_size(mixture, config.optim.batch_size)
    total_steps = min(len(mixture), config.optim.max_steps or len(mixture))
    if branch.step:
        total_steps = min(len(mixture), int(np.searchsorted(mixture.samples_before(), branch.samples)))
    spans = phase_spans(config.data.phases, mixture.phase_ends(), total_steps)
    warnings = [*statistics.data_warnings(dataset.report), *_step_warnings(config, dataset, mixture)]
    return RunData(dataset, mixture, total_steps, spans, warnings)


def _step_warnings(config: Config, dataset: Dataset, mixture: Mixture) -> Iterator[str]:
    crowded = mixture.crowded_phases()
    if crowded:
        left = "data.drop_remainder=True leaves no step" if config.data.drop_remainder else "each step is a whole epoch"
        yield f"a batch is larger than an epoch, so {left}, in {', '.join(crowded)}"
    if config.data.validation_fraction and not dataset.validation:
        yield f"data.validation_fraction={config.data.validation_fraction} holds out no sample of these few"
    if mixture.samples_left_out:
        yield f"{format_count(mixture.samples_left_out, 'sample')} left out by data.drop_remainder"
    if config.optim.max_steps > len(mixture):
        steps = format_count(len(mixture), "step")
        yield f"optim.max_steps={config.optim.max_steps} is more than the phases have: {steps}"


def step_source(
    config: Config, data: RunData, shapes: tuple[Shape, ...], num_shards: int, shards: tuple[int, ...]
) -> StepSource:
    """Returns the steps of a run, packed into microbatches.

    Args:
      config: The run's config.
      data: The run's data.
      shapes: The shapes that a microbatch may have on one shard, largest first.
      num_shards: The number of shards that a microbatch's rows are split into.
      shards: The indices of the shards of this process.
    """
    return StepSource(
        data.dataset.corpus,
        data.mixture,
        shapes,
        num_shards,
        shards,
        config.optim.loss_reduction,
        config.seed,
        split_every=config.log.noise_every,
        sources=data.dataset.sources,
    )


def held_out_packer(
    config: Config, data: RunData, shapes: tuple[Shape, ...], mesh: Mesh
) -> Callable[[Mixture], StepSource]:
    """Returns a function that packs held-out samples into microbatches, with the same weight for each token.

    Args:
      config: The run's config.
      data: The run's data.
      shapes: The shapes that a microbatch may have on one shard, largest first.
      mesh: The run's mesh.
    """
    corpus, shards = data.dataset.corpus, (num_shards(mesh), local_shards(mesh))
    return lambda mixture: StepSource(corpus, mixture, shapes, *shards, "token", config.seed)


# ---------------------------------------------------------------------------------------- model
class Model(NamedTuple):
    """The model of a run and how it is computed on the mesh.

    Attributes:
      decoder: The model's functions.
      compute: The dtype, attention backend and remat policy.
      shapes: The shapes that a microbatch may have on one device, largest first.
      memory_inputs: The inputs of the memory model.
      memory: The memory of one device that a program may use, in bytes.
    """

    decoder: Decoder
    compute: Compute
    shapes: tuple[Shape, ...]
    memory_inputs: memory_model.MemoryInputs
    memory: int

    @property
    def rows(self) -> int:
        """The number of rows of the largest microbatch on one device."""
        return self.shapes[0].rows

    @property
    def num_params(self) -> int:
        """The number of parameters, the padding of the vocabulary included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.decoder.abstract))

    @property
    def num_padding(self) -> int:
        """The number of parameters that pad the vocabulary to a size that the mesh divides."""
        decoder = self.decoder
        axes = jax.tree.leaves(decoder.axes, is_leaf=lambda a: isinstance(a, tuple))
        leaves = zip(jax.tree.leaves(decoder.abstract), axes, strict=True)
        in_a_row = sum(leaf.size // decoder.vocab_rows for leaf, names in leaves if "vocab" in names)
        return in_a_row * (decoder.vocab_rows - decoder.spec.vocab_size)


def model(
    config: Config,
    source: ModelSource,
    spec: ModelSpec,
    mesh: Mesh,
    attention: str,
    mean_length: float,
    recorded: dict[str, Any],
) -> Model:
    """Chooses how a run's model is computed on a mesh.

    Args:
      config: The run's config.
      source: The model that the run starts from.
      spec: The run's model, with the vocabulary of its tokenizer.
      mesh: The run's mesh.
      attention: The attention backend, as `attention_on_mesh` returns it.
      mean_length: The mean number of tokens of a sample.
      recorded: The choices of the run's last process on such a mesh; empty if there was none.

    Returns:
      The model.
    """
    platform = mesh.devices.flat[0].platform
    decoder = run_decoder(config, spec, source.architecture, mesh.shape["tensor"])
    dtype = compute_dtype(config, platform)
    needs = memory_inputs(config, decoder, source.architecture, mesh, dtype, attention)
    memory = memory_model.device_memory_bytes(
        jax.local_devices()[0]
    )  # A device of another process has no statistics here.
    rows, remat = rows_and_remat(
        config, needs, mean_length=mean_length, memory=memory, platform=platform, recorded=recorded
    )
    memory_model.check_host_memory(needs, rows, remat, jax.local_device_count(), memory_model.host_memory_bytes())
    devices, parts = mesh.shape[LENGTH_AXIS], row_parts(spec, mesh)
    compute = Compute(jnp.dtype(dtype), attention, remat, jnp.dtype(config.optim.reduce_dtype), parts)
    shapes = microbatch_shapes(config.data.max_length, rows, 2 * devices if parts else 1, devices if parts == 2 else 1)
    return Model(decoder, compute, shapes, needs, memory)


def row_parts(spec: ModelSpec, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts of each row that a device of the sequence axis has; 0 if devices have whole rows.

    Two parts balance the work of causal attention. A recurrent mixer needs the slots of a device to follow one another,
    so attention moves the queries of its models.
    """
    if mesh.shape[LENGTH_AXIS] == 1:
        return 0
    return 1 if spec.is_recurrent else 2


def offloading_settings(config: Config) -> list[str]:
    """Returns the settings of a config that keep arrays in host memory, as `field=value`."""
    moments = ["optim.offload_moments=True"] if config.optim.offload_moments else []
    return moments + (["model.remat='offload'"] if config.model.remat == "offload" else [])


def run_decoder(config: Config, spec: ModelSpec, architecture: str, tensor: int) -> Decoder:
    """Returns the decoder of a run, with the adapters that its config asks for.

    Args:
      config: The run's config.
      spec: The run's model, with the vocabulary of its tokenizer.
      architecture: The name of transformers' class, by whose module names `model.lora.targets` is matched.
      tensor: The size of the mesh's tensor axis.

    Raises:
      UserError: A target matches no matrix.
    """
    made = config.model.lora
    if not made.rank:
        return make_decoder(spec, tensor)
    targets = peft_format.find_targets(spec, architecture, made.targets)
    scale = scale_of(made.rank, made.alpha, made.rslora)
    return make_decoder(spec, tensor, LoRA(made.rank, scale, targets, made.dora))


def compute_dtype(config: Config, platform: str) -> str:
    """Returns the dtype of the run's activations; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    return "float32" if platform == "cpu" else "bfloat16"


def attention(
    config: Config,
    spec: ModelSpec,
    platform: str,
    capability: str | None,
    recorded: dict[str, Any] | None = None,
    *,
    sequence: int = 1,
) -> str:
    """Returns the attention backend of a run.

    Args:
      config: The run's config.
      spec: The run's model.
      platform: The platform of the devices: cpu, gpu or tpu.
      capability: The compute capability of a GPU; None for other devices.
      recorded: The choices of the run's last process on such devices, which "auto" repeats.
      sequence: The size of the mesh's sequence axis.

    Raises:
      UserError: The backend cannot compute this model on these devices.
    """
    asked = config.model.attention
    taken = (recorded or {}).get("attention", asked) if asked == "auto" else asked
    try:
        return choose_backend(
            taken,
            AttentionRequirements(
                spec,
                platform=platform,
                compute_capability=capability,
                dtype=compute_dtype(config, platform),
                max_length=config.data.max_length,
                deterministic=config.train.deterministic,
                sequence=sequence,
            ),
        )
    except UserError as e:
        if taken == asked:
            raise
        raise UserError(
            f'{e} model.attention is "auto", which took {taken!r} when the run was last on such devices (config.json, '
            "resolved.attention), and a resumed run keeps its choices: use the versions that it began with, or another "
            "--workdir."
        ) from None


def attention_on_mesh(config: Config, spec: ModelSpec, mesh: Mesh, recorded: dict[str, Any]) -> str:
    """Returns the attention backend of a run on the devices of a mesh.

    Args:
      config: The run's config.
      spec: The run's model.
      mesh: The run's mesh.
      recorded: The choices of the run's last process on such a mesh, which "auto" repeats.

    Raises:
      UserError: The backend cannot compute this model on these devices.
    """
    device = mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", None)
    return attention(config, spec, device.platform, capability, recorded, sequence=mesh.shape[LENGTH_AXIS])


class OptimizerSettings(NamedTuple):
    """What the optimizer of a run depends on besides the model; see the fields of `config.optim`."""

    name: str
    grad_clip: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    moments_dtype: str
    frozen: tuple[str, ...]
    osft_rank_ratio: float

    @classmethod
    def of(cls, config: Config) -> "OptimizerSettings":
        """Returns those of a run's config."""
        o = config.optim
        grad_clip = 0.0 if o.offload_moments else o.grad_clip  # an update of parts is clipped outside of the optimizer
        numbers = (grad_clip, o.beta1, beta2_of(o), o.eps, o.weight_decay)
        return cls(o.name, *numbers, o.moments_dtype, tuple(o.frozen), o.osft_rank_ratio)


def optimizer(
    settings: OptimizerSettings, decoder: Decoder, architecture: str
) -> tuple[optax.GradientTransformation, Any]:
    """Makes the optimizer of a run.

    Args:
      settings: What it depends on.
      decoder: The model.
      architecture: The name of transformers' class, by whose parameter names `optim.frozen` is matched.

    Returns:
      The optimizer, and the mask of the parameters that are trained; None if all of them are.
    """
    some_frozen = settings.frozen or (decoder.lora is None and hf.always_frozen(architecture))
    trained = hf.trained_mask(decoder, architecture, settings.frozen) if some_frozen else None
    numbers = settings._asdict()
    del numbers["frozen"], numbers["osft_rank_ratio"]
    axes = decoder.split(decoder.axes)[0]
    made = make_optimizer(**numbers, axes=axes, trained=trained)
    if settings.osft_rank_ratio:
        made = osft.freeze_subspaces(made, settings.osft_rank_ratio, axes, trained)
    return made, trained


def memory_inputs(
    config: Config, decoder: Decoder, architecture: str, mesh: Mesh | AbstractMesh, dtype: str, attention: str
) -> memory_model.MemoryInputs:
    """Returns the inputs of the memory model, which chooses rows and remat.

    Args:
      config: The run's config.
      decoder: The model.
      architecture: The name of transformers' class.
      mesh: The run's mesh.
      dtype: The compute dtype.
      attention: The attention backend.
    """
    return memory_model.MemoryInputs(
        decoder,
        make_abstract_state(
            decoder,
            optimizer(OptimizerSettings.of(config), decoder, architecture)[0],
            mesh,
            keeps_average=bool(config.train.ema_half_life),
            offloads_moments=config.optim.offload_moments,
            param_dtype=config.model.param_dtype,
        ),
        mesh,
        jnp.dtype(dtype),
        attention,
        jnp.dtype(config.optim.accumulate_dtype),
        jnp.dtype(config.optim.reduce_dtype),
        config.data.max_length,
        make_abstract_base(decoder, mesh, jnp.dtype(dtype)),
    )


def rows_and_remat(
    config: Config,
    inputs: memory_model.MemoryInputs,
    *,
    mean_length: float,
    memory: float,
    platform: str,
    recorded: dict[str, Any] | None = None,
) -> tuple[int, str]:
    """Returns the rows of a microbatch on one device and the remat policy.

    Each is taken from the config, else from the record of the run's last process, else from the memory model.

    Args:
      config: The run's config.
      inputs: The inputs of the memory model.
      mean_length: The mean number of tokens of a sample.
      memory: The memory of one device that a program may use, in bytes.
      platform: The platform of the devices: cpu, gpu or tpu.
      recorded: The choices of the run's last process on such a mesh.
    """
    recorded, remat = recorded or {}, config.model.remat
    if remat == "auto":
        remat = recorded.get("remat", "auto")
    return memory_model.choose_rows_and_remat(
        inputs,
        memory,
        rows=config.train.rows_per_device or recorded.get("rows_per_device", 0),
        policies=memory_model.remat_policies_fastest_first(platform) if remat == "auto" else (remat,),
        most=max_useful_rows(config, inputs, mean_length, platform),
    )


def max_useful_rows(config: Config, inputs: memory_model.MemoryInputs, mean_length: float, platform: str) -> int:
    """Returns the number of rows of one device beyond which a microbatch is not faster or is never filled.

    Args:
      config: The run's config.
      inputs: The inputs of the memory model.
      mean_length: The mean number of tokens of a sample.
      platform: The platform of the devices: cpu, gpu or tpu.
    """
    wanted = mean_length * config.optim.batch_size / (config.data.max_length * num_shards(inputs.mesh))
    return memory_model.max_useful_rows(inputs, platform, wanted)


def schedule(config: Config, spans: Sequence[PhaseSpan], horizon: int) -> Schedule:
    """Returns the learning rate schedule of a run.

    Args:
      config: The run's config.
      spans: The steps of each phase.
      horizon: The number of steps that a complete schedule takes.
    """
    o = config.optim
    return make_phase_schedule(
        [(s.first, peak_rate(config, s.phase), s.phase.schedule == "restart") for s in spans],
        horizon=horizon,
        kind=o.schedule,
        warmup_steps=o.warmup_steps,
        warmup_ratio=o.warmup_ratio,
        final_ratio=o.final_ratio,
        decay_ratio=o.decay_ratio,
    )


def run_schedule(config: Config, data: RunData) -> Schedule:
    """Returns the learning rate schedule of a run, over the steps that the whole run takes without a stop.

    In a branch of another batch size, a step has the rate that the other run's schedule has after as many samples.

    Args:
      config: The run's config.
      data: The run's data.
    """
    branch, mixture = config.branch, data.mixture
    if not branch.step or branch.batch_size == config.optim.batch_size:
        # The data or a stop rule may end the run earlier.
        return schedule(config, data.spans, horizon=config.optim.max_steps or branch.max_steps or len(mixture))
    trunk = Mixture(
        mixture.phases, batch_size=branch.batch_size, seed=branch.seed, drop_remainder=config.data.drop_remainder
    )
    spans = phase_spans(config.data.phases, trunk.phase_ends(), len(trunk))
    of_trunk = schedule(config, spans, horizon=branch.max_steps or len(trunk))
    places = np.interp(mixture.samples_before()[:-1], trunk.samples_before(), np.arange(len(trunk) + 1))
    return lambda step: of_trunk(places[int(step)])


def peak_rate(config: Config, phase: Phase) -> float:
    """Returns the peak learning rate of a phase at its batch size."""
    o = config.optim
    rate = phase.learning_rate or o.learning_rate
    return rate_for_batch(rate, o.rate_for_batch, phase.batch_size or o.batch_size, o.rate_batch_size)


class StepSettings(NamedTuple):
    """What the step functions of a run depend on besides the model and the mesh."""

    optimizer: OptimizerSettings
    accumulate_dtype: str
    compiler_options: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
    keeps_average: bool
    max_held_out_samples: int
    offloads_moments: bool
    clip_norm: float
    rounding_seed: int | None  # runs whose weights are float32 share step functions, whatever their seeds


def step_functions(config: Config, decoder: Decoder, architecture: str, mesh: Mesh, compute: Compute) -> StepFunctions:
    """Makes the step functions of a run. Runs of one process whose settings are equal share what is compiled.

    Args:
      config: The run's config.
      decoder: The model.
      architecture: The name of transformers' class.
      mesh: The run's mesh.
      compute: The dtype, attention backend and remat policy.
    """
    chip = find_chip(mesh.devices.flat[0])
    options = compiler_options(chip is not None and chip.sparse_cores)
    settings = StepSettings(
        OptimizerSettings.of(config),
        config.optim.accumulate_dtype,
        tuple((options or {}).items()),
        tuple(source_names(config.data)),
        keeps_average=bool(config.train.ema_half_life),
        max_held_out_samples=held_out.TOGETHER if config.eval.exact_match else 0,
        offloads_moments=config.optim.offload_moments,
        clip_norm=config.optim.grad_clip if config.optim.offload_moments else 0.0,
        rounding_seed=config.seed if config.model.param_dtype == "bfloat16" else None,
    )
    return shared_step_functions(settings, decoder, architecture, mesh, compute)


@functools.lru_cache(maxsize=4)
def shared_step_functions(
    settings: StepSettings, decoder: Decoder, architecture: str, mesh: Mesh, compute: Compute
) -> StepFunctions:
    """Makes step functions, or returns those of the last few runs of the process that equal them in all arguments.

    Learning rates are arguments of the update, so runs that differ only in the schedule share all functions. Those that
    run the model, which take most of the time to compile, are shared by runs with different optimizers too.
    """
    plain = settings.optimizer._replace(
        name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0, moments_dtype="float32"
    )
    numbered = tuple(map(str, range(len(settings.sources))))  # the model's functions have no names of sources
    of_model = settings._replace(optimizer=plain, sources=numbered, keeps_average=False)
    fns = own_step_functions(settings, decoder, architecture, mesh, compute)
    return fns._replace(**shared_model_functions(of_model, decoder, architecture, mesh, compute))


@functools.lru_cache(maxsize=4)
def shared_model_functions(
    settings: StepSettings, decoder: Decoder, architecture: str, mesh: Mesh, compute: Compute
) -> dict[str, Callable]:
    """Makes the step functions that run the model, which the optimizer does not change.

    Args:
      settings: Of an optimizer that stands for all, with the run's frozen parameters, whose gradients are not measured.
      decoder: The model.
      architecture: The name of transformers' class.
      mesh: The run's mesh.
      compute: The dtype, attention backend and remat policy.

    Returns:
      The functions by their names in StepFunctions.
    """
    fns = own_step_functions(settings, decoder, architecture, mesh, compute)
    return {name: getattr(fns, name) for name in ("zero_sums", "accumulate", "evaluate", "gradients")}


def own_step_functions(
    settings: StepSettings, decoder: Decoder, architecture: str, mesh: Mesh, compute: Compute
) -> StepFunctions:
    """Makes step functions that no other run shares."""
    made, trained = optimizer(settings.optimizer, decoder, architecture)
    return make_step(
        decoder,
        made,
        mesh,
        compute,
        trained,
        settings.accumulate_dtype,
        dict(settings.compiler_options),
        settings.sources,
        keeps_average=settings.keeps_average,
        max_held_out_samples=settings.max_held_out_samples,
        offloads_moments=settings.offloads_moments,
        clip_norm=settings.clip_norm,
        rounding_seed=settings.rounding_seed,
    )


def sample_answerer(
    config: Config, data: RunData, source: ModelSource, model: Model, mesh: Mesh, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Params], list[dict[str, str]]]:
    """Returns a function that lets a model answer the held-out prompts that eval.answers asks for.

    Args:
      config: The run's config.
      data: The run's data.
      source: The model that the run starts from, whose config.json has the tokens that end an answer.
      model: The run's model.
      mesh: The run's mesh.
      tokenizer: The run's tokenizer.
    """
    longest = model.decoder.spec.max_positions - sample_answers.max_new_tokens(model.decoder)
    dataset, count = data.dataset, config.eval.answers
    asked = sample_answers.questions(dataset.validation, dataset.corpus, count, longest) if count else []
    if not asked:
        return lambda params: []
    stops = stop_ids(source.config, tokenizer)
    return sample_answers.answerer(asked, model.decoder, mesh, model.compute.dtype, tokenizer, stops)


# ---------------------------------------------------------------------------------------- inference
@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model on a mesh.

    Attributes:
      decoder: The model's functions.
      params: Its parameters, sharded over the mesh.
      mesh: The devices.
    """

    decoder: Decoder
    params: Params
    mesh: Mesh


def load_for_inference(
    source: ModelSource, mesh: Mesh | None = None, *, step: int | None = None, dtype: Any = None
) -> LoadedModel:
    """Loads a trained model to evaluate it, generate with it or export it.

    Args:
      source: The model, from `model_source.resolve_source` or `resolve_model`.
      mesh: The devices; by default all of them, with the parameters split over the `fsdp` axis.
      step: The checkpoint of a run; None takes the one in the path, or else the newest.
      dtype: The dtype to cast the parameters to, except norms, which stay in float32; None keeps all in float32.

    Returns:
      The model with its parameters.

    Raises:
      UserError: The weights are missing, damaged or of other shapes.
    """
    mesh = make_mesh(1, -1, 1) if mesh is None else mesh
    decoder = make_decoder(source.spec, mesh.shape["tensor"])
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh), step=step)
    return LoadedModel(decoder, params if dtype is None else cast_params(params, dtype), mesh)
