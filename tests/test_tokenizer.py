"""Folders with a sentencepiece `tokenizer.model` and no tokenizer.json: ids, masks, saving, and what is refused."""

import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, ByT5Tokenizer

from helpers.runs import (
    Record,
    chat,
    make_chats,
    run_export,
    run_train,
    run_verb,
    write_config,
    write_init,
    write_jsonl,
)
from mice_jax import generate
from mice_jax.data import tokenizer as under_test
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import Sample
from mice_jax.data.store import build_store
from mice_jax.data.templates import TOKENS
from mice_jax.data.tokenizer import decode, load_tokenizer, offset_tokenizer
from mice_jax.errors import UserError

LINES = [
    "Hello there, how are you? I am fine, thank you.",
    "Red and blue mice learn to compete with elephants.",
    "What is it? It is a large batch at a low rate.",
    "1 cold barn, 2 red barns, 345 mice: so it goes.",
] * 20

# The end of a turn is eos, as in Llama 2's template; a space stands before each answer.
LLAMA2 = """{% for m in messages %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
# The end of a turn is an added token.
TURNS = """{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
ADDED = ("<|turn|>", "<|end|>")

# Classes that transformers makes fast ones of, and some that stay slow.
FAST = ("LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")
SLOW = ("GPTSw3Tokenizer", "BertGenerationTokenizer", "SentencePieceBackend")
KINDS = ("bpe", "unigram")
BROKEN = ("PreTrainedTokenizerFast", "unigram")  # by transformers, see the last test
PAIRS = [p for p in itertools.product((*FAST, *SLOW), KINDS) if p != BROKEN]

TEXTS = ["Red.", "  Red and", " Red", "blue  mice ", "héllo 🤖", "日本 1 é", "👨‍👩‍👧", "a\tb", "a\n\n b"]


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    """Sentencepiece models of 400 pieces at most, whose unknown characters become bytes."""

    def train(kind: str, **more: Any) -> bytes:
        file = io.BytesIO()
        common = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, "split_digits": True}
        llama2 = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, model_type=kind, **(common | llama2 | more)
        )
        return file.getvalue()

    nfkc = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "byte_fallback": False}
    return {k: train(k) for k in KINDS} | {"changing": train("unigram", **nfkc)}


Make = Callable[..., str]


@pytest.fixture
def make(models: dict[str, bytes], tmp_path: Path) -> Make:
    """Writes a folder of Llama 2's age: tokenizer.model, tokenizer_config.json, and nothing else."""

    def make(cls: str, kind: str = "bpe", template: str | None = TURNS, **keys: Any) -> str:
        folder = tmp_path / f"{cls}_{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        return write_folder(folder, models[kind], cls, template, **keys)

    return make


