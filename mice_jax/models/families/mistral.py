"""Mistral 7B: v0.1 with a sliding window in every layer, v0.3 without."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "MistralForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Mistral model from its config.json."""
    spec = llama_like_spec(c)
    window = c.window("sliding_window", 4096)  # null in later models
    return dataclasses.replace(spec, windows=(window,) * spec.num_layers)
