"""What a mixer costs, for the estimates of memory and time.

The arrays that are saved without remat are those that `jax.ad_checkpoint.print_saved_residuals` lists for a layer.
"""

from typing import NamedTuple


class MixerWidths(NamedTuple):
    """Entries per slot of the arrays of a mixer on one device, besides its input and its output of d_model entries.

    Attributes:
      products: What remat `dots` saves: the results of products with weights, without that of the last, and the scan's.
      saved: The arrays in the compute dtype that are saved for the backward pass without remat.
      saved_float32: Those in float32.
      working: The arrays that are alive while its backward pass runs.
    """

    products: int
    saved: int
    saved_float32: int
    working: int


def padded(width: int, lanes: int) -> int:
    """Returns the width of the last dim of an array on devices that pad it to a multiple of `lanes`."""
    return -(-width // lanes) * lanes