def write_folder(folder: Path, model: bytes, cls: str, template: str | None, **keys: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    added = {str(size + i): token_of(t) for i, t in enumerate(ADDED)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": cls}
    config = special | {"chat_template": template, "added_tokens_decoder": added} | keys
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def token_of(content: str, **keys: bool) -> Record:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | flags | keys


def sample(*turns: str) -> Sample:
    return Sample(chat(*turns)["messages"], None, False, "chats.jsonl line 7")


def encode(encoder: ChatEncoder, sample: Sample) -> tuple[list[int], list[int]]:
    (encoded,) = encoder.encode([sample])
    return encoded.ids.tolist(), encoded.trained.tolist()


def runs(encoder: ChatEncoder, sample: Sample) -> list[str]:
    """What each run of trained tokens spells, once the ids are seen to be transformers' own."""
    ids, trained = encode(encoder, sample)
    assert ids == encoder.tokenizer.apply_chat_template(sample.messages, return_dict=False)
    found = [b""]
    for token, is_trained in zip(encoder.tokenizer.convert_ids_to_tokens(ids), trained, strict=True):
        if is_trained:
            is_byte = token.startswith("<0x") and len(token) == 6
            found[-1] += bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
        elif found[-1]:
            found.append(b"")
    return [f.decode() for f in found if f]


# ---------------------------------------------------------------------------------------- ids
@pytest.mark.parametrize("cls, kind", PAIRS)
def test_ids_of_chats_documents_and_prompts_are_those_of_transformers(cls: str, kind: str, make: Make) -> None:
    path = make(cls, kind)
    tokenizer = load_tokenizer(path)
    reference = AutoTokenizer.from_pretrained(path)
    assert tokenizer.is_fast == reference.is_fast == (cls in FAST)
    encoder = ChatEncoder(tokenizer)
    for text in TEXTS:
        conversation = sample(text, text, "And?", text)
        wanted = reference.apply_chat_template(conversation.messages, return_dict=False)
        assert encode(encoder, conversation)[0] == wanted
        asked = reference.apply_chat_template(conversation.messages[:1], add_generation_prompt=True, return_dict=False)
        assert encoder.prompt_ids(conversation.messages[:1]) == asked
        document = Sample([{"role": "pretraining", "content": text}], None, False, "")
        assert encode(encoder, document)[0] == [*reference(text)["input_ids"], reference.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", SLOW)
def test_ids_of_slow_tokenizers_are_those_of_the_sentencepiece_model(
    cls: str, kind: str, make: Make, models: dict[str, bytes]
) -> None:
    given = offset_tokenizer(load_tokenizer(make(cls, kind)))
    model = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    for text in TEXTS:
        assert given.encode(text) == model.encode(text)


# ---------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("cls, kind", PAIRS)
def test_answers_and_what_ends_them_are_trained_and_nothing_else(cls: str, kind: str, make: Make) -> None:
    encoder = ChatEncoder(load_tokenizer(make(cls, kind)))
    for text in TEXTS:
        assert runs(encoder, sample("Hello", text, text, "Blue.")) == [f"{text}<|end|>", "Blue.<|end|>"]
    assert runs(encoder, sample("Red", "")) == ["<|end|>"]
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == ["<|end|>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", SLOW)
def test_space_before_an_answer_joins_its_first_token(cls: str, kind: str, make: Make) -> None:
    encoder = ChatEncoder(load_tokenizer(make(cls, kind, LLAMA2)))
    assert runs(encoder, sample("Hello", "mice", "And?", "blue")) == [" mice</s>", " blue</s>"]
    # Where an answer starts with an unknown letter the space is a token of its own, which touches no letter of it.
    assert [r.strip() for r in runs(encoder, sample("Hello", "é🤖", "And?", "🤖"))] == ["é🤖</s>", "🤖</s>"]


def test_mask_written_out_by_hand(make: Make) -> None:
    encoder = ChatEncoder(load_tokenizer(make("SentencePieceBackend")))
    ids, trained = encode(encoder, sample("Red", "é it"))
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<s>"
    end = tokens.index("<|turn|>", 2)  # of the answer's turn
    at = tokens.index("<0x0A>", end)
    assert tokens[at:] == ["<0x0A>", "<0xC3>", "<0xA9>", "▁it", "<|end|>", "▁", "<0x0A>"]
    assert trained == [0] * (at + 1) + [1, 1, 1, 1, 0, 0]


def test_slow_tokenizer_gives_the_ids_and_masks_of_its_fast_twin(make: Make) -> None:
    fast = ChatEncoder(load_tokenizer(make("LlamaTokenizer", template=LLAMA2)))
    # Transformers' newer way, in which no space is put before what follows an added token.
    slow = ChatEncoder(load_tokenizer(make("SentencePieceBackend", template=LLAMA2, legacy=False)))
    assert fast.tokenizer.is_fast and not slow.tokenizer.is_fast
    for text in [*TEXTS, "", "<|end|>x", " x <|turn|> y"]:
        for conversation in (sample("Hello", text), sample(text, "Blue", "And?", text)):
            assert encode(slow, conversation) == encode(fast, conversation)


def test_token_offsets_are_those_of_sentencepiece_or_of_the_letters(make: Make) -> None:
    def parts(cls: str, text: str, **keys: Any) -> list[tuple[str, str]]:
        tokenizer = load_tokenizer(make(cls, **keys))
        ((ids, offsets),) = offset_tokenizer(tokenizer).encode_with_offsets([text])
        return [
            (t, text[s:e]) for t, (s, e) in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), offsets, strict=True)
        ]

    text = "é  Red<|end|> it"
    wanted = [("▁", ""), ("<0xC3>", ""), ("<0xA9>", "é"), ("▁", " "), ("▁Red", " Red"), ("<|end|>", "<|end|>")]
    assert parts("BertGenerationTokenizer", text) == [*wanted, ("▁", ""), ("▁it", " it")]
    assert parts("GPTSw3Tokenizer", text) == [*wanted, ("▁", ""), ("▁it", " it")]
    # Without a space put before a text, one that begins with spaces goes through the unknown token.
    wanted = [*wanted[1:], ("▁it", " it")]
    assert parts("SentencePieceBackend", text, legacy=False) == wanted
    # Characters that the class takes out or joins before sentencepiece sees them.
    found = parts("GPTSw3Tokenizer", "Re\u200bd\u3000e\u0301 it")
    assert found == [("▁Red", "Re\u200bd"), ("▁", "\u3000"), ("<0xC3>", ""), ("<0xA9>", "e\u0301"), ("▁it", " it")]


def test_characters_that_the_model_itself_changes_are_trained_whole(make: Make) -> None:
    """NFKC makes two letters of a ligature, four of a square sign; spaces in a row become one."""
    encoder = ChatEncoder(load_tokenizer(make("SentencePieceBackend", "changing", LLAMA2)))
    conversation = sample("ﬁ ㍿   it", "ﬁ  ㍿")
    ids, trained = encode(encoder, conversation)
    assert encoder.tokenizer.apply_chat_template(conversation.messages, return_dict=False) == ids
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[-8:] == ["I", "<unk>", "▁", "f", "i", "▁", "<unk>", "</s>"]
    assert trained == [0] * (len(ids) - 5) + [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ({"rstrip": True}, "Red <|turn|> it 🤖 <|end|>"),  # a space before "it" is not the text's: each part gets one
        ({"lstrip": True}, "Red<|turn|>   it 🤖<|end|>"),
        ({"lstrip": True, "rstrip": True}, "Red<|turn|> it 🤖<|end|>"),
    ],
)
def test_added_tokens_that_strip_spaces_leave_the_mask_in_place(keys: dict[str, bool], wanted: str, make: Make) -> None:
    added = {str(400 + i): token_of(t, **keys) for i, t in enumerate(ADDED)}
    encoder = ChatEncoder(load_tokenizer(make("SentencePieceBackend", added_tokens_decoder=added)))
    assert runs(encoder, sample("blue ", "Red <|turn|>  it 🤖 ")) == [wanted]


