"""Granite 3: Llama with multipliers on embeddings, attention scores, residuals and logits."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "GraniteForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Granite model from its config.json."""
    attention_bias = c.flag("attention_bias", False)
    return dataclasses.replace(
        llama_like_spec(c),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=c.flag("mlp_bias", False),
        embedding_multiplier=c.number("embedding_multiplier", 1.0),
        attention_scale=c.number("attention_multiplier", 1.0),  # replaces 1 / sqrt(head_dim)
        residual_multiplier=c.number("residual_multiplier", 1.0),
        logit_scale=1 / c.number("logits_scaling", 1.0),
    )
