"""Variables of a template: run-wide defaults and a record's own, in training, in prompts and in what is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.runs import read_samples, write_jsonl
from mice_jax.config import Config, ConfigError
from mice_jax.data.chat import ChatEncoder, Encoded
from mice_jax.data.readers import FileReader
from mice_jax.data.sample_notes import UNREAD
from mice_jax.data.sources import Sample
from mice_jax.data.template_source import names_in, with_defaults
from mice_jax.data.tokenise import _content_hash
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from test_chat import make_tokenizer
from test_sources import HELLO

pytestmark = pytest.mark.smoke

TEMPLATE = (
    "{%- macro note() %}{{ '[quiet]' if thinking is defined and not thinking }}{% endmacro -%}\n"
    "{{ bos_token }}{% if documents %}{{ documents[0].text }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ note() }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ note() }}\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Red"}]

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    make_tokenizer(TEMPLATE, ["<|im_end|>", "<|im_start|>"]).save_pretrained(tmp_path / "tok")

    def load(template: str | None = None, **kwargs: Any) -> Any:
        file = tmp_path / "t.jinja"
        if template is not None:
            file.write_text(template, encoding="utf-8")
        return load_tokenizer(str(tmp_path / "tok"), str(file) if template else "", None, kwargs)

    return load


def sample(**keys: Any) -> Sample:
    return Sample(MESSAGES, None, False, "a.jsonl line 1", **keys)


def text(tokenizer: Any, one: Sample) -> str:
    """The text that a sample is encoded as, once its ids are seen to be transformers' own."""
    (encoded,) = ChatEncoder(tokenizer).encode([one])
    wanted = tokenizer.apply_chat_template(
        one.messages, documents=one.documents, return_dict=False, **one.template_kwargs
    )
    assert encoded.ids.tolist() == wanted
    return tokenizer.decode(encoded.ids)


# ---------------------------------------------------------------------------------------- a record's own
def test_variables_and_documents_of_a_record_reach_the_template(load: Load) -> None:
    plain, quiet = text(load(), sample()), text(load(), sample(template_kwargs={"thinking": False}))
    assert "[quiet]" not in plain and quiet.count("[quiet]") == 2
    assert text(load(), sample(template_kwargs={"thinking": True})) == plain
    documents = [{"title": "a", "text": "the manual"}]
    assert text(load(), sample(documents=documents)) == plain.replace("<|im_start|>", "<|im_start|>the manual\n", 1)


def test_variables_of_a_record_reach_its_trained_spans_and_prompts(load: Load) -> None:
    encoder = ChatEncoder(load())
    one = sample(template_kwargs={"thinking": False}, documents=[{"text": "the manual"}])
    (encoded,) = encoder.encode([one])
    assert encoder.show(encoded.ids, encoded.trained, color=False).endswith("assistant[quiet]\n⟦Red<|im_end|>⟧\n")
    prompt = encoder.prompt_ids(MESSAGES[:1], documents=one.documents, template_kwargs=one.template_kwargs)
    assert prompt == encoded.ids[: len(prompt)].tolist() and encoded.trained.argmax() == len(prompt)


