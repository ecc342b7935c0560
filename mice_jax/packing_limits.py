"""What those who pack rows and those who compute on them agree on."""

FEW_SEGMENTS = 64  # samples that may share a row of any length,
SEGMENT_SLOTS = 16  # and more where it has so many slots for each


def max_segments(slots: int) -> int:
    """Samples in a row at most: kernels that are told where segments end want a number known beforehand.

    Chats are longer than 16 tokens by their headers alone, so the cap costs no slot but with tiny documents.
    """
    return max(FEW_SEGMENTS, slots // SEGMENT_SLOTS)
