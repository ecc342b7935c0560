"""Llama 2, 3, 3.1 and 3.2; Granite 7B, Granite 3B Code (with biases) and SmolLM2 have this architecture too."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Llama model from its config.json."""
    c.only(rope_interleaved=False)  # a key of SmolLM2
    attention_bias = c.flag("attention_bias", False)
    return dataclasses.replace(
        llama_like_spec(c), qkv_bias=attention_bias, out_bias=attention_bias, mlp_bias=c.flag("mlp_bias", False)
    )
