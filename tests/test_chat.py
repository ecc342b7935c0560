"""Ids against transformers, masks against strings written out by hand, for templates of every kind."""

import copy
import datetime
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mice_jax.data import chat as under_test
from mice_jax.data.chat import ChatEncoder, SampleFlag
from mice_jax.data.sources import Sample
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke

TEMPLATES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "data" / "templates").iterdir())}
CHATML, TAGGED = TEMPLATES["chatml"], TEMPLATES["tagged"]
TAGGED_SHORT = TAGGED.replace("<|im_end|>{% endgen", "{% endgen").replace(
    "{% endgeneration %}\n", "{% endgeneration %}<|im_end|>\n"
)


# Template, special tokens (the first is eos), and what ends a turn.
CHATS: dict[str, tuple[str, list[str], str]] = {
    "chatml": (CHATML, ["<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "llama3": (
        TEMPLATES["llama3"],
        ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|eot_id|>",
    ),
    "mistral": (TEMPLATES["mistral"], ["</s>", "<s>", "[INST]", "[/INST]"], "</s>"),
    "granite": (
        TEMPLATES["granite"],
        ["<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
        "<|end_of_text|>",
    ),
    "gemma": (TEMPLATES["gemma"], ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "zephyr": (TEMPLATES["zephyr"], ["</s>", "<s>"], "</s>"),
    "phi3": (TEMPLATES["phi3"], ["<|endoftext|>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"], "<|end|>"),
    "plain": (TEMPLATES["plain"], ["<eos>"], "\n"),
    "tagged": (TAGGED, ["<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "tagged_short": (TAGGED_SHORT, ["<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "qwen3": (TEMPLATES["qwen3"], ["<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "qwen25": (TEMPLATES["qwen25"], ["<|im_end|>", "<|im_start|>"], "<|im_end|>"),
}
TRIMMING = {"llama3", "gemma"}  # assistant and user alike
WORDS = ["Hello there, how are you?", "I am fine, thank you.", "Red and blue.", "What is it?\n\n"]
WORDS += ["a Red Blue Hello And Bye I am loud one"]


def make_tokenizer(template: str | None, special: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator(WORDS * 5, trainer)
    backend.add_special_tokens([AddedToken(s, rstrip=s == "<|end|>", normalized=False) for s in dict.fromkeys(special)])
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special[0],
        bos_token=special[1] if len(special) > 1 else None,
        pad_token=special[0],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def encoders() -> dict[str, ChatEncoder]:
    return {k: ChatEncoder(make_tokenizer(t, special)) for k, (t, special, _) in CHATS.items()}


def chat(*turns: str, system: str = "", **keys: Any) -> Sample:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return make(messages, **keys)


def make(messages: list[dict[str, Any]], tools: Any = None, unmask: bool = False) -> Sample:
    return Sample(messages, tools, unmask, "chats.jsonl line 7")


def runs(encoder: ChatEncoder, sample: Sample, shift: int = 0) -> list[str]:
    """The text of each run of trained tokens, once the ids are seen to be transformers' own."""
    (encoded,) = encoder.encode([sample])
    wanted = encoder.tokenizer.apply_chat_template(sample.messages, tools=sample.tools, return_dict=False)
    assert encoded.ids.tolist() == wanted
    assert (encoded.ids.dtype, encoded.trained.dtype) == (np.int32, np.uint8)
    assert encoded.ids.shape == encoded.trained.shape
    found: list[list[int]] = []
    trained = np.roll(encoded.trained, shift)
    for i, is_trained in enumerate(trained):
        if is_trained:
            if not i or not trained[i - 1]:
                found.append([])
            found[-1].append(int(encoded.ids[i]))
    return [encoder.tokenizer.decode(r, clean_up_tokenization_spaces=False) for r in found]


def marked(encoder: ChatEncoder, sample: Sample) -> str:
    """The chat's text, what is trained in brackets: that which gives these very ids and this very mask.

    The brackets go where trained tokens begin and end, by the tokenizers library's own offsets.
    """
    tokenizer: Any = encoder.tokenizer
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None  # which would take spaces out of the offsets
    (encoded,) = encoder.encode([sample])
    text = str(tokenizer.apply_chat_template(sample.messages, tools=sample.tools, tokenize=False))
    tokens = backend.encode(text, add_special_tokens=False)
    assert tokens.ids == encoded.ids.tolist()
    is_trained = np.zeros(len(text) + 2, np.int8)  # an untrained place before and after
    for (start, end), trained in zip(tokens.offsets, encoded.trained, strict=True):
        is_trained[start + 1 : end + 1] |= trained
    edges = np.diff(is_trained)
    return "".join({1: "⟦", -1: "⟧", 0: ""}[e] + c for e, c in zip(edges.tolist(), text + " ", strict=True))[:-1]


def expected(name: str, *contents: str) -> list[str]:
    """Contents with their end of turn; old Mistral and plain have a space before that joins in."""
    end = CHATS[name][2]
    before = {"mistral": " ", "plain": " "}.get(name, "")
    return [(before if c[:1].isalpha() else "") + c + end for c in contents]


@pytest.fixture(params=CHATS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# ---------------------------------------------------------------------------------------- masks
def test_one_turn_trains_the_answer_and_the_token_that_ends_it(name: str, encoders: dict[str, ChatEncoder]) -> None:
    assert runs(encoders[name], chat("What is it?", "Blue.")) == expected(name, "Blue.")


def test_every_answer_of_many_turns_is_trained(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.", "And?", "I am fine", "Bye", "Blue and red")
    wanted = expected(name, "Red.", "I am fine", "Blue and red")
    assert runs(encoders[name], sample) == wanted


@pytest.mark.parametrize("name", [n for n in CHATS if n != "gemma"])  # whose template refuses one, see below
def test_system_message_is_not_trained(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue.", system="Be kind.")
    assert runs(encoders[name], sample) == expected(name, "Red.", "Blue.")


def test_shifted_mask_is_seen_by_this_checker(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello there", "I am fine", "And", "Red")
    for shift in (-1, 1):
        assert runs(encoders[name], sample, shift) != expected(name, "I am fine", "Red")


def test_header_and_the_newline_after_the_end_are_not_trained(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["chatml"]
    (encoded,) = encoder.encode([chat("Hi", "Red")])
    assert encoder.show(encoded.ids, encoded.trained, color=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Red<|im_end|>⟧\n"
    )


def test_end_of_turn_that_is_bos_and_pad_is_trained_after_answers_only(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["granite"]
    tokenizer = encoder.tokenizer
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id
    (encoded,) = encoder.encode([chat("Hi", "Red", "And", "Blue")])
    ends = encoded.trained[encoded.ids == tokenizer.eos_token_id]
    assert ends.tolist() == [0, 1, 0, 1]


def test_second_token_at_the_very_end_of_phi3_is_not_trained(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["phi3"]
    (encoded,) = encoder.encode([chat("Hi", "Red")])
    tail = [encoder.tokenizer.decode([i]) for i in encoded.ids[-2:]]
    assert tail == ["<|end|>", "<|endoftext|>"]
    assert encoded.trained[-2:].tolist() == [1, 0]


@pytest.mark.parametrize("answer", ["héllo 🤖", "日本語です", "👨‍👩‍👧", "a\u0301 ﬁ", "🤖"])
def test_every_byte_of_a_character_is_trained(name: str, answer: str, encoders: dict[str, ChatEncoder]) -> None:
    found = runs(encoders[name], chat("Was ist das? 🤔", answer))
    end = CHATS[name][2]
    assert [r.lstrip(" ") for r in found] == [answer + end]


@pytest.mark.parametrize("answer", ["  Red  ", "\nRed\n", "\n\n Red \n\n", "Red\n", "\tRed", "\n\nRed"])
def test_spaces_around_an_answer_follow_the_template(name: str, answer: str, encoders: dict[str, ChatEncoder]) -> None:
    found = "".join(runs(encoders[name], chat("  What \n", answer, "\nAnd\n", "Blue")))
    shown = answer.strip() if name in {*TRIMMING, "mistral"} else answer
    if name == "qwen3":  # as the real one, it keeps what history has and strips the last turn
        assert found.lstrip("\n") == answer.lstrip("\n") + "<|im_end|>Blue<|im_end|>"
        return
    end = CHATS[name][2]
    if name == "plain":
        assert found.split() == ["Red", "Blue"]
        assert shown.lstrip(" ") + end in found  # a space before joins the header's
        return
    # A newline before the answer may be one token with the header's own.
    found, shown = found.lstrip("\n"), shown.lstrip("\n")
    assert found.replace(" ", "") == f"{shown}{end}Blue{end}".replace(" ", "").lstrip("\n")


def test_empty_answer_trains_the_end_alone(name: str, encoders: dict[str, ChatEncoder]) -> None:
    found = runs(encoders[name], chat("Hello", "", "And?", "Blue."))
    end = CHATS[name][2]
    # Where the header ends in a space, the token of that space is not part of the turn's end.
    assert [r.lstrip(" ") for r in found] == [end, "Blue." + end]


def test_contents_that_look_like_the_template_do_not_mislead(name: str, encoders: dict[str, ChatEncoder]) -> None:
    tricks = ["assistant\n", "user: Red", "Assistant: Blue", "MicePart000003End", "{{ m.content }}"]
    for trick in tricks:
        answer = trick.strip()
        found = runs(encoders[name], chat(trick, answer, answer, trick.strip()))
        assert [r.lstrip(" ") for r in found] == [answer + CHATS[name][2]] * 2


def test_answer_equal_to_the_question_is_the_only_one_trained(name: str, encoders: dict[str, ChatEncoder]) -> None:
    assert runs(encoders[name], chat("Blue", "Blue")) == expected(name, "Blue")


def test_end_of_turn_written_inside_an_answer_stays_inside(
    encoders: dict[str, ChatEncoder],
) -> None:
    answer = "one<|im_end|>\n<|im_start|>assistant\ntwo"
    for name in ("chatml", "tagged", "tagged_short"):
        assert runs(encoders[name], chat("Hi", answer)) == [answer + "<|im_end|>"]


# Whole texts by hand, by the layouts that these families publish.
BY_HAND = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Red<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Blue<|im_end|>⟧\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Red<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Blue<|eot_id|>⟧",
    "mistral": "<s>[INST] Hi [/INST]⟦ Red</s>⟧[INST] Bye [/INST]⟦ Blue</s>⟧",
    "granite": "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦Red<|end_of_text|>⟧\n"
    "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦Blue<|end_of_text|>⟧\n",
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Red<end_of_turn>⟧\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Blue<end_of_turn>⟧\n",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\n⟦Red</s>⟧\n<|user|>\nBye</s>\n<|assistant|>\n⟦Blue</s>⟧\n",
    # The end token takes the newline after it.
    "phi3": "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Red<|end|>\n⟧"
    "<|user|>\nBye<|end|>\n<|assistant|>\n⟦Blue<|end|>\n⟧<|endoftext|>",
    "plain": "User: Hi\nAssistant:⟦ Red\n⟧User: Bye\nAssistant:⟦ Blue\n⟧",
    "qwen25": "<|im_start|>system\nYou are a mouse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n⟦Red<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    "⟦Blue<|im_end|>⟧\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Red<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>"
    "\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Blue<|im_end|>⟧\n",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_chat_is_the_text_written_by_hand(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hi", "Red", "Bye", "Blue")
    assert marked(encoders[name], sample) == BY_HAND[name]
    sample.messages[1]["train"] = False  # negative control: the brackets follow the mask
    assert marked(encoders[name], sample) == BY_HAND[name].replace("⟦", "", 1).replace("⟧", "", 1)


def test_last_answer_alone_is_trained_where_asked(name: str, encoders: dict[str, ChatEncoder]) -> None:
    encoder = ChatEncoder(encoders[name].tokenizer, train_on="last")
    assert runs(encoder, chat("Hello", "Red.", "And?", "I am fine", "Bye", "Blue")) == expected(name, "Blue")
    assert runs(encoder, chat("Hello", "Red.")) == expected(name, "Red.")
    assert runs(encoder, chat("Hello", "Red.", "And?")) == expected(name, "Red.")  # the user's stands last
    assert runs(encoder, chat("Hello")) == []
    assert encoder.stop_ids() == encoders[name].stop_ids()


def test_message_train_flag_overrides_train_on(name: str, encoders: dict[str, ChatEncoder]) -> None:
    encoder = ChatEncoder(encoders[name].tokenizer, train_on="last")
    sample = chat("Hello", "Red.", "And?", "I am fine", "Bye", "Blue")
    sample.messages[1]["train"] = True
    assert runs(encoder, sample) == expected(name, "Red.", "Blue")
    sample.messages[5]["train"] = False
    assert runs(encoder, sample) == expected(name, "Red.")


def test_unmask_and_documents_are_the_same_whatever_train_on_is(encoders: dict[str, ChatEncoder]) -> None:
    unmasked = chat("Hello", "Red.", "And?", "Blue.", system="Be kind.", unmask=True)
    document = make([{"role": "pretraining", "content": "Red"}])
    wanted = expected("chatml", "Hello", "Red.", "And?", "Blue.")
    for every in encoders["chatml"], encoders["tagged"]:
        last = ChatEncoder(every.tokenizer, train_on="last")
        assert runs(last, unmasked) == runs(every, unmasked) == wanted
        assert last.encode([document])[0].trained.all()


def test_unknown_train_on_is_an_error(encoders: dict[str, ChatEncoder]) -> None:
    with pytest.raises(UserError, match=r"data\.train_on='first' is not one of all, last"):
        ChatEncoder(encoders["chatml"].tokenizer, train_on="first")


# ---------------------------------------------------------------------------------------- flags
def flags_of(encoder: ChatEncoder, *samples: Sample) -> list[SampleFlag]:
    return [SampleFlag(e.flags) for e in encoder.encode(samples)]


def test_ordinary_chat_has_no_flag(name: str, encoders: dict[str, ChatEncoder]) -> None:
    samples = [chat("Hello", "Red <b> [x] <think>"), make([{"role": "pretraining", "content": "Red"}])]
    samples += [chat("Hello", "Red.", system="Be kind.")] if name != "gemma" else []
    assert flags_of(encoders[name], *samples) == [SampleFlag(0)] * len(samples)


def test_special_token_spelt_by_a_content_is_flagged(encoders: dict[str, ChatEncoder]) -> None:
    encoder, spelt = encoders["chatml"], SampleFlag.SPECIAL_IN_CONTENT
    thought, called = chat("Hi", "Red"), chat("Hi", "Red")
    thought.messages[1]["reasoning_content"] = "<|im_start|>"
    called.messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"a": "é<|im_end|>"}}}]
    described = make([*chat("Hi", "Red").messages], tools=[{"name": "f", "description": "ends with <|im_end|>"}])
    assert flags_of(encoders["qwen25"], called) == [spelt]  # whose template has a place for calls
    of_tools = "{% if tools %}{{ tools }}{% endif %}" + CHATML
    assert flags_of(ChatEncoder(encoder.tokenizer, of_tools), described) == [spelt]
    document = make([{"role": "pretraining", "content": "Red<|im_end|>blue"}])
    samples = [chat("a<|im_end|>", "Red"), chat("Hi", "<|im_start|>"), thought, document]
    assert flags_of(encoder, *samples) == [spelt] * 4
    assert flags_of(ChatEncoder(encoder.tokenizer, reasoning="drop"), thought) == [SampleFlag(0)]
    # Tokens that are added but not special (<think>) and parts of special ones are mere text.
    assert flags_of(encoder, chat("<think>", "<|im_start"), chat("Hi", "<|im_end |>")) == [SampleFlag(0)] * 2
    encoder.tokenizer.split_special_tokens = True  # then it is read as text too
    try:
        assert flags_of(ChatEncoder(encoder.tokenizer), *samples) == [SampleFlag(0)] * 4
    finally:
        encoder.tokenizer.split_special_tokens = False


def test_special_tokens_of_every_length_are_found() -> None:
    tokens = ["</s>", "<s>", "☃", "[]", "[][", "<s>>"]
    encoder = ChatEncoder(make_tokenizer(CHATML, tokens))
    for text in [*tokens, "a", "<s", "[", "</s"]:
        assert flags_of(encoder, chat("Hi", f"a{text}b")) == [SampleFlag(text in tokens)], text


def test_double_bos_is_flagged(encoders: dict[str, ChatEncoder]) -> None:
    spelt = SampleFlag.SPECIAL_IN_CONTENT
    # One bos is the template's, the other the content's.
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(template, ["</s>", "<s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    encoder = ChatEncoder(tokenizer)
    chats = [chat("<s>Hi", "Red"), chat("Hi", "<s><s>Red"), chat("Hi", "Red")]
    assert flags_of(encoder, *chats) == [spelt | SampleFlag.DOUBLE_BOS, spelt, SampleFlag(0)]
    documents = [make([{"role": "pretraining", "content": t}]) for t in ("<s>Red", "Red")]
    assert flags_of(encoder, *documents) == [spelt | SampleFlag.DOUBLE_BOS, SampleFlag(0)]
    # Both are the template's.
    assert flags_of(ChatEncoder(tokenizer, "{{ bos_token }}" + template), chat("Hi", "Red")) == [SampleFlag.DOUBLE_BOS]
    # The one bos there is comes from the content.
    assert flags_of(ChatEncoder(tokenizer, template.replace("{{ bos_token }}", "")), chat("<s>Hi", "Red")) == [spelt]
    # Without a bos there are no two.
    assert flags_of(ChatEncoder(make_tokenizer(template, ["</s>"])), chat("Hi", "Red")) == [SampleFlag(0)]


def test_chat_that_the_assistant_begins_is_flagged(encoders: dict[str, ChatEncoder]) -> None:
    answer, system = {"role": "assistant", "content": "Red"}, {"role": "system", "content": "Be kind."}
    question = {"role": "user", "content": "Hi"}
    samples = [make(m) for m in ([answer], [system, answer, question, answer], [system, question, answer], [system])]
    assert flags_of(encoders["chatml"], *samples) == [SampleFlag.STARTS_WITH_ASSISTANT] * 2 + [SampleFlag(0)] * 2


# ---------------------------------------------------------------------------------------- dates
DATED = "{% if strftime_now is defined %}{{ 'Today is ' + strftime_now(\"%d %B %Y\") }}{% endif %}|" + CHATML


def test_template_date_is_one_day_throughout() -> None:
    tokenizer = make_tokenizer(DATED, ["<|im_end|>", "<|im_start|>"])
    old = ChatEncoder(tokenizer, today=datetime.date(2024, 7, 26))
    rest = "|<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    wanted = tokenizer.encode(f"Today is 26 July 2024{rest}Red<|im_end|>\n", add_special_tokens=False)
    for encoder in (old, pickle.loads(pickle.dumps(old))):
        (encoded,) = encoder.encode([chat("Hi", "Red")])
        assert encoded.ids.tolist() == wanted
        assert tokenizer.decode(encoded.ids[encoded.trained == 1]) == "Red<|im_end|>"
        prompt = tokenizer.encode(f"Today is 26 July 2024{rest}", add_special_tokens=False)
        assert encoder.prompt_ids([{"role": "user", "content": "Hi"}]) == prompt


def test_template_date_is_today_as_in_transformers() -> None:
    for template in (DATED, {"default": DATED, "tool_use": DATED + "{{ tools | tojson }}"}):
        encoder = ChatEncoder(make_tokenizer(template, ["<|im_end|>", "<|im_start|>"]))  # type: ignore[arg-type]
        if encoder.today == datetime.date.today():  # not over midnight
            assert runs(encoder, chat("Hi", "Red")) == ["Red<|im_end|>"]
            tools = [{"type": "function"}] if isinstance(template, dict) else None
            assert runs(encoder, chat("Hi", "Red", tools=tools)) == ["Red<|im_end|>"]


def test_token_store_is_known_by_the_day_where_the_template_writes_it() -> None:
    days = [datetime.date(2024, 7, 26), datetime.date(2024, 7, 27)]
    for template, dated in ((DATED, True), ({"default": CHATML, "tool_use": DATED}, True), (CHATML, False)):
        tokenizer = make_tokenizer(template, ["<|im_end|>", "<|im_start|>"])  # type: ignore[arg-type]
        one, other = (ChatEncoder(tokenizer, today=day) for day in days)
        assert one.depends_on_date == other.depends_on_date == dated
        assert (one.fingerprint() != other.fingerprint()) == dated
        assert one.fingerprint() == ChatEncoder(tokenizer, today=days[0]).fingerprint()
    assert not ChatEncoder(make_tokenizer(None, ["</s>"])).depends_on_date


def test_template_date_with_a_computed_format_is_an_error() -> None:
    encoder = custom("{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML)
    with pytest.raises(
        UserError, match=r"writes a date with 'strftime_now\(f\).*not a quoted string.*data\.chat_template"
    ):
        encoder.encode([chat("Hi", "Red")])


# ---------------------------------------------------------------------------------------- flags
def test_train_flags_choose_among_messages(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue.")
    sample.messages[1]["train"] = False
    assert runs(encoders[name], sample) == expected(name, "Blue.")
    sample.messages[1]["train"], sample.messages[3]["train"] = True, False
    assert runs(encoders[name], sample) == expected(name, "Red.")


def test_message_of_the_user_can_be_trained(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.")
    sample.messages[0]["train"], sample.messages[1]["train"] = True, False
    end = " [/INST]" if name == "mistral" else CHATS[name][2]
    before = expected(name, "Hello")[0].partition("Hello")[0]
    assert runs(encoders[name], sample) == [f"{before}Hello{end}"]


def test_no_flag_left_gives_a_mask_of_zeros(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.")
    sample.messages[1]["train"] = False
    assert runs(encoders[name], sample) == []
    assert runs(encoders[name], chat("Hello")) == []


def test_unmask_trains_all_but_the_system_and_the_headers(
    encoders: dict[str, ChatEncoder],
) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue.", system="Be kind.", unmask=True)
    for name in ("chatml", "llama3", "granite", "zephyr", "phi3", "tagged", "plain"):
        wanted = expected(name, "Hello", "Red.", "And?", "Blue.")
        assert runs(encoders[name], sample) == wanted, name


def test_folded_system_message_stays_untrained_under_unmask(
    encoders: dict[str, ChatEncoder],
) -> None:
    sample = chat("Hello", "Red.", system="Be kind.", unmask=True)
    found = runs(encoders["mistral"], sample)
    assert found == ["Hello [/INST] Red.</s>"]


# ---------------------------------------------------------------------------------------- documents
def test_document_is_trained_whole_with_its_special_tokens() -> None:
    tokenizer = make_tokenizer(None, ["</s>", "<s>"])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    encoder = ChatEncoder(tokenizer)
    texts = ["Red and blue.", "Blue</s>", ""]
    samples = [make([{"role": "pretraining", "content": t}]) for t in texts]
    encoded = encoder.encode(samples)
    decoded = [tokenizer.decode(e.ids) for e in encoded]
    assert decoded == ["<s>Red and blue.</s>", "<s>Blue</s>", "<s></s>"]
    assert all(e.trained.all() for e in encoded)
    assert encoded[0].ids[:-1].tolist() == tokenizer("Red and blue.").input_ids


def test_documents_and_chats_of_one_batch_keep_their_places(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["chatml"]
    document = make([{"role": "pretraining", "content": "Red and blue."}])
    samples = [chat("a", "b"), document, chat("c", "d"), document]
    together = encoder.encode(samples)
    for sample, encoded in zip(samples, together, strict=True):
        (alone,) = encoder.encode([sample])
        assert alone.ids.tolist() == encoded.ids.tolist()
        assert alone.trained.tolist() == encoded.trained.tolist()
    assert encoder.encode([]) == []


# ---------------------------------------------------------------------------------------- ids written out
# Of a tokenizer whose ids are those of ASCII, a character each; its special tokens follow from 128 on, in the order in
# which CHATS has them, then <think>, </think>, <tool_call>, </tool_call>. What is trained stands in brackets.
IDS = {
    "chatml": "129 117 115 101 114 10 72 105 128 10 129 97 115 115 105 115 116 97 110 116 10 [78 111 128] 10",
    "llama3": "129 130 117 115 101 114 131 10 10 72 105 128 130 97 115 115 105 115 116 97 110 116 131 10 10 [78 "
    "111 128]",
    "mistral": "129 130 32 72 105 32 131 32 [78 111 128]",
    "granite": "129 117 115 101 114 130 72 105 128 10 129 97 115 115 105 115 116 97 110 116 130 [78 111 128] 10",
    "gemma": "129 130 117 115 101 114 10 72 105 131 10 130 109 111 100 101 108 10 [78 111 131] 10",
    "zephyr": "60 124 117 115 101 114 124 62 10 72 105 128 10 60 124 97 115 115 105 115 116 97 110 116 124 62 "
    "10 [78 111 128] 10",
    "phi3": "131 10 72 105 130 132 10 [78 111 130] 128",
    "plain": "85 115 101 114 58 32 72 105 10 65 115 115 105 115 116 97 110 116 58 32 [78 111 10]",
    "qwen25": "129 115 121 115 116 101 109 10 89 111 117 32 97 114 101 32 97 32 109 111 117 115 101 46 128 10 "
    "129 117 115 101 114 10 72 105 128 10 129 97 115 115 105 115 116 97 110 116 10 [78 111 128] 10",
    "qwen3": "129 117 115 101 114 10 72 105 128 10 129 97 115 115 105 115 116 97 110 116 10 130 10 10 131 10 "
    "10 [78 111 128] 10",
}
LAST = (
    "129 117 115 101 114 10 65 128 10 129 97 115 115 105 115 116 97 110 116 10 66 128 10 129 117 115 101 114 10 67 "
    "128 10 129 97 115 115 105 115 116 97 110 116 10 [68 128] 10"
)
UNMASKED = "129 117 115 101 114 10 [65 128] 10 129 97 115 115 105 115 116 97 110 116 10 [66 128] 10"
REASONED = (
    "129 117 115 101 114 10 65 128 10 129 97 115 115 105 115 116 97 110 116 10 [66 128] 10 129 117 115 101 114 10 "
    "67 128 10 129 97 115 115 105 115 116 97 110 116 10 [130 10 84 10 131 10 10 68 128] 10"
)
CALLED_BY_ID = (
    "129 115 121 115 116 101 109 10 91 123 34 110 34 58 32 49 125 93 128 10 129 117 115 101 114 10 65 128 10 129 97 "
    "115 115 105 115 116 97 110 116 10 [132 10 123 34 102 34 58 32 50 125 10 133 128] 10 129 117 115 101 114 10 60 "
    "116 111 111 108 95 114 101 115 112 111 110 115 101 62 10 51 10 60 47 116 111 111 108 95 114 101 115 112 111 "
    "110 115 101 62 128 10 129 97 115 115 105 115 116 97 110 116 10 130 10 10 131 10 10 [68 128] 10"
)


def ascii_encoder(name: str, **keys: Any) -> ChatEncoder:
    template, special, _ = CHATS[name]
    backend = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    added = [*dict.fromkeys(special), "<think>", "</think>", "<tool_call>", "</tool_call>"]
    backend.add_tokens([AddedToken(s, rstrip=s == "<|end|>", normalized=False) for s in added])
    names = {"eos_token": special[0], "pad_token": special[0]} | ({"bos_token": special[1]} if special[1:] else {})
    return ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, **names), template, **keys)


def written(encoder: ChatEncoder, sample: Sample) -> str:
    """Ids as a line of numbers, runs of trained ones in brackets."""
    (encoded,) = encoder.encode([sample])
    line, inside = "", 0
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        line += ("]" if inside and not trained else "") + " " + ("[" if trained and not inside else "") + str(token)
        inside = trained
    return line.strip() + "]" * inside


@pytest.mark.parametrize("name", IDS)
def test_ids_and_the_mask_of_a_chat_are_those_written_out(name: str) -> None:
    assert written(ascii_encoder(name), chat("Hi", "No")) == IDS[name]
    assert written(ascii_encoder(name), chat("Hi", "on")) == IDS[name].replace("[78 111", "[111 110")  # it looks at ids


def test_ids_and_the_masks_of_the_other_rules_are_those_written_out() -> None:
    encoder, two = ascii_encoder("chatml"), chat("A", "B", "C", "D")
    assert written(ascii_encoder("chatml", train_on="last"), two) == LAST
    two.messages[1]["train"] = False
    assert written(encoder, two) == LAST
    assert written(encoder, chat("A", "B", unmask=True)) == UNMASKED
    document = make([{"role": "pretraining", "content": "Hi"}])
    assert written(encoder, document) == "[72 105 128]"
    thought = chat("A", "B", "C", "D")
    thought.messages[1]["reasoning_content"] = "S"  # which this template drops
    thought.messages[3]["reasoning_content"] = "T"
    assert written(ascii_encoder("qwen3"), thought) == REASONED
    called = make(
        [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": None, "tool_calls": [{"f": 2}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "D"},
        ],
        tools=[{"n": 1}],
    )
    assert written(ascii_encoder("qwen3"), called) == CALLED_BY_ID


# ---------------------------------------------------------------------------------------- tools
def test_reasoning_is_trained_where_the_template_keeps_it(
    encoders: dict[str, ChatEncoder],
) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue.")
    sample.messages[1]["reasoning_content"] = "Think of red."
    sample.messages[3]["reasoning_content"] = "\nThink of blue.\n"
    last = "<think>\nThink of blue.\n</think>\n\nBlue.<|im_end|>"
    assert runs(encoders["qwen3"], sample) == ["Red.<|im_end|>", last]


def test_reasoning_written_into_the_content_is_found_too(
    encoders: dict[str, ChatEncoder],
) -> None:
    sample = chat("Hello", "<think>\nOf red.\n</think>\n\nRed.", "And?", "<think>\nOf blue.\n</think>\n\nBlue.")
    last = "<think>\nOf blue.\n</think>\n\nBlue.<|im_end|>"
    assert runs(encoders["qwen3"], sample) == ["Red.<|im_end|>", last]
    open_ended = chat("Hello", "Of red.</think>Red.", "And?", "Of blue.\n</think>\n\nBlue.")
    assert runs(encoders["qwen3"], open_ended) == ["Red.<|im_end|>", last]
    spaced = chat("Hi", "Of red.</think>Red. ")  # its last space is its own, and ends no turn
    assert runs(encoders["plain"], spaced) == ["Of red.</think>Red. \n"]
    whole = [m["content"] + "<|im_end|>" for m in sample.messages[1::2]]
    assert runs(encoders["chatml"], sample) == whole


def test_empty_thinking_block_of_the_template_is_a_header(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["qwen3"]
    (encoded,) = encoder.encode([chat("Hi", "Red")])
    text = encoder.show(encoded.ids, encoded.trained, color=False)
    assert text.endswith("assistant\n<think>\n\n</think>\n\n⟦Red<|im_end|>⟧\n")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = "<tool_call>\n" + json.dumps(CALL) + "\n</tool_call><|im_end|>"


@pytest.mark.parametrize("content", [None, "", "I will add."])
def test_tool_calls_are_trained_with_the_text_before_them(
    content: str | None, encoders: dict[str, ChatEncoder]
) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    before = "I will add.\n" if content else ""
    last = "It is 2.<|im_end|>"
    assert runs(encoders["qwen3"], make(messages, tools)) == [before + CALLED, last]
    assert runs(encoders["qwen3"], make(messages[:2], tools))[-1].endswith(before + CALLED)


def test_earlier_tool_calls_are_found_where_their_reasoning_was_dropped(
    encoders: dict[str, ChatEncoder],
) -> None:
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "reasoning_content": "Use it.", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "Good."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Bye."},
    ]
    found = runs(encoders["qwen3"], make(messages))
    assert found == [CALLED, "It is 2.<|im_end|>", "Bye.<|im_end|>"]
    thought = ["<think>\nUse it.\n</think>\n\n" + CALLED, "<think>\nGood.\n</think>\n\nIt is 2.<|im_end|>"]
    assert runs(encoders["qwen3"], make(messages[:4])) == thought


# ---------------------------------------------------------------------------------------- other ways
def custom(template: str, special: tuple[str, ...] = ("<|im_end|>", "<|im_start|>")) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(template, list(special)))


def test_template_that_depends_on_user_content_has_spans() -> None:
    looks = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!!' if 'loud' in m.content }}")
    assert runs(custom(looks), chat("Be loud", "Red", "Hi", "Blue")) == ["Red<|im_end|>", "Blue<|im_end|>"]


def test_template_that_depends_on_answers_has_spans() -> None:
    looks = CHATML.replace("{{ m.content }}", "{{ '# ' if 'loud' in m.content }}{{ m.content }}")
    encoder = custom(looks)
    assert runs(encoder, chat("Hi", "loud", "Hi", "Blue")) == [" loud<|im_end|>", "Blue<|im_end|>"]


def test_end_only_after_the_last_answer_is_trained_there() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ eos_token if loop.last }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert runs(custom(template), chat("Hi", "Red", "Hi", "Blue")) == ["Red", "Blue<|im_end|>"]


def test_space_before_an_end_of_turn_is_trained_with_it() -> None:
    spaced = CHATML.replace("<|im_end|>", " <|im_end|>")
    assert runs(custom(spaced), chat("Hi", "Red", "Hi", "Blue")) == ["Red <|im_end|>", "Blue <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", "would never stop"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "{% generation %}"),
        (CHATML.replace("{{ m.content }}", "{{ m.content + m.content }}"), "more than once"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), "leaves out"),
        (TAGGED.replace("m.role == 'assistant'", "false"), "0 {% generation %} spans"),
    ],
)
def test_template_without_derivable_spans_is_an_error(template: str, words: str) -> None:
    with pytest.raises(UserError) as e:
        custom(template).encode([chat("Hi", "Red")])
    assert words in str(e.value)
    assert "chats.jsonl line 7" in str(e.value)


def test_exception_of_a_template_is_quoted_with_file_and_line(
    encoders: dict[str, ChatEncoder],
) -> None:
    with pytest.raises(UserError, match=r"chats.jsonl line 7: .*System role not supported"):
        encoders["gemma"].encode([chat("Hi", "Red", system="Be kind.")])
    with pytest.raises(UserError, match=r"chats.jsonl line 7: .*must alternate"):
        encoders["mistral"].encode([make([{"role": "assistant", "content": "Red"}])])


def test_train_flags_need_a_tagged_span_for_each_answer() -> None:
    joined = "{% generation %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% endgeneration %}"
    encoder = custom(joined)
    assert runs(encoder, chat("Hi", "Red", "Hi", "Blue")) == ["Hi<|im_end|>Red<|im_end|>Hi<|im_end|>Blue<|im_end|>"]
    sample = chat("Hi", "Red", "Hi", "Blue")
    sample.messages[1]["train"] = False
    with pytest.raises(UserError, match=r"1 .* spans for 2 assistant messages"):
        encoder.encode([sample])


# ---------------------------------------------------------------------------------------- the rest
def test_stop_ids_are_what_ends_a_turn(name: str, encoders: dict[str, ChatEncoder]) -> None:
    encoder = encoders[name]
    assert [encoder.tokenizer.decode([i]) for i in encoder.stop_ids()] == [CHATS[name][2]]


def test_prompt_ids_are_those_of_transformers(name: str, encoders: dict[str, ChatEncoder]) -> None:
    encoder, messages = encoders[name], [{"role": "user", "content": " Hello\n"}]
    wanted = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids(messages) == wanted


def test_show_marks_what_is_trained_by_colour_or_brackets(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["plain"]
    (encoded,) = encoder.encode([chat("Hi 🤖", "Red é🤖 a")])
    shown = encoder.show(encoded.ids, encoded.trained, color=False)
    assert shown == "User: Hi 🤖\nAssistant:⟦ Red é🤖 a\n⟧"
    green = encoder.show(encoded.ids, encoded.trained, color=True)
    assert green == shown.replace("⟦", "\x1b[32m").replace("⟧", "\x1b[0m")


def test_fingerprint_follows_tokenizer_and_template() -> None:
    first = custom(CHATML)
    prints = [first.fingerprint()]
    first.tokenizer("Hello", padding="max_length", truncation=True, max_length=4)
    (encoded,) = first.encode([chat("Hello there", "I am fine, thank you.")])
    assert len(encoded.ids) > 4
    assert custom(CHATML).fingerprint() == first.fingerprint() == prints[0]
    others = [custom(CHATML + " "), custom(CHATML, ("<|im_end|>", "<|im_start|>", "<x>"))]
    others += [ChatEncoder(first.tokenizer, TEMPLATES["llama3"]), ChatEncoder(first.tokenizer, train_on="last")]
    splitting = make_tokenizer(CHATML, ["<|im_end|>", "<|im_start|>"])
    splitting.split_special_tokens = True
    others.append(ChatEncoder(splitting))
    assert len({*prints, *(o.fingerprint() for o in others)}) == 6


def test_fingerprint_follows_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = custom(CHATML).fingerprint()
    monkeypatch.setattr(under_test, "RULES_VERSION", under_test.RULES_VERSION + 1)
    assert custom(CHATML).fingerprint() != before


def test_encoder_can_be_sent_to_a_worker(name: str, encoders: dict[str, ChatEncoder]) -> None:
    sample = chat("Hello", "Red.")
    sent = pickle.loads(pickle.dumps(encoders[name]))
    assert runs(sent, sample) == runs(encoders[name], sample)


def test_worker_reads_special_tokens_as_text_where_the_tokenizer_does() -> None:
    tokenizer = make_tokenizer(CHATML, ["<|im_end|>", "<|im_start|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    document = make([{"role": "pretraining", "content": "Red<|im_end|>blue"}])
    found = []
    for splits in (False, True):
        tokenizer.split_special_tokens = splits
        encoder = ChatEncoder(tokenizer)
        (here,), (there,) = encoder.encode([document]), pickle.loads(pickle.dumps(encoder)).encode([document])
        assert there.ids.tolist() == here.ids.tolist()
        found.append(here.ids.tolist().count(end))
    assert found == [2, 1]  # the one at the end of the document is added by its id


def metaspace(template: str) -> ChatEncoder:
    """As Llama 2's: spaces are "▁", one is put before a text, and unknown letters become bytes."""
    words = ["▁", "▁Hello", "▁Red", "▁Hi", "a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def test_prefix_spaces_and_byte_fallback_are_trained_whole() -> None:
    template = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
    encoder = metaspace(template)
    assert runs(encoder, chat("ab", "ba")) == [" ba</s>"]
    assert runs(encoder, chat("ab", "b🤖a")) == [" b🤖a</s>"]


# ---------------------------------------------------------------------------------------- loading
@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str | None], str]:
    def save(template: str | None) -> str:
        make_tokenizer(template, ["<|im_end|>", "<|im_start|>"]).save_pretrained(tmp_path / "tok")
        return str(tmp_path / "tok")

    return save


def test_saved_tokenizer_is_loaded_with_its_template_or_a_files(
    saved: Callable[[str | None], str], tmp_path: Path
) -> None:
    path = saved(CHATML)
    assert runs(ChatEncoder(load_tokenizer(path)), chat("Hi", "Red")) == ["Red<|im_end|>"]
    file = tmp_path / "other.jinja"
    file.write_text(TEMPLATES["zephyr"], encoding="utf-8")
    tokenizer = load_tokenizer(path, str(file))
    assert tokenizer.chat_template == TEMPLATES["zephyr"]
    assert runs(ChatEncoder(tokenizer), chat("Hi", "Red")) == ["Red<|im_end|>"]


def test_missing_tokenizer_or_template_is_named(saved: Callable[[str | None], str], tmp_path: Path) -> None:
    path = saved(None)
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds nothing: .*tokenizer\.json"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"chat_template='nowhere\.jinja' is neither .* nor an existing file"):
        load_tokenizer(path, "nowhere.jinja")
    with pytest.raises(UserError, match=r"data\.chat_template='.*' cannot be read: .*directory"):
        load_tokenizer(path, str(tmp_path))
    bad = tmp_path / "bad.jinja"
    bad.write_text("a\n{% for %}")
    with pytest.raises(UserError, match=r"bad\.jinja line 2 does not parse"):
        load_tokenizer(path, str(bad))


def test_tokenizer_without_template_encodes_documents_but_not_chats(
    saved: Callable[[str | None], str],
) -> None:
    encoder = ChatEncoder(load_tokenizer(saved(None)))
    (document,) = encoder.encode([make([{"role": "pretraining", "content": "Red"}])])
    assert document.trained.all()
    with pytest.raises(UserError, match=r"line 7: .*no chat template.*data\.chat_template"):
        encoder.encode([chat("Hi", "Red")])
