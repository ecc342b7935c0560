"""Granite 4: Granite 3 with gate and up in one tensor, and Mamba-2 instead of attention in some layers of hybrids.

The class has experts too, which are not supported.
"""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec, with_recurrent_layers
from mice_jax.models.families.granite import with_multipliers
from mice_jax.models.families.names import name
from mice_jax.models.spec import Mamba2, ModelSpec

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
CONVOLVED = ("x", "b", "c")
PROJECTED = ("gate", *CONVOLVED)
NAMES = [
    names.EMBED,
    *names.PRE_NORMS,
    *names.QKV,
    *names.ATTENTION_OUT,
    name(
        "model.layers.{}.mamba.in_proj.weight", *(f"layers.mamba2.{part}" for part in PROJECTED), "layers.mamba2.step"
    ),
    name(
        "model.layers.{}.mamba.in_proj.bias",
        *(f"layers.mamba2.{part}_bias" for part in PROJECTED),
        "layers.mamba2.step_projection_bias",
    ),
    name("model.layers.{}.mamba.conv1d.weight", *(f"layers.mamba2.{part}_kernel" for part in CONVOLVED)),
    name("model.layers.{}.mamba.conv1d.bias", *(f"layers.mamba2.{part}_kernel_bias" for part in CONVOLVED)),
    name("model.layers.{}.mamba.dt_bias", "layers.mamba2.step_bias"),
    name("model.layers.{}.mamba.A_log", "layers.mamba2.rate_log"),
    name("model.layers.{}.mamba.D", "layers.mamba2.skip"),
    name("model.layers.{}.mamba.norm.weight", "layers.mamba2.scale"),
    name("model.layers.{}.mamba.out_proj.weight", "layers.mamba2.out"),
    name("model.layers.{}.mamba.out_proj.bias", "layers.mamba2.out_bias"),
    name("model.layers.{}.shared_mlp.input_linear.weight", "layers.mlp.gate", "layers.mlp.up"),
    name("model.layers.{}.shared_mlp.output_linear.weight", "layers.mlp.down"),
    *names.ENDS,
]
WITHOUT_EFFECT = ("init_method", "intermediate_size", "mamba_chunk_size", "num_experts_per_tok", "router_aux_loss_coef")
# Keys of Mamba-2 layers, which dense models have too.
MAMBA = ("conv_bias", "d_conv", "d_head", "d_state", "expand", "n_groups", "n_heads", "proj_bias")
# The names of the kinds of layers in releases and in what transformers 5 writes.
ATTENDS = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Granite 4 model without experts from its config.json."""
    c.only(normalization_function="rmsnorm", output_router_logits=False)
    if (experts := c.get("num_local_experts", 8)) != 0:
        raise ValueError(f"num_local_experts={experts!r}; mixture-of-experts layers are not supported, so it must be 0")
    for key in (*WITHOUT_EFFECT, "time_step_limit", *(f"mamba_{key}" for key in MAMBA)):
        c.get(key)
    spec = with_multipliers(c, llama_like_spec(c, d_ff_key="shared_intermediate_size", d_ff=1024))
    attends = c.layer_types(ATTENDS, default=[False] * spec.num_layers)
    if (positions := c.get("position_embedding_type")) not in (None, "nope", "rope"):
        raise ValueError(f"position_embedding_type={positions!r}; only 'rope' and 'nope' are supported")
    mamba = None if all(attends) else _mamba(c, spec)
    if spec.activation != "silu" and not all(attends):
        raise ValueError(f"hidden_act={c.get('hidden_act')!r}; only 'silu' is supported with Mamba-2 layers")
    if positions != "rope":
        spec = dataclasses.replace(spec, ropes=(None,) * spec.num_layers)
    return with_recurrent_layers(spec, mamba, attends)


def _mamba(c: ConfigReader, spec: ModelSpec) -> Mamba2:
    """Reads what all Mamba-2 layers have."""
    heads, width = c.integer("mamba_n_heads", 128), c.integer("mamba_expand", 2) * spec.d_model
    head_dim = width // heads if c.get("mamba_d_head", "auto") == "auto" else c.integer("mamba_d_head")
    groups = c.integer("mamba_n_groups", 1)
    if heads * head_dim != width or heads % groups:
        raise ValueError(
            f"mamba_n_heads={heads}; it must divide mamba_expand * hidden_size={width} into heads of mamba_d_head="
            f"{head_dim}, and be a multiple of mamba_n_groups={groups}"
        )
    return Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        num_groups=groups,
        state_dim=c.integer("mamba_d_state", 256),
        taps=c.integer("mamba_d_conv", 4),
        time_step_limits=_limits(c),
        bias=c.flag("mamba_proj_bias", False),
        conv_bias=c.flag("mamba_conv_bias", True),
    )


def _limits(c: ConfigReader) -> tuple[float, float]:
    """Reads the least and the greatest time step; transformers writes infinity as an object."""
    limits = c.get("time_step_limit", [0.0, float("inf")])
    numbers = limits if isinstance(limits, list) else []
    numbers = [float("inf") if x == {"__float__": "Infinity"} else x for x in numbers]
    if len(numbers) != 2 or any(isinstance(x, bool) or not isinstance(x, int | float) or x < 0 for x in numbers):
        raise ValueError(f"time_step_limit={limits!r}; it must be the least and the greatest time step")
    return float(numbers[0]), float(numbers[1])
