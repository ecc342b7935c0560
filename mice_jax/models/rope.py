"""Rotary positions: the frequencies of every kind of scaling, and the rotation of queries and keys.

Frequencies are rounded to float32 after each operation after which transformers rounds them, because a difference in
the last place is multiplied by the position.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    NTKScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)

# B rows, T slots, H head_dim, R = half the number of dims that are rotated

RopeTables = tuple[jax.Array, jax.Array]  # cosines and sines, [B T R] float32


class Frequencies(NamedTuple):
    """Rotation angles per position, in radians."""

    short: np.ndarray  # [R] float32
    long: np.ndarray | None  # [R] for samples of more than `original_positions` tokens; None if they are the same
    original_positions: int
    factor: float  # multiplies cosines and sines


def frequencies(rope: Rope) -> Frequencies:
    """Computes the frequencies of a RoPE by its kind of scaling."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    theta = rope.theta
    if isinstance(rope.scaling, NTKScaling):
        theta *= rope.scaling.alpha ** (rope.dims / (rope.dims - 2))
    # The power is computed in float64, since XLA's float32 pow is not exact to the last place.
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
    base, scaling = np.float32(1) / periods, rope.scaling
    match scaling:
        case None | NTKScaling():
            return Frequencies(base, None, 0, 1.0)
        case LinearScaling():
            return Frequencies(base / np.float32(scaling.factor), None, 0, 1.0)
        case Llama3Scaling():
            return Frequencies(_llama3(base, scaling), None, 0, 1.0)
        case YarnScaling():
            return Frequencies(_yarn(periods, rope, scaling), None, 0, scaling.attention_factor)
        case ProportionalScaling():
            rotated = np.where(np.arange(len(base)) < scaling.rotated, base, np.float32(0))
            return Frequencies(rotated / np.float32(scaling.factor), None, 0, 1.0)
        case LongScaling():
            short = np.float32(1) / (np.array(scaling.short_factors, np.float32) * periods)
            long = np.float32(1) / (np.array(scaling.long_factors, np.float32) * periods)
            return Frequencies(short, long, scaling.original_positions, scaling.attention_factor)


def _llama3(base: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    wavelengths = np.float32(2 * math.pi) / base
    rotations = np.float32(s.original_positions) / wavelengths  # rotations of each frequency over the original length
    blend = (rotations - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    slow = base / np.float32(s.factor)
    blended = (1 - blend) * base / np.float32(s.factor) + blend * base
    scaled = np.where(wavelengths > s.original_positions / s.low_freq_factor, slow, blended)
    return np.where(wavelengths < s.original_positions / s.high_freq_factor, base, scaled).astype(np.float32)


def _yarn(periods: np.ndarray, rope: Rope, s: YarnScaling) -> np.ndarray:
    def dim_of(rotations: float) -> float:
        """Returns the dim whose frequency makes `rotations` full rotations over the original length."""
        return rope.dims * math.log(s.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = high - low or 0.001  # a ramp without width becomes a step
    ramp = np.clip((np.arange(rope.dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    share_of_original = 1 - ramp.astype(np.float32)
    interpolated = np.float32(1) / (np.float32(s.factor) * periods)
    return (interpolated * (1 - share_of_original) + np.float32(1) / periods * share_of_original).astype(np.float32)


def needs_lengths(ropes: tuple[Rope | None, ...]) -> bool:
    """Whether the rotation of a token depends on the length of its sample."""
    return any(rope is not None and isinstance(rope.scaling, LongScaling) for rope in ropes)


def rope_tables(rope: Rope | None, dims: int, positions: jax.Array, lengths: jax.Array | None) -> RopeTables:
    """Computes the cosines and sines of the rotation of each slot.

    Args:
      rope: the kind of RoPE; None gives the identity rotation.
      dims: the number of dims that are rotated if `rope` is None.
      positions: [B T] int32.
      lengths: the length of the sample to which each slot belongs, int32, broadcastable to [B T]; may be None unless
        `needs_lengths`.

    Returns:
      Cosines and sines, [B T R] float32.
    """
    if rope is None:
        zeros = jnp.zeros((*positions.shape, dims // 2), jnp.float32)
        return zeros + 1, zeros
    f = frequencies(rope)
    angles = positions[..., None].astype(jnp.float32) * f.short
    if f.long is not None:
        assert lengths is not None
        is_long = jnp.broadcast_to(lengths > f.original_positions, positions.shape)
        angles = jnp.where(is_long[..., None], positions[..., None].astype(jnp.float32) * f.long, angles)
    factor = np.float32(f.factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotates the first 2R dims of queries or keys [B T heads H], in float32, and returns them in their own dtype."""
    cos, sin = tables[0][:, :, None], tables[1][:, :, None]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def sample_lengths(segment_ids: jax.Array) -> jax.Array:
    """Computes the number of slots of each slot's segment, [B T] int32, from segment ids [B T]."""
    t = segment_ids.shape[1]
    slots = jnp.arange(t, dtype=jnp.int32)
    edge = segment_ids[:, 1:] != segment_ids[:, :-1]
    ones = jnp.ones((segment_ids.shape[0], 1), bool)
    starts = jax.lax.cummax(jnp.where(jnp.concatenate([ones, edge], axis=1), slots, 0), axis=1)
    ends = jax.lax.cummin(jnp.where(jnp.concatenate([edge, ones], axis=1), slots, t), axis=1, reverse=True)
    return ends - starts + 1
