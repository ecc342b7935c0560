"""The frozen directions of a matrix, as the state of an optimizer holds them."""

from typing import Any, NamedTuple


class Basis(NamedTuple):
    """Directions of a stack of L matrices [L O... I...] with outputs O and inputs I, as K orthonormal columns."""

    outputs: Any  # [L O... K], float32; or its shape or sharding, as of any leaf of a state
    inputs: Any  # [L I... K], float32
