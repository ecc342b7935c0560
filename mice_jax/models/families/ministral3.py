"""Ministral 3: Mistral with YaRN, and queries scaled by a function of their position."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.families.rope_config import QUERY_SCALE_KEYS, read_query_beta
from mice_jax.models.spec import ModelSpec, QueryScale, YarnScaling

ARCHITECTURE = "Ministral3ForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Ministral 3 model from its config.json."""
    spec = llama_like_spec(c, head_dim=128, norm_eps=1e-5, own_rope_keys=QUERY_SCALE_KEYS)
    scaling = spec.ropes[0].scaling if spec.ropes[0] else None
    if not isinstance(scaling, YarnScaling):
        raise ValueError("a rope_type that this architecture does not have; it has yarn")
    windows = (c.window("sliding_window", None),) * spec.num_layers
    scale = QueryScale(read_query_beta(c), scaling.original_positions)
    return dataclasses.replace(spec, windows=windows, query_scale=scale)
