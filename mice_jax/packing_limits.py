"""The limit on samples in one row, which packing and the attention kernels share."""

MIN_SEGMENT_LIMIT = 64  # the limit for short rows
SLOTS_PER_SEGMENT = 16  # in longer rows, the limit is one sample for each 16 slots


def max_segments(slots: int) -> int:
    """The largest number of samples in a row of `slots` slots.

    Kernels that take the ends of segments need an array of fixed size. The headers of a chat alone have more than 16
    tokens, so the limit costs slots only where data consist of tiny documents.
    """
    return max(MIN_SEGMENT_LIMIT, slots // SLOTS_PER_SEGMENT)
