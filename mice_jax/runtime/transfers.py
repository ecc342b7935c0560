"""A guard against implicit transfers between host and devices, which would make a step wait unnoticed."""

import contextlib
import os

import jax

# The level at which JAX guards transfers inside of a step: allow, log or disallow. Tests disallow implicit transfers.
LEVEL = "MICE_JAX_TRANSFER_GUARD"


def guard() -> contextlib.AbstractContextManager[None]:
    """Guards the code inside of it at the level of $MICE_JAX_TRANSFER_GUARD, which is "allow" by default.

    `jax.device_put`, `jax.device_get` and the functions of `sharding` that put rows and scalars always pass. A numpy
    array or a Python number that is given to a compiled function is an implicit transfer, and so is reading an array by
    `float` or `np.asarray`; on a CPU, where a device's memory is the host's, JAX does not notice the latter.
    """
    return jax.transfer_guard(os.environ.get(LEVEL, "allow"))
