"""EXAONE 4: norms after attention and MLP; layers with a sliding window use RoPE, the others no positions."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Exaone4ForCausalLM"
NAMES = [*names.PROJECTIONS, *names.POST_NORMS]


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of an EXAONE 4 model from its config.json."""
    spec, window = llama_like_spec(c, norm_eps=1e-5), c.window("sliding_window", 4096)
    c.get("sliding_window_pattern")  # may be letters such as "LLLG"; layer_types says the same
    sliding = [window is not None] * spec.num_layers
    if c.get("layer_types") is None and window is not None:
        every = c.integer("sliding_window_pattern", 4)
        sliding = [(i + 1) % every != 0 for i in range(spec.num_layers)]
    windows = c.windows(window, sliding)
    has_rope = [window is None or w is not None for w in windows]
    ropes = tuple(rope if rotated else None for rope, rotated in zip(spec.ropes, has_rope, strict=True))
    return dataclasses.replace(spec, pre_norm=False, post_norm=True, qk_norm="head", windows=windows, ropes=ropes)
