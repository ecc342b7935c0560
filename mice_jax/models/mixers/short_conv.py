"""The gated short convolution of LFM2 (arXiv 2511.23404): out(c * conv(b * x)), with three projections b, c and x."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models.mixers.causal_conv import ConvState, causal_conv, causal_conv_step, empty_conv_state
from mice_jax.models.mixers.costs import MixerWidths
from mice_jax.models.parameters import param, plus, product
from mice_jax.models.spec import ModelSpec, ShortConv
from mice_jax.sharding import constrain

# B rows, T slots, D d_model, C channels (as many as D), K taps of the kernel


class ShortConvMixer(nnx.Module):
    """The gated short convolution of a layer."""

    NAME = "short_conv"  # of its parameters among those of a layer
    STATE_AXES = (("batch", None, "channels"),)  # the logical axes of each array of its state

    def __init__(self, spec: ModelSpec, kind: ShortConv, rngs: nnx.Rngs):
        d, std = spec.d_model, spec.init_std
        self.b = param(rngs, (d, d), ("channels", "embed"), std)
        self.c = param(rngs, (d, d), ("channels", "embed"), std)
        self.x = param(rngs, (d, d), ("channels", "embed"), std)
        self.kernel = param(rngs, (d, 1, kind.taps), ("channels", None, None), std)
        self.out = param(rngs, (d, d), ("embed", "channels"), std)
        self.has_bias = kind.bias
        if kind.bias:
            self.b_bias = param(rngs, (d,), ("channels",), 0)
            self.c_bias = param(rngs, (d,), ("channels",), 0)
            self.x_bias = param(rngs, (d,), ("channels",), 0)
            self.kernel_bias = param(rngs, (d,), ("channels",), 0)
            self.out_bias = param(rngs, (d,), ("embed",), 0)

    def __call__(self, x: jax.Array, segment_ids: jax.Array, reduce_dtype: Any = jnp.float32) -> jax.Array:
        """Computes the mixer for packed rows.

        Args:
          x: [B T D].
          segment_ids: [B T] int32.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T D].
        """
        inputs, c = self._gated(x, reduce_dtype)
        mixed = causal_conv(inputs, self.kernel[:, 0], segment_ids, self._kernel_bias())
        return self._output(c * mixed, reduce_dtype)

    def decode(self, x: jax.Array, state: ConvState, num_tokens: jax.Array) -> tuple[jax.Array, ConvState]:
        """Continues rows, of one sample each, from a state.

        Args:
          x: [B T D].
          state: the last inputs of the convolution, [B K-1 C].
          num_tokens: [B] int32, the number of slots of each row that are tokens; the rest, at its end, is padding.

        Returns:
          [B T D], and the new state.
        """
        inputs, c = self._gated(x, jnp.float32)
        mixed, state = causal_conv_step(inputs, self.kernel[:, 0], state, num_tokens, self._kernel_bias())
        return self._output(c * mixed, jnp.float32), state

    def _gated(self, x: jax.Array, reduce_dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Computes the inputs of the convolution and the factors of its outputs, [B T C] both."""
        b, c, x = (product(x, weight, reduce_dtype) for weight in (self.b, self.c, self.x))
        if self.has_bias:
            b, c = plus(b, self.b_bias, reduce_dtype), plus(c, self.c_bias, reduce_dtype)
            x = plus(x, self.x_bias, reduce_dtype)
        return constrain(b * x, "batch", "length", "channels"), c

    def _output(self, y: jax.Array, reduce_dtype: Any) -> jax.Array:
        y = product(constrain(y, "batch", "length", "channels"), self.out, reduce_dtype)
        return plus(y, self.out_bias, reduce_dtype) if self.has_bias else y

    def _kernel_bias(self) -> jax.Array | None:
        return self.kernel_bias[...] if self.has_bias else None

    @staticmethod
    def empty_state(spec: ModelSpec, kind: ShortConv, rows: int, dtype: Any) -> ConvState:
        """Makes the state of `rows` rows before their first token."""
        return empty_conv_state(rows, spec.d_model, kind.taps, dtype)

    @staticmethod
    def flops_per_token(spec: ModelSpec, kind: ShortConv) -> int:
        """Returns the FLOPs of the forward pass for one token: two for each weight."""
        return 2 * (4 * spec.d_model**2 + kind.taps * spec.d_model)

    @staticmethod
    def widths(spec: ModelSpec, kind: ShortConv, tensor: int, lanes: int) -> MixerWidths:
        """Returns the widths of its arrays on one of `tensor` devices."""
        channels = spec.d_model // tensor
        return MixerWidths(products=3 * channels, saved=6 * channels, saved_float32=0, working=8 * channels)
