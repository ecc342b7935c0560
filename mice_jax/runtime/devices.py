"""The devices of JAX, with an error that says what to do where there are none of the kind that is asked for."""

import os
from typing import Any

import jax

from mice_jax.errors import UserError, install_command, one_line

EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # by the name of a platform in JAX_PLATFORMS


def split_cpu(count: int | None) -> bool:
    """Makes a CPU that number of devices, once JAX starts its backend.

    Args:
      count: the number; None leaves it as it is.

    Returns:
      Whether this has an effect. It has none if JAX's own setting has been made, or if its backend has started already,
      in a process that has used JAX before.
    """
    settings: Any = jax.config  # pyright does not see its attributes, which JAX adds at import
    if count is None or settings.jax_num_cpu_devices > 0:
        return False
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return False
    return True


def find_devices() -> list[Any]:
    """Returns all devices of the run, over all processes; the first call starts JAX's backend.

    Raises:
      UserError: if JAX cannot start its backend: that of the environment variable JAX_PLATFORMS, or any.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # An AssertionError without a text, if the plugin is not installed.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        extra = next((EXTRAS[name] for name in platforms.split(",") if name in EXTRAS), None)
        install = f" JAX's support for it is installed by {install_command(extra)}." if extra else ""
        reason = f": {one_line(e)}" if str(e) else ""
        if not platforms:
            raise UserError(f"JAX cannot use the devices of this machine{reason}.") from None
        raise UserError(
            f"JAX_PLATFORMS={platforms} is set, and JAX finds no such device on this machine{reason}.{install} Set "
            "JAX_PLATFORMS=cpu to run on the CPU, or unset it to take what there is."
        ) from None
