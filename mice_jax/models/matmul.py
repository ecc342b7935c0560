"""The product of activations with a weight, written as each backend computes it fastest, and in what it is computed."""

import functools
import math
from typing import Any

import jax

# B rows, T slots, S = B * T slots of all rows, I inputs, O outputs

FEW = 64  # slots: with more, both ways to write a product take the same time on a CPU


def product(x: jax.Array, weight: jax.Array, in_dims: int = 1, out_dtype: Any = None) -> jax.Array:
    """The last `in_dims` dims of x [B T ...] against the last of the weight, as one product of two matrices.

    An einsum says the same, but on CPU its gradient by the weight takes twice the time. The weight is cast to the dtype
    of x; `out_dtype` is the result's, in which it is summed too.
    """
    inputs = math.prod(weight.shape[-in_dims:])
    slots, w = x.reshape(-1, inputs), weight.astype(x.dtype).reshape(-1, inputs)
    plain = functools.partial(_plain, out_dtype)
    if len(slots) <= FEW:  # a decoding step's
        y = jax.lax.platform_dependent(slots, w, cpu=functools.partial(_turned, out_dtype), default=plain)
    else:
        y = plain(slots, w)
    return y.reshape(*x.shape[:2], *weight.shape[:-in_dims])


def _plain(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """[S I] and [O I] -> [S O]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def _turned(out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with the weight on the left, which is then not packed anew for a few slots.

    Without the barrier XLA would turn it back.
    """
    return jax.lax.optimization_barrier(_plain(out_dtype, w, x)).T
