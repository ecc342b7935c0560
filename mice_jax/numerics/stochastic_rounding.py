"""Rounding to bfloat16 that keeps, in expectation, changes that are smaller than the last bit."""

import jax
import jax.numpy as jnp

LOST_BITS = 16  # of float32's mantissa, which bfloat16 does not have


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to one of the two nearest bfloat16 values, to each with a probability that makes the mean equal to x.

    A value that bfloat16 has is not changed, nor is one that is not finite. The random bits of an entry depend on the
    key and its index in a row-major order alone, so they are the same on every mesh.

    Args:
      x: float32, of any shape.
      key: a key of jax.random, not used elsewhere.

    Returns:
      bfloat16, in the shape of x.
    """
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The bits of a float are ordered as its magnitude is. Adding to them carries into the kept bits with the
    # probability that the lost ones say.
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + random
    kept = (carried >> LOST_BITS).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(kept, jnp.bfloat16), x.astype(jnp.bfloat16))
