"""LFM2: gated short convolutions in most layers; attention with a norm on each head's queries and keys in the rest."""

import dataclasses

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec, with_recurrent_layers
from mice_jax.models.families.names import name
from mice_jax.models.spec import ModelSpec, ShortConv

ARCHITECTURE = "Lfm2ForCausalLM"
NAMES = [
    names.EMBED,
    name("model.layers.{}.operator_norm.weight", "layers.attention_norm.scale"),
    name("model.layers.{}.ffn_norm.weight", "layers.mlp_norm.scale"),
    *names.QKV,
    name("model.layers.{}.self_attn.q_layernorm.weight", "layers.attention.q_norm.scale"),
    name("model.layers.{}.self_attn.k_layernorm.weight", "layers.attention.k_norm.scale"),
    name("model.layers.{}.self_attn.out_proj.weight", "layers.attention.o"),
    name("model.layers.{}.conv.in_proj.weight", *(f"layers.short_conv.{part}" for part in "bcx")),
    name("model.layers.{}.conv.in_proj.bias", *(f"layers.short_conv.{part}_bias" for part in "bcx")),
    name("model.layers.{}.conv.conv.weight", "layers.short_conv.kernel"),
    name("model.layers.{}.conv.conv.bias", "layers.short_conv.kernel_bias"),
    name("model.layers.{}.conv.out_proj.weight", "layers.short_conv.out"),
    name("model.layers.{}.conv.out_proj.bias", "layers.short_conv.out_bias"),
    name("model.layers.{}.feed_forward.w1.weight", "layers.mlp.gate"),
    name("model.layers.{}.feed_forward.w3.weight", "layers.mlp.up"),
    name("model.layers.{}.feed_forward.w2.weight", "layers.mlp.down"),
    name("model.embedding_norm.weight", "final_norm.scale"),
    name("lm_head.weight", "head.weight"),
]
# Keys of how the weights were drawn, which have no effect afterwards.
INIT_KEYS = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of an LFM2 model from its config.json."""
    tied = c.flag("tie_embedding", c.flag("tie_word_embeddings", True))
    _check_equal(c, "tie_embedding", "tie_word_embeddings")
    _check_equal(c, "block_ff_dim", "intermediate_size")
    width = c.integer("block_ff_dim", c.integer("intermediate_size", 12_288))
    spec = llama_like_spec(c, theta=1_000_000.0, norm_eps=1e-5, norm_eps_key="norm_eps", d_ff=width, tied=tied)
    rope = spec.ropes[0]
    # Releases repeat these under names that transformers does not read.
    repeated = {"block_norm_eps": spec.norm_eps, "num_heads": spec.num_heads, "theta": rope.theta if rope else None}
    repeated |= dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), spec.d_model)
    c.only(hidden_act="silu", block_use_swiglu=True, use_pos_enc=True, **repeated)
    for key in INIT_KEYS:
        c.get(key)
    conv = ShortConv(c.integer("conv_L_cache", 3), c.flag("conv_bias", False))
    attends = _layers_with_attention(c, spec.num_layers)
    spec = dataclasses.replace(spec, d_ff=_adjusted(c, width), qk_norm="head", tie_embeddings=tied)
    return with_recurrent_layers(spec, conv, attends)


def _check_equal(c: ConfigReader, first: str, second: str) -> None:
    """Checks two keys of which transformers reads the second only if the first is absent."""
    a, b = c.get(first), c.get(second)
    if a is not None and b is not None and a != b:
        raise ValueError(f"{first}={a!r} and {second}={b!r}, which mean the same; remove the wrong one")


def _layers_with_attention(c: ConfigReader, layers: int) -> list[bool]:
    """Reads which layers have attention: by name, by index, or all of them."""
    indices = c.get("full_attn_idxs")
    every = list(range(layers))
    if indices is not None and (not isinstance(indices, list) or any(i not in every for i in indices)):
        raise ValueError(f"full_attn_idxs={indices!r}; it must list indices of {layers} layers")
    by_index = None if indices is None else [i in indices for i in every]
    by_name = c.layer_types({"full_attention": True, "conv": False}, default=by_index or [True] * layers)
    if by_index not in (None, by_name):
        types = c.get("layer_types")
        raise ValueError(f"layer_types={types!r} but full_attn_idxs={indices!r}; remove the wrong one")
    return by_name


def _adjusted(c: ConfigReader, width: int) -> int:
    """Computes the width of the MLP: 2/3 of that in the config.json, times a factor, rounded up to a multiple."""
    multiple, factor = c.integer("block_multiple_of", 256), c.or_none("block_ffn_dim_multiplier", 1.0)
    if not c.flag("block_auto_adjust_ff_dim", True):
        return width
    adjusted = 2 * width // 3
    if factor is not None:
        adjusted = -(-int(factor * adjusted) // multiple) * multiple
    if adjusted < 1:
        raise ValueError(f"an MLP of width {adjusted} after block_auto_adjust_ff_dim, from {width}")
    return adjusted
