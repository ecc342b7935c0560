"""Weights in bfloat16 whose gradients are float32.

JAX gives a gradient the dtype of what it differentiates by, which would round that of a bfloat16 weight. Casting all
weights to float32 beforehand would need twice the memory of float32 weights. So a weight is accompanied by float32
zeros of its shape, which no value depends on and XLA removes; the gradient of the weight is given to them.
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
      zeros: float32, of the same shape.
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
        """Returns the weight as an array of another dtype, whose gradient is given to the zeros."""
        return _in_float32(self.weight, self.zeros).astype(dtype)


def variables_of(params: Any) -> Any:
    """Returns what to differentiate by, float32: each parameter itself, or zeros in the place of one in bfloat16."""
    return jax.tree.map(lambda p: p if p.dtype == jnp.float32 else jnp.zeros(p.shape, jnp.float32), params)


def with_variables(params: Any, variables: Any) -> Any:
    """Returns the parameters as a model uses them, so that the gradient by `variables_of(params)` is theirs."""
    return jax.tree.map(lambda p, v: v if p.dtype == jnp.float32 else WideGradient(p, v), params, variables)


def gradient_for(weight: Any, gradient: jax.Array) -> Any:
    """Returns a float32 gradient as a custom_vjp returns it for a weight: in its dtype, or that of the zeros."""
    return WideGradient(None, gradient) if isinstance(weight, WideGradient) else gradient.astype(weight.dtype)


@jax.custom_vjp
def _in_float32(weight: jax.Array, zeros: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32)


_in_float32.defvjp(lambda weight, zeros: (_in_float32(weight, zeros), None), lambda _, gradient: (None, gradient))
