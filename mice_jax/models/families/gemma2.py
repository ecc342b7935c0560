"""Gemma 2: norms before and after, soft caps on scores and logits, windows in every other layer."""

import dataclasses
from typing import Any

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Gemma2ForCausalLM"
NAMES = [*names.PROJECTIONS, *names.PRE_AND_POST_NORMS]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Gemma 2 model from its config.json."""
    spec = gemma_spec(c)
    return dataclasses.replace(
        spec,
        windows=c.windows(c.window("sliding_window", 4096), [i % 2 == 0 for i in range(spec.num_layers)]),
        attention_softcap=c.or_none("attn_logit_softcapping", 50.0),
        logit_softcap=c.or_none("final_logit_softcapping", 30.0),
    )


def gemma_spec(c: ConfigReader, **defaults: Any) -> ModelSpec:
    """Makes the part of a spec that Gemma 2 and 3 have in common; `defaults` are arguments of `llama_like_spec`."""
    c.only(use_bidirectional_attention=False)
    c.get("hidden_act")  # an older key that has no effect
    activation = {"activation_key": "hidden_activation", "activation": "gelu_pytorch_tanh"}
    spec, bias = llama_like_spec(c, tied=True, head_dim=256, **activation, **defaults), c.flag("attention_bias", False)
    return dataclasses.replace(
        spec,
        attention_scale=c.number("query_pre_attn_scalar", 256.0) ** -0.5,
        post_norm=True,
        norm_offset=1.0,
        embedding_multiplier=spec.d_model**0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
