"""Reads a config.json key by key and tracks which keys were read; hf.py raises for keys that no family has read.

A missing required key is a KeyError. An unsupported value is a ValueError with the key and the value. hf.py adds the
name of the file.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mice_jax.models.families.rope_config import is_positive, read_rope
from mice_jax.models.spec import Mixer, ModelSpec

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip

# Keys that do not affect what is computed in training.
IGNORED = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "architectures", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "is_encoder_decoder", "is_llama_config", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip

# Training does not use dropout; a run reports values of these keys other than 0.
DROPOUTS = ("attention_dropout", "embd_pdrop", "hidden_dropout", "mlp_dropout", "resid_pdrop")


class ConfigReader:
    """The content of a config.json, and the set of keys that were read; null counts as absent."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.was_read = IGNORED | set(DROPOUTS)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns any value, or `default` if the key is absent."""
        self.was_read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number from 1 up; the key is required if `default` is None."""
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value!r}; it must be a whole number from 1 up")
        return value

    def count(self, key: str, default: int) -> int:
        """Returns a whole number from 0 up."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key}={value!r}; it must be a whole number from 0 up")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number above 0; the key is required if `default` is None."""
        value = self._required(key, default)
        if not is_positive(value):
            raise ValueError(f"{key}={value!r}; it must be a number above 0")
        return float(value)

    def or_none(self, key: str, default: float | None) -> float | None:
        """Returns a number above 0, or None if the key is null, or absent with a default of None."""
        value = self.config.get(key, default)
        return self.number(key, default) if value is not None else self.get(key)

    def window(self, key: str, default: int | None) -> int | None:
        """Returns the size of a window, or None if the key is null, or absent with a default of None."""
        return None if self.or_none(key, default) is None else self.integer(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """Returns True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r}; it must be true or false")
        return value

    def only(self, **allowed: Any) -> None:
        """Checks keys of which only one value is supported."""
        for key, value in allowed.items():
            if self.get(key, value) != value:
                raise ValueError(f"{key}={self.config[key]!r}; only {value!r} is supported")

    def activation(self, key: str, default: str) -> str:
        """Returns a key of `transformer.ACTIVATIONS`."""
        name = self.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(f"{key}={name!r}; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def within(
        self, key: str, defaults: dict[str, Any], spec_from_hf: Callable[["ConfigReader"], ModelSpec]
    ) -> ModelSpec:
        """Makes a spec from an object inside of the config.json.

        Args:
          key: the key of the object.
          defaults: values of its absent keys.
          spec_from_hf: the family that reads it.

        Returns:
          The spec.
        """
        value = self._required(key, None)
        if not isinstance(value, dict):
            raise ValueError(f"{key}={value!r}; it must be an object")
        reader = ConfigReader(defaults | {k: v for k, v in value.items() if v is not None or k not in defaults})
        try:
            spec = spec_from_hf(reader)
        except KeyError as e:
            raise KeyError(f"{key}.{e.args[0]}") from None
        except ValueError as e:
            raise ValueError(f"in {key}, {e}") from None
        if unread := reader.unread():
            raise ValueError(f"in {key}, keys that are not supported: {unread}")
        return spec

    def unread(self) -> str:
        """Returns the keys that were not read, with their values; null counts as absent."""
        keys = [k for k in self.config if k not in self.was_read and self.config[k] is not None]
        return ", ".join(f"{k}={self.config[k]!r}" for k in sorted(keys))

    def layer_types(self, known: Mapping[str, bool], default: list[bool]) -> list[bool]:
        """Reads which layers are of a kind from `layer_types`.

        Args:
          known: the names of all types, and whether a layer of that type is of the kind.
          default: whether each layer is of the kind, if the key is absent.

        Returns:
          Whether each layer is of the kind.
        """
        types = self.get("layer_types")
        if types is None:
            return default
        if not isinstance(types, list) or len(types) != len(default) or any(t not in list(known) for t in types):
            names = " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
            raise ValueError(f"layer_types={types!r}; it must list {names} for each of {len(default)} layers")
        return [known[t] for t in types]

    def windows(self, window: int | None, sliding: Iterable[bool]) -> tuple[int | None, ...]:
        """Reads the windows of the layers from `layer_types`.

        Args:
          window: the window of the layers that have one.
          sliding: which layers have one, if the key is absent.

        Returns:
          The window of each layer, or None.
        """
        sliding = self.layer_types({"sliding_attention": True, "full_attention": False}, list(sliding))
        if any(sliding) and window is None:
            raise ValueError(f"layer_types={self.get('layer_types')!r} but no sliding_window")
        return tuple(window if s else None for s in sliding)

    def late_windows(self, layers: int) -> tuple[int | None, ...]:
        """The windows of Qwen: in layers from `max_window_layers` on, if `use_sliding_window` is true."""
        first, window = self.count("max_window_layers", 28), self.window("sliding_window", 4096)
        window = window if self.flag("use_sliding_window", False) else None
        return self.windows(window, [window is not None and i >= first for i in range(layers)])

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise KeyError(key)
        return value


