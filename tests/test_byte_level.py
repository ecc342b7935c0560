"""Ids by a table of words, and spans by adding up bytes, are those of the tokenizers library wherever they are used."""

import pickle
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mice_jax.data import byte_level
from mice_jax.data.tokenizer import offset_tokenizer

TRAINED_ON = ["red barns and blue barns", "naïve café 12 345", "日本語 🤖👍", "  two  spaces\n\nand lines\t"] * 4
# What Llama 3 and Qwen 2 cut by, but for the number of digits.
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL: dict[str, tuple[Any, Any]] = {  # how a text is changed, and cut
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    ),
    "qwen": (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ),
}
OTHERS: dict[str, tuple[Any, Any]] = {
    "a space is added": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lowercase": (normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "spaces are taken out": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    ),
    "words": (None, pre_tokenizers.Whitespace()),
}


def bpe(normalizer: Any, cutter: Any, alphabet: bool = True, added: AddedToken | str = "<|end|>") -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cutter
    if normalizer is not None:
        made.normalizer = normalizer
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(TRAINED_ON, trainer)
    made.add_special_tokens(["<|turn|>", added])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def by_bytes() -> dict[str, Any]:
    return {name: offset_tokenizer(bpe(*parts)) for name, parts in BYTE_LEVEL.items()}


PIECES = st.text(max_size=12) | st.sampled_from(
    ["<|turn|>", "<|end|>", "e\u0301", "é", " ", "\n\n", "👨‍👩‍👧", "red barns", "12345"]
)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=10))
def test_spans_by_bytes_are_those_that_the_library_keeps(
    name: str, by_bytes: dict[str, Any], pieces: list[str]
) -> None:
    text = "".join(pieces).encode("utf-8", "ignore").decode()
    found = by_bytes[name]
    assert found._num_bytes is not None
    (kept,) = found._chats.encode_batch([text], add_special_tokens=False)
    ((ids, spans),) = found.encode_with_offsets([text])
    assert (ids.tolist(), [tuple(s) for s in spans.tolist()]) == (kept.ids, kept.offsets)


@pytest.mark.parametrize("name", OTHERS)
def test_spans_are_not_counted_by_bytes_where_tokens_do_not_spell_the_text(name: str) -> None:
    found: Any = offset_tokenizer(bpe(*OTHERS[name]))
    assert found._num_bytes is None
    (kept,) = found._chats.encode_batch(["Red  barns é"], add_special_tokens=False)
    ((ids, spans),) = found.encode_with_offsets(["Red  barns é"])
    assert (ids.tolist(), [tuple(s) for s in spans.tolist()]) == (kept.ids, kept.offsets)


def test_missing_byte_or_stripping_token_rules_out_byte_counts() -> None:
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert offset_tokenizer(bpe(None, cutter, alphabet=False))._num_bytes is None  # type: ignore[attr-defined]
    greedy = AddedToken("<|end|>", rstrip=True, special=True)
    assert offset_tokenizer(bpe(None, cutter, added=greedy))._num_bytes is None  # type: ignore[attr-defined]


def test_count_that_does_not_come_out_is_never_used() -> None:
    found: Any = offset_tokenizer(bpe(*BYTE_LEVEL["gpt2"]))
    found._num_bytes[:] = 1
    with pytest.raises(AssertionError, match="do not spell"):
        found.encode_with_offsets(["red barns"])


# ---------------------------------------------------------------------------------------- by a table of words
WORDS = st.sampled_from(
    [
        "red",
        "Barns",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "don't",
        "12",
        "3456",
        "...",
        "(",
        "x=1;",
        '"',
        "<|end|>",
        "<|tur",
    ]
)
PLAIN = st.text(st.characters(min_codepoint=9, max_codepoint=127), max_size=20)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen"])
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(WORDS | PLAIN, max_size=25))
def test_ids_by_a_table_of_words_are_those_of_the_library(
    name: str, by_bytes: dict[str, Any], pieces: list[str]
) -> None:
    text = "".join(pieces)
    found = by_bytes[name]
    ids = found._words.ids(text)
    assert (ids is None) == any(not ("\x20" <= c <= "\x7e" or c in "\t\n\r") for c in text)
    if ids is not None:
        wanted = found._chats.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == wanted
        assert found._words.ids(text).tolist() == wanted  # again, when every word is known


def test_full_word_table_leaves_further_texts_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = offset_tokenizer(bpe(*BYTE_LEVEL["gpt2"]))
    found._words.ids("blue barns")
    assert len(pickle.loads(pickle.dumps(found))._words._ids) == 0 < len(found._words._ids)
    monkeypatch.setattr(byte_level, "MAX_WORDS", 1)
    assert found._words.ids("red barns") is None
    ((ids, _),) = found.encode_with_offsets(["red barns"])
    assert ids.tolist() == found._chats.encode("red barns").ids


def digits_removed() -> Any:
    cutter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[a-z]+"), "isolated", invert=True),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    return bpe(None, cutter)


def split_special() -> Any:
    tokenizer = bpe(*BYTE_LEVEL["gpt2"])
    tokenizer.split_special_tokens = True
    return tokenizer


NO_TABLE: dict[str, Any] = {
    "a cutter of another kind": lambda: bpe(*BYTE_LEVEL["digits"]),
    "a pattern for what is between words": digits_removed,
    "an added token that is a word of its own only": lambda: bpe(
        *BYTE_LEVEL["gpt2"], added=AddedToken("<|end|>", single_word=True)
    ),
    "special tokens that are mere text": split_special,
    "an added token that is looked for later": lambda: bpe(
        *BYTE_LEVEL["gpt2"], added=AddedToken("<|end|>", normalized=True)
    ),
}


@pytest.mark.parametrize("name", NO_TABLE)
def test_word_table_is_absent_where_the_library_splits_differently(name: str) -> None:
    found: Any = offset_tokenizer(NO_TABLE[name]())
    assert found._words is None
    ((ids, _),) = found.encode_with_offsets(["red barns<|end|> 12 and"])
    assert ids.tolist() == found._chats.encode("red barns<|end|> 12 and").ids


def test_pattern_that_two_regex_engines_read_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "GPT2", r"\S+|\s+")
    assert offset_tokenizer(bpe(*BYTE_LEVEL["gpt2"]))._words is None  # type: ignore[attr-defined]


def test_word_that_the_pattern_leaves_out_is_not_lost() -> None:
    cutter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z@]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    found: Any = offset_tokenizer(bpe(None, cutter))
    ((ids, _),) = found.encode_with_offsets(["red@barns"])
    assert ids.tolist() == found._chats.encode("red@barns").ids
