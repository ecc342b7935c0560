"""Gemma 3, text: norms on queries and keys, and different rotary positions in layers with a window."""

import dataclasses

from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.families.gemma2 import NAMES, gemma_spec
from mice_jax.models.families.rope_config import read_local_rope
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Gemma3ForCausalLM"
__all__ = ["ARCHITECTURE", "NAMES", "spec_from_hf"]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Gemma 3 model from its config.json."""
    c.only(attn_logit_softcapping=None)
    spec = gemma_spec(c, theta=1_000_000.0, layer_type="full_attention")
    every = c.integer("sliding_window_pattern", 6)
    c.only(_sliding_window_pattern=every)
    windows = c.windows(c.window("sliding_window", 4096), [(i + 1) % every != 0 for i in range(spec.num_layers)])
    full, sliding = spec.ropes[0], read_local_rope(c, spec.head_dim, 10_000.0)
    return dataclasses.replace(
        spec,
        windows=windows,
        ropes=tuple(full if w is None else sliding for w in windows),
        logit_softcap=c.or_none("final_logit_softcapping", None),
        qk_norm="head",
    )
