"""Numbers as text for the terminal: sizes, durations and counts."""

SECONDS_PER_UNIT = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
MIN_GIB_BYTES = 2**27  # smaller sizes are printed in MiB


def format_bytes(count: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= MIN_GIB_BYTES else f"{count / 2**20:.2f} MiB"


def format_duration(days: float) -> str:
    """A duration in the largest unit of which it has at least one."""
    seconds = days * SECONDS_PER_UNIT["day"]
    unit = next((name for name, length in SECONDS_PER_UNIT.items() if seconds >= length), "second")
    count = f"{seconds / SECONDS_PER_UNIT[unit]:.3g}"
    return f"{count} {unit}" if count == "1" else f"{count} {unit}s"
