"""Prints a line whenever a program has been silent for some seconds, as while XLA compiles."""

import sys
import threading
import time
from typing import Any

SILENCE_S = 7.0  # after which a line is printed
CHECK_EVERY_S = 1.0


class Heartbeat:
    """Stands in for stdout, and tells in silences that the program works on."""

    def __init__(self) -> None:
        self._out, self._began, self._last = sys.stdout, time.monotonic(), time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Heartbeat":
        sys.stdout = self  # type: ignore[assignment]
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        sys.stdout = self._out

    def write(self, text: str) -> int:
        self._last = time.monotonic()
        count = self._out.write(text)
        self._out.flush()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def _beat(self) -> None:
        while not self._ended.wait(CHECK_EVERY_S):
            now = time.monotonic()
            if now - self._last >= SILENCE_S:
                self.write(f"  ... still at work, {now - self._began:.0f} s so far\n")
