"""The Mamba-2 layer (arXiv 2405.21060): projections, a causal convolution, the state space model and a gated norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models.attention.segments import mark_saveable
from mice_jax.models.mixers.causal_conv import Kernel, empty_conv_state, heads_conv, heads_conv_steps
from mice_jax.models.mixers.chunks import CHUNK
from mice_jax.models.mixers.costs import MixerWidths, padded
from mice_jax.models.mixers.mamba2 import mamba2_of_rows, mamba2_step, time_steps
from mice_jax.models.parameters import normalized, param, param_of, plus, product
from mice_jax.models.spec import Mamba2, ModelSpec
from mice_jax.numerics.scaled import scaled
from mice_jax.sharding import constrain

# B rows, T slots, D d_model, N heads, P head dims, G groups, S state dims, K taps of the kernels

# The last inputs of the convolutions of x [B K-1 N*P], b [B K-1 G*S] and c [B K-1 G*S], and the state [B N P S].
State = tuple[jax.Array, ...]


class Mamba2Mixer(nnx.Module):
    """The state space model of a layer, with what is around it."""

    NAME = "mamba2"  # of its parameters among those of a layer
    # The logical axes of the arrays of its state.
    STATE_AXES = (
        ("batch", None, "channels"),
        ("batch", None, None),
        ("batch", None, None),
        ("batch", "heads", None, None),
    )

    def __init__(self, spec: ModelSpec, kind: Mamba2, rngs: nnx.Rngs):
        d, n, p, g, s, std = spec.d_model, kind.num_heads, kind.head_dim, kind.num_groups, kind.state_dim, spec.init_std
        heads, groups = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.gate = param(rngs, (n, p, d), (*heads, "embed"), std)
        self.x = param(rngs, (n, p, d), (*heads, "embed"), std)
        self.b = param(rngs, (g, s, d), (*groups, "embed"), std)
        self.c = param(rngs, (g, s, d), (*groups, "embed"), std)
        self.step = param(rngs, (n, d), ("heads", "embed"), std)
        self.out = param(rngs, (d, n, p), ("embed", *heads), std)
        self.x_kernel = param(rngs, (n, p, 1, kind.taps), (*heads, None, None), std)
        self.b_kernel = param(rngs, (g, s, 1, kind.taps), (*groups, None, None), std)
        self.c_kernel = param(rngs, (g, s, 1, kind.taps), (*groups, None, None), std)
        self.step_bias = param(rngs, (n,), ("heads",), None)
        self.rate_log = param_of(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), ("heads",))
        self.skip = param(rngs, (n,), ("heads",), None)
        self.scale = param(rngs, (n, p), heads, None)
        if kind.bias:
            self.gate_bias = param(rngs, (n, p), heads, 0)
            self.x_bias = param(rngs, (n, p), heads, 0)
            self.b_bias = param(rngs, (g, s), groups, 0)
            self.c_bias = param(rngs, (g, s), groups, 0)
            self.step_projection_bias = param(rngs, (n,), ("heads",), 0)
            self.out_bias = param(rngs, (d,), ("embed",), 0)
        if kind.conv_bias:
            self.x_kernel_bias = param(rngs, (n, p), heads, 0)
            self.b_kernel_bias = param(rngs, (g, s), groups, 0)
            self.c_kernel_bias = param(rngs, (g, s), groups, 0)
        self.kind, self.eps = kind, spec.norm_eps

    def __call__(self, x: jax.Array, segment_ids: jax.Array, reduce_dtype: Any = jnp.float32) -> jax.Array:
        """Computes the mixer for packed rows.

        Args:
          x: [B T D].
          segment_ids: [B T] int32.
          reduce_dtype: the dtype in which gradients are summed over devices.

        Returns:
          [B T D].
        """
        gate, *inputs, steps = self._projected(x, reduce_dtype)
        x, b, c = (
            heads_conv(y, kernel, segment_ids, bias) for y, (kernel, bias) in zip(inputs, self._kernels(), strict=True)
        )
        (y,) = mark_saveable(mamba2_of_rows(x, steps, self._rate(), b, c, self.skip[...], segment_ids))
        return self._output(y, gate, reduce_dtype)

    def decode(self, x: jax.Array, state: State, num_tokens: jax.Array) -> tuple[jax.Array, State]:
        """Continues rows, of one sample each, from a state.

        Args:
          x: [B T D].
          state: the last inputs of the convolutions, and the state of the heads.
          num_tokens: [B] int32, the number of slots of each row that are tokens; the rest, at its end, is padding.

        Returns:
          [B T D], and the new state.
        """
        gate, *inputs, steps = self._projected(x, jnp.float32)
        (x, b, c), last = heads_conv_steps(inputs, self._kernels(), state[:3], num_tokens)
        y, heads = mamba2_step(x, steps, self._rate(), b, c, self.skip[...], state[3], num_tokens)
        return self._output(y, gate, jnp.float32), (*last, heads)

    def _projected(self, x: jax.Array, reduce_dtype: Any) -> tuple[jax.Array, ...]:
        """Projects [B T D] to gates and x [B T N P], b and c [B T G S], and time steps [B T N], float32."""
        weights = (self.gate, self.x, self.b, self.c, self.step)
        projected = [product(x, weight, reduce_dtype) for weight in weights]
        if self.kind.bias:
            biases = (self.gate_bias, self.x_bias, self.b_bias, self.c_bias, self.step_projection_bias)
            projected = [plus(y, bias, reduce_dtype) for y, bias in zip(projected, biases, strict=True)]
        *projected, raw = (constrain(y, "batch", "length", "heads", *[None] * (y.ndim - 3)) for y in projected)
        return *projected, time_steps(raw, self.step_bias[...], self.kind.time_step_limits)

    def _kernels(self) -> list[Kernel]:
        """Returns the kernel and the bias of the convolution of x, of b and of c."""
        kernels = [kernel[...] for kernel in (self.x_kernel, self.b_kernel, self.c_kernel)]
        if not self.kind.conv_bias:
            return [(kernel, None) for kernel in kernels]
        biases = (self.x_kernel_bias, self.b_kernel_bias, self.c_kernel_bias)
        return [(kernel, bias[...]) for kernel, bias in zip(kernels, biases, strict=True)]

    def _rate(self) -> jax.Array:
        return -jnp.exp(self.rate_log[...].astype(jnp.float32))

    def _output(self, y: jax.Array, gate: jax.Array, reduce_dtype: Any) -> jax.Array:
        """Multiplies [B T N P] by its gates, normalises it within groups of heads, and projects it to [B T D]."""
        gated = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        grouped = gated.reshape(*y.shape[:2], self.kind.num_groups, -1)
        normed = scaled(normalized(grouped, self.eps).reshape(y.shape), self.scale[...], (2, 3))
        y = product(normed.astype(y.dtype), self.out, reduce_dtype, in_dims=2)
        return plus(y, self.out_bias, reduce_dtype) if self.kind.bias else y

    @staticmethod
    def empty_state(spec: ModelSpec, kind: Mamba2, rows: int, dtype: Any) -> State:
        """Makes the state of `rows` rows before their first token."""
        inner, shared = kind.num_heads * kind.head_dim, kind.num_groups * kind.state_dim
        x, b, c = (empty_conv_state(rows, channels, kind.taps, dtype) for channels in (inner, shared, shared))
        return x, b, c, jnp.zeros((rows, kind.num_heads, kind.head_dim, kind.state_dim), jnp.float32)

    @staticmethod
    def flops_per_token(spec: ModelSpec, kind: Mamba2) -> int:
        """Returns the FLOPs of the forward pass for one token: two for each weight, and those of the chunked scan."""
        inner, shared = kind.num_heads * kind.head_dim, kind.num_groups * kind.state_dim
        weights = spec.d_model * (3 * inner + 2 * shared + kind.num_heads) + kind.taps * (inner + 2 * shared)
        scan = CHUNK * shared + inner * (CHUNK + 2 * kind.state_dim)
        return 2 * (weights + scan)

    @staticmethod
    def widths(spec: ModelSpec, kind: Mamba2, tensor: int, lanes: int) -> MixerWidths:
        """Returns the widths of its arrays on one of `tensor` devices, which pad heads to a multiple of `lanes`."""
        inner, shared = kind.num_heads * kind.head_dim // tensor, kind.num_groups * kind.state_dim
        products = 3 * inner + 2 * shared + kind.num_heads // tensor
        # In float32 are the products with the gate, the weights and decays between slots, and of all chunks the states,
        # what each adds to them, and a gradient.
        pairs = 2 * 3 * CHUNK * kind.num_heads // tensor
        states = 2 * 3 * inner * kind.state_dim // CHUNK
        working = products + 10 * inner + 2 * shared + pairs + states
        heads = kind.num_heads // tensor * padded(kind.head_dim, lanes)
        return MixerWidths(products, 4 * inner + 2 * heads + 10 * shared, inner + 6 * heads, working)
