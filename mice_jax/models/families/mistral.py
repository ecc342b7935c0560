"""Mistral 7B: v0.1 with a sliding window in every layer, v0.3 without."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.reading import Reader, plain_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "MistralForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: Reader) -> ModelSpec:
    spec = plain_spec(c)
    window = c.window("sliding_window", 4096)  # later models say null
    return dataclasses.replace(spec, windows=(window,) * spec.num_layers)