def test_tokens_of_a_byte_tokenizer_are_aligned_with_the_text(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert not tokenizer.is_fast
    encoder = ChatEncoder(tokenizer, "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}")
    ids, trained = encode(encoder, sample("hé", "é🤖"))
    assert ids == encoder.tokenizer.encode("u:hé</s>a:é🤖</s>", add_special_tokens=False)
    assert trained == [0] * 8 + [1] * 7


# ---------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", ["BertGenerationTokenizer", "SentencePieceBackend"])
def test_text_decoded_by_sentencepiece_is_that_which_was_encoded(cls: str, kind: str, make: Make) -> None:
    tokenizer = load_tokenizer(make(cls, kind))
    assert "<0xC3><0xA9>" in tokenizer.decode(tokenizer.encode("é"))  # which is why
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert decode(tokenizer, ids, skip_special_tokens=True) == text
        chat = f"<s><|turn|>user\n{text}<|end|>\n<|turn|><|turn|> it</s>"
        ids = tokenizer.encode(chat, add_special_tokens=False)
        assert decode(tokenizer, ids, skip_special_tokens=False) == chat
        assert decode(tokenizer, ids, skip_special_tokens=True) == f"user\n{text}\n it"
    assert decode(tokenizer, [], skip_special_tokens=True) == ""
    assert decode(tokenizer, [9999], skip_special_tokens=True) == ""


def test_slow_tokenizer_decodes_like_its_fast_twin(make: Make) -> None:
    fast = load_tokenizer(make("LlamaTokenizer", legacy=False))
    slow = load_tokenizer(make("SentencePieceBackend", legacy=False))
    for text in [*TEXTS, "<|turn|>user\n é <|end|>\n🤖", "<s> Red"]:
        ids = fast.encode(text, add_special_tokens=False)
        for skip in (False, True):
            wanted = fast.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert decode(slow, ids, skip_special_tokens=skip) == wanted
            assert decode(fast, ids, skip_special_tokens=skip) == wanted


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "GPTSw3Tokenizer"])
def test_tokenizers_with_own_bytes_decode_as_in_transformers(cls: str, make: Make) -> None:
    tokenizer = load_tokenizer(make(cls))
    for text in [*TEXTS, "<|turn|>user\n é <|end|>\n🤖</s>"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for skip in (False, True):
            wanted = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert decode(tokenizer, ids, skip_special_tokens=skip) == wanted


def test_chat_is_shown_with_the_letters_that_bytes_spell(make: Make) -> None:
    encoder = ChatEncoder(load_tokenizer(make("SentencePieceBackend")))
    (encoded,) = encoder.encode([sample("é", "🤖 it")])
    shown = encoder.show(encoded.ids, encoded.trained, color=False)
    assert shown == "<s><|turn|>user\né<|end|>\n<|turn|>assistant\n⟦🤖 it<|end|>⟧\n"


# ---------------------------------------------------------------------------------------- what cannot be told
def test_tokens_that_cannot_be_aligned_with_the_text_are_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(make("SentencePieceBackend"))
    encoder = ChatEncoder(tokenizer)
    original = type(tokenizer)._tokenize
    monkeypatch.setattr(type(tokenizer), "_tokenize", lambda self, text: original(self, text.upper()))
    message = (
        r"'.*' \(SentencePieceBackend\) is a slow one.*tokens of 'user\\nRed' are .*do not spell that text\. .*\.json"
    )
    with pytest.raises(UserError, match=message):
        encoder.encode([sample("Red", "blue")])


def test_parts_that_are_cut_otherwise_than_by_transformers_are_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a wrong cut gives offsets of the right number, and only the ids show it."""
    encoder = ChatEncoder(load_tokenizer(make("SentencePieceBackend")))
    encode(encoder, sample("Red", "blue"))

    def halves(self: Any, text: str) -> Any:
        middle = text.index("blue") + 2
        return [((0, middle), False), ((middle, len(text)), False)]

    monkeypatch.setattr(under_test._Slow, "_parts", halves)
    with pytest.raises(UserError, match=r"encoded separately, give other ids than the whole text"):
        encoder.encode([sample("Red", "blue")])


def test_sentencepieces_account_counts_only_for_the_very_same_tokens(make: Make) -> None:
    """Negative control: one token that is not sentencepiece's, and there is no account."""
    slow = under_test._Slow(load_tokenizer(make("SentencePieceBackend")))
    tokens = slow._tokenizer.tokenize("Red and blue")
    assert slow._by_sentencepiece("Red and blue", tokens)
    assert slow._by_sentencepiece("Red and blue", ["▁", *tokens[1:]]) is None
    assert slow._by_sentencepiece("Red and red", tokens) is None
    assert under_test._by_spelling("Red", ["R", "ed"]) == [(0, 1), (1, 3)]
    assert under_test._by_spelling("Red", ["R", "d"]) is None
    assert under_test._clusters(" a b ", str.strip) is None  # which does not treat each character for itself


# ---------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("cls, kind", PAIRS)
def test_saved_tokenizer_gives_the_same_ids_masks_and_template(cls: str, kind: str, make: Make, tmp_path: Path) -> None:
    encoder = ChatEncoder(load_tokenizer(make(cls, kind)))
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    saved = ChatEncoder(load_tokenizer(str(tmp_path / "saved")))
    assert type(saved.tokenizer) is type(encoder.tokenizer)
    assert saved.tokenizer.chat_template == TURNS
    for text in TEXTS:
        assert encode(saved, sample(text, text)) == encode(encoder, sample(text, text))


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "SentencePieceBackend", "GPTSw3Tokenizer"])
@pytest.mark.parametrize("name", TOKENS)
def test_built_in_template_and_its_tokens_are_saved(name: str, cls: str, make: Make, tmp_path: Path) -> None:
    said: list[str] = []
    tokenizer = load_tokenizer(make(cls, template=None, added_tokens_decoder={}), name, said)
    # Of these classes only Llama's puts bos before a text.
    assert tokenizer.chat_template.startswith("{{- bos_token }}") == (
        tokenizer.encode("a")[0] == tokenizer.bos_token_id
    )
    wanted = f"chat template {name}: the tokenizer gets the special tokens {', '.join(TOKENS[name])}"
    assert said == ([] if name == "plain" else [wanted])
    tokenizer.save_pretrained(tmp_path / "saved")
    encoders = [ChatEncoder(tokenizer), ChatEncoder(load_tokenizer(str(tmp_path / "saved")))]
    end = {"chatml": "<|im_end|>", "granite": "<|end_of_text|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    for encoder in encoders:
        assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == [end]
        found = runs(encoder, sample("Hello", "mice it", "And?", "Red"))
        assert [r.strip() for r in found] == [f"mice it{end}", f"Red{end}"]  # a space before is of the first token
        assert [t for t in TOKENS[name] if encoder.tokenizer.tokenize(t) != [t]] == []
    for text in TEXTS:
        assert encode(encoders[0], sample(text, text)) == encode(encoders[1], sample(text, text))


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "SentencePieceBackend", "GPTSw3Tokenizer"])
def test_encoder_can_be_sent_to_a_worker(cls: str, make: Make) -> None:
    encoder = ChatEncoder(load_tokenizer(make(cls)))
    sent = pickle.loads(pickle.dumps(encoder))
    assert encode(sent, sample("Hello", "Red 🤖")) == encode(encoder, sample("Hello", "Red 🤖"))
    assert sent.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "SentencePieceBackend"])
