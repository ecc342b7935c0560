"""Granite 3: Llama with multipliers on embeddings, attention scores, residuals and logits."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "GraniteForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Granite 3 model from its config.json."""
    return dataclasses.replace(with_multipliers(c, llama_like_spec(c)), mlp_bias=c.flag("mlp_bias", False))


def with_multipliers(c: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """Adds what Granite 3 and 4 have in common, multipliers and biases of attention, to the spec of a Llama."""
    attention_bias = c.flag("attention_bias", False)
    return dataclasses.replace(
        spec,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        embedding_multiplier=c.number("embedding_multiplier", 1.0),
        attention_scale=c.number("attention_multiplier", 1.0),  # replaces 1 / sqrt(head_dim)
        residual_multiplier=c.number("residual_multiplier", 1.0),
        logit_scale=1 / c.number("logits_scaling", 1.0),
    )
