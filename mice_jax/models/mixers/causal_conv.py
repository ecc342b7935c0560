"""A causal convolution along a row with a kernel for each channel, in packed rows and while decoding.

It computes in float32 whatever the dtype of its inputs: the kernel is small, and its gradient is a sum over all slots.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mice_jax.models.mixers.split_rows import last_of_previous, map_parts, num_parts

# B rows, T slots, C channels, K taps of the kernel

# The last K-1 inputs of a row, [B K-1 C].
ConvState = jax.Array
# A kernel [N H 1 K], as checkpoints have it, and its bias [N H], if it has one.
Kernel = tuple[jax.Array, jax.Array | None]


def causal_conv(x: jax.Array, weight: jax.Array, segment_ids: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Convolves each channel of packed rows with its own kernel, within the samples.

    An output is the sum of the K inputs that end at its slot, each times its tap; the last tap is that of the slot
    itself. An input of another sample counts as zero.

    Args:
      x: [B T C].
      weight: [C K].
      segment_ids: [B T] int32.
      bias: [C], or None.

    Returns:
      [B T C] in the dtype of `x`.
    """
    slots, before = x.shape[1], weight.shape[1] - 1
    parts = num_parts(slots)
    if parts == 1 or not 0 < before <= slots // parts:
        return _causal_conv(x, weight, segment_ids, bias)

    def of_part(
        _: jax.Array, x: jax.Array, segment_ids: jax.Array, weight: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        x, segment_ids = (jnp.concatenate([last_of_previous(a, before), a], axis=1) for a in (x, segment_ids))
        return _causal_conv(x, weight, segment_ids, bias)[:, before:]

    return map_parts(of_part, (x, segment_ids), (weight, bias))


def _causal_conv(x: jax.Array, weight: jax.Array, segment_ids: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _plus(_taps_sum(x, weight, segment_ids), bias).astype(x.dtype)


# With a backward pass of its own: XLA fuses the one of automatic differentiation into a loop per tap, of which each
# computes again what comes before it, the derivative of SiLU among others.
@jax.custom_vjp
def _taps_sum(x: jax.Array, weight: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Convolves [B T C] with [C K] within samples; returns float32."""
    wide, kernel = x.astype(jnp.float32), weight.astype(jnp.float32)
    y = wide * kernel[:, -1]
    for distance in _distances(x, weight):
        y += _earlier(wide, distance, segment_ids) * kernel[:, -1 - distance]
    return y


def _distances(x: jax.Array, weight: jax.Array) -> range:
    return range(1, min(weight.shape[1], x.shape[1]))


def _earlier(x: jax.Array, distance: int, segment_ids: jax.Array) -> jax.Array:
    """Returns the inputs [B T C] that stand so many slots before each slot, and zero where that is another sample."""
    moved = jnp.pad(x[:, :-distance], ((0, 0), (distance, 0), (0, 0)))
    return jnp.where(_is_same_sample(distance, segment_ids), moved, 0)


def _is_same_sample(distance: int, segment_ids: jax.Array) -> jax.Array:
    before = jnp.pad(segment_ids[:, :-distance], ((0, 0), (distance, 0)), constant_values=-1)
    return (segment_ids == before)[..., None]


def _taps_sum_forward(
    x: jax.Array, weight: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _taps_sum(x, weight, segment_ids), (x, weight, segment_ids)


def _taps_sum_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, weight, segment_ids = saved
    wide, kernel = x.astype(jnp.float32), weight.astype(jnp.float32)
    dx, d_taps = dy * kernel[:, -1], [_sum_over_slots(dy, wide)]
    for distance in _distances(x, weight):
        later = jnp.where(_is_same_sample(distance, segment_ids), dy, 0)[:, distance:]
        dx += jnp.pad(later, ((0, 0), (0, distance), (0, 0))) * kernel[:, -1 - distance]
        d_taps.append(_sum_over_slots(dy, _earlier(wide, distance, segment_ids)))
    d_taps += [jnp.zeros_like(d_taps[0])] * (weight.shape[1] - len(d_taps))  # of taps longer than the rows
    return dx.astype(x.dtype), jnp.stack(d_taps[::-1], axis=1).astype(weight.dtype), None


def _sum_over_slots(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("btc,btc->c", a, b, precision=jax.lax.Precision.HIGHEST)


_taps_sum.defvjp(_taps_sum_forward, _taps_sum_backward)


def causal_conv_step(
    x: jax.Array, weight: jax.Array, state: ConvState, num_tokens: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, ConvState]:
    """Continues rows, of one sample each, from their last inputs.

    Args:
      x: [B T C], the inputs that follow.
      weight: [C K].
      state: [B K-1 C], the inputs before them, zeros where there were fewer.
      num_tokens: [B] int32, the number of slots of each row that are tokens. The rest, at its end, is padding, whose
        outputs have no meaning and which does not enter the state.
      bias: [C], or None.

    Returns:
      [B T C] in the dtype of `x`, and the new state.
    """
    taps, slots = weight.shape[1], x.shape[1]
    kernel = weight.astype(jnp.float32)
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)  # [B K-1+T C]
    wide = inputs.astype(jnp.float32)
    y = wide[:, taps - 1 :] * kernel[:, -1]
    for distance in range(1, taps):
        start = taps - 1 - distance
        y += wide[:, start : start + slots] * kernel[:, -1 - distance]
    last = num_tokens[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)
    new_state = jnp.take_along_axis(inputs, last[..., None], axis=1)
    return _plus(y, bias).astype(x.dtype), new_state.astype(state.dtype)


def empty_conv_state(rows: int, channels: int, taps: int, dtype: jnp.dtype) -> ConvState:
    """Makes the state of `rows` rows before their first token: [B K-1 C] zeros."""
    return jnp.zeros((rows, taps - 1, channels), dtype)


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(jnp.float32)


def heads_conv(x: jax.Array, kernel: jax.Array, segment_ids: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Convolves heads as `causal_conv` does, and applies SiLU.

    Args:
      x: [B T N H].
      kernel: [N H 1 K], as checkpoints have it.
      segment_ids: [B T] int32.
      bias: [N H], or None.

    Returns:
      [B T N H].
    """
    weight, bias = _of_channels(kernel, bias)
    return jax.nn.silu(causal_conv(x.reshape(*x.shape[:2], -1), weight, segment_ids, bias)).reshape(x.shape)


def heads_conv_steps(
    inputs: Sequence[jax.Array], kernels: Sequence[Kernel], states: Sequence[ConvState], num_tokens: jax.Array
) -> tuple[list[jax.Array], list[ConvState]]:
    """Continues the rows of several convolutions as `causal_conv_step` does, with heads as in `heads_conv`.

    Args:
      inputs: of each convolution, [B T N H].
      kernels: the kernel and bias of each, as `heads_conv` takes them.
      states: the last inputs of each, with channels N*H.
      num_tokens: [B] int32, the number of slots of each row that are tokens.

    Returns:
      The outputs [B T N H] and the new states.
    """
    outputs, new_states = [], []
    for x, (kernel, bias), state in zip(inputs, kernels, states, strict=True):
        weight, bias = _of_channels(kernel, bias)
        y, new_state = causal_conv_step(x.reshape(*x.shape[:2], -1), weight, state, num_tokens, bias)
        outputs.append(jax.nn.silu(y).reshape(x.shape))
        new_states.append(new_state)
    return outputs, new_states


def _of_channels(kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Joins heads and their dims to channels."""
    return kernel.reshape(-1, kernel.shape[-1]), None if bias is None else bias.reshape(-1)
