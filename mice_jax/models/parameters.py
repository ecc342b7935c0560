"""Parameters of Flax NNX modules: how they are declared and used, and the norm that most layers have.

A declaration has the shape, the logical axes and the initialisation of a parameter. Parameters are float32 and are cast
to the compute dtype where they are used. The dims of a weight are its outputs, then its inputs, as in checkpoints.
`reduce_dtype` is everywhere the dtype in which the gradients of weights and biases are summed over devices. Those of
norms are always summed in float32, in which norms compute, as are those of all `FLOAT32_PARAMS`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models.lora import LoRA
from mice_jax.models.matmul import add_bias, matmul, scale_outputs
from mice_jax.models.spec import ModelSpec
from mice_jax.numerics.scaled import scaled
from mice_jax.sharding import constrain_param

# B rows, T slots

# The last names of parameters that are applied in float32, in whatever dtype the rest is computed.
FLOAT32_PARAMS = frozenset(
    {"scale", "magnitude", "rate_log", "skip", "step_bias", "kernel", "kernel_bias"}
    | {"q_kernel", "k_kernel", "v_kernel", "x_kernel", "b_kernel", "c_kernel"}
    | {"x_kernel_bias", "b_kernel_bias", "c_kernel_bias"}
)


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
    """A parameter drawn from a normal distribution; ones if `std` is None, zeros if it is 0."""
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif std == 0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return param_of(value, axes)


def param_of(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter with a given first value."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def axes_of(parameter: nnx.Param) -> tuple[str | None, ...]:
    """The logical axes of a parameter of one layer; the stacked parameter, whose metadata it has, has one more."""
    return tuple(parameter.out_sharding)[-parameter[...].ndim :]


class Adapted(nnx.Module):
    """Stacked weights W with low-rank adapters, in the place of the weights: the product is W x + scale * B (A x).

    A is drawn as PEFT draws it, uniformly within 1 / sqrt(inputs). B is zero, so that the model is that of W at first.
    With DoRA, each output of the product is multiplied by its magnitude over its norm.
    """

    def __init__(self, weight: nnx.Param, lora: LoRA, rngs: nnx.Rngs):
        layers, *shape = weight[...].shape
        stack, *axes = weight.out_sharding
        num_in = 2 if axes[-1] == "head_dim" else 1  # heads and their dims are inputs together
        bound = 1 / math.sqrt(math.prod(shape[-num_in:]))
        a = jax.random.uniform(rngs.params(), (layers, lora.rank, *shape[-num_in:]), jnp.float32, -bound, bound)
        b = jnp.zeros((layers, *shape[:-num_in], lora.rank), jnp.float32)
        self.weight, self.scale, self.dora = weight, lora.scale, lora.dora
        self.a = nnx.Param(a, out_sharding=(stack, "rank", *axes[-num_in:]), eager_sharding=False)
        self.b = nnx.Param(b, out_sharding=(stack, *axes[:-num_in], "rank"), eager_sharding=False)
        if lora.dora:
            norms = jnp.sqrt(jnp.sum(jnp.square(weight[...]), axis=tuple(range(-num_in, 0))))
            self.magnitude = nnx.Param(norms, out_sharding=(stack, *axes[:-num_in]), eager_sharding=False)

    def factors(self, in_dims: int, dtype: Any) -> jax.Array:
        """Computes the factor of each output with DoRA: its magnitude over its norm, which has no gradient.

        The squared norm of W + s B A is |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T, row by row, so that no array is as
        large as W.

        Args:
          in_dims: how many of the last dims of the weight are inputs.
          dtype: that of the activations, in which products use the weights.

        Returns:
          [O...], float32.
        """
        weight, a, b = (jax.lax.stop_gradient(p[...]) for p in (self.weight, self.a, self.b))
        inputs = tuple(range(-in_dims, 0))
        sums = functools.partial(jnp.tensordot, preferred_element_type=jnp.float32)
        weight, narrow = weight.astype(dtype), a.astype(dtype)
        both = sums(weight, narrow, axes=(inputs, inputs))  # [O... R]
        low = self.scale * b
        change = 2 * both + sums(low, sums(narrow, narrow, axes=(inputs, inputs)), axes=1)
        squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=inputs) + jnp.sum(low * change, axis=-1)
        norms = constrain_param(jnp.sqrt(squares), *axes_of(self.magnitude))
        return self.magnitude[...] / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def product(x: jax.Array, parameter: nnx.Param | Adapted, reduce_dtype: Any, in_dims: int = 1) -> jax.Array:
    """Multiplies activations by a parameter, as `matmul` does, and adds what its adapter gives if it has one."""
    if isinstance(parameter, Adapted):
        low = product(x, parameter.a, reduce_dtype, in_dims)
        low *= jnp.asarray(parameter.scale, low.dtype)
        y = product(x, parameter.weight, reduce_dtype, in_dims) + product(low, parameter.b, reduce_dtype)
        if not parameter.dora:
            return y
        factors, axes = parameter.factors(in_dims, x.dtype), axes_of(parameter.magnitude)
        return scale_outputs(y, factors, axes=axes, reduce_dtype=reduce_dtype)
    return matmul(x, parameter[...], in_dims, axes=axes_of(parameter), reduce_dtype=reduce_dtype)


def plus(x: jax.Array, parameter: nnx.Param, reduce_dtype: Any) -> jax.Array:
    """Adds a bias to activations, as `add_bias` does."""
    return add_bias(x, parameter[...], axes=axes_of(parameter), reduce_dtype=reduce_dtype)


def normalized(x: jax.Array, eps: float, dims: int = 1) -> jax.Array:
    """Divides x by the root mean square over its last dims, in float32; returns float32."""
    wide = x.astype(jnp.float32)
    factors = jax.lax.rsqrt(jnp.mean(wide * wide, axis=tuple(range(-dims, 0))) + eps)
    return scaled(wide, factors, range(factors.ndim))


class RMSNorm(nnx.Module):
    """RMS norm over all dims of `shape` together; its factor is the stored scale plus the spec's `norm_offset`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], spec: ModelSpec, rngs: nnx.Rngs):
        self.scale = param(rngs, shape, axes, 0 if spec.norm_offset else None)
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, whose last dims are `shape`, in float32; returns the same shape and dtype."""
        scale = self.scale[...] + self.offset
        return scaled(normalized(x, self.eps, scale.ndim), scale, range(x.ndim - scale.ndim, x.ndim)).astype(x.dtype)
