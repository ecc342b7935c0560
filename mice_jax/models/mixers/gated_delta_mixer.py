"""The gated delta layer of Qwen3.5 (arXiv 2412.06464): projections, a causal convolution, the rule and a gated norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models.attention.segments import mark_saveable
from mice_jax.models.mixers.causal_conv import Kernel, empty_conv_state, heads_conv, heads_conv_steps
from mice_jax.models.mixers.chunks import CHUNK
from mice_jax.models.mixers.costs import MixerWidths, padded
from mice_jax.models.mixers.gated_delta import gated_delta_of_rows, gated_delta_step
from mice_jax.models.parameters import normalized, param, param_of, product
from mice_jax.models.spec import GatedDelta, ModelSpec
from mice_jax.numerics.scaled import scaled
from mice_jax.sharding import constrain

# B rows, T slots, M d_model, K key heads, D key dims, N value heads, E value dims, W taps of the kernels

# The last inputs of the convolutions of queries and keys [B W-1 K*D] and of values [B W-1 N*E], and the state
# [B N D E].
State = tuple[jax.Array, ...]


class GatedDeltaMixer(nnx.Module):
    """The gated delta rule of a layer, with what is around it."""

    NAME = "gated_delta"  # of its parameters among those of a layer
    # The logical axes of the arrays of its state.
    STATE_AXES = (*(("batch", None, "channels"),) * 3, ("batch", "heads", None, None))

    def __init__(self, spec: ModelSpec, kind: GatedDelta, rngs: nnx.Rngs):
        m, std, taps = spec.d_model, spec.init_std, kind.taps
        keys, values = (kind.num_key_heads, kind.key_dim), (kind.num_value_heads, kind.value_dim)
        n, key_axes, value_axes = kind.num_value_heads, ("kv_heads", "head_dim"), ("heads", "head_dim")
        self.q = param(rngs, (*keys, m), (*key_axes, "embed"), std)
        self.k = param(rngs, (*keys, m), (*key_axes, "embed"), std)
        self.v = param(rngs, (*values, m), (*value_axes, "embed"), std)
        self.gate = param(rngs, (*values, m), (*value_axes, "embed"), std)
        self.beta = param(rngs, (n, m), ("heads", "embed"), std)
        self.step = param(rngs, (n, m), ("heads", "embed"), std)
        self.out = param(rngs, (m, *values), ("embed", *value_axes), std)
        self.q_kernel = param(rngs, (*keys, 1, taps), (*key_axes, None, None), std)
        self.k_kernel = param(rngs, (*keys, 1, taps), (*key_axes, None, None), std)
        self.v_kernel = param(rngs, (*values, 1, taps), (*value_axes, None, None), std)
        self.step_bias = param(rngs, (n,), ("heads",), None)
        rates = jax.random.uniform(rngs.params(), (n,), jnp.float32, 0.01, 16)
        self.rate_log = param_of(jnp.log(rates), ("heads",))
        self.scale = param(rngs, (kind.value_dim,), ("head_dim",), None)
        self.eps = spec.norm_eps

    def __call__(self, x: jax.Array, segment_ids: jax.Array, reduce_dtype: Any = jnp.float32) -> jax.Array:
        """Computes the mixer for packed rows.

        Args:
          x: [B T M].
          segment_ids: [B T] int32.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T M].
        """
        *inputs, gate, log_decay, beta = self._projected(x, reduce_dtype)
        q, k, v = (
            heads_conv(y, kernel, segment_ids, bias) for y, (kernel, bias) in zip(inputs, self._kernels(), strict=True)
        )
        (y,) = mark_saveable(gated_delta_of_rows(q, k, v, log_decay, beta, segment_ids))
        return self._output(y, gate, reduce_dtype)

    def decode(self, x: jax.Array, state: State, num_tokens: jax.Array) -> tuple[jax.Array, State]:
        """Continues rows, of one sample each, from a state.

        Args:
          x: [B T M].
          state: the last inputs of the convolutions, and the state of the heads.
          num_tokens: [B] int32, the number of slots of each row that are tokens; the rest, at its end, is padding.

        Returns:
          [B T M], and the new state.
        """
        *inputs, gate, log_decay, beta = self._projected(x, jnp.float32)
        (q, k, v), last = heads_conv_steps(inputs, self._kernels(), state[:3], num_tokens)
        y, heads = gated_delta_step(q, k, v, log_decay, beta, state[3], num_tokens)
        return self._output(y, gate, jnp.float32), (*last, heads)

    def _projected(self, x: jax.Array, reduce_dtype: Any) -> tuple[jax.Array, ...]:
        """Projects [B T M].

        Returns:
          Queries and keys [B T K D], values and gates [B T N E], and log decays and betas [B T N], float32.
        """
        weights = (self.q, self.k, self.v, self.gate)
        projected = [constrain(product(x, w, reduce_dtype), "batch", "length", "heads", None) for w in weights]
        step, beta = (
            constrain(product(x, w, reduce_dtype), "batch", "length", "heads").astype(jnp.float32)
            for w in (self.step, self.beta)
        )
        rate = jnp.exp(self.rate_log[...])
        return *projected, -rate * jax.nn.softplus(step + self.step_bias[...]), jax.nn.sigmoid(beta)

    def _kernels(self) -> list[Kernel]:
        return [(kernel[...], None) for kernel in (self.q_kernel, self.k_kernel, self.v_kernel)]

    def _output(self, y: jax.Array, gate: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Normalises each head of [B T N E], multiplies it by its gate, and projects it to [B T M]."""
        normed = scaled(normalized(y, self.eps), self.scale[...], (3,))
        gated = (normed * jax.nn.silu(gate.astype(jnp.float32))).astype(y.dtype)
        return product(gated, self.out, reduce_dtype, in_dims=2)

    @staticmethod
    def empty_state(spec: ModelSpec, kind: GatedDelta, rows: int, dtype: Any) -> State:
        """Makes the state of `rows` rows before their first token."""
        keys, values = kind.num_key_heads * kind.key_dim, kind.num_value_heads * kind.value_dim
        q, k, v = (empty_conv_state(rows, channels, kind.taps, dtype) for channels in (keys, keys, values))
        return q, k, v, jnp.zeros((rows, kind.num_value_heads, kind.key_dim, kind.value_dim), jnp.float32)

    @staticmethod
    def flops_per_token(spec: ModelSpec, kind: GatedDelta) -> int:
        """Returns the FLOPs of the forward pass for one token: two for each weight, and those of the chunked scan."""
        keys, values = kind.num_key_heads * kind.key_dim, kind.num_value_heads * kind.value_dim
        keys_by_value_head = kind.num_value_heads * kind.key_dim
        weights = spec.d_model * (2 * keys + 3 * values + 2 * kind.num_value_heads) + kind.taps * (2 * keys + values)
        scan = CHUNK * (2 * keys + 2 * values + keys_by_value_head) + 3 * values * kind.key_dim
        return 2 * (weights + scan)

    @staticmethod
    def widths(spec: ModelSpec, kind: GatedDelta, tensor: int, lanes: int) -> MixerWidths:
        """Returns the widths of its arrays on one of `tensor` devices, which pad heads to a multiple of `lanes`."""
        keys, values = kind.num_key_heads * kind.key_dim // tensor, kind.num_value_heads * kind.value_dim // tensor
        keys_by_value_head = kind.num_value_heads * kind.key_dim // tensor
        products = 2 * keys + 3 * values + 2 * kind.num_value_heads // tensor
        # In float32 are the arrays of the rule, the decays and weights between slots, and of all chunks the states,
        # what each adds to them, and a gradient.
        pairs = 2 * 5 * CHUNK * kind.num_value_heads // tensor
        states = 2 * 3 * values * kind.key_dim // CHUNK
        working = products + 8 * keys + 13 * values + 4 * keys_by_value_head + pairs + states
        key_heads = kind.num_key_heads // tensor * padded(kind.key_dim, lanes)
        value_heads = kind.num_value_heads // tensor * padded(kind.value_dim, lanes)
        saved = 8 * keys + 4 * values + 2 * key_heads + 2 * value_heads
        norms = 2 * kind.num_value_heads // tensor * lanes  # a number for each head, in an array whose last dim is 1
        return MixerWidths(products, saved, 7 * value_heads + norms, working)
