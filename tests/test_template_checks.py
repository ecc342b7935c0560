"""What a chat template leaves out of a conversation: calls and tools are refused, everything else is counted."""

import json
from typing import Any

import pytest

from mice_jax.data.chat import ChatEncoder, Encoded
from mice_jax.data.sample_notes import UNREAD
from mice_jax.data.sources import Sample
from mice_jax.data.templates import TOKENS
from mice_jax.errors import UserError
from test_chat import CHATML, TAGGED, TEMPLATES, chat, make, make_tokenizer

pytestmark = pytest.mark.smoke

SPECIAL = ["<|im_end|>", "<|im_start|>"]
USER = {"role": "user", "content": "Weather in Rome?"}
ADD = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# As `CHATML`, with calls of which the parts in use are in the braces.
CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{PARTS}</call>{% endfor %}"
)
WITH_CALLS = CALLS.replace("{PARTS}", "{{ c.function.name }} {{ c.function.arguments | tojson }}")


def encoder(template: str, **options: Any) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(template, SPECIAL), **options)


def called(content: str | None = "", arguments: Any = None, **keys: Any) -> Sample:
    arguments = {"city": "Rome", "days": 2} if arguments is None else arguments
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return make([USER, {"role": "assistant", "content": content, "tool_calls": [call]} | keys])


def refusal(template: str, *samples: Sample) -> str:
    with pytest.raises(UserError) as raised:
        encoder(template).encode(samples)
    return str(raised.value)


def notes(template: str, sample: Sample, **options: Any) -> dict[str, int]:
    (one,) = encoder(template, **options).encode_each([sample])
    assert isinstance(one, Encoded), one
    return {name: note.count for name, note in one.notes.items()}


# ---------------------------------------------------------------------------------------- tools
@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize("content", ["", "Let me look.", None])
def test_calls_that_the_template_leaves_out_are_refused(template: str, content: str | None) -> None:
    said = refusal(template.replace("{{ m.content", "{{ (m.content or '')"), called(content))
    assert said.startswith("chats.jsonl line 7: the chat template leaves out the `tool_calls` of messages[1]; take ")
    named = said.partition("; take ")[2].partition(", which render it, as data.chat_template")[0]
    assert named == "chatml, granite, llama3 or mistral"  # not plain


@pytest.mark.parametrize("parts", ["", "{{ c.function.name }}", "{{ c.function.arguments | tojson }}", "{{ c.id }}"])
def test_call_of_which_a_part_is_left_out_is_refused(parts: str) -> None:
    assert "leaves out the `tool_calls` of messages[1]" in refusal(CALLS.replace("{PARTS}", parts), called())


def test_second_call_that_is_left_out_is_refused() -> None:
    first_only = WITH_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    sample = called()
    sample.messages[1]["tool_calls"] *= 2
    assert "leaves out the `tool_calls` of messages[1]" in refusal(first_only, sample)
    encoder(WITH_CALLS).encode([sample])


def test_calls_that_are_rendered_are_accepted() -> None:
    (one,) = encoder(WITH_CALLS).encode([called()])
    shown = encoder(WITH_CALLS).show(one.ids, one.trained, color=False)
    assert '⟦<call>weather {"city": "Rome", "days": 2}</call><|im_end|>⟧' in shown
    # A template that looks into a call, so that it fails for marks, is asked by leaving out the calls instead.
    checks = "{% if c.function.name != 'weather' %}{{ raise_exception('unknown') }}{% endif %}{{ c.function.name }}"
    encoder(CALLS.replace("{PARTS}", checks)).encode([called()])
    ignores = checks.replace("{{ c.function.name }}", "")
    silent = CALLS.replace("<call>{PARTS}</call>", ignores)
    assert "leaves out the `tool_calls` of messages[1]" in refusal(silent, called())


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    said = refusal(CHATML, chat("Hi", "Red", tools=[ADD]))
    assert "leaves out its `tools`; take chatml, granite, llama3 or mistral, which render it" in said
    shown = "{{ tools | tojson if tools }}" + CHATML
    encoder(shown).encode([chat("Hi", "Red", tools=[ADD]), chat("Hi", "Red", tools=[]), chat("Hi", "Red")])
    both = refusal(CHATML, make(called().messages, [ADD]))
    assert "leaves out its `tools` and the `tool_calls` of messages[1]" in both


def test_named_templates_are_those_that_render_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reasoning has a place in one of them only.
    assert "; take chatml, which renders it" in refusal(CHATML, called(reasoning_content="Hm."))
    # The list is computed: it follows the templates that there are.
    monkeypatch.delitem(TOKENS, "granite")
    assert "; take chatml, llama3 or mistral, which render it" in refusal(CHATML, called())
    for name in [*TOKENS]:
        monkeypatch.delitem(TOKENS, name)
    assert "no built-in template renders it" in refusal(CHATML, called())


