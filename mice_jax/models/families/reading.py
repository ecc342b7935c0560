"""A config.json, read key by key: what a family has not read, it does not honour.

Raises KeyError for a key that must be there, and ValueError, with the key and its value, for a value that cannot
be honoured. hf.py adds the file's name.
"""

from collections.abc import Iterable
from typing import Any

from mice_jax.models.families.positions import is_positive, read_rope
from mice_jax.models.spec import ModelSpec

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip

# Keys that change nothing that is computed in training, whatever their value.
IGNORED = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "architectures", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "is_encoder_decoder", "is_llama_config", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip

# Chances of dropping values. Supervised fine-tuning goes without; a value that is not 0 is said.
DROPOUTS = ("attention_dropout", "embd_pdrop", "hidden_dropout", "mlp_dropout", "resid_pdrop")


class Reader:
    """The content of a config.json, and which of its keys were read; a null counts as absent."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.was_read = IGNORED | set(DROPOUTS)

    def get(self, key: str, default: Any = None) -> Any:
        self.was_read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 up; there must be one where `default` is None."""
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value!r}; it must be a whole number from 1 up")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; there must be one where `default` is None."""
        value = self._required(key, default)
        if not is_positive(value):
            raise ValueError(f"{key}={value!r}; it must be a number above 0")
        return float(value)

    def or_none(self, key: str, default: float | None) -> float | None:
        """A number above 0, or None where the key says null or, being absent, the default does."""
        value = self.config.get(key, default)
        return self.number(key, default) if value is not None else self.get(key)

    def window(self, key: str, default: int | None) -> int | None:
        """A window's size, or None where the key says null or, being absent, the default does."""
        return None if self.or_none(key, default) is None else self.integer(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r}; it must be true or false")
        return value

    def only(self, **allowed: Any) -> None:
        """Keys that may be there with this value alone."""
        for key, value in allowed.items():
            if self.get(key, value) != value:
                raise ValueError(f"{key}={self.config[key]!r}; only {value!r} is computed")

    def activation(self, key: str, default: str) -> str:
        name = self.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(f"{key}={name!r}; those computed are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def windows(self, window: int | None, sliding: Iterable[bool]) -> tuple[int | None, ...]:
        """A window a layer, from `layer_types`; `sliding` says which layers have one where that key is absent."""
        types = self.get("layer_types")
        sliding = list(sliding)
        if types is not None:
            known = {"sliding_attention": True, "full_attention": False}
            if not isinstance(types, list) or len(types) != len(sliding) or any(t not in list(known) for t in types):
                raise ValueError(
                    f"layer_types={types!r}; it must list sliding_attention or full_attention for each of "
                    f"{len(sliding)} layers"
                )
            sliding = [known[t] for t in types]
        if any(sliding) and window is None:
            raise ValueError(f"layer_types={types!r} but no sliding_window")
        return tuple(window if s else None for s in sliding)

    def late_windows(self, layers: int) -> tuple[int | None, ...]:
        """Qwen's: the layers from `max_window_layers` on, where `use_sliding_window` is true."""
        first, window = self.get("max_window_layers", 28), self.window("sliding_window", 4096)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ValueError(f"max_window_layers={first!r}; it must be a whole number from 0 up")
        window = window if self.flag("use_sliding_window", False) else None
        return self.windows(window, [window is not None and i >= first for i in range(layers)])

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise KeyError(key)
        return value


def plain_spec(
    c: Reader,
    *,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    norm_eps: float = 1e-6,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    tied: bool = False,
    layer_type: str = "",
    partial_rope: bool = False,
) -> ModelSpec:
    """The decoder that every family starts from: Llama without biases, windows, multipliers and caps.

    The arguments are a family's defaults for keys that are absent: transformers leaves out of a config.json what
    some version of it took for granted. `layer_type` is the kind of layer whose RoPE is read, and `partial_rope` says
    whether it may turn a part of a head's dims.
    """
    layers, heads, d_model = (c.integer(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    head_dim = c.integer("head_dim", head_dim or d_model // heads)
    return ModelSpec(
        vocab_size=c.integer("vocab_size"),
        d_model=d_model,
        d_ff=c.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_positions=c.integer("max_position_embeddings"),
        ropes=(read_rope(c, head_dim, theta, layer_type, partial_rope),) * layers,
        windows=(None,) * layers,
        attention_scale=head_dim**-0.5,
        attention_softcap=None,
        qk_norm="none",
        pre_norm=True,
        post_norm=False,
        norm_eps=c.number("rms_norm_eps", norm_eps),
        norm_offset=0.0,
        activation=c.activation(activation_key, activation),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logit_scale=1.0,
        logit_softcap=None,
        tie_embeddings=c.flag("tie_word_embeddings", tied),
        init_std=c.number("initializer_range", 0.02),
    )
