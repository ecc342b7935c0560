"""Gemma 4, text: other heads in layers without a window, borrowed keys and values, and embeddings of each layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mice_jax.models.families import names
from mice_jax.models.families.config_reader import ConfigReader, llama_like_spec
from mice_jax.models.families.names import Name, name
from mice_jax.models.families.rope_config import read_rope
from mice_jax.models.spec import ATTENTION_NAMES, MLP_NAMES, AttentionKind, ModelSpec

ARCHITECTURE = "Gemma4ForCausalLM"


def _in_parts(rows: Sequence[Name], usual: str, parts: Sequence[str]) -> list[Name]:
    """Returns rows of names for parameters that are in one of several parts, which depends on the layer."""
    return [
        Name(row.hf, tuple(path.replace(f"layers.{usual}.", f"layers.{part}.") for path in row.ours))
        for row in rows
        for part in parts
    ]


NAMES = [
    names.EMBED,
    name("model.embed_tokens_per_layer.weight", "own_embeddings.table"),
    name("model.per_layer_model_projection.weight", "own_embeddings.projection"),
    name("model.per_layer_projection_norm.weight", "own_embeddings.norm.scale"),
    *_in_parts([*names.QKV, *names.QK_NORMS, *names.ATTENTION_OUT], "attention", ATTENTION_NAMES),
    *_in_parts([*names.GATE_UP, *names.MLP_OUT], "mlp", MLP_NAMES),
    *names.PRE_AND_POST_NORMS,
    name("model.layers.{}.per_layer_input_gate.weight", "layers.own_embedding.gate"),
    name("model.layers.{}.per_layer_projection.weight", "layers.own_embedding.out"),
    name("model.layers.{}.post_per_layer_input_norm.weight", "layers.own_embedding.norm.scale"),
    name("model.layers.{}.layer_scalar", "layers.layer_scale"),
    *names.ENDS,
]
# Tensors that transformers stores as buffers, which its training does not change.
FROZEN = ("*.layer_scalar",)
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


def spec_from_hf(c: ConfigReader) -> ModelSpec:
    """Makes the spec of a Gemma 4 model from its config.json."""
    if c.flag("enable_moe_block", False):
        raise ValueError("enable_moe_block=True; mixture-of-experts layers are not supported")
    for key in OF_EXPERTS:
        c.get(key)
    c.only(rope_theta=None, rope_scaling=None, partial_rotary_factor=None)  # transformers does not read them
    if c.get("use_bidirectional_attention") not in (None, "vision"):  # which concerns images only
        raise ValueError(
            f"use_bidirectional_attention={c.get('use_bidirectional_attention')!r}; only None is supported"
        )
    activation: dict[str, Any] = {"activation_key": "hidden_activation", "activation": "gelu_pytorch_tanh"}
    spec = llama_like_spec(c, tied=True, head_dim=256, layer_type="sliding_attention", **activation)
    sliding = [i % 6 != 0 for i in range(1, spec.num_layers)] + [False]
    windows = c.windows(c.integer("sliding_window", 512), sliding)
    if windows[-1] is not None:
        raise ValueError(f"layer_types={c.get('layer_types')!r}; the last layer must have full_attention")
    bias, own_dim = c.flag("attention_bias", False), c.count("hidden_size_per_layer_input", 256)
    own_rows = c.integer("vocab_size_per_layer_input", 262144)
    if own_dim and own_rows != spec.vocab_size:
        raise ValueError(f"vocab_size_per_layer_input={own_rows}; only vocab_size={spec.vocab_size} is supported")
    kinds = _kinds(c, spec, [window is not None for window in windows])
    ropes: Any = c.get("rope_parameters") or ROPES
    positions: Any = {"rope_parameters": ropes, "max_position_embeddings": spec.max_positions}
    full = read_rope(positions, kinds[-1].head_dim, 1e6, "full_attention")
    return dataclasses.replace(
        spec,
        mixers=kinds,
        windows=windows,
        ropes=tuple(full if window is None else spec.ropes[0] for window in windows),
        attention_scale=1.0,
        qk_norm="head",
        value_norm=True,
        post_norm=True,
        embedding_multiplier=spec.d_model**0.5,
        per_layer_dim=own_dim,
        layer_scales=True,
        logit_softcap=c.or_none("final_logit_softcapping", None),
        qkv_bias=bias,
        out_bias=bias,
    )


def _kinds(c: ConfigReader, spec: ModelSpec, sliding: Sequence[bool]) -> tuple[AttentionKind, ...]:
    """Reads the attention of each layer."""
    shared, wide = c.count("num_kv_shared_layers", 0), c.flag("use_double_wide_mlp", False)
    first = spec.num_layers - shared  # the first layer that borrows
    if shared and set(sliding[: max(first, 0)]) != set(sliding):
        raise ValueError(f"num_kv_shared_layers={shared}; a layer before them must have each of their layer_types")
    head_dim, num_kv_heads, same = _global_heads(c, spec, sliding)
    local = AttentionKind("local_attention", spec.head_dim, spec.num_kv_heads, False, "own", False)
    global_ = AttentionKind("global_attention", head_dim, num_kv_heads, same, "own", False)
    kinds = []
    for i, slides in enumerate(sliding):
        lends = i < first and slides in sliding[first:] and slides not in sliding[i + 1 : first]
        keys = "borrowed" if i >= first else "lent" if lends else "own"
        kinds.append(dataclasses.replace(local if slides else global_, keys=keys, wide_mlp=wide and i >= first))
    return tuple(kinds)


def _global_heads(c: ConfigReader, spec: ModelSpec, sliding: Sequence[bool]) -> tuple[int, int, bool]:
    """Reads the heads of layers without a window, in either spelling.

    Releases have keys of their own for these layers; what transformers writes has `per_layer_config`.

    Returns:
      The dims of a head, the number of key heads, and whether values are the projections of keys.
    """
    same = c.flag("attention_k_eq_v", False)
    dims, heads = c.integer("global_head_dim", 512), c.window("num_global_key_value_heads", None)
    heads = heads if same and heads else spec.num_kv_heads
    by_layer = c.get("per_layer_config")
    if by_layer is not None:
        full = [str(i) for i, slides in enumerate(sliding) if not slides]
        known, usual = {"head_dim", "num_key_value_heads"}, {"head_dim": spec.head_dim}
        usual["num_key_value_heads"] = spec.num_kv_heads
        of_layers = [by_layer.get(i) for i in full] if isinstance(by_layer, dict) else []
        fits = of_layers and sorted(by_layer) == sorted(full) and all(of == of_layers[0] for of in of_layers)
        if not fits or not isinstance(of_layers[0], dict) or not of_layers[0].keys() <= known:
            raise ValueError(
                f"per_layer_config={by_layer!r}; it must set head_dim and num_key_value_heads of all layers with "
                f"full_attention ({', '.join(full)}), and of no others, to the same values"
            )
        within = ConfigReader(usual | of_layers[0])
        found = within.integer("head_dim"), within.integer("num_key_value_heads")
        if c.get("global_head_dim") is not None and found != (dims, heads):
            raise ValueError(f"per_layer_config={by_layer!r} and global_head_dim={dims!r}; remove the wrong one")
        dims, heads = found
    if spec.num_heads % heads:
        raise ValueError(f"{heads} key heads in layers with full_attention, which do not divide {spec.num_heads} heads")
    return dims, heads, same
