"""SmolLM3: every fourth layer has no positions."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "SmolLM3ForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a SmolLM3 model from its config.json."""
    spec, bias = llama_like_spec(c, theta=2_000_000.0, tied=True), c.flag("attention_bias", False)
    every = c.integer("no_rope_layer_interval", 4)
    has_rope = c.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(spec.num_layers)])  # 1 = RoPE
    if not isinstance(has_rope, list) or len(has_rope) < spec.num_layers or any(t not in (0, 1) for t in has_rope):
        raise ValueError(f"no_rope_layers={has_rope!r}; it must list 0 or 1 for each of {spec.num_layers} layers")
    has_rope = has_rope[: spec.num_layers]
    window = c.window("sliding_window", None)
    window = window if c.flag("use_sliding_window", False) else None
    c.get("max_window_layers")  # has no effect
    return dataclasses.replace(
        spec,
        ropes=tuple(rope if rotated else None for rope, rotated in zip(spec.ropes, has_rope, strict=True)),
        windows=c.windows(window, [window is not None and not rotated for rotated in has_rope]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )
