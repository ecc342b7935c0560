"""What a decoder computes, in numbers: the one description that every model family is translated into."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A pre-norm decoder: grouped-query attention with rotary positions, gated MLP, RMS norms.

    No field has a default: a family's file says each one aloud.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # what the weights were made for; longer rows are refused
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    init_std: float
