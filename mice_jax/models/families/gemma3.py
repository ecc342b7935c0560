"""Gemma 3, text: norms on queries and keys, and in layers with a window other rotary positions than in the rest."""

import dataclasses
from typing import Any

from mice_jax.models.families import names
from mice_jax.models.families.positions import read_local_rope
from mice_jax.models.families.reading import Reader, plain_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Gemma3ForCausalLM"
DEFAULTS: dict[str, Any] = {
    "tied": True, "head_dim": 256, "activation_key": "hidden_activation", "activation": "gelu_pytorch_tanh",
    "theta": 1_000_000.0, "layer_type": "full_attention",
}  # fmt: skip
NAMES = [*names.PROJECTIONS, *names.PRE_AND_POST_NORMS]


def spec_from_hf(c: Reader) -> ModelSpec:
    c.only(use_bidirectional_attention=False, attn_logit_softcapping=None)
    spec = plain_spec(c, **DEFAULTS)
    every, window = c.integer("sliding_window_pattern", 6), c.window("sliding_window", 4096)
    c.only(_sliding_window_pattern=every)
    c.get("hidden_act")  # an older key, which nothing goes by
    windows = c.windows(window, [(i + 1) % every != 0 for i in range(spec.num_layers)])
    full, sliding = spec.ropes[0], read_local_rope(c, spec.head_dim, 10_000.0)
    bias = c.flag("attention_bias", False)
    return dataclasses.replace(
        spec,
        windows=windows,
        ropes=tuple(full if w is None else sliding for w in windows),
        attention_scale=c.number("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_softcap=c.or_none("final_logit_softcapping", None),
        qk_norm="head",
        post_norm=True,
        norm_offset=1.0,
        embedding_multiplier=spec.d_model**0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
