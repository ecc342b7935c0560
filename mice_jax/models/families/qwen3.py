"""Qwen3: a norm on each head's queries and keys."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Qwen3ForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Qwen3 model from its config.json."""
    spec, bias = llama_like_spec(c, head_dim=128), c.flag("attention_bias", False)
    windows = c.late_windows(spec.num_layers)
    return dataclasses.replace(spec, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=windows)
