"""Gemma 4 as it is released: its decoder in a checkpoint with towers for images and sound, which are not trained."""

from typing import Any

from mice_jax.models.families import gemma4
from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.families.names import Name
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Gemma4ForConditionalGeneration"
NAMES = [Name(n.hf.replace("model.", "model.language_model.", 1), n.ours) for n in gemma4.NAMES]
UNTRAINED = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
FROZEN = gemma4.FROZEN
# Keys of images and sound, which have no effect on text.
OF_OTHERS = (
    "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id",
    "image_token_id", "video_token_id", "vision_config", "vision_soft_tokens_per_image",
)  # fmt: skip


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of the decoder from the `text_config` of a config.json."""
    for key in (*OF_OTHERS, "initializer_range"):  # text_config has an initializer_range of its own
        c.get(key)
    c.only(tie_word_embeddings=True)
    return c.within("text_config", {"vocab_size": 262144, "max_position_embeddings": 131072}, gemma4.spec_from_hf)


def unused(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the prefixes of tensors that releases have and nothing reads: keys and values of layers that borrow."""
    text = config["text_config"]
    layers, shared = text["num_hidden_layers"], text.get("num_kv_shared_layers") or 0
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    first = layers - shared
    return tuple(f"model.language_model.layers.{i}.self_attn.{p}." for i in range(first, layers) for p in parts)
