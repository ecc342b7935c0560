"""Qwen3.5 as it is released: its decoder in a checkpoint with a vision tower and a head that predicts several tokens.

Neither of the two is trained.
"""

from mice_jax.models.families import qwen3_5
from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.families.names import Name
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Qwen3_5ForConditionalGeneration"
NAMES = [Name(n.hf.replace("model.", "model.language_model.", 1), n.ours) for n in qwen3_5.NAMES]
UNTRAINED = ("model.visual.", "mtp.")
# Keys of images, which have no effect on text.
OF_IMAGES = ("image_token_id", "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id")


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of the decoder from the `text_config` of a config.json."""
    for key in OF_IMAGES:
        c.get(key)
    tied = c.flag("tie_word_embeddings", False)
    spec = c.within("text_config", {"tie_word_embeddings": tied}, qwen3_5.spec_from_hf)
    if spec.tie_embeddings != tied:  # transformers reads the key outside of text_config
        raise ValueError(f"tie_word_embeddings={tied!r}, and {spec.tie_embeddings!r} in text_config; they must agree")
    return spec
