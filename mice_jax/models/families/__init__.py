"""The model families, by the name that config.json gives them in `architectures`.

A family is one file of translation: `spec_from_hf` maps a config.json to a spec, and `NAMES` maps the checkpoint's
tensors to parameters. docs/add_a_family.md describes how to add one.
"""

from types import ModuleType

from mice_jax.models.families import (
    exaone4,
    gemma2,
    gemma3,
    gemma3_wrapped,
    gemma4,
    gemma4_wrapped,
    granite,
    granite4,
    hunyuan,
    lfm2,
    llama,
    ministral3,
    ministral3_wrapped,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_wrapped,
    smollm3,
)

FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family
    for family in (
        llama, mistral, granite, granite4, qwen2, qwen3, smollm3, olmo2, olmo3, phi3, gemma2, gemma3, gemma3_wrapped,
        gemma4, gemma4_wrapped, exaone4, hunyuan, ministral3, ministral3_wrapped, lfm2, qwen3_5, qwen3_5_wrapped,
    )
}  # fmt: skip
