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
    taps, slots = weight.shape[1], x.shape[1]
    kernel, wide = weight.astype(jnp.float32), x.astype(jnp.float32)
    y = wide * kernel[:, -1]
    for distance in range(1, min(taps, slots)):
        before = jnp.pad(wide[:, :-distance], ((0, 0), (distance, 0), (0, 0)))
        own = segment_ids == jnp.pad(segment_ids[:, :-distance], ((0, 0), (distance, 0)), constant_values=-1)
        y += jnp.where(own[..., None], before, 0) * kernel[:, -1 - distance]
    return _plus(y, bias).astype(x.dtype)


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