def test_token_store_follows_the_bytes_of_the_model_and_not_its_place(
    cls: str, make: Make, models: dict[str, bytes], tmp_path: Path
) -> None:
    path = make(cls)
    moved = shutil.copytree(path, tmp_path / "moved")
    data = write_jsonl(tmp_path / "chats.jsonl", make_chats(4))

    def build(path: str) -> set[str]:
        encoder = ChatEncoder(load_tokenizer(path))
        build_store(str(data), format="messages", encoder=encoder, skip_bad=False, cache_dir=tmp_path / "cache")
        return {p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()}

    assert len(build(path)) == len(build(str(moved))) == 1
    # The pieces are the same, and their ids: only what is done to a text before is another.
    other = proto(models["bpe"])
    other.normalizer_spec.add_dummy_prefix = False
    (Path(moved) / "tokenizer.model").write_bytes(other.SerializeToString())
    assert len(build(str(moved))) == (2 if cls in SLOW else 1)  # a LlamaTokenizer puts the space whatever that says
    other.pieces[-1].piece = "☃"
    (Path(moved) / "tokenizer.model").write_bytes(other.SerializeToString())
    assert len(build(str(moved))) == (3 if cls in SLOW else 2)


def proto(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


@pytest.mark.slow  # no other test trains a model of this vocabulary
@pytest.mark.parametrize("cls", ["LlamaTokenizer", "SentencePieceBackend"])
def test_run_is_trained_exported_and_asked_with_tokenizer_model_alone(
    cls: str, models: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = write_init(tmp_path / "init", vocab_size=402)
    for file in init.glob("*token*"):
        file.unlink()
    (init / "chat_template.jinja").unlink(missing_ok=True)
    write_folder(init, models["bpe"], cls, TURNS)
    data = write_jsonl(tmp_path / "chats.jsonl", make_chats(16))
    config = write_config(tmp_path / "run.py", data, init, "c.data.max_length = 256")
    assert run_train(config, tmp_path / "run") == 0
    assert run_export(tmp_path / "run", tmp_path / "hf") == 0
    first, last = (AutoTokenizer.from_pretrained(p) for p in (init, tmp_path / "hf"))
    assert type(first) is type(last)
    assert first.chat_template == last.chat_template == TURNS
    for record in make_chats(4, seed=1):
        ids = [t.apply_chat_template(record["messages"], return_dict=False) for t in (first, last)]
        assert ids[0] == ids[1]
    capsys.readouterr()
    asked = [f"--model={tmp_path / 'hf'}", "--prompt=red barn", "--max_new_tokens=4"]
    assert run_verb(generate.main, asked) == 0
    assert capsys.readouterr().out.strip()


# ---------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("cls", ["LlamaTokenizer", "GemmaTokenizer", "SentencePieceBackend", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("content", [None, b"", b"junk " * 9, b"version https://git-lfs.github.com/spec/v1\noid"])
def test_folder_without_a_vocabulary_is_an_error_that_lists_its_needs(
    content: bytes | None, cls: str, make: Make
) -> None:
    path = make(cls, added_tokens_decoder={})
    if content is None:
        (Path(path) / "tokenizer.model").unlink()
    else:
        (Path(path) / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from .*config\.json") as refused:
        load_tokenizer(path)
    message = str(refused.value)
    assert (
        "needs a tokenizer_config.json and a tokenizer.json" in message and "sentencepiece tokenizer.model" in message
    )
    if content == b"":
        assert "its tokenizer.model is empty" in message or "no vocabulary there except special tokens" in message
    if content:
        assert "tiktoken" not in message
        assert f"its tokenizer.model is not a sentencepiece model: {len(content)} bytes" in message
    assert ("fetch the file itself" in message) == bool(content and content.startswith(b"version"))


def test_unreadable_class_and_broken_model_have_different_errors(make: Make) -> None:
    with pytest.raises(UserError, match=r"is a sentencepiece model, .* tokenizer_class in") as refused:
        load_tokenizer(make("PreTrainedTokenizerFast", "unigram"))
    assert "tiktoken" not in str(refused.value)


@pytest.mark.parametrize("cls, kind, says", [("LlamaTokenizer", "bpe", False), ("LlamaTokenizer", "unigram", True)])
def test_conversion_that_changes_tokens_is_reported(
    cls: str, kind: str, says: bool, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tokenizer(make(cls, kind))
    said = capsys.readouterr().err
    assert ("gives other tokens than sentencepiece" in said) == says
    load_tokenizer(make("SentencePieceBackend", kind))
    assert not capsys.readouterr().err


def test_class_that_a_models_type_forces_keeps_its_ids_when_saved(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a Mistral transformers makes no LlamaTokenizer, whatever its tokenizer_config.json says."""
    path = make("LlamaTokenizer")
    (Path(path) / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = load_tokenizer(path)
    assert "gives other tokens than sentencepiece" in capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(Path(path) / "config.json", tmp_path / "saved")
    encoders = [ChatEncoder(t) for t in (tokenizer, load_tokenizer(str(tmp_path / "saved")))]
    for text in TEXTS:
        assert encode(encoders[0], sample(text, text)) == encode(encoders[1], sample(text, text))
