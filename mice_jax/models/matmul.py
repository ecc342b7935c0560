"""Products of activations with a weight, look-ups in a table, biases and factors, and the gradients of all of them.

Forward passes use a parameter in the dtype of the activations, in which devices gather it. The gradient of a parameter
is a sum over the rows of all devices. JAX would compute it in the dtype of the copy that is used, so that bfloat16
copies give bfloat16 sums over devices. The functions here compute it in float32 from operands of any dtype, and leave
it to `sharding.GradientSum` to add up what the devices have. Parameters held in bfloat16 come as WideGradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mice_jax.numerics.wide_gradient import WideGradient, gradient_for
from mice_jax.sharding import (
    constrain,
    gather_over_rows,
    gather_split_heads,
    gradient_sum,
    splits_slots,
    sum_over_devices,
)

# B rows, T slots, S = B * T slots of all rows, or of those of one device
# I inputs, O outputs, V rows of a table, D its columns

MAX_DECODE_SLOTS = 64  # with more slots, both forms of the product take the same time on a CPU

Axes = tuple[str | None, ...]


def matmul(
    x: jax.Array,
    weight: jax.Array | WideGradient,
    in_dims: int = 1,
    out_dtype: Any = None,
    *,
    axes: Axes | None = None,
    reduce_dtype: Any = jnp.float32,
) -> jax.Array:
    """Multiplies activations by a weight, as one product of two matrices.

    An einsum gives the same result, but on a CPU its gradient with respect to the weight takes twice the time.

    Args:
      x: [B T I...], with `in_dims` dims of inputs.
      weight: [O... I...], outputs first; cast to the dtype of `x`.
      in_dims: how many of the last dims of `x` and `weight` are summed over.
      out_dtype: the dtype of the sum and of the result; None takes that of `x`.
      axes: the logical axes of the weight, by which it is gathered and its gradient is split; None if it is not split.
      reduce_dtype: the dtype in which the gradient with respect to the weight is summed over devices.

    Returns:
      [B T O...].
    """
    inputs, num_slots = math.prod(weight.shape[-in_dims:]), x.shape[0] * x.shape[1]
    axes = axes or (None,) * weight.ndim

    def matrices(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:  # [S I] or [B T I], and [O I]
        gather = gather_split_heads if num_slots <= MAX_DECODE_SLOTS else gather_over_rows
        # Rows and their slots are only joined where the mesh does not split both: that would gather them.
        slots = x.reshape(*x.shape[:2], inputs) if splits_slots() else x.reshape(-1, inputs)
        return slots, gather(weight.astype(x.dtype), *axes).reshape(-1, inputs)

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        slots, w = matrices(x, weight)
        plain = functools.partial(_matmul, out_dtype)
        if num_slots <= MAX_DECODE_SLOTS and slots.ndim == 2:
            few = functools.partial(_transposed_matmul, out_dtype)
            y = jax.lax.platform_dependent(slots, w, cpu=few, default=plain)
        else:
            y = plain(slots, w)
        return y.reshape(*x.shape[:2], *weight.shape[:-in_dims])

    def forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return product(x, weight), (x, weight)

    def backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, weight = saved
        slots, w = matrices(x, weight)
        d_slots = d_y.reshape(*slots.shape[:-1], len(w))
        d_x = jax.lax.dot_general(d_slots, w, (((slots.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)

        def of_rows(d_y: jax.Array, x: jax.Array) -> jax.Array:
            slots, d_slots = x.reshape(-1, inputs), d_y.reshape(-1, len(w))
            sums = (((0,), (0,)), ((), ()))
            d_w = jax.lax.dot_general(d_slots, slots, sums, preferred_element_type=jnp.float32)
            return d_w.reshape(weight.shape)

        d_weight = sum_over_devices(of_rows, (d_y, x), gradient_sum(weight.shape, axes, reduce_dtype))
        return d_x.astype(x.dtype).reshape(x.shape), gradient_for(weight, d_weight)

    differentiable = jax.custom_vjp(product)
    differentiable.defvjp(forward, backward)
    return differentiable(x, weight)


def add_bias(x: jax.Array, bias: jax.Array | WideGradient, *, axes: Axes, reduce_dtype: Any) -> jax.Array:
    """Adds a bias to activations.

    Args:
      x: [B T O...].
      bias: [O...], cast to the dtype of `x`.
      axes: the logical axes of the bias, by which its gradient is split over devices.
      reduce_dtype: the dtype in which the gradient with respect to the bias is summed over devices.

    Returns:
      [B T O...].
    """

    def add(x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + bias.astype(x.dtype)

    def forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        return add(x, bias), bias

    def backward(bias: jax.Array, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_rows(d_y: jax.Array) -> jax.Array:
            return jnp.sum(d_y, axis=(0, 1), dtype=jnp.float32)

        d_bias = sum_over_devices(of_rows, (d_y,), gradient_sum(bias.shape, axes, reduce_dtype))
        return d_y, gradient_for(bias, d_bias)

    differentiable = jax.custom_vjp(add)
    differentiable.defvjp(forward, backward)
    return differentiable(x, bias)


def scale_outputs(x: jax.Array, factors: jax.Array, *, axes: Axes, reduce_dtype: Any) -> jax.Array:
    """Multiplies activations by factors, in float32.

    Args:
      x: [B T O...].
      factors: [O...], float32.
      axes: the logical axes of the factors, by which their gradient is split over devices.
      reduce_dtype: the dtype in which the gradient with respect to the factors is summed over devices.

    Returns:
      [B T O...], in the dtype of `x`.
    """

    def scale(x: jax.Array, factors: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * factors).astype(x.dtype)

    def forward(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return scale(x, factors), (x, factors)

    def backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, factors = saved

        def of_rows(d_y: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(d_y.astype(jnp.float32) * x.astype(jnp.float32), axis=(0, 1))

        d_factors = sum_over_devices(of_rows, (d_y, x), gradient_sum(factors.shape, axes, reduce_dtype))
        return scale(d_y, factors), d_factors.astype(factors.dtype)

    differentiable = jax.custom_vjp(scale)
    differentiable.defvjp(forward, backward)
    return differentiable(x, factors)


def look_up(
    table: jax.Array | WideGradient, tokens: jax.Array, dtype: Any, *, axes: Axes, reduce_dtype: Any
) -> jax.Array:
    """Looks up rows of a table.

    Args:
      table: [V D].
      tokens: [B T] int32.
      dtype: the dtype of the result, to which the table is cast.
      axes: the logical axes of the table, by which its gradient is split over devices.
      reduce_dtype: the dtype in which the gradient with respect to the table is summed over devices.

    Returns:
      [B T D].
    """

    def rows_of(table: jax.Array, tokens: jax.Array) -> jax.Array:
        # Every device looks up its own tokens in the whole width of the table.
        return jnp.take(constrain(table.astype(dtype), "vocab", "hidden"), tokens, axis=0)

    def forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return rows_of(table, tokens), (table, tokens)

    def backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, None]:
        table, tokens = saved

        def of_rows(d_y: jax.Array, tokens: jax.Array) -> jax.Array:
            # A frequent token has thousands of terms, of which a bfloat16 sum would lose most.
            return jnp.zeros(table.shape, jnp.float32).at[tokens].add(d_y.astype(jnp.float32))

        d_table = sum_over_devices(of_rows, (d_y, tokens), gradient_sum(table.shape, axes, reduce_dtype))
        return gradient_for(table, d_table), None

    differentiable = jax.custom_vjp(rows_of)
    differentiable.defvjp(forward, backward)
    return differentiable(table, tokens)


def _matmul(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies [... I] by the transpose of [O I]; returns [... O]."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def _transposed_matmul(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Computes `_matmul` with the weight as the left operand, so that XLA does not repack it for a few slots.

    The barrier keeps XLA from swapping the operands again.
    """
    return jax.lax.optimization_barrier(_matmul(out_dtype, w, x)).T
