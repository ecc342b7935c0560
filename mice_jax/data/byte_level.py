"""Byte-level BPE, which most models have: ids and spans of a text, at a multiple of the speed of asking the library.

Spans: the tokens spell the text byte by byte, so that adding up their bytes says where each lies.

Ids: byte-level BPE cuts a text at its added tokens and then, by a pattern, into words, and what becomes of a word
depends on nothing around it. Chats repeat their words, so a table of those seen so far answers nearly all of them. The
pattern is written for another engine than Python's. The two agree on printable ASCII, and only texts of that are taken
here; whether they do for this very pattern is tried out on a probe, and each text's words must add up to it.
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


# ---------------------------------------------------------------------------------------- ids
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
    if pattern is None or backend.encode_special_tokens or any(t["single_word"] or t["normalized"] for t in added):
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


# ---------------------------------------------------------------------------------------- spans
def bytes_of_tokens(state: dict[str, Any]) -> np.ndarray | None:
    """How many bytes of a text in NFC each id stands for, where tokens spell it byte by byte; else None.

    That is so for byte-level BPE that has all bytes and takes nothing out of a text before it is cut.
    """
    model, cutters = state["model"], state["pre_tokenizer"] or {}
    cutters = cutters.get("pretokenizers", [cutters])
    is_plain = (
        (state["normalizer"] or {}).get("type", "NFC") == "NFC"
        and model.get("type", "BPE") == "BPE"
        and not any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
        and set(pre_tokenizers.ByteLevel.alphabet()) <= model.get("vocab", {}).keys()
        and any(c.get("type") == "ByteLevel" for c in cutters)
        and all(c.get("type") in ("ByteLevel", "Split", "Digits") for c in cutters)
        and not any(c.get("add_prefix_space") or c.get("behavior") == "Removed" for c in cutters)
        and not any(t["lstrip"] or t["rstrip"] for t in state["added_tokens"])
    )
    if not is_plain:
        return None
    spelled = {i: len(token) for token, i in model["vocab"].items()}  # a character of it stands for a byte
    spelled |= {t["id"]: len(t["content"].encode()) for t in state["added_tokens"]}
    num_bytes = np.zeros(max(spelled) + 1, np.int64)
    num_bytes[list(spelled)] = list(spelled.values())
    return num_bytes


def spans_by_bytes(text: str, num_bytes: np.ndarray) -> np.ndarray:
    """Spans [n, 2] in characters of tokens of so many bytes; a token of a part of a character has all of it."""
    ends = np.cumsum(num_bytes)
    data = text.encode()
    assert len(data) == (ends[-1] if len(ends) else 0), "tokens of a byte-level tokenizer do not spell their text"
    starts = ends - num_bytes
    if len(data) != len(text):
        is_first = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # of a character's bytes
        character = np.cumsum(is_first) - 1
        starts, ends = character[starts], character[ends - 1] + 1
    return np.stack([starts, ends], axis=1)