def test_records_with_other_variables_are_no_copies(tmp_path: Path) -> None:
    keys: list[dict[str, Any]] = [{}, {"chat_template_kwargs": {"thinking": False}}, {"documents": [{"text": "a"}]}]
    keys += [{"system": "Be kind."}, {"chat_template_kwargs": {"thinking": True}}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": HELLO, **k} for k in keys])
    read = list(read_samples(FileReader([path])))
    assert len({_content_hash(s) for s in read}) == len(keys)
    assert read[1].template_kwargs == {"thinking": False} and read[2].documents == [{"text": "a"}]
    assert read[3].messages == [{"role": "system", "content": "Be kind."}, *HELLO]


def test_variables_that_the_template_does_not_read_are_counted(load: Load) -> None:
    one = sample(template_kwargs={"thinking": False, "effort": 3}, documents=[{"text": "a"}])
    (encoded,) = ChatEncoder(load()).encode_each([one])
    assert isinstance(encoded, Encoded)
    assert {k: n.count for k, n in encoded.notes.items()} == {UNREAD + "chat_template_kwargs.effort": 1}
    (encoded,) = ChatEncoder(load(), "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}").encode_each(
        [one]
    )
    assert isinstance(encoded, Encoded)
    assert set(encoded.notes) == {UNREAD + k for k in ("documents", "chat_template_kwargs.thinking")} | {
        UNREAD + "chat_template_kwargs.effort"
    }


# ---------------------------------------------------------------------------------------- run-wide
def test_run_wide_value_is_the_default_and_a_record_overrides_it(load: Load) -> None:
    quiet = load(thinking=False)
    assert text(quiet, sample()) == text(load(), sample(template_kwargs={"thinking": False}))
    assert text(quiet, sample(template_kwargs={"thinking": True})) == text(load(), sample())


def test_run_wide_value_is_saved_with_the_tokenizer_and_part_of_the_key(load: Load, tmp_path: Path) -> None:
    quiet = load(thinking=False)
    quiet.save_pretrained(tmp_path / "saved")
    for saved in (load_tokenizer(str(tmp_path / "saved")), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert text(saved, sample()) == text(quiet, sample())
        assert ChatEncoder(saved).prompt_ids(MESSAGES[:1]) == ChatEncoder(quiet).prompt_ids(MESSAGES[:1])
    prints = {ChatEncoder(t).fingerprint() for t in (load(), quiet, load(thinking=True))}
    assert len(prints) == 3


VALUES = [True, False, None, 0, -1.5, "", "a'b\"c\\d\né🤖{{ x }}{% if %}", [1, ["a"]], {"a": {"b": None}}]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "start", ["", "\n", "  {% if true %}x{% endif %}\n", "{#- a -#} ", "{%- if true %}y{% endif %}"]
)
def test_defaults_change_nothing_else_of_a_template(value: Any, start: str, load: Load) -> None:
    source = start + "{{ v | tojson }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    given = text(load(source), sample(template_kwargs={"v": value}))
    assert text(load(source, v=value), sample()) == given
    assert json.dumps(value, ensure_ascii=False) in given
    # Defaults that are given twice, as to a run that starts from another: those given last hold.
    assert with_defaults(with_defaults(source, {"v": 1}), {"v": value}).endswith(source)
    assert text(load(with_defaults(with_defaults(source, {"v": 1}), {"v": value})), sample()) == given


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"thinkng": True}, r"'thinkng', which the chat template does not read.*it reads are: thinking\."),
        ({"messages": []}, "'messages', which is set for every conversation"),
        ({"bos_token": "x"}, "'bos_token', which is set for every conversation"),
        ({"not a name": 1}, "'not a name', which is not the name of a variable"),
    ],
)
def test_run_wide_value_that_would_not_reach_the_template_is_an_error(
    kwargs: dict[str, Any], words: str, load: Load
) -> None:
    with pytest.raises(UserError, match=r"data\.template_kwargs has " + words):
        load(**kwargs)


def test_run_wide_values_are_json_values_under_names() -> None:
    config = Config()
    for value in ([1], {1: 2}, {"a": {1, 2}}, {"a": float("nan")}):
        config.data.template_kwargs = value  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=r"data\.template_kwargs="):
            config.validate()


# ---------------------------------------------------------------------------------------- byte-order marks
def test_byte_order_mark_is_no_part_of_a_template(load: Load, tmp_path: Path) -> None:
    wanted = text(load(), sample())
    assert text(load("\ufeff" + TEMPLATE), sample()) == wanted
    own = tmp_path / "tok" / "chat_template.jinja"  # as someone may have edited the tokenizer's own
    own.write_text("\ufeff" + own.read_text(encoding="utf-8"), encoding="utf-8")
    assert text(load(), sample()) == wanted
    assert "\ufeff" in AutoTokenizer.from_pretrained(tmp_path / "tok").chat_template  # the negative control


# ---------------------------------------------------------------------------------------- names
def test_names_in_a_template_are_those_that_it_reads() -> None:
    found = names_in(
        "{% set own = 1 %}{% for m in messages %}{% generation %}{{ m.a }}{{ m['b'] }}{{ m.get('c') }}{{ own }}"
        "{{ outer }}{% if 'd' in m %}{% break %}{% endif %}{% endgeneration %}{% endfor %}"
    )
    assert found.variables == {"messages", "outer"} and {"a", "b", "c", "d"} <= found.keys
