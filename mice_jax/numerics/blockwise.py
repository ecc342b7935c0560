"""Blockwise quantisation: one byte for each entry of an array, and one float32 scale for each block of entries.

Dettmers et al. (arXiv 2110.02861) store an optimizer's moments so. A block is a run of entries along the last dim, so
that a device that holds whole blocks quantises them alone. Its scale s is the largest magnitude in it. An entry x has
the code that is nearest to L (|x| / s)^(1/4) with the sign of x, where L is the largest code.

The fourth root spends codes on small entries as the table of that paper does, in which each decade has half the codes
of the one above it; here it has 0.56 times as many. It needs no table, which accelerators look up slowly. A code c
stands for s (c / L)^4, so it is wrong by at most about 2 / c of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SQUARE_ROOTS = 2  # in turn: a fourth root
MAX_BLOCK = 128
# With shorter blocks, scales would take more than a quarter of the bytes of codes.
MIN_BLOCK = 16


class Quantized(NamedTuple):
    """A quantised array of the shape [... N]; int8 codes have a sign, uint8 codes stand for entries that have none."""

    codes: Any  # [... N], int8 or uint8; or the sharding of these, as of any leaf of a state
    scales: Any  # [... N / block], float32


def is_quantized(x: Any) -> bool:
    """Whether x is a quantised array."""
    return isinstance(x, Quantized)


def block_size(length: int) -> int:
    """Returns the entries of a block along a dim: its largest divisor from MIN_BLOCK to MAX_BLOCK, or 0 without one."""
    return next((n for n in range(MAX_BLOCK, MIN_BLOCK - 1, -1) if length % n == 0), 0)


def quantize(x: jax.Array, *, signed: bool, square_roots: int = SQUARE_ROOTS) -> Quantized:
    """Quantises an array; an entry that is not zero keeps a code that is not zero if it has no sign.

    A second moment of zero would make an update of any size, so a small one becomes the smallest that has a code.

    Args:
      x: [... N], float32, where `block_size(N)` is not 0. Not negative unless `signed`.
      signed: whether codes have a sign.
      square_roots: how many are taken before rounding; 0 makes codes linear.
    """
    dtype = jnp.int8 if signed else jnp.uint8
    size = block_size(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    relative = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)[..., None]
    for _ in range(square_roots):
        relative = jnp.sqrt(relative)
    codes = jnp.round(jnp.iinfo(dtype).max * relative)
    codes = jnp.copysign(codes, blocks) if signed else jnp.where(blocks > 0, jnp.maximum(codes, 1), 0)
    return Quantized(codes.astype(dtype).reshape(x.shape), scales)


def dequantize(stored: Quantized, square_roots: int = SQUARE_ROOTS) -> jax.Array:
    """Returns the array that codes and scales stand for, float32, in the shape of the codes."""
    codes, scales = stored
    blocks = codes.reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])
    blocks = blocks.astype(jnp.float32) / jnp.iinfo(codes.dtype).max
    magnitudes = jnp.abs(blocks) ** 2**square_roots * scales[..., None]
    return jnp.copysign(magnitudes, blocks).reshape(codes.shape)


def times(x: Any, factor: float) -> Any:
    """Multiplies an array, quantised or not, by a factor that is not negative."""
    return x._replace(scales=x.scales * factor) if is_quantized(x) else x * factor
