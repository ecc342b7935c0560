"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Qwen2ForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Qwen2 model from its config.json."""
    c.only(use_mrope=False)
    spec = llama_like_spec(c)
    return dataclasses.replace(spec, qkv_bias=True, windows=c.late_windows(spec.num_layers))
