"""The precision of matrix products, a setting of the whole JAX process."""

from typing import Any

import jax
import jax.numpy as jnp


def set_float32_matmul_precision(dtype: Any, platform: str) -> None:
    """Makes a float32 run on GPUs or TPUs multiply in full float32 precision.

    By default these devices round the operands of float32 products to 10 bits (TF32) or 7 bits (bfloat16). A precision
    that the user has set, for example by $JAX_DEFAULT_MATMUL_PRECISION, is kept.

    Args:
      dtype: the dtype of computation of the run.
      platform: cpu, gpu or tpu.
    """
    settings: Any = jax.config  # pyright does not see its attributes, which JAX adds at import
    if jnp.dtype(dtype) == jnp.float32 and platform != "cpu" and settings.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")
