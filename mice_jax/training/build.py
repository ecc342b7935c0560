"""From a config to what a run is made of: its inputs, data, model and step functions.

Every command that needs one of these builds it here, so `plan` plans what `train` runs. Each part of the config is
opened in one function only.
"""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from transformers import PreTrainedTokenizerBase

from mice_jax.config import Config
from mice_jax.data import statistics
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.inference.sampler import cast_params
from mice_jax.model_source import ModelSource, load_params, resolve_source, with_vocabulary
from mice_jax.models import hf
from mice_jax.models.attention import AttentionRequirements, choose_backend
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder
from mice_jax.optim import Schedule, make_optimizer, make_phase_schedule
from mice_jax.sharding import local_shards, make_mesh, num_shards, param_shardings
from mice_jax.step import StepFunctions, make_abstract_state, make_step
from mice_jax.training import memory_model
from mice_jax.training.phases import PhaseSpan, phase_spans


# ---------------------------------------------------------------------------------------- inputs
class Inputs(NamedTuple):
    """What a run starts from, read as far as config.json and tokenizer."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    remarks: list[str]  # what the user should know of the tokenizer

    def spec(self) -> ModelSpec:
        """The model, with an embedding row for each token of the tokenizer; UserError where the two do not match."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return with_vocabulary(self.source, self.tokenizer.get_vocab(), added)


def inputs(config: Config) -> Inputs:
    """Reads what `model.init_from` and `data.tokenizer` name; UserError where they cannot be read."""
    source = resolve_source(config.model.init_from)
    remarks: list[str] = []
    tokenizer = load_tokenizer(config.data.tokenizer or str(source.folder), config.data.chat_template, remarks)
    return Inputs(source, tokenizer, remarks)


def encoder(config: Config, tokenizer: PreTrainedTokenizerBase, today: datetime.date | None = None) -> ChatEncoder:
    """The encoder of the run's chats; `today` is the date that a chat template may write."""
    return ChatEncoder(tokenizer, train_on=config.data.train_on, today=today)


# ---------------------------------------------------------------------------------------- data
class RunData(NamedTuple):
    """A run's data and the steps that they make."""

    dataset: Dataset
    mixture: Mixture
    total_steps: int
    spans: list[PhaseSpan]

    @property
    def mean_length(self) -> float:
        """Tokens of a sample, on average."""
        return statistics.mean_length(self.dataset.report)


def data(
    config: Config,
    encoder: ChatEncoder,
    log: Callable[[str], None] = lambda text: None,
    watch: Callable[[str], Callable[[float, int], None]] = lambda what: lambda done, samples: None,
) -> RunData:
    """Opens the token stores of a run, or builds them, and plans which samples each of its steps holds.

    Args:
      config: the run's config.
      encoder: the encoder of its chats.
      log: is called with a sentence about anything that the user should know.
      watch: makes, for the path of a source, a callback that is told how much of it is tokenised.

    Raises:
      UserError: where the data cannot be read, or leave a phase without a sample.
    """
    dataset = build_dataset(config.data, encoder, log, watch)
    mixture = Mixture(
        dataset.phases,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        drop_remainder=config.data.drop_remainder,
    )
    total_steps = min(len(mixture), config.optim.max_steps or len(mixture))
    return RunData(dataset, mixture, total_steps, phase_spans(config.data.phases, mixture.phase_ends(), total_steps))


def step_source(
    config: Config, data: RunData, shapes: tuple[Shape, ...], num_shards: int, shards: tuple[int, ...]
) -> StepSource:
    """The steps of a run, packed into microbatches.

    Args:
      config: the run's config.
      data: its data.
      shapes: the shapes that a microbatch may have on one shard, largest first.
      num_shards: the number of shards that a microbatch's rows are split into.
      shards: those of them that this process fills.
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
    )


def held_out_packer(
    config: Config, data: RunData, shapes: tuple[Shape, ...], mesh: Mesh
) -> Callable[[Mixture], StepSource]:
    """Packs passes over held-out samples, of which each token weighs the same."""
    corpus, shards = data.dataset.corpus, (num_shards(mesh), local_shards(mesh))
    return lambda mixture: StepSource(corpus, mixture, shapes, *shards, "token", config.seed)


# ---------------------------------------------------------------------------------------- model
class Model(NamedTuple):
    """The model of a run and how it is computed on its mesh."""

    decoder: Decoder
    compute: Compute
    shapes: tuple[Shape, ...]  # that a microbatch may have on one device, largest first
    memory_inputs: memory_model.MemoryInputs
    memory: int  # bytes of one device that a program may use

    @property
    def rows(self) -> int:
        """Rows of the largest microbatch on one device."""
        return self.shapes[0].rows


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
      config: the run's config.
      source: what the run starts from.
      spec: its model, with the vocabulary of its tokenizer.
      mesh: the mesh of its devices.
      attention: the attention backend, as `attention` chose it.
      mean_length: tokens of a sample, on average.
      recorded: what the run chose when it last ran on such a mesh.
    """
    platform = mesh.devices.flat[0].platform
    decoder = make_decoder(spec, mesh.shape["tensor"])
    dtype = compute_dtype(config, platform)
    needs = memory_inputs(config, decoder, source.architecture, mesh, dtype, attention)
    memory = memory_model.device_memory_bytes(jax.local_devices()[0])  # Another process's device does not tell.
    rows, remat = rows_and_remat(
        config, needs, mean_length=mean_length, memory=memory, platform=platform, recorded=recorded
    )
    compute = Compute(jnp.dtype(dtype), attention, remat)
    return Model(decoder, compute, microbatch_shapes(config.data.max_length, rows), needs, memory)


