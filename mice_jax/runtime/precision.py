"""The precision of matrix products, a setting of the whole JAX process."""

from typing import Any

import jax
import jax.numpy as jnp


def multiply_in(dtype: Any, platform: str) -> None:
    """Has this process's products of a run that computes in float32 be float32's, on devices of such a platform.

    GPUs and TPUs round the operands otherwise, to 10 bits (TF32) or to 7 (bfloat16), whatever their dtype says. What
    the user asks of jax stays ($JAX_DEFAULT_MATMUL_PRECISION).
    """
    settings: Any = jax.config  # its attributes are made when it is imported
    if jnp.dtype(dtype) == jnp.float32 and platform != "cpu" and settings.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")
