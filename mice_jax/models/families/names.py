"""The names of the tensors that most families have in checkpoints, and our parameters in each of them."""

from typing import NamedTuple


class Name(NamedTuple):
    """A tensor of a checkpoint, or one tensor per layer."""

    hf: str  # {} stands for the layer
    ours: tuple[str, ...]  # our parameters; several follow one another along its rows


def name(hf: str, *ours: str) -> Name:
    """Makes the name of a tensor `hf` that holds our parameters `ours`."""
    return Name(hf, ours)


def with_prefix(prefix: str, names: list[Name]) -> list[Name]:
    """Returns the names of a checkpoint in which those of a decoder follow a prefix."""
    return [Name(prefix + n.hf, n.ours) for n in names]


EMBED = name("model.embed_tokens.weight", "embed.table")
QKV = [
    name("model.layers.{}.self_attn.q_proj.weight", "layers.attention.q"),
    name("model.layers.{}.self_attn.k_proj.weight", "layers.attention.k"),
    name("model.layers.{}.self_attn.v_proj.weight", "layers.attention.v"),
    name("model.layers.{}.self_attn.q_proj.bias", "layers.attention.q_bias"),
    name("model.layers.{}.self_attn.k_proj.bias", "layers.attention.k_bias"),
    name("model.layers.{}.self_attn.v_proj.bias", "layers.attention.v_bias"),
]
QK_NORMS = [
    name("model.layers.{}.self_attn.q_norm.weight", "layers.attention.q_norm.scale"),
    name("model.layers.{}.self_attn.k_norm.weight", "layers.attention.k_norm.scale"),
]
ATTENTION_OUT = [
    name("model.layers.{}.self_attn.o_proj.weight", "layers.attention.o"),
    name("model.layers.{}.self_attn.o_proj.bias", "layers.attention.o_bias"),
]
GATE_UP = [
    name("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate"),
    name("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up"),
    name("model.layers.{}.mlp.gate_proj.bias", "layers.mlp.gate_bias"),
    name("model.layers.{}.mlp.up_proj.bias", "layers.mlp.up_bias"),
]
MLP_OUT = [
    name("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down"),
    name("model.layers.{}.mlp.down_proj.bias", "layers.mlp.down_bias"),
]
PRE_NORMS = [
    name("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale"),
    name("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
]
POST_NORMS = [
    name("model.layers.{}.post_attention_layernorm.weight", "layers.attention_post_norm.scale"),
    name("model.layers.{}.post_feedforward_layernorm.weight", "layers.mlp_post_norm.scale"),
]
PRE_AND_POST_NORMS = [
    name("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale"),
    name("model.layers.{}.pre_feedforward_layernorm.weight", "layers.mlp_norm.scale"),
    *POST_NORMS,
]
ENDS = [
    name("model.norm.weight", "final_norm.scale"),
    name("lm_head.weight", "head.weight"),
]

# These are the tensors of most families; a decoder without one of the parameters has no such tensor.
PROJECTIONS = [EMBED, *QKV, *QK_NORMS, *ATTENTION_OUT, *GATE_UP, *MLP_OUT, *ENDS]
PRE_NORM = [*PROJECTIONS, *PRE_NORMS]