def compute_dtype(config: Config, platform: str) -> str:
    """The dtype of the run's activations; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    return "float32" if platform == "cpu" else "bfloat16"


def attention(
    config: Config, spec: ModelSpec, platform: str, capability: str | None, recorded: dict[str, Any] | None = None
) -> str:
    """The attention backend; for "auto", the one that is `recorded` where there is one."""
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
            ),
        )
    except UserError as e:
        if taken == asked:
            raise
        raise UserError(
            f'{e} model.attention is "auto", which took {taken!r} when the run was last on such devices (config.json, '
            "resolved.attention), and a run goes on as it began: use the versions that it began with, or another "
            "--workdir."
        ) from None


def attention_on_mesh(config: Config, spec: ModelSpec, mesh: Mesh, recorded: dict[str, Any]) -> str:
    """The attention backend of a run on the devices of a mesh; see `attention`."""
    device = mesh.devices.flat[0]
    return attention(config, spec, device.platform, getattr(device, "compute_capability", None), recorded)


def optimizer(config: Config, decoder: Decoder, architecture: str) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer, and the mask of what is trained (None = all of it)."""
    o = config.optim
    trained = hf.trained_mask(decoder, architecture, o.frozen) if o.frozen else None
    made = make_optimizer(
        name=o.name,
        grad_clip=o.grad_clip,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        moments_dtype=o.moments_dtype,
        axes=decoder.axes,
        trained=trained,
    )
    return made, trained


def memory_inputs(
    config: Config, decoder: Decoder, architecture: str, mesh: Mesh | AbstractMesh, dtype: str, attention: str
) -> memory_model.MemoryInputs:
    """What a run lays on one device, by which rows and remat are chosen."""
    return memory_model.MemoryInputs(
        decoder,
        make_abstract_state(decoder, optimizer(config, decoder, architecture)[0], mesh),
        mesh,
        jnp.dtype(dtype),
        attention,
        jnp.dtype(config.optim.accumulate_dtype),
        config.data.max_length,
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
    """Rows of a microbatch on one device and the remat policy: as given, else as recorded, else as they fit.

    `memory` is what a program may use of one device, in bytes; `mean_length` is tokens a sample.
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
    """Rows of one device beyond which a microbatch is no faster, or a step of such samples has no more."""
    wanted = mean_length * config.optim.batch_size / (config.data.max_length * num_shards(inputs.mesh))
    return memory_model.max_useful_rows(inputs, platform, wanted)


def schedule(config: Config, spans: Sequence[PhaseSpan], horizon: int) -> Schedule:
    """The learning rate over a run whose phases have these steps; a whole schedule takes `horizon` of them."""
    o = config.optim
    return make_phase_schedule(
        [(s.first, s.phase.learning_rate or o.learning_rate, s.phase.schedule == "restart") for s in spans],
        horizon=horizon,
        kind=o.schedule,
        warmup_steps=o.warmup_steps,
        warmup_ratio=o.warmup_ratio,
        final_ratio=o.final_ratio,
        decay_ratio=o.decay_ratio,
    )


def step_functions(
    config: Config, decoder: Decoder, architecture: str, mesh: Mesh, compute: Compute, schedule: Schedule
) -> StepFunctions:
    made, trained = optimizer(config, decoder, architecture)
    return make_step(decoder, made, schedule, mesh, compute, trained, config.optim.accumulate_dtype)


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

    Raises:
      UserError: The weights are missing, damaged or of other shapes.
    """
    mesh = make_mesh(1, -1, 1) if mesh is None else mesh
    decoder = make_decoder(source.spec, mesh.shape["tensor"])
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh), step=step)
    return LoadedModel(decoder, params if dtype is None else cast_params(params, dtype), mesh)
