"""Append-only files of one JSON object per line, whose last line may be incomplete because its writer was killed."""

import json
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 15  # `read_last` assumes that lines are at most this long


def append(file: Path, record: dict[str, Any]) -> None:
    """Appends one line; creates the file if needed."""
    with file.open("a") as opened:
        opened.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the objects of all complete lines; empty if the file does not exist."""
    if not file.exists():
        return []
    return [json.loads(line) for line in complete_lines(file.read_bytes()).splitlines()]


def read_last(file: Path) -> dict[str, Any]:
    """Returns the object of the last complete line; empty if there is none."""
    if not file.exists():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 2 * MAX_LINE_BYTES))
        lines = complete_lines(opened.read()).splitlines()
    return json.loads(lines[-1]) if lines else {}


def complete_lines(content: bytes) -> bytes:
    """Returns the content up to and including its last newline."""
    return content[: content.rfind(b"\n") + 1]
