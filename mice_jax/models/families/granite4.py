"""Granite 4, dense: Granite 3 with gate and up in one tensor; the class has experts and Mamba-2 layers too."""

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.families.granite import with_multipliers
from mice_jax.models.families.names import name
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
NAMES = [
    names.EMBED,
    *names.PRE_NORMS,
    *names.QKV,
    *names.ATTENTION_OUT,
    name("model.layers.{}.shared_mlp.input_linear.weight", "layers.mlp.gate", "layers.mlp.up"),
    name("model.layers.{}.shared_mlp.output_linear.weight", "layers.mlp.down"),
    *names.ENDS,
]
# Keys of experts and of Mamba-2 layers, which have no effect on a model without them.
MAMBA = ("chunk_size", "conv_bias", "d_conv", "d_head", "d_state", "expand", "n_groups", "n_heads", "proj_bias")
WITHOUT_EFFECT = ["init_method", "intermediate_size", "num_experts_per_tok", "router_aux_loss_coef", "time_step_limit"]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a dense Granite 4 model from its config.json."""
    c.only(normalization_function="rmsnorm", output_router_logits=False)
    if (experts := c.get("num_local_experts", 8)) != 0:
        raise ValueError(f"num_local_experts={experts!r}; mixture-of-experts layers are not supported, so it must be 0")
    for key in (*WITHOUT_EFFECT, *(f"mamba_{key}" for key in MAMBA)):
        c.get(key)
    spec = llama_like_spec(c, d_ff_key="shared_intermediate_size", d_ff=1024)
    types = c.get("layer_types", ["mamba"] * spec.num_layers)
    if types not in (["attention"] * spec.num_layers, ["full_attention"] * spec.num_layers):
        raise ValueError(f"layer_types={types!r}; Mamba-2 layers are not supported, so each layer must be 'attention'")
    if (positions := c.get("position_embedding_type")) != "rope":
        raise ValueError(f"position_embedding_type={positions!r}; only 'rope' is supported")
    return with_multipliers(c, spec)
