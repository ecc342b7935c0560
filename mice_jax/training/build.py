"""What a config comes to on a mesh: what "auto" and 0 stand for there, its schedule and the functions of its step.

`train` runs what is made here and `plan` compiles it, so that what is planned is what is run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from mice_jax.config import Config
from mice_jax.errors import UserError
from mice_jax.inference.sampler import cast_params
from mice_jax.model_source import ModelSource, load_params
from mice_jax.models import hf
from mice_jax.models.attention import AttentionRequirements, choose_backend
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder
from mice_jax.optim import Schedule, make_optimizer, make_phase_schedule
from mice_jax.sharding import make_mesh, num_shards, param_shardings
from mice_jax.step import StepFunctions, make_abstract_state, make_step
from mice_jax.training import memory_model
from mice_jax.training.phases import Stretch


def compute_dtype(config: Config, platform: str) -> str:
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


def schedule(config: Config, stretches: Sequence[Stretch], horizon: int) -> Schedule:
    """The learning rate over a run whose phases have these steps; a whole schedule takes `horizon` of them."""
    o = config.optim
    return make_phase_schedule(
        [(s.first, s.phase.learning_rate or o.learning_rate, s.phase.schedule == "restart") for s in stretches],
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
