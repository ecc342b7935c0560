"""What packing and attention agree on: the limit on samples in one row, and the order of a row on several devices."""

MIN_SEGMENT_LIMIT = 64  # the limit for short rows
SLOTS_PER_SEGMENT = 16  # in longer rows, the limit is one sample for each 16 slots


def max_segments(slots: int) -> int:
    """The largest number of samples in a row of `slots` slots.

    Kernels that take the ends of segments need an array of fixed size. The headers of a chat alone have more than 16
    tokens, so the limit costs slots only where data consist of tiny documents.
    """
    return max(MIN_SEGMENT_LIMIT, slots // SLOTS_PER_SEGMENT)


def balanced_parts(devices: int) -> list[int]:
    """The order in which devices that share a row hold its parts, of which each device has two.

    A row is cut into 2 * devices parts of equal length. Device i has part i from the start and part i from the end.
    Under causality, their queries together see as many keys on every device.
    """
    return [part for i in range(devices) for part in (i, 2 * devices - 1 - i)]
