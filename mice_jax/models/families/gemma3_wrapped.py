"""Gemma 3 4B, 12B and 27B: the decoder of Gemma 3 in a checkpoint with a vision tower, which is not trained."""

from mice_jax.models.families import gemma3, names
from mice_jax.models.families.config_reader import ConfigReader
from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "Gemma3ForConditionalGeneration"
NAMES = names.with_prefix("language_model.", gemma3.NAMES)
UNTRAINED = ("vision_tower.", "multi_modal_projector.")
# Keys of images, which have no effect on text.
OF_IMAGES = ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config")
# Published files leave these keys of text_config out.
TEXT_DEFAULTS = {
    "vocab_size": 262208, "max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of the decoder from the `text_config` of a config.json."""
    for key in (*OF_IMAGES, "initializer_range"):  # text_config has an initializer_range of its own
        c.get(key)
    c.only(tie_word_embeddings=True)
    spec = c.within("text_config", TEXT_DEFAULTS, gemma3.spec_from_hf)
    if spec.logit_softcap is not None:  # transformers applies it in the class without a vision tower only
        raise ValueError(f"in text_config, final_logit_softcapping={spec.logit_softcap}; only None is supported")
    if not spec.tie_embeddings:  # transformers reads the key outside of text_config
        raise ValueError("in text_config, tie_word_embeddings=False; only True is supported")
    return spec