# ---------------------------------------------------------------------------------------- null contents
def test_template_that_fails_on_a_null_content_names_the_fix() -> None:
    template = WITH_CALLS.replace("{{ m.content or '' }}", "{{ '' + m.content }}")
    said = refusal(template, called(None))
    assert "raises an exception" in said and "It fails where `content` is null (messages[1])" in said
    assert 'give such messages "content": ""' in said and "or take chatml, granite, llama3 or mistral" in said
    encoder(template).encode([called("")])  # the fix


def test_template_that_fails_otherwise_does_not_name_null_contents() -> None:
    said = refusal("{{ raise_exception('no chats today') }}", called(None))
    assert "no chats today" in said and "null" not in said


# ---------------------------------------------------------------------------------------- arguments
OBJECT_OR_TEXT = [{"city": "Rome", "days": 2}, '{"city": "Rome", "days": 2}']


@pytest.mark.parametrize("arguments", OBJECT_OR_TEXT)
def test_arguments_that_are_a_text_are_an_object_for_the_template(arguments: Any) -> None:
    asked = encoder(WITH_CALLS)
    (one,) = asked.encode([called(arguments=arguments)])
    assert 'weather {"city": "Rome", "days": 2}</call>' in asked.tokenizer.decode(one.ids)


@pytest.mark.parametrize("arguments", OBJECT_OR_TEXT)
def test_arguments_are_a_text_for_a_template_that_needs_one(arguments: Any) -> None:
    asked = encoder(CALLS.replace("{PARTS}", "{{ c.function.name + ' ' + c.function.arguments }}"))
    (one,) = asked.encode([called(arguments=arguments)])
    assert 'weather {"city": "Rome", "days": 2}</call>' in asked.tokenizer.decode(one.ids)
    prompt = asked.prompt_ids([*called(arguments=arguments).messages, {"role": "tool", "content": "Sun"}])
    assert 'weather {"city": "Rome", "days": 2}</call>' in asked.tokenizer.decode(prompt)


def test_arguments_that_are_no_json_object_are_counted() -> None:
    assert notes(WITH_CALLS, called(arguments="Rome")) == {"arguments_not_json": 1}
    assert notes(WITH_CALLS, called(arguments='["Rome"]')) == {"arguments_not_json": 1}
    assert notes(WITH_CALLS, called(arguments='{"a": 1}')) == {}


# ---------------------------------------------------------------------------------------- what is counted
def test_ordinary_chat_has_no_notes() -> None:
    for name in ("chatml", "llama3", "zephyr", "tagged", "qwen25"):
        assert notes(TEMPLATES[name], chat("Hello", " Red\n", "And?", "Blue", system="Be kind.")) == {}


def test_empty_answers_are_counted_where_they_are_trained() -> None:
    sample = chat("Hello", "", "And?", "")
    assert notes(CHATML, sample) == {"empty_answer": 2}
    sample.messages[1]["train"] = False
    assert notes(CHATML, sample) == {"empty_answer": 1}
    assert notes(WITH_CALLS, called("")) == {}  # it has a call


def test_messages_that_the_template_leaves_out_are_counted() -> None:
    template = "{% for m in messages if m.role in ('user', 'assistant') %}" + CHATML.partition("%}")[2]
    sample = make([{"role": "system", "content": "Be kind."}, USER, {"role": "assistant", "content": "Sun."}])
    assert notes(template, sample) == {"content_left_out": 1}
    # A content that is written in another form is there.
    escaped = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'user' else m.content }}")
    assert notes(escaped, chat('Say "Hi"\n', "Hi")) == {}


def test_keys_that_nothing_reads_are_counted_by_name() -> None:
    sample = chat("Hi", "Red")
    sample.messages[1] |= {"function_call": {"name": "f"}, "name": "Ann", "train": True, "comment": None}
    unread = {UNREAD + "messages.function_call": 1, UNREAD + "messages.name": 1}
    assert notes(CHATML, sample) == unread
    named = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m['name'] }}")
    assert notes(named, sample) == {UNREAD + "messages.function_call": 1}
    sample.messages[0] |= {"id": 7}
    whole = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' else m | tojson }}")
    assert notes(whole, sample) == {}


def test_marks_are_never_part_of_what_is_trained() -> None:
    asked, plain = encoder(WITH_CALLS), called("MiceMark000000End", {"a": "MiceMark000001End"})
    (one,) = asked.encode([plain])
    call = json.dumps({"a": "MiceMark000001End"})
    assert f"MiceMark000000End<call>weather {call}</call>" in asked.tokenizer.decode(one.ids)
