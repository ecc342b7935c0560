"""Weights in bfloat16 whose gradients are computed in float32, and kept in the dtype in which a run sums them.

JAX gives a gradient the dtype of what it differentiates by, which would make that of a bfloat16 weight bfloat16
wherever it is computed. Casting all weights to float32 beforehand would need twice the memory of float32 weights. So a
weight is accompanied by zeros of its shape, which no value depends on and XLA removes; the gradient of the weight is
given to them, in their dtype.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WideGradient:
    """A weight and the zeros that receive its gradient; a model uses it where it otherwise uses an array.

    Attributes:
      weight: bfloat16, of any shape; None in a gradient, which has none for it.
      zeros: of the same shape, in the dtype of the gradient.
    """

    weight: Any
    zeros: jax.Array

    def __getitem__(self, index: Any) -> "WideGradient":
        return WideGradient(self.weight[index], self.zeros[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """The number of dims of the weight."""
        return self.weight.ndim

    def astype(self, dtype: Any) -> jax.Array:
        """Returns the weight as an array of another dtype, whose float32 gradient is given to the zeros."""
        return _in_float32(self.weight, self.zeros).astype(dtype)


def gradient_dtype(param: Any, sums_dtype: Any) -> Any:
    """Returns the dtype of the gradient of a parameter: float32, or that of the sums if the parameter is bfloat16."""
    return jnp.dtype(jnp.float32 if param.dtype == jnp.float32 else sums_dtype)


def variables_of(params: Any, sums_dtype: Any) -> Any:
    """Returns what to differentiate by: each parameter itself, or zeros in the place of one in bfloat16.

    Args:
      params: The parameters, float32 or bfloat16.
      sums_dtype: The dtype in which gradients are summed over microbatches, which the zeros get.
    """
    return jax.tree.map(
        lambda p: p if p.dtype == jnp.float32 else jnp.zeros(p.shape, gradient_dtype(p, sums_dtype)), params
    )


def with_variables(params: Any, variables: Any) -> Any:
    """Returns the parameters as a model uses them, so that the gradient by `variables_of(params, ...)` is theirs."""
    return jax.tree.map(lambda p, v: v if p.dtype == jnp.float32 else WideGradient(p, v), params, variables)


def gradient_for(weight: Any, gradient: jax.Array) -> Any:
    """Returns a float32 gradient as a custom_vjp returns it for a weight: in its dtype, or that of the zeros."""
    if isinstance(weight, WideGradient):
        return WideGradient(None, gradient.astype(weight.zeros.dtype))
    return gradient.astype(weight.dtype)


@jax.custom_vjp
def _in_float32(weight: jax.Array, zeros: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32)


def _forward(weight: jax.Array, zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _in_float32(weight, zeros), jnp.zeros(0, zeros.dtype)  # an empty array that tells their dtype


def _backward(empty: jax.Array, gradient: jax.Array) -> tuple[None, jax.Array]:
    # Without a barrier, XLA would round where the gradient is added, and keep float32 until then.
    return None, jax.lax.optimization_barrier(gradient.astype(empty.dtype))


_in_float32.defvjp(_forward, _backward)
