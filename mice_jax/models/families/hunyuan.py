"""Hunyuan, dense: norms on heads' queries and keys after their rotation, and RoPE with a factor on its base."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.families.names import name
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "HunYuanDenseV1ForCausalLM"
NAMES = [
    *(n for n in names.PRE_NORM if n not in names.QK_NORMS),
    name("model.layers.{}.self_attn.query_layernorm.weight", "layers.attention.q_norm.scale"),
    name("model.layers.{}.self_attn.key_layernorm.weight", "layers.attention.k_norm.scale"),
]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a dense Hunyuan model from its config.json."""
    c.only(use_qk_norm=True, use_cla=False, use_mla=False, use_rotary_pos_emb=True, norm_type="rms", mlp_bias=False)
    spec, bias = llama_like_spec(c, norm_eps=1e-5, ntk_rope=True), c.flag("attention_bias", False)
    c.only(attention_head_dim=spec.head_dim, position_embedding_xdrope=False, add_classification_head=False)
    for key in ("cla_share_factor", "eod_token_id", "org_vocab_size"):  # have no effect
        c.get(key)
    return dataclasses.replace(spec, qk_norm="head_after_rope", qkv_bias=bias, out_bias=bias)
