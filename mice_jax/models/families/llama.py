"""Llama: how its config.json and its tensor names translate. Translation only; nothing is computed here."""

from typing import Any

from mice_jax.models.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"

# Keys of config.json that change nothing that is computed here.
IGNORED = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "model_type", "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "use_cache",
    "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip


def spec_from_hf(config: dict[str, Any]) -> tuple[ModelSpec, set[str]]:
    """The spec of a config.json, and the keys that were read from it.

    Raises KeyError for a key that must be there, ValueError for a value that cannot be honoured.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={config['hidden_act']!r}; only 'silu' is computed")
    theta, rope_keys = _rope_theta(config)
    heads, d_model = config["num_attention_heads"], config["hidden_size"]
    spec = ModelSpec(
        vocab_size=config["vocab_size"],
        d_model=d_model,
        d_ff=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or d_model // heads,
        max_positions=config["max_position_embeddings"],
        rope_theta=theta,
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        init_std=config.get("initializer_range", 0.02),
    )
    read = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "initializer_range",
    }  # fmt: skip
    return spec, read | rope_keys


def _rope_theta(config: dict[str, Any]) -> tuple[float, set[str]]:
    """The old spelling (rope_theta, rope_scaling) and the new one (rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"rope_type={kind!r}; only 'default' is computed")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta), {"rope_parameters", "rope_scaling", "rope_theta"}


# One row a tensor: its name in the checkpoint ({} = the layer), its path in our tree, and how many leading
# dims of ours are inputs of a matrix product. A checkpoint stores such a weight as [outputs, inputs], ours is
# [inputs..., outputs...]; with 0 inputs it is a flat vector; None = stored as it is.
NAMES: list[tuple[str, str, int | None]] = [
    ("model.embed_tokens.weight", "embed.table", None),
    ("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale", 0),
    ("model.layers.{}.self_attn.q_proj.weight", "layers.attention.q", 1),
    ("model.layers.{}.self_attn.k_proj.weight", "layers.attention.k", 1),
    ("model.layers.{}.self_attn.v_proj.weight", "layers.attention.v", 1),
    ("model.layers.{}.self_attn.o_proj.weight", "layers.attention.o", 2),
    ("model.layers.{}.self_attn.q_proj.bias", "layers.attention.q_bias", 0),
    ("model.layers.{}.self_attn.k_proj.bias", "layers.attention.k_bias", 0),
    ("model.layers.{}.self_attn.v_proj.bias", "layers.attention.v_bias", 0),
    ("model.layers.{}.self_attn.o_proj.bias", "layers.attention.o_bias", 0),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale", 0),
    ("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate", 1),
    ("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up", 1),
    ("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down", 1),
    ("model.layers.{}.mlp.gate_proj.bias", "layers.mlp.gate_bias", 0),
    ("model.layers.{}.mlp.up_proj.bias", "layers.mlp.up_bias", 0),
    ("model.layers.{}.mlp.down_proj.bias", "layers.mlp.down_bias", 0),
    ("model.norm.weight", "final_norm.scale", 0),
    ("lm_head.weight", "head.weight", 1),
]
