"""Decodes the items of a JSON list while its text is read, so that memory holds a chunk or an item, not the list."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_ITEM = set(",] \t\n\r")


def _raise_for_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=_raise_for_constant)  # without NaN and Infinity, which are not JSON


class JSONListItems:
    """Iterates over the items of a JSON list, each with the length of its text in characters."""

    def __init__(self, text: TextIO, chunk: int, max_item: int) -> None:
        """Begins at the start of the text.

        Args:
          text: the list.
          chunk: characters that are read at once.
          max_item: characters of an item beyond which no more text is read for it.
        """
        self._text, self._chunk, self._max_item = text, chunk, max_item
        self._buffer = ""
        self._at = 0  # position in the buffer
        self._is_complete = False  # whether the buffer ends with the text
        self._line, self._column = 1, 1  # of the buffer's first character

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._expect("[", "a list begins with '['")
        if self._next() != "]":
            yield self._item()
            while self._next() == ",":
                self._at += 1
                self._next()
                yield self._item()
        self._expect("]", "after an item comes ',' or ']'")
        self._expect("", "there is more text after the list")

    def _item(self) -> tuple[Any, int]:
        while True:
            is_enough = self._is_complete or len(self._buffer) - self._at > self._max_item
            try:
                item, end = DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as e:
                if is_enough:
                    raise self._error(e.pos, e.msg) from None
            else:
                # The first digits of a number are a number too, so the character after an item must be known.
                if is_enough or self._buffer[end : end + 1] in _AFTER_ITEM:
                    size, self._at = end - self._at, end
                    return item, size
            self._read_more()

    def _next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _WHITE_SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer) or self._is_complete:
                return self._buffer[self._at : self._at + 1]
            self._read_more()

    def _expect(self, character: str, rule: str) -> None:
        if self._next() != character:
            raise self._error(self._at, rule)
        self._at += 1

    def _read_more(self) -> None:
        self._line, self._column = self._position(self._at)
        rest = self._buffer[self._at :]
        # A long item is decoded again after each read; doubling what is read keeps that cheap.
        more = self._text.read(max(len(rest), self._chunk))
        self._buffer, self._at, self._is_complete = rest + more, 0, not more

    def _position(self, at: int) -> tuple[int, int]:
        """Line and column in the text of a position in the buffer."""
        lines = self._buffer.count("\n", 0, at)
        return self._line + lines, at - self._buffer.rfind("\n", 0, at) if lines else self._column + at

    def _error(self, at: int, why: str) -> ValueError:
        line, column = self._position(at)
        return ValueError(f"{why} at line {line} column {column}")
