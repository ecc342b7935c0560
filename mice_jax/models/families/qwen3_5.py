"""Qwen3.5: the gated delta rule in three of four layers, and gated attention with partial RoPE in the others.

Text has the same position in all of the sections of its RoPE, which then equals an ordinary one.
"""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec, with_recurrent_layers
from mice_jax.models.families.names import name
from mice_jax.models.spec import GatedDelta, ModelSpec

ARCHITECTURE = "Qwen3_5ForCausalLM"
NAMES = [
    *names.PRE_NORM,
    name("model.layers.{}.linear_attn.in_proj_qkv.weight", *(f"layers.gated_delta.{part}" for part in "qkv")),
    name("model.layers.{}.linear_attn.conv1d.weight", *(f"layers.gated_delta.{part}_kernel" for part in "qkv")),
    name("model.layers.{}.linear_attn.in_proj_z.weight", "layers.gated_delta.gate"),
    name("model.layers.{}.linear_attn.in_proj_b.weight", "layers.gated_delta.beta"),
    name("model.layers.{}.linear_attn.in_proj_a.weight", "layers.gated_delta.step"),
    name("model.layers.{}.linear_attn.dt_bias", "layers.gated_delta.step_bias"),
    name("model.layers.{}.linear_attn.A_log", "layers.gated_delta.rate_log"),
    name("model.layers.{}.linear_attn.norm.weight", "layers.gated_delta.scale"),
    name("model.layers.{}.linear_attn.out_proj.weight", "layers.gated_delta.out"),
]
# Keys of the head that predicts several tokens, and of positions in images, which have no effect on a decoder of text.
OF_MTP = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
OF_IMAGES = ("mrope_section", "mrope_interleaved")


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of the decoder of a Qwen3.5 model from its config.json."""
    c.only(attn_output_gate=True, output_gate_type="swish", mamba_ssm_dtype="float32", mlp_only_layers=[])
    for key in OF_MTP:
        c.get(key)
    spec = llama_like_spec(c, head_dim=256, partial_rope=0.25, own_rope_keys=OF_IMAGES)
    bias, interval = c.flag("attention_bias", False), c.integer("full_attention_interval", 4)
    periodic = [i % interval == 0 for i in range(1, spec.num_layers + 1)]
    attends = c.layer_types({"linear_attention": False, "full_attention": True}, default=periodic)
    if spec.activation != "silu":
        raise ValueError(f"hidden_act={c.get('hidden_act')!r}; only 'silu' is supported")
    delta = GatedDelta(
        num_key_heads=c.integer("linear_num_key_heads", 16),
        num_value_heads=c.integer("linear_num_value_heads", 32),
        key_dim=c.integer("linear_key_head_dim", 128),
        value_dim=c.integer("linear_value_head_dim", 128),
        taps=c.integer("linear_conv_kernel_dim", 4),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise ValueError(
            f"linear_num_value_heads={delta.num_value_heads}; it must be a multiple of "
            f"linear_num_key_heads={delta.num_key_heads}"
        )
    spec = with_recurrent_layers(spec, delta, attends)
    return dataclasses.replace(spec, attention_gate=True, qk_norm="head", norm_offset=1.0, qkv_bias=bias, out_bias=bias)
