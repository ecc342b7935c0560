"""Names of topologies, which are checked without the imports that planning takes."""

import re

from mice_jax.config_checks import nearest
from mice_jax.errors import UserError

# Common TPU slices, which error messages suggest; libtpu accepts others too.
SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": SLICES_3D, "v5e": SLICES_2D, "v5p": SLICES_3D, "v6e": SLICES_2D, "tpu7x": SLICES_3D}
SHAPES = {1: r"[1-9]\d*x[1-9]\d*", 2: r"[1-9]\d*x[1-9]\d*x[1-9]\d*"}  # by how many times "x" occurs
GPUS = ("l4", "rtx4090", "a100-40", "a100", "h100", "h200", "b200")
KINDS = ("cpu", *SLICES, *GPUS)
OTHER_NAMES = {"7x": "tpu7x", "v7x": "tpu7x"}
EXAMPLES = ("cpu:8", "v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:8")


def parse_topology(topology: str) -> tuple[str, str]:
    """Splits the name of a topology.

    Args:
      topology: the name as the user gave it: cpu:8, v5p:2x2x2, h100:8.

    Returns:
      The kind of device, of `KINDS`, and what follows the colon: the shape of a TPU slice, which libtpu checks, or a
      number of devices.

    Raises:
      UserError: the kind is unknown, or no number of devices follows a CPU or GPU.
    """
    name, _, shape = topology.lower().partition(":")
    kind = OTHER_NAMES.get(name, name)
    if kind not in KINDS:
        raise UserError(
            f"--topology={topology}: {name!r} is not a known kind of device{nearest(name, KINDS)} "
            f"Examples: {', '.join(EXAMPLES)}."
        )
    if kind not in SLICES and not re.fullmatch(r"[1-9]\d*", shape):
        problem = f"{shape!r} is not a number of devices" if shape else "the number of devices is missing"
        raise UserError(f"--topology={topology}: {problem}; write it as in {kind}:8.")
    if kind in SLICES and not re.fullmatch(SHAPES[SLICES[kind][0].count("x")], shape):
        raise UserError(f"--topology={topology} is not a slice of TPU {kind}{nearest(shape, SLICES[kind])}")
    return kind, shape
