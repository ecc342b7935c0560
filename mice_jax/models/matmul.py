"""The product of activations with a weight, in the form that each backend computes fastest."""

import functools
import math
from typing import Any

import jax

# B rows, T slots, S = B * T slots of all rows, I inputs, O outputs

MAX_DECODE_SLOTS = 64  # with more slots, both forms of the product take the same time on a CPU


def matmul(x: jax.Array, weight: jax.Array, in_dims: int = 1, out_dtype: Any = None) -> jax.Array:
    """Multiplies activations by a weight, as one product of two matrices.

    An einsum gives the same result, but on a CPU its gradient with respect to the weight takes twice the time.

    Args:
      x: [B T I...], with `in_dims` dims of inputs.
      weight: [O... I...], outputs first; cast to the dtype of `x`.
      in_dims: how many of the last dims of `x` and `weight` are summed over.
      out_dtype: the dtype of the sum and of the result; None takes that of `x`.

    Returns:
      [B T O...].
    """
    inputs = math.prod(weight.shape[-in_dims:])
    slots, w = x.reshape(-1, inputs), weight.astype(x.dtype).reshape(-1, inputs)
    plain = functools.partial(_matmul, out_dtype)
    if len(slots) <= MAX_DECODE_SLOTS:
        y = jax.lax.platform_dependent(slots, w, cpu=functools.partial(_transposed_matmul, out_dtype), default=plain)
    else:
        y = plain(slots, w)
    return y.reshape(*x.shape[:2], *weight.shape[:-in_dims])


def _matmul(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies [S I] by the transpose of [O I]; returns [S O]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def _transposed_matmul(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Computes `_matmul` with the weight as the left operand, so that XLA does not repack it for a few slots.

    The barrier keeps XLA from swapping the operands again.
    """
    return jax.lax.optimization_barrier(_matmul(out_dtype, w, x)).T
