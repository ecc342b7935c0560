"""Ministral 3 as it is published: its decoder in a checkpoint with a vision tower, which is not trained."""

from mice_jax.models.families import ministral3, names
from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Mistral3ForConditionalGeneration"
NAMES = names.with_prefix("language_model.", ministral3.NAMES)
UNTRAINED = ("vision_tower.", "multi_modal_projector.")
# Keys of images, which have no effect on text.
OF_IMAGES = (
    "image_token_index", "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_config",
    "vision_feature_layer",
)  # fmt: skip


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of the decoder from the `text_config` of a config.json."""
    for key in OF_IMAGES:
        c.get(key)
    text = c.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else "ministral3"
    if kind != "ministral3":  # Mistral Small 3 has the same class
        raise ValueError(f"in text_config, model_type={kind!r}; only 'ministral3' is supported")
    tied = c.flag("tie_word_embeddings", True)
    spec = c.within("text_config", {"tie_word_embeddings": tied}, ministral3.spec_from_hf)
    if spec.tie_embeddings != tied:  # transformers reads the first, other programs the second
        raise ValueError(f"tie_word_embeddings={tied} (true if absent), and {spec.tie_embeddings} in text_config")
    return spec
