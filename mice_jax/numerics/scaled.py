"""Products of an array with factors that have some of its dims, whose gradients are quick on a CPU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def scaled(x: jax.Array, factors: jax.Array, dims: Sequence[int]) -> jax.Array:
    """Multiplies an array by factors that have some of its dims.

    The gradient of the factors is computed as a contraction. On a CPU XLA takes a tenth to a fiftieth of the time for
    one that it takes for a product of two arrays and its sum, which is how a broadcast is differentiated.

    Args:
      x: the array.
      factors: the factors.
      dims: which dims of `x` those of `factors` are, in order.

    Returns:
      The product, of the shape of `x`.
    """

    def multiply(x: jax.Array, factors: jax.Array) -> jax.Array:
        return x * jax.lax.broadcast_in_dim(factors, x.shape, dims)

    def forward(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return multiply(x, factors), (x, factors)

    def backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, factors = saved
        all_dims = [*range(x.ndim)]
        d_factors = jnp.einsum(x, all_dims, dy, all_dims, [*dims], precision=jax.lax.Precision.HIGHEST)
        return multiply(dy, factors), d_factors

    differentiable = jax.custom_vjp(multiply)
    differentiable.defvjp(forward, backward)
    return differentiable(x, factors)
