"""SmolLM3: every fourth layer is without positions."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.reading import Reader, plain_spec
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "SmolLM3ForCausalLM"
NAMES = names.PRE_NORM


def spec_from_hf(c: Reader) -> ModelSpec:
    spec, bias = plain_spec(c, theta=2_000_000.0, tied=True), c.flag("attention_bias", False)
    every = c.integer("no_rope_layer_interval", 4)
    turned = c.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(spec.num_layers)])  # 1 = with RoPE
    if not isinstance(turned, list) or len(turned) < spec.num_layers or any(t not in (0, 1) for t in turned):
        raise ValueError(f"no_rope_layers={turned!r}; it must list 0 or 1 for each of {spec.num_layers} layers")
    turned = turned[: spec.num_layers]
    window = c.window("sliding_window", None)
    window = window if c.flag("use_sliding_window", False) else None
    c.get("max_window_layers")  # of no effect
    return dataclasses.replace(
        spec,
        ropes=tuple(rope if turns else None for rope, turns in zip(spec.ropes, turned, strict=True)),
        windows=c.windows(window, [window is not None and not turns for turns in turned]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )
