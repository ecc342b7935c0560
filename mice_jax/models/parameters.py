"""Parameters of Flax NNX modules: how they are declared and used, and the norm that most layers have.

A declaration has the shape, the logical axes and the initialisation of a parameter. Parameters are float32 and are cast
to the compute dtype where they are used. The dims of a weight are its outputs, then its inputs, as in checkpoints.
`reduce_dtype` is everywhere the dtype in which the gradients of weights and biases are summed over devices. Those of
norms are always summed in float32, in which norms compute, as are those of all `FLOAT32_PARAMS`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mice_jax.models.matmul import add_bias, matmul
from mice_jax.models.spec import ModelSpec

# B rows, T slots

# The last names of parameters that are applied in float32, in whatever dtype the rest is computed.
FLOAT32_PARAMS = frozenset({"scale", "kernel", "kernel_bias"})


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
    """A parameter drawn from a normal distribution; ones if `std` is None, zeros if it is 0."""
    if std is None:
        value = jnp.ones(shape, jnp.float32)
    elif std == 0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def axes_of(parameter: nnx.Param) -> tuple[str | None, ...]:
    """The logical axes of a parameter of one layer; the stacked parameter, whose metadata it has, has one more."""
    return tuple(parameter.out_sharding)[-parameter[...].ndim :]


def product(x: jax.Array, parameter: nnx.Param, reduce_dtype: Any, in_dims: int = 1) -> jax.Array:
    """Multiplies activations by a parameter, as `matmul` does."""
    return matmul(x, parameter[...], in_dims, axes=axes_of(parameter), reduce_dtype=reduce_dtype)


def plus(x: jax.Array, parameter: nnx.Param, reduce_dtype: Any) -> jax.Array:
    """Adds a bias to activations, as `add_bias` does."""
    return add_bias(x, parameter[...], axes=axes_of(parameter), reduce_dtype=reduce_dtype)


class RMSNorm(nnx.Module):
    """RMS norm over all dims of `shape` together; its factor is the stored scale plus the spec's `norm_offset`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], spec: ModelSpec, rngs: nnx.Rngs):
        self.scale = param(rngs, shape, axes, 0 if spec.norm_offset else None)
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, whose last dims are `shape`, in float32; returns the same shape and dtype."""
        scale = self.scale[...] + self.offset
        wide = x.astype(jnp.float32)
        dims = tuple(range(-scale.ndim, 0))
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=dims, keepdims=True) + self.eps)
        return (scale * wide).astype(x.dtype)
