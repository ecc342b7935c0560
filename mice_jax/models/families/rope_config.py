"""Reads and writes rotary positions in config.json, in the spelling of transformers 4, of transformers 5, or both.

The old spelling has the top-level keys `rope_theta`, `rope_scaling`, `partial_rotary_factor` and, in Phi-3,
`original_max_position_embeddings`. The new spelling has all of these in `rope_parameters`; where layers differ
(Gemma 3), it has one object per kind of layer.
"""

import math
import sys
from typing import Any, Protocol, TypeGuard

from mice_jax.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    NTKScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic", "proportional")
# Keys of the old spelling outside `rope_scaling`.
TOP_LEVEL_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Of each `model_type` whose `rope_parameters` has an object per kind of layer: the key of the old spelling that has the
# theta of layers with a window.
LOCAL_THETA_KEYS = {"gemma3_text": "rope_local_base_freq", "olmo3": "rope_theta"}
NEW_SPELLING_ONLY = ("gemma4_text",)  # each `model_type` that is younger than the new spelling
QUERY_SCALE_KEYS = ("llama_4_scaling_beta", "max_position_embeddings")  # the second has no effect
YARN_MAGNITUDES = ("mscale", "mscale_all_dim")  # 0 counts as absent


class Keys(Protocol):
    """A config.json as a dict or a ConfigReader."""

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key."""


def read_rope(
    c: Keys,
    head_dim: int,
    default_theta: float,
    layer_type: str = "",
    *,
    partial: float | None = None,
    ntk: bool = False,
    own_keys: tuple[str, ...] = (),
) -> Rope:
    """Reads the rotary positions of a config.json.

    Args:
      c: the config.json.
      head_dim: the number of dims of a head.
      default_theta: the value of an absent rope_theta.
      layer_type: the object of `rope_parameters` to read, where there is one per kind of layer.
      partial: the default share of a head's dims that are rotated, if the architecture can rotate a part of them. In
        transformers most architectures ignore such a key or fail with it.
      ntk: whether the architecture reads `alpha` where the kind is "dynamic". The others ignore it and stretch RoPE by
        the length of the batch, which is not supported.
      own_keys: keys that do not describe RoPE, which the family reads itself.

    Returns:
      The kind of RoPE.

    Raises:
      ValueError: a value is not supported, or the two spellings disagree.
    """
    scaling = _object(c, "rope_scaling")
    old = {key: c.get(key) for key in TOP_LEVEL_KEYS if c.get(key) is not None} | scaling
    new, max_positions = _parameters(c, layer_type), c.get("max_position_embeddings")
    rope = _agreed(old, new, head_dim, default_theta, max_positions, own_keys, partial or 1.0)
    if isinstance(rope.scaling, NTKScaling) and not ntk:
        raise ValueError("rope_type='dynamic' among its RoPE parameters, which depends on the length of a batch")
    return rope if partial is not None else _of_all_dims(rope, head_dim)


def read_local_rope(c: Keys, head_dim: int, default_theta: float, theta_key: str = "rope_local_base_freq") -> Rope:
    """Reads the rotary positions of layers with a window, of which the old spelling has only a theta.

    Args:
      c: the config.json.
      head_dim: the number of dims of a head.
      default_theta: the value of an absent theta.
      theta_key: the key of the theta in the old spelling.

    Returns:
      The kind of RoPE.
    """
    theta = c.get(theta_key)
    old = {} if theta is None else {"rope_theta": theta}
    new = _parameters(c, "sliding_attention")
    rope = _agreed(old, new, head_dim, default_theta, c.get("max_position_embeddings"))
    return _of_all_dims(rope, head_dim)


def _of_all_dims(rope: Rope, head_dim: int) -> Rope:
    if rope.dims != head_dim:
        raise ValueError(f"a partial_rotary_factor that rotates {rope.dims} of {head_dim} dims; it must be all")
    return rope


def _object(c: Keys, key: str) -> dict[str, Any]:
    value = c.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key}={value!r}; it must be an object")
    return value


def _parameters(c: Keys, layer_type: str) -> dict[str, Any]:
    parameters = _object(c, "rope_parameters")
    if not layer_type or not parameters:
        return parameters
    if not isinstance(parameters.get(layer_type), dict):
        raise ValueError(f"rope_parameters={parameters!r}; it must hold an object {layer_type!r}")
    return parameters[layer_type]


def read_query_beta(c: Keys) -> float:
    """Reads the strength of Ministral 3's scaling of queries, which is among its RoPE parameters."""
    parameters = _object(c, "rope_scaling") | _object(c, "rope_parameters")
    return _number(parameters, "llama_4_scaling_beta")


