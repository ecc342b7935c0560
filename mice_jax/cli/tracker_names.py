"""Names of experiment trackers, whose packages are looked for without importing them."""

import importlib.util
from collections.abc import Sequence

from mice_jax.errors import UserError, install_command


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError if the package of a tracker is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.trackers has {name!r}, but the package {name} is not installed: "
                f"{install_command('tracking')}, or leave it out."
            )
