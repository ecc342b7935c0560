"""Phi-3 and Phi-4-mini: queries, keys and values in one tensor, gate and up in another; LongRoPE, partial rotation."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.families.names import name
from mice_jax.models.spec import LongScaling, ModelSpec

ARCHITECTURE = "Phi3ForCausalLM"
NAMES = [
    names.EMBED,
    *names.PRE_NORMS,
    name(
        "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.attention.q", "layers.attention.k", "layers.attention.v",
    ),
    *names.ATTENTION_OUT,
    name("model.layers.{}.mlp.gate_up_proj.weight", "layers.mlp.gate", "layers.mlp.up"),
    *names.MLP_OUT,
    *names.ENDS,
]  # fmt: skip


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Phi-3 model from its config.json."""
    c.only(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    spec = llama_like_spec(c, norm_eps=1e-5, partial_rope=1.0)
    scaling = spec.ropes[0].scaling if spec.ropes[0] else None
    if scaling is not None:
        if not isinstance(scaling, LongScaling):
            raise ValueError("a rope_type that this architecture does not have; it has default and longrope")
        c.integer("original_max_position_embeddings")  # required here, since transformers would take 4096
    return dataclasses.replace(spec, windows=(c.window("sliding_window", None),) * spec.num_layers)