def _agreed(
    old: dict[str, Any],
    new: dict[str, Any],
    head_dim: int,
    default_theta: float,
    max_positions: int,
    own_keys: tuple[str, ...] = (),
    default_share: float = 1.0,
) -> Rope:
    old, new = dict(old), dict(new)
    for spelling in (old, new):
        old_kind, kind = spelling.pop("type", None), spelling.pop("rope_type", None)
        if kind is None:
            kind = old_kind
        if kind is not None:
            spelling["rope_type"] = _kind(kind)
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise ValueError(
                f"{key}={old[key]!r} in the old spelling of RoPE (rope_theta, rope_scaling) and {new[key]!r} in the "
                "new one (rope_parameters); remove the wrong one"
            )
    parameters = {"rope_theta": default_theta, "partial_rotary_factor": default_share} | old | new
    return _rope({k: v for k, v in parameters.items() if k not in own_keys}, head_dim, max_positions)


def _rope(parameters: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    left = dict(parameters)  # keys that are still to be read
    kind = left.pop("rope_type", "default")
    if kind not in KINDS:
        raise ValueError(f"rope_type={kind!r}; supported are {', '.join(KINDS)}")
    theta = _number(left, "rope_theta")
    if not theta > 1:
        raise ValueError(f"rope_theta={theta!r}; it must be above 1")
    share = _number(left, "partial_rotary_factor", 1.0)
    dims = head_dim if kind == "proportional" else int(head_dim * share)
    if dims % 2 or not 0 < dims <= head_dim:
        raise ValueError(f"a partial_rotary_factor that rotates {dims} of {head_dim} dims; it must be an even number")
    original = _whole(left, "original_max_position_embeddings", max_positions)
    scaling: Any = None
    if kind == "linear":
        scaling = LinearScaling(_number(left, "factor"))
    elif kind == "llama3":
        factor, low, high = (_number(left, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        if not high > low:
            raise ValueError(f"high_freq_factor={high!r} among its RoPE parameters; it must be above low_freq_factor")
        scaling = Llama3Scaling(factor, low, high, original)
    elif kind == "yarn":
        scaling = _yarn(left, original, max_positions)
    elif kind == "dynamic":
        scaling = _ntk(left, dims)
    elif kind == "proportional":
        scaling = _proportional(left, share, dims)
    elif kind == "longrope":
        scaling = _long(left, dims, original, max_positions)
    unknown = {k: v for k, v in left.items() if v is not None}
    if unknown:
        key, value = next(iter(unknown.items()))
        raise ValueError(f"{key}={value!r} among its RoPE parameters, which rope_type={kind!r} does not use")
    return Rope(theta, dims, scaling)


def _yarn(left: dict[str, Any], original: int, max_positions: int) -> YarnScaling:
    factor = _number(left, "factor", max_positions / original)
    mscale, mscale_all = (_number(left, key) if left.get(key) else left.pop(key, 0) for key in YARN_MAGNITUDES)
    truncate = left.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate={truncate!r} among its RoPE parameters; it must be true or false")

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return YarnScaling(
        factor=factor,
        beta_fast=_number(left, "beta_fast", 32.0),
        beta_slow=_number(left, "beta_slow", 1.0),
        attention_factor=_number(left, "attention_factor", attention),
        original_positions=original,
        truncate=truncate,
    )


def _ntk(left: dict[str, Any], dims: int) -> NTKScaling:
    if dims < 4:
        raise ValueError(f"rope_type='dynamic' among its RoPE parameters, for {dims} dims; it needs 4 or more")
    for key in ("beta_fast", "beta_slow", *YARN_MAGNITUDES):  # have no effect here
        left.pop(key, None)
    if _number(left, "factor", 1.0) != 1:
        raise ValueError("a factor other than 1 among its RoPE parameters, which rope_type='dynamic' does not use")
    return NTKScaling(_number(left, "alpha"))


def _proportional(left: dict[str, Any], share: float, dims: int) -> ProportionalScaling:
    rotated = int(share * dims // 2)
    if not 0 < rotated <= dims // 2:
        raise ValueError(f"a partial_rotary_factor that rotates {2 * rotated} of {dims} dims")
    return ProportionalScaling(rotated, _number(left, "factor", 1.0))


def _long(left: dict[str, Any], dims: int, original: int, max_positions: int) -> LongScaling:
    factor = _number(left, "factor", max_positions / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (_numbers(left, key, dims // 2) for key in ("short_factor", "long_factor"))
    return LongScaling(short, long, _number(left, "attention_factor", attention), original)


def _numbers(left: dict[str, Any], key: str, count: int) -> tuple[float, ...]:
    value = left.pop(key, None)
    if not isinstance(value, list) or len(value) != count or not all(is_positive(x) for x in value):
        raise ValueError(f"{key}={value!r} among its RoPE parameters; it must list {count} numbers above 0")
    return tuple(float(x) for x in value)


def _number(left: dict[str, Any], key: str, default: float | None = None) -> float:
    value = left.pop(key, None)
    value = default if value is None else value
    if not is_positive(value):
        raise ValueError(f"{key}={value!r} among its RoPE parameters; it must be a number above 0")
    return float(value)


def _whole(left: dict[str, Any], key: str, default: int) -> int:
    value = left.pop(key, None)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:  # the logarithm of the value is a divisor
        raise ValueError(f"{key}={value!r} among its RoPE parameters; it must be a whole number from 2 up")
    return value


def is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number above 0, neither infinite nor a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _kind(name: Any) -> Any:
    return "longrope" if name == "su" else name  # "su" is the former name of longrope


def with_both_rope_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Spells the rotary positions of a config.json for transformers 4 and for 5, from either spelling."""
    if isinstance(config.get("text_config"), dict):
        return config | {"text_config": with_both_rope_spellings(config["text_config"])}
    if config.get("model_type") in NEW_SPELLING_ONLY:
        return config
    if config.get("rope_parameters"):
        return _with_old_spelling(config, config["rope_parameters"])
    return _with_new_spelling(config)


def _with_new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: config[key] for key in TOP_LEVEL_KEYS if config.get(key) is not None}
    old |= config.get("rope_scaling") or {}
    kind = old.pop("rope_type", None)
    old_kind = old.pop("type", None)
    flat = {"rope_type": _kind(kind or old_kind or "default")} | old
    if "su" in (kind, old_kind):  # transformers 5 does not load this name
        config = config | {"rope_scaling": config["rope_scaling"] | {"type": "longrope"}}
    local_key = _local_theta_key(config)
    if local_key is None:
        return config | {"rope_parameters": flat}
    local = config.get(local_key)
    sliding = {"rope_type": "default"} | ({"rope_theta": local} if local is not None else {})
    return config | {"rope_parameters": {"full_attention": flat, "sliding_attention": sliding}}


def _with_old_spelling(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    full = parameters.get("full_attention", parameters)
    spelled = {}
    local_key = _local_theta_key(config)
    if local_key == "rope_local_base_freq":
        spelled[local_key] = parameters["sliding_attention"].get("rope_theta")
    scaling = {k: v for k, v in full.items() if k not in ("type", *TOP_LEVEL_KEYS[:2]) and v is not None}
    kind = scaling.get("rope_type", full.get("type", "default"))
    if kind == "longrope":  # transformers 4 requires exactly three keys for longrope
        original = scaling.pop("original_max_position_embeddings", None)
        spelled |= {"original_max_position_embeddings": original} if original else {}
        if original and scaling.get("factor") == config["max_position_embeddings"] / original:
            del scaling["factor"]  # the factor equals its default
        scaling = {"type": scaling.pop("rope_type")} | scaling
    spelled |= {key: full[key] for key in TOP_LEVEL_KEYS[:2] if full.get(key) is not None}
    return config | spelled | {"rope_scaling": scaling if kind != "default" or "mrope_section" in scaling else None}


def _local_theta_key(config: dict[str, Any]) -> str | None:
    return LOCAL_THETA_KEYS.get(config.get("model_type", ""))
