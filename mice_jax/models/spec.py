"""What a decoder computes, in numbers: the one description that every model family is translated into."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Position Interpolation, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation, and a factor on cosines and sines (YaRN, arXiv 2309.00071)."""

    factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    original_positions: int
    truncate: bool  # whether the ramp starts and ends at whole dims


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """A divisor for each frequency, one list for samples within the original length and one for longer ones.

    LongRoPE, arXiv 2402.13753. The list is chosen by a sample's own length, not by that of its row.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the first `dims` dims of a head are turned, in the half-split form of checkpoints."""

    theta: float
    dims: int
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongScaling | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A causal decoder: grouped-query attention, gated MLP, RMS norms.

    No field has a default: whoever makes a spec says each one.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # what the weights were made for
    ropes: tuple[Rope | None, ...]  # one a layer; None = a layer without positions
    windows: tuple[int | None, ...]  # one a layer: how many tokens a query sees, itself included; None = all
    attention_scale: float
    attention_softcap: float | None  # s -> cap * tanh(s / cap), on attention scores
    qk_norm: str  # none | head: of each head by itself | all: over all heads together
    pre_norm: bool  # of what enters attention and MLP
    post_norm: bool  # of what leaves them, before it is added
    norm_eps: float
    norm_offset: float  # added to each norm's stored scale
    activation: str  # a key of transformer.ACTIVATIONS
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    residual_multiplier: float  # of what attention and MLP add
    logit_scale: float
    logit_softcap: float | None
    tie_embeddings: bool
    init_std: float
