"""Rotary positions: the frequencies of every kind of scaling, and the turning of queries and keys.

Frequencies are rounded to float32 at each step at which the checkpoints' own code rounds them: a difference in
the last place is multiplied by the position.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.models.spec import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling

# B rows, T slots, H head_dim, R = half the dims that are turned

Turns = tuple[jax.Array, jax.Array]  # cosines and sines [B T R], float32


class Frequencies(NamedTuple):
    """Radians a position."""

    short: np.ndarray  # [R] float32
    long: np.ndarray | None  # [R] for samples of more than `original_positions` tokens, where they differ
    original_positions: int
    factor: float  # on cosines and sines


def frequencies(rope: Rope) -> Frequencies:
    """The frequencies of a kind of RoPE."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    periods = (rope.theta ** exponents.astype(np.float64)).astype(
        np.float32
    )  # XLA's pow is not exact to the last place
    base, scaling = np.float32(1) / periods, rope.scaling
    match scaling:
        case None:
            return Frequencies(base, None, 0, 1.0)
        case LinearScaling():
            return Frequencies(base / np.float32(scaling.factor), None, 0, 1.0)
        case Llama3Scaling():
            return Frequencies(_llama3(base, scaling), None, 0, 1.0)
        case YarnScaling():
            return Frequencies(_yarn(periods, rope, scaling), None, 0, scaling.attention_factor)
        case LongScaling():
            short, long = (
                np.float32(1) / (np.array(f, np.float32) * periods)
                for f in (scaling.short_factors, scaling.long_factors)
            )
            return Frequencies(short, long, scaling.original_positions, scaling.attention_factor)


def _llama3(base: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    wavelengths = np.float32(2 * math.pi) / base
    turns = np.float32(s.original_positions) / wavelengths  # of each frequency over the original length
    blend = (turns - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    slow = base / np.float32(s.factor)
    blended = (1 - blend) * base / np.float32(s.factor) + blend * base
    scaled = np.where(wavelengths > s.original_positions / s.low_freq_factor, slow, blended)
    return np.where(wavelengths < s.original_positions / s.high_freq_factor, base, scaled).astype(np.float32)


def _yarn(periods: np.ndarray, rope: Rope, s: YarnScaling) -> np.ndarray:
    def dim_of(turns: float) -> float:
        """The dim whose frequency makes so many turns over the original length."""
        return rope.dims * math.log(s.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = high - low or 0.001  # a step, where the ramp has no width
    ramp = np.clip((np.arange(rope.dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    kept = 1 - ramp.astype(np.float32)
    interpolated = np.float32(1) / (np.float32(s.factor) * periods)
    return (interpolated * (1 - kept) + np.float32(1) / periods * kept).astype(np.float32)


def needs_lengths(ropes: tuple[Rope | None, ...]) -> bool:
    """Whether how a token is turned depends on its sample's length."""
    return any(rope is not None and isinstance(rope.scaling, LongScaling) for rope in ropes)


def turns(rope: Rope | None, dims: int, positions: jax.Array, lengths: jax.Array | None) -> Turns:
    """Cosines and sines [B T dims/2] for positions [B T]; those of no turn at all where there is no rope.

    `lengths`, broadcastable to [B T], are those of the samples that the tokens belong to.
    """
    if rope is None:
        still = jnp.zeros((*positions.shape, dims // 2), jnp.float32)
        return still + 1, still
    f = frequencies(rope)
    angles = positions[..., None].astype(jnp.float32) * f.short
    if f.long is not None:
        assert lengths is not None
        beyond = jnp.broadcast_to(lengths > f.original_positions, positions.shape)
        angles = jnp.where(beyond[..., None], positions[..., None].astype(jnp.float32) * f.long, angles)
    factor = np.float32(f.factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, by: Turns) -> jax.Array:
    """[B T heads H] with its first 2R dims turned, in float32."""
    cos, sin = (y[:, :, None] for y in by)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def sample_lengths(segment_ids: jax.Array) -> jax.Array:
    """[B T] -> [B T]: how many slots the segment of each slot has."""
    t = segment_ids.shape[1]
    slots = jnp.arange(t, dtype=jnp.int32)
    edge = segment_ids[:, 1:] != segment_ids[:, :-1]
    ones = jnp.ones((segment_ids.shape[0], 1), bool)
    starts = jax.lax.cummax(jnp.where(jnp.concatenate([ones, edge], axis=1), slots, 0), axis=1)
    ends = jax.lax.cummin(jnp.where(jnp.concatenate([edge, ones], axis=1), slots, t), axis=1, reverse=True)
    return ends - starts + 1
