"""Spans of tokens by adding up their bytes are those that the tokenizers library keeps, wherever they are used."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mice_jax.data.tokenizer import locator

TRAINED_ON = ["red barns and blue barns", "naïve café 12 345", "日本語 🤖👍", "  two  spaces\n\nand lines\t"] * 4
SPLIT = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
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
    return {name: locator(bpe(*parts)) for name, parts in BYTE_LEVEL.items()}


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
    ((ids, spans),) = found.located([text])
    assert (ids.tolist(), [tuple(s) for s in spans.tolist()]) == (kept.ids, kept.offsets)


@pytest.mark.parametrize("name", OTHERS)
def test_spans_are_not_counted_by_bytes_where_tokens_do_not_spell_the_text(name: str) -> None:
    found: Any = locator(bpe(*OTHERS[name]))
    assert found._num_bytes is None
    (kept,) = found._chats.encode_batch(["Red  barns é"], add_special_tokens=False)
    ((ids, spans),) = found.located(["Red  barns é"])
    assert (ids.tolist(), [tuple(s) for s in spans.tolist()]) == (kept.ids, kept.offsets)


def test_a_byte_without_a_token_or_a_token_that_takes_spaces_rules_counting_out() -> None:
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert locator(bpe(None, cutter, alphabet=False))._num_bytes is None  # type: ignore[attr-defined]
    greedy = AddedToken("<|end|>", rstrip=True, special=True)
    assert locator(bpe(None, cutter, added=greedy))._num_bytes is None  # type: ignore[attr-defined]


def test_a_count_that_does_not_come_out_is_never_used() -> None:
    found: Any = locator(bpe(*BYTE_LEVEL["gpt2"]))
    found._num_bytes[:] = 1
    with pytest.raises(AssertionError, match="do not spell"):
        found.located(["red barns"])
