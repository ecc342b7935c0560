"""Fast ids and spans for byte-level BPE, the kind of tokenizer that most models have.

Spans: the tokens spell the text byte by byte, so the cumulative sum of their bytes gives the span of each token.

Ids: byte-level BPE splits a text at its added tokens and then, by a pattern, into words. The ids of a word do not
depend on the words around it, and chats repeat their words, so that a table of the words seen so far holds nearly all
of them. The pattern is written for another regex engine than Python's. The two agree on printable ASCII, so only ASCII
texts use the table. A probe checks that they agree on the tokenizer's pattern, and the words of each text must have the
length of the text.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer, pre_tokenizers

MAX_WORDS = 500_000  # words in the table, about 100 MB; once it is full, the library encodes texts with new words
# The pattern that the library's ByteLevel uses if `use_regex` is set.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBE = (
    " It's  what WE'LL see:\n\n\t12,345.678 x_y-z \r\n  'quoted' (a+b)**2 == \"c\";\n   end...   \n"
    "\tif (x<=1e-9) {return ~y;}  // done!\r\r\n<a href='#'>I'D</a> don'T 0000001 $5@10% ^|`  "
)

_is_plain = regex.compile(r"[\t\n\r\x20-\x7e]*").fullmatch


# ---------------------------------------------------------------------------------------- ids
class WordTable:
    """A table of words and their ids, which grows with the texts that it encodes; `word_table` makes one."""

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
        """Pickles the table without its words, so that another process starts with an empty table."""
        return WordTable, self._parts

    def ids(self, text: str) -> np.ndarray | None:
        """Returns the ids of a text without special tokens around it, int32 [n]; None if the table cannot encode it."""
        if not _is_plain(text):
            return None
        parts = self._cut(text) if self._cut else [text]
        found: list[tuple[int, ...]] = []
        for k, part in enumerate(parts):
            if k % 2:  # `split` returns the separators, which are the added tokens, at odd indices
                found.append(self._added[part])
                continue
            words = self._find(part)
            if sum(map(len, words)) != len(part):  # the library keeps characters that the pattern does not match
                return None
            try:
                found += list(map(self._ids.__getitem__, words))  # the list adds either all ids or, on KeyError, none
            except KeyError:
                if len(self._ids) >= MAX_WORDS:
                    return None
                found += map(self._learned, words)
        return np.fromiter(itertools.chain.from_iterable(found), np.int32)

    def words(self, text: str) -> list[str]:
        """Returns the words of a text without added tokens, in the library's byte letters."""
        return [word.translate(self._byte) for word in self._find(text)]

    def _learned(self, word: str) -> tuple[int, ...]:
        ids = self._ids.get(word)
        if ids is None:
            tokens = self._model.tokenize(word.translate(self._byte))
            ids = self._ids[word] = tuple(t.id for t in tokens)
        return ids


def word_table(backend: Tokenizer, state: dict[str, Any]) -> WordTable | None:
    """Returns a table for a byte-level BPE tokenizer, or None if the tokenizer splits texts in another way.

    Args:
      backend: the tokenizer.
      state: the parsed `backend.to_str()`.
    """
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
    """Returns the regex that splits a text into words, or None if the pre-tokenizer is of another form."""
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
    """Returns the letter that byte-level tokenizers write for each byte of plain ASCII text."""
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {byte: cutter.pre_tokenize_str(chr(byte))[0][0] for byte in [9, 10, 13, *range(0x20, 0x7F)]}


# ---------------------------------------------------------------------------------------- spans
def bytes_of_tokens(state: dict[str, Any]) -> np.ndarray | None:
    """Returns the number of bytes of NFC text that each id stands for, int64 [vocabulary], or None if undefined.

    It is defined for byte-level BPE that has all bytes and removes nothing from a text before splitting it.

    Args:
      state: the parsed `to_str()` of the tokenizer.
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
    spelled = {i: len(token) for token, i in model["vocab"].items()}  # each character of a token stands for a byte
    spelled |= {t["id"]: len(t["content"].encode()) for t in state["added_tokens"]}
    num_bytes = np.zeros(max(spelled) + 1, np.int64)
    num_bytes[list(spelled)] = list(spelled.values())
    return num_bytes


def spans_by_bytes(text: str, num_bytes: np.ndarray) -> np.ndarray:
    """Computes the spans of tokens from their numbers of bytes.

    Args:
      text: the text, in NFC.
      num_bytes: int64 [n], bytes of each token.

    Returns:
      int64 [n, 2], spans in characters; the span of a token that is part of a character covers the whole character.
    """
    ends = np.cumsum(num_bytes)
    data = text.encode()
    assert len(data) == (ends[-1] if len(ends) else 0), "tokens of a byte-level tokenizer do not spell their text"
    starts = ends - num_bytes
    if len(data) != len(text):
        is_first = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # True for the first byte of each character
        character = np.cumsum(is_first) - 1
        starts, ends = character[starts], character[ends - 1] + 1
    return np.stack([starts, ends], axis=1)
