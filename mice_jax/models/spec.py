"""The description of a decoder into which every model family is translated."""

import dataclasses
from typing import TypeGuard


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Position Interpolation, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones unchanged, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class NTKScaling:
    """The base multiplied, so that the lowest frequency is divided by `alpha` and the highest unchanged."""

    alpha: float


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation with a factor on cosines and sines (YaRN, arXiv 2309.00071)."""

    factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    original_positions: int
    truncate: bool  # whether the first and last dim of the ramp are rounded to integers


@dataclasses.dataclass(frozen=True)
class ProportionalScaling:
    """The first `rotated` of a head's frequencies divided by `factor`, and the others zero (Gemma 4)."""

    rotated: int
    factor: float


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """A divisor per frequency: one list for samples within the original length, one for longer samples.

    LongRoPE, arXiv 2402.13753. The length of a sample, not that of its row, decides between the lists.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the first `dims` dims of a head are rotated, in the half-split layout of transformers."""

    theta: float
    dims: int
    scaling: LinearScaling | Llama3Scaling | NTKScaling | YarnScaling | ProportionalScaling | LongScaling | None


@dataclasses.dataclass(frozen=True)
class QueryScale:
    """Queries at position p are multiplied by 1 + beta * log(1 + p // original_positions), after their rotation."""

    beta: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class ShortConv:
    """A gated causal convolution with a kernel of `taps` for each channel (LFM2, arXiv 2511.23404)."""

    taps: int
    bias: bool  # of its projections and of the convolution


@dataclasses.dataclass(frozen=True)
class Mamba2:
    """A state space model between a causal convolution and a gated norm (Mamba-2, arXiv 2405.21060)."""

    num_heads: int
    head_dim: int
    num_groups: int  # of heads that share what they add to the state by and read from it by
    state_dim: int
    taps: int  # of the convolution
    time_step_limits: tuple[float, float]
    bias: bool  # of its projections
    conv_bias: bool


@dataclasses.dataclass(frozen=True)
class GatedDelta:
    """The gated delta rule between a causal convolution and a gated norm (arXiv 2412.06464)."""

    num_key_heads: int
    num_value_heads: int  # a multiple of num_key_heads
    key_dim: int  # of a head
    value_dim: int  # of a head
    taps: int  # of the convolution


Mixer = ShortConv | Mamba2 | GatedDelta  # a recurrent mixer; each has a file in mixers/


# The names that attention and an MLP may have among the parameters of a layer.
ATTENTION_NAMES = (
    "attention", "local_attention", "global_attention", "borrowing_local_attention", "borrowing_global_attention",
)  # fmt: skip
MLP_NAMES = ("mlp", "wide_mlp")


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """Attention in some layers of a model whose layers differ in more than rotary positions and windows (Gemma 4).

    Layers that borrow attend to the keys and values of the one layer of the same name that lends its own.
    """

    name: str  # of its parameters among those of a layer, after "borrowing_" if it borrows; one of ATTENTION_NAMES
    head_dim: int
    num_kv_heads: int
    values_are_keys: bool  # whether values are the keys' projections, before norm and rotation
    keys: str  # "own", "lent" for own ones that later layers use too, or "borrowed"
    wide_mlp: bool  # whether the MLP of the layer is twice as wide


Kind = Mixer | AttentionKind | None  # of a layer; None for attention as the fields of the spec say


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A causal decoder: grouped-query attention or a recurrent mixer in each layer, gated MLP, RMS norms.

    No field has a default, so that every family states each one.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # the length of the longest sample that the weights were trained for
    mixers: tuple[Kind, ...]  # per layer: what mixes tokens; None = attention as the fields below say
    ropes: tuple[Rope | None, ...]  # per layer; None = without positions, as every layer without attention
    windows: tuple[int | None, ...]  # per layer: the number of tokens that a query sees, itself included; None = all
    attention_scale: float
    query_scale: QueryScale | None
    attention_softcap: float | None  # s -> cap * tanh(s / cap), on attention scores
    # Whether what a head attends to is multiplied by the sigmoid of a gate, whose projection follows that of the head's
    # queries in the same tensor.
    attention_gate: bool
    # Norms of queries and keys: "none", "head" for a norm of each head, "head_after_rope" for the same after their
    # rotation instead of before, or "all" for a norm over all heads.
    qk_norm: str
    pre_norm: bool  # norms of the inputs of mixer and MLP
    post_norm: bool  # norms of their outputs, before these are added to the residual stream
    norm_eps: float
    norm_offset: float  # is added to each norm's stored scale
    value_norm: bool  # a norm of each head's values, without a scale
    activation: str  # a key of transformer.ACTIVATIONS
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    residual_multiplier: float  # factor on the outputs of mixer and MLP
    layer_scales: bool  # whether the output of each layer is multiplied by a stored scalar, which is not trained
    # The width of embeddings that each layer has of its own: each token adds a gated projection of its embedding to
    # the output of the MLP. 0 for none.
    per_layer_dim: int
    logit_scale: float
    logit_softcap: float | None
    tie_embeddings: bool
    init_std: float

    @property
    def is_recurrent(self) -> bool:
        """Whether any layer has a recurrent mixer."""
        return any(is_recurrent(kind) for kind in self.mixers)

    def attention_of(self, kind: Kind) -> AttentionKind:
        """Returns the attention of a layer, which must not be recurrent, in full."""
        if isinstance(kind, AttentionKind):
            return kind
        assert kind is None, f"{kind} is no attention"
        return AttentionKind("attention", self.head_dim, self.num_kv_heads, False, "own", False)

    @property
    def attention_kinds(self) -> list[AttentionKind]:
        """The attention of the model in full: each kind once."""
        return list(dict.fromkeys(self.attention_of(kind) for kind in self.mixers if not is_recurrent(kind)))

    @property
    def max_head_dim(self) -> int:
        """The number of dims of the widest heads."""
        return max((attention.head_dim for attention in self.attention_kinds), default=self.head_dim)

    def d_ff_of(self, kind: Kind) -> int:
        """Returns the width of the MLP of a layer."""
        return self.d_ff * (2 if isinstance(kind, AttentionKind) and kind.wide_mlp else 1)


def is_recurrent(kind: Kind) -> TypeGuard[Mixer]:
    """Whether a layer has a recurrent mixer instead of attention."""
    return kind is not None and not isinstance(kind, AttentionKind)
