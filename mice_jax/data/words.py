"""Ids of plain texts by a table of words: what byte-level BPE gives, at twice the speed of asking for it anew.

Byte-level BPE cuts a text at its added tokens and then, by a pattern, into words, and what becomes of a word depends on
nothing around it. Chats repeat their words, so a table of those seen so far answers nearly all of them. The pattern is
written for another engine than Python's. The two agree on printable ASCII, and only texts of that are taken here;
whether they do for this very pattern is tried out on a probe, and each text's words must add up to it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer, pre_tokenizers

MAX_WORDS = 500_000  # in the table, about 100 MB; texts in which a word is new go the library's way then
# How the library's ByteLevel cuts where it is told to cut by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBE = (
    " It's  what WE'LL see:\n\n\t12,345.678 x_y-z \r\n  'quoted' (a+b)**2 == \"c\";\n   end...   \n"
    "\tif (x<=1e-9) {return ~y;}  // done!\r\r\n<a href='#'>I'D</a> don'T 0000001 $5@10% ^|`  "
)

_is_plain = regex.compile(r"[\t\n\r\x20-\x7e]*").fullmatch


class WordTable:
    """Made by `word_table`."""

    def __init__(self, backend: Tokenizer, added: dict[str, int], pattern: str) -> None:
        self._parts = backend, added, pattern
        self._model: Any = backend.model
        self._byte: dict[int, str] = _letters()
        self._ids: dict[str, tuple[int, ...]] = {}
        longest_first = sorted(added, key=lambda t: (-len(t), t))
        self._added = {t: (i,) for t, i in added.items()}
        self._cut = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")").split if added else None
        self._find: Callable[[str], list[str]] = regex.compile(pattern).findall

    def __reduce__(self) -> Any:
        """Another process begins a table of its own."""
        return WordTable, self._parts

    def ids(self, text: str) -> np.ndarray | None:
        """Ids of a text without special tokens around it, int32 [n]; None where it is not for this table."""
        if not _is_plain(text):
            return None
        parts = self._cut(text) if self._cut else [text]
        found: list[tuple[int, ...]] = []
        for k, part in enumerate(parts):
            if k % 2:  # an added token, by the way that `split` works
                found.append(self._added[part])
                continue
            words = self._find(part)
            if sum(map(len, words)) != len(part):  # a pattern may leave something out, which the library then keeps
                return None
            try:
                found += list(map(self._ids.__getitem__, words))  # a list first: all of them or none
            except KeyError:
                if len(self._ids) >= MAX_WORDS:
                    return None
                found += map(self._learned, words)
        return np.fromiter(itertools.chain.from_iterable(found), np.int32)

    def words(self, text: str) -> list[str]:
        """What a text without added tokens is cut into, as the library writes it."""
        return [word.translate(self._byte) for word in self._find(text)]

    def _learned(self, word: str) -> tuple[int, ...]:
        ids = self._ids.get(word)
        if ids is None:
            tokens = self._model.tokenize(word.translate(self._byte))
            ids = self._ids[word] = tuple(t.id for t in tokens)
        return ids


def word_table(backend: Tokenizer, state: dict[str, Any]) -> WordTable | None:
    """A table for a byte-level BPE tokenizer, whose `to_str()` the state is; None where its way is not this one."""
    pattern = _pattern(state["pre_tokenizer"])
    added = state["added_tokens"]
    if pattern is None or any(t["single_word"] or t["normalized"] for t in added):
        return None
    try:
        table = WordTable(backend, {t["content"]: t["id"] for t in added}, pattern)
    except regex.error:
        return None
    cut = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(PROBE)]  # type: ignore[union-attr]
    return table if table.words(PROBE) == cut else None


def _pattern(cutter: dict[str, Any]) -> str | None:
    """What a text is cut into words by."""
    match cutter:
        case {"type": "ByteLevel", "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False},
            ],
        }:
            return pattern
    return None


@functools.cache
def _letters() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte of plain text."""
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {byte: cutter.pre_tokenize_str(chr(byte))[0][0] for byte in [9, 10, 13, *range(0x20, 0x7F)]}
