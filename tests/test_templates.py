"""The templates that come with the package: ids against transformers, masks against texts marked by hand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mice_jax.data.chat import ChatEncoder
from mice_jax.data.sources import Sample
from mice_jax.data.templates import TOKENS
from mice_jax.data.tokenizer import load_tokenizer, save_tokenizer
from mice_jax.errors import UserError
from test_chat import chat, make, make_tokenizer, marked, runs

# Special tokens of base models (the first is eos, the second bos), and whether bos is put before a text.
BASES: dict[str, tuple[list[str], bool]] = {
    "llama": (["</s>", "<s>"], True),
    "gpt2": (["<|endoftext|>", "<|endoftext|>"], False),  # one token is eos, bos and pad
    "qwen": (["<|endoftext|>"], False),  # no bos at all
    "granite": (["<|end_of_text|>", "<|end_of_text|>"], False),  # a token that a template writes is there already
}
END = {"chatml": "<|im_end|>", "granite": "<|end_of_text|>", "llama3": "<|eot_id|>"}  # the others end by eos

Load = Callable[..., ChatEncoder]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(base: str) -> str:
        special, puts_bos = BASES[base]
        tokenizer = make_tokenizer(None, special)
        if puts_bos:
            bos = (special[1], tokenizer.convert_tokens_to_ids(special[1]))
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
                single=f"{bos[0]} $A", special_tokens=[bos]
            )
        tokenizer.save_pretrained(tmp_path / base)
        return str(tmp_path / base)

    return write


@pytest.fixture
def load(write: Callable[[str], str]) -> Load:
    return lambda name, base="llama", **keys: ChatEncoder(load_tokenizer(write(base), name), **keys)


@pytest.fixture(params=TOKENS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return request.param


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Add."}


def call(arguments: Any, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}} | keys


def tool_chat(**keys: Any) -> Sample:
    """Two calls in one turn, whose arguments are an object and a text, and both results."""
    messages = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call({"a": 1}), call('{"a": 2}')]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "2 and 3."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Again:", "tool_calls": [call({"a": 3})]},
    ]
    return make([m | keys.get(str(i), {}) for i, m in enumerate(messages)], [ADD])


def battery(name: str) -> list[Sample]:
    """Chats of all kinds that a template takes."""
    flagged, user = chat("Hello", "Red.", "And?", "Blue."), chat("Hello", "Red.", "And?", "Blue.")
    flagged.messages[1]["train"], user.messages[2]["train"] = False, True
    samples = [
        chat("Hello", "Red."),
        chat("Hello", "Red.", "And?", "I am fine", "Bye", "Blue and red", system="Be kind."),
        chat("Was ist das? 🤔", "héllo 🤖", "日本", "a\u0301 ﬁ"),
        chat("  What \n", "Red\n", "\nAnd\n", "Blue  "),
        chat("Hello", "", "And?", "Blue."),
        chat("user: Red", "Assistant:\nBlue", "{{ m.content }}", "Assistant:\nBlue"),
        make([USER, USER, {"role": "assistant", "content": "Red."}, {"role": "assistant", "content": "Blue."}]),
        make([{"role": "assistant", "content": "Red."}, USER, {"role": "assistant", "content": "Blue."}]),
        chat("Hello"),
        flagged,
        user,
        chat("Hello", "Red.", "And?", "Blue.", system="Be kind.", unmask=True),
    ]
    if name != "plain":
        samples += [tool_chat(), tool_chat(**{"2": {"train": False}})]
    if name == "chatml":
        thought = chat("Hello", "Red.", "And?", "Blue.")
        thought.messages[1]["reasoning_content"] = "Of red."
        thought.messages[3]["reasoning_content"] = "\nOf blue.\n"
        inline = chat("Hello", "<think>\nOf red.\n</think>\n\nRed.", "And?", "Blue.")
        samples += [thought, inline, tool_chat(**{"2": {"reasoning_content": "Add them."}})]
    return samples


def untagged(encoder: ChatEncoder, train_on: str = "all") -> ChatEncoder:
    """The same template without its tags, so that what is trained has to be derived."""
    template, count = re.subn(r"\{%-? (end)?generation -?%\}", "", encoder.tokenizer.chat_template)
    assert count == 2
    return ChatEncoder(encoder.tokenizer, template, train_on)


# ---------------------------------------------------------------------------------------- ids and masks
def test_masks_by_the_tags_are_those_derived_without_them(name: str, base: str, load: Load) -> None:
    encoder = load(name, base)
    derived = untagged(encoder)
    for sample in battery(name):
        runs(encoder, sample)  # sees that the ids are transformers' own
        ((one,), (other,)) = encoder.encode([sample]), derived.encode([sample])
        assert one.ids.tolist() == other.ids.tolist()
        assert one.trained.tolist() == other.trained.tolist(), encoder.show(one.ids, one.trained, color=False)


def test_tag_in_the_wrong_place_is_seen_by_this_comparison(name: str, load: Load) -> None:
    """Negative control."""
    encoder = load(name)
    derived = untagged(encoder)
    wrong = encoder.tokenizer.chat_template.replace("{%- generation %}", "{%- generation %}{{- '# ' }}")
    sample = chat("Hello", "Red.")
    (one,), (other,) = ChatEncoder(encoder.tokenizer, wrong).encode([sample]), derived.encode([sample])
    assert one.trained.sum() > other.trained.sum()


# By hand: the text between brackets is trained. {bos} is written where the tokenizer puts one, {eos} is its eos.
# Mistral's space before an answer is trained where it shares a token with the answer's first word.
CHAT = {
    "chatml": (
        "{bos}<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        "⟦Red.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Blue 🤖<|im_end|>⟧\n"
    ),
    "granite": (
        "{bos}<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Red.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Blue 🤖<|end_of_text|>⟧\n"
    ),
    "llama3": (
        "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Red.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Blue 🤖<|eot_id|>⟧"
    ),
    "mistral": "{bos}[INST] Be kind.\n\nHello[/INST]⟦ Red.{eos}⟧[INST] And?[/INST]⟦ Blue 🤖{eos}⟧",
    "plain": (
        "{bos}System:\nBe kind.\n\nUser:\nHello\n\nAssistant:\n⟦Red.{eos}⟧\nUser:\nAnd?\n\nAssistant:\n⟦Blue 🤖{eos}⟧\n"
    ),
}
TOOL_CHAT = {
    "chatml": (
        "{bos}<|im_start|>system\nBe kind.\n\nFunctions that can be called, one JSON description a line:\n<tools>\n"
        "{tool}\n</tools>\nA call is written as:\n<tool_call>\n"
        '{{"name": NAME, "arguments": {{...}}}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call>\n'
        '<tool_call>\n{{"name": "add", "arguments": {{"a": 2}}}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦2 and 3.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        '⟦Again:\n<tool_call>\n{{"name": "add", "arguments": {{"a": 3}}}}\n</tool_call><|im_end|>⟧\n'
    ),
    "granite": (
        "{bos}<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
        "<|start_of_role|>available_tools<|end_of_role|>[{tool}]<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Add.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        '⟦<|tool_call|>[{{"name": "add", "arguments": {{"a": 1}}}}, {{"name": "add", "arguments": {{"a": 2}}}}]'
        "<|end_of_text|>⟧\n<|start_of_role|>tool_response<|end_of_role|>2<|end_of_text|>\n"
        "<|start_of_role|>tool_response<|end_of_role|>3<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦2 and 3.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        '⟦Again:<|tool_call|>[{{"name": "add", "arguments": {{"a": 3}}}}]<|end_of_text|>⟧\n'
    ),
    "llama3": (
        "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe kind.\n\n"
        "Functions that can be called, one JSON description a line:\n{tool}\n"
        'A call is written as {{"name": NAME, "parameters": {{...}}}}<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\nAdd.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{{"name": "add", "parameters": {{"a": 1}}}}; {{"name": "add", "parameters": {{"a": 2}}}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦2 and 3.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦Again:\n{{"name": "add", "parameters": {{"a": 3}}}}<|eot_id|>⟧'
    ),
    "mistral": (
        "{bos}[AVAILABLE_TOOLS] [{tool}][/AVAILABLE_TOOLS][INST] Be kind.\n\nAdd.[/INST]"
        '⟦[TOOL_CALLS] [{{"name": "add", "arguments": {{"a": 1}}}}, {{"name": "add", "arguments": {{"a": 2}}}}]{eos}⟧'
        '[TOOL_RESULTS] {{"content": "2"}}[/TOOL_RESULTS][TOOL_RESULTS] {{"content": "3"}}[/TOOL_RESULTS]'
        ' ⟦2 and 3.{eos}⟧[INST] And?[/INST] ⟦Again:[TOOL_CALLS] [{{"name": "add", "arguments": {{"a": 3}}}}]{eos}⟧'
    ),
}


def by_hand(text: str, base: str) -> str:
    special, puts_bos = BASES[base]
    return text.format(bos=special[1] if puts_bos else "", eos=special[0], tool=json.dumps(ADD))


def test_chat_is_the_text_written_by_hand(name: str, base: str, load: Load) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue 🤖", system="Be kind.")
    assert marked(load(name, base), sample) == by_hand(CHAT[name], base)


@pytest.mark.parametrize("name", TOOL_CHAT)
def test_chat_with_tools_is_the_text_written_by_hand(name: str, base: str, load: Load) -> None:
    assert marked(load(name, base), tool_chat()) == by_hand(TOOL_CHAT[name], base)


def test_ids_of_calls_are_written_where_mistral_has_them(load: Load) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call({"a": 1}, id="abcdefghi")]}]
    messages += [{"role": "tool", "content": "2", "tool_call_id": "abcdefghi"}]
    assert marked(load("mistral"), make(messages)) == (
        '<s>[INST] Add.[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>⟧'
        '[TOOL_RESULTS] {"content": "2", "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )


def test_reasoning_is_trained_in_every_turn_that_has_it(load: Load) -> None:
    sample = chat("Hello", "Red.", "And?", "Blue.")
    sample.messages[1]["reasoning_content"] = "Of red."
    assert marked(load("chatml", "qwen"), sample) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦<think>\nOf red.\n</think>\n\nRed.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Blue.<|im_end|>⟧\n"
    )


def test_last_turn_alone_is_trained_where_asked(name: str, load: Load) -> None:
    encoder = load(name, train_on="last")
    every = CHAT[name].replace("⟦", "", 1).replace("⟧", "", 1)
    sample = chat("Hello", "Red.", "And?", "Blue 🤖", system="Be kind.")
    assert marked(encoder, sample) == by_hand(every, "llama")
    derived = untagged(encoder, "last")
    for sample in battery(name):
        assert encoder.encode([sample])[0].trained.tolist() == derived.encode([sample])[0].trained.tolist()


def test_end_of_turn_is_trained_and_stops_even_as_pad_bos_or_eos(name: str, base: str, load: Load) -> None:
    encoder = load(name, base)
    tokenizer = encoder.tokenizer
    end = END.get(name, BASES[base][0][0])
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == [end]
    if base == "granite" and name in ("granite", "mistral", "plain"):
        assert encoder.stop_ids() == [tokenizer.pad_token_id] == [tokenizer.bos_token_id] == [tokenizer.eos_token_id]
    assert [r[-len(end) :] for r in runs(encoder, chat("Hello", "Red.", "And?", ""))] == [end, end]


def test_prompt_and_what_is_trained_make_the_conversation(name: str, base: str, load: Load) -> None:
    """What a model is asked with is what came before its turn in training."""
    encoder = load(name, base)
    for sample in (chat("Hello", "Red.", "And?", "Blue."), chat("Hello", "Red.", "And?", "Blue.", system="Be kind.")):
        (encoded,) = encoder.encode([sample])
        last = np.flatnonzero(np.diff(encoded.trained) == 1)[-1] + 1
        messages = sample.messages[:-1]
        prompt = encoder.prompt_ids(messages)
        asked, said = (encoder.tokenizer.decode(ids) for ids in (prompt, encoded.ids[:last]))
        assert asked == said
        # GPT-2's rule reads two newlines at the end of a text as one token, and before a word as two.
        assert name == "llama3" or prompt == encoded.ids[:last].tolist()
        assert prompt == encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# ---------------------------------------------------------------------------------------- tokens
def test_tokens_that_the_tokenizer_lacks_are_added_and_reported(
    name: str, base: str, write: Callable[[str], str]
) -> None:
    said: list[str] = []
    before, after = load_tokenizer(write(base)), load_tokenizer(write(base), name, said)
    lacking = [t for t in TOKENS[name] if t not in before.get_vocab()]
    assert lacking == [t for t in TOKENS[name] if (base, t) != ("granite", "<|end_of_text|>")]
    assert set(after.get_vocab()) - set(before.get_vocab()) == set(lacking)
    added = after.added_tokens_decoder
    for token in lacking:
        (i,) = after.encode(token, add_special_tokens=False)
        assert added[i].special and not (added[i].lstrip or added[i].rstrip or added[i].normalized)
        text = f"a {token} b"
        assert after.decode(after.encode(text, add_special_tokens=False)) == text
        assert token not in after.decode([i], skip_special_tokens=True)
    wanted = f"chat template {name}: the tokenizer gets the special tokens {', '.join(lacking)}"
    assert said == ([wanted] if lacking else [])
    assert after.encode("Hello 🤖") == before.encode("Hello 🤖")
    for special in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(after, special) == getattr(before, special)


def test_nothing_is_added_a_second_time(name: str, load: Load, tmp_path: Path) -> None:
    load(name).tokenizer.save_pretrained(tmp_path / "saved")
    said: list[str] = []
    again = load_tokenizer(str(tmp_path / "saved"), name, said)
    assert said == [] and len(again) == len(load(name).tokenizer)


def test_saved_tokenizer_brings_template_and_tokens_with_it(name: str, base: str, load: Load, tmp_path: Path) -> None:
    encoder = load(name, base)
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    saved = ChatEncoder(load_tokenizer(str(tmp_path / "saved")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.tokenizer.chat_template == encoder.tokenizer.chat_template == theirs.chat_template
    assert saved.stop_ids() == encoder.stop_ids()
    for sample in battery(name):
        assert marked(saved, sample) == marked(encoder, sample)
        ids = theirs.apply_chat_template(sample.messages, tools=sample.tools, return_dict=False)
        assert ids == encoder.encode([sample])[0].ids.tolist()


def test_saved_tokenizer_names_what_both_versions_of_transformers_know(load: Load, tmp_path: Path) -> None:
    encoder = load("llama3")
    save_tokenizer(encoder.tokenizer, tmp_path / "both")
    config = json.loads((tmp_path / "both" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == list(TOKENS["llama3"])
    encoder.tokenizer.save_pretrained(tmp_path / "five")
    both, five = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("both", "five"))
    assert type(both) is type(five) and both.all_special_tokens == five.all_special_tokens
    assert both.backend_tokenizer.to_str() == five.backend_tokenizer.to_str()
    assert both.chat_template == five.chat_template


# ---------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("name", ["mistral", "plain"])
def test_template_that_ends_turns_by_eos_needs_one(name: str, write: Callable[[str], str]) -> None:
    path = write("qwen")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=rf"chat_template='{name}'.* has none.*eos_token.*chatml, granite, llama3\."):
        load_tokenizer(path, name)


def test_tools_in_a_template_without_tokens_for_them_are_an_error(load: Load) -> None:
    encoder = load("plain")
    used = make([USER, {"role": "assistant", "content": "", "tool_calls": [call({"a": 1})]}])
    given = chat("Hello", "Red.", tools=[ADD])
    result = make([USER, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}])
    for sample in (used, given, result):
        with pytest.raises(UserError, match=r"chats.jsonl line 7: .*no place for tools; take chatml, granite"):
            encoder.encode([sample])


@pytest.mark.parametrize("name", ["granite", "llama3", "mistral", "plain"])
def test_reasoning_is_never_dropped_in_silence(name: str, load: Load) -> None:
    sample = chat("Hello", "Red.")
    sample.messages[1]["reasoning_content"] = "Of red."
    with pytest.raises(UserError, match=rf"chats.jsonl line 7: .*the {name} template has no place for reasoning"):
        load(name).encode([sample])


def test_system_message_that_mistral_has_no_place_for_is_an_error(load: Load) -> None:
    late = make([USER, {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Red."}])
    alone = make([{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Red."}])
    for sample in (late, alone):
        with pytest.raises(UserError, match=r"chats.jsonl line 7: .*into the first turn of the user"):
            load("mistral").encode([sample])


def test_unknown_template_name_lists_the_known_ones(write: Callable[[str], str]) -> None:
    with pytest.raises(
        UserError, match=r"'chatlm' is neither .*chatml, granite, llama3, mistral, plain.* nor an existing file"
    ):
        load_tokenizer(write("qwen"), "chatlm")
    encoder = ChatEncoder(load_tokenizer(write("qwen")))
    names = "no chat template.*chatml, granite, llama3, mistral, plain.*"
    with pytest.raises(UserError, match=names + "or to the path of a .jinja file"):
        encoder.encode([chat("Hello", "Red.")])
