"""Llama 2, 3, 3.1 and 3.2; Granite 7B, Granite 3B Code (biases) and SmolLM2 are of this architecture too."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.reading import Reader, plain_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: Reader) -> ModelSpec:
    c.only(rope_interleaved=False)  # SmolLM2 says so
    attention_bias = c.flag("attention_bias", False)
    return dataclasses.replace(
        plain_spec(c), qkv_bias=attention_bias, out_bias=attention_bias, mlp_bias=c.flag("mlp_bias", False)
    )
