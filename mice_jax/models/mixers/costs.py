"""What a mixer costs, for the estimates of memory and time."""

from typing import NamedTuple


class MixerWidths(NamedTuple):
    """Entries per slot of the arrays of a mixer on one device, besides its input and its output of d_model entries.

    Attributes:
      products: What remat `dots` saves: the results of products with weights, without that of the last, and the scan's.
      saved: All arrays that are saved for the backward pass without remat.
      working: The arrays that are alive while its backward pass runs.
    """

    products: int
    saved: int
    working: int
