"""OLMo 3: OLMo 2 with windows in three of four layers; RoPE is scaled in the other layers only."""

import dataclasses

from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.families.olmo2 import NAMES, olmo_spec
from mice_jax.models.families.rope_config import read_local_rope
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Olmo3ForCausalLM"
__all__ = ["ARCHITECTURE", "NAMES", "spec_from_hf"]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of an OLMo 3 model from its config.json."""
    spec = olmo_spec(c, theta=500_000.0, layer_type="full_attention")
    windows = c.windows(c.window("sliding_window", 4096), [(i + 1) % 4 != 0 for i in range(spec.num_layers)])
    full = spec.ropes[0]
    sliding = read_local_rope(c, spec.head_dim, 500_000.0, theta_key="rope_theta")
    if full is None or sliding != dataclasses.replace(full, scaling=None):  # transformers 4 has one theta
        raise ValueError(
            f"rope_parameters={c.get('rope_parameters')!r}; sliding_attention must have the rope_theta of "
            "full_attention, and rope_type 'default'"
        )
    return dataclasses.replace(spec, windows=windows, ropes=tuple(full if w is None else sliding for w in windows))