def with_recurrent_layers(spec: ModelSpec, mixer: Mixer | None, attends: Sequence[bool]) -> ModelSpec:
    """Returns a spec in which layers without attention have a recurrent mixer, and no rotary positions.

    Args:
      spec: the spec with attention in all layers.
      mixer: what layers without attention have; None if there are none.
      attends: whether each layer has attention.
    """
    return dataclasses.replace(
        spec,
        mixers=tuple(None if attention else mixer for attention in attends),
        ropes=tuple(rope if attention else None for rope, attention in zip(spec.ropes, attends, strict=True)),
    )


def llama_like_spec(
    c: ConfigReader,
    *,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    norm_eps: float = 1e-6,
    norm_eps_key: str = "rms_norm_eps",
    activation: str = "silu",
    activation_key: str = "hidden_act",
    d_ff: int | None = None,
    d_ff_key: str = "intermediate_size",
    tied: bool = False,
    layer_type: str = "",
    partial_rope: float | None = None,
    ntk_rope: bool = False,
    own_rope_keys: tuple[str, ...] = (),
) -> ModelSpec:
    """Reads the decoder that every family starts from: Llama without biases, windows, multipliers and caps.

    Most arguments are a family's defaults for absent keys: transformers leaves out of a config.json what some version
    of it took as the default.

    Args:
      c: the config.json.
      head_dim: default; None for hidden_size / num_attention_heads.
      theta: default of rope_theta.
      norm_eps: default of `norm_eps_key`.
      norm_eps_key: the key of the constant in norms.
      activation: default of `activation_key`.
      activation_key: the key of the activation.
      d_ff: default of `d_ff_key`; None if the key is required.
      d_ff_key: the key of the width of the MLP.
      tied: default of tie_word_embeddings.
      layer_type: the kind of layer whose RoPE is read, where kinds differ.
      partial_rope: the default share of a head's dims that RoPE rotates; None if it must be all.
      ntk_rope: whether RoPE may be "dynamic" with an alpha.
      own_rope_keys: keys among the RoPE parameters that the family reads itself.

    Returns:
      The spec, in which the family replaces what differs.
    """
    layers = c.integer("num_hidden_layers")
    heads = c.integer("num_attention_heads")
    d_model = c.integer("hidden_size")
    head_dim = c.integer("head_dim", head_dim or d_model // heads)
    max_positions = c.integer("max_position_embeddings")
    rope = read_rope(c, head_dim, theta, layer_type, partial=partial_rope, ntk=ntk_rope, own_keys=own_rope_keys)
    return ModelSpec(
        vocab_size=c.integer("vocab_size"),
        d_model=d_model,
        d_ff=c.integer(d_ff_key, d_ff),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_positions=max_positions,
        mixers=(None,) * layers,
        ropes=(rope,) * layers,
        windows=(None,) * layers,
        attention_scale=head_dim**-0.5,
        query_scale=None,
        attention_softcap=None,
        attention_gate=False,
        qk_norm="none",
        pre_norm=True,
        post_norm=False,
        norm_eps=c.number(norm_eps_key, norm_eps),
        norm_offset=0.0,
        value_norm=False,
        activation=c.activation(activation_key, activation),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        layer_scales=False,
        per_layer_dim=0,
        logit_scale=1.0,
        logit_softcap=None,
        tie_embeddings=c.flag("tie_word_embeddings", tied),
        init_std=c.number("initializer_range", 0.02),
    )
