"""OLMo 2: norms after attention and MLP instead of before, and on all heads' queries and keys together."""

import dataclasses
from typing import Any

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Olmo2ForCausalLM"
NAMES = [*names.PROJECTIONS, *names.POST_NORMS]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of an OLMo 2 model from its config.json."""
    return olmo_spec(c)


def olmo_spec(c: ConfigReader, **defaults: Any) -> ModelSpec:
    """Makes the part of a spec that OLMo 2 and 3 have in common; `defaults` are arguments of `llama_like_spec`."""
    spec, bias = llama_like_spec(c, norm_eps=1e-5, **defaults), c.flag("attention_bias", False)
    return dataclasses.replace(spec, pre_norm=False, post_norm=True, qk_norm="all", qkv_bias=bias, out_bias=bias)
