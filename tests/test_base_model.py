"""A base model, which has no chat template: named ones, the tokens they add, and what is exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from helpers.runs import make_chats, make_tokenizer, read_json, run_export, run_prepare, run_train, setting
from mice_jax.data.templates import TOKENS
from mice_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose tokenizer knows neither roles nor turns."""
    folder = tmp_path_factory.mktemp("base")
    config = setting(folder, samples=8)
    assert run_train(config, folder / "run") == 0 and run_export(folder / "run", folder / "hf") == 0
    for file in (folder / "hf").glob("*token*"):
        file.unlink()
    (folder / "hf" / "chat_template.jinja").unlink()
    tokenizer = make_tokenizer(None)
    tokenizer.save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    return setting(tmp_path, f"c.model.init_from = {str(base)!r}", samples=16)


def test_missing_template_name_lists_the_known_ones(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prepare(config) == 2
    err = capsys.readouterr().err
    assert "no chat template" in err and all(name in err for name in TOKENS) and err.count("\n") == 1


@pytest.mark.parametrize("name", TOKENS)
def test_template_reports_added_tokens_and_trains_answers_to_their_end(
    name: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prepare(config, f"--config.data.chat_template={name}", "--inspect=2") == 0
    out, err = capsys.readouterr()
    assert err == "" and "trained on" in out
    lacking = [t for t in TOKENS[name] if t not in ("<|im_start|>", "<|im_end|>")]
    assert (f"chat template {name}: the tokenizer gets the special tokens {', '.join(lacking)}" in out) == bool(lacking)
    end = {"granite": "<|end_of_text|>", "llama3": "<|eot_id|>"}.get(name, "<|im_end|>")
    shown = out.partition("trained on")[2]
    assert shown.count(f"{end}⟧") == 2  # once a sample, and nothing else is marked
    assert shown.count("⟦") == 2


def test_new_tokens_get_mean_rows_and_are_exported_with_the_template(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config.data.chat_template=llama3", "--config.optim.max_steps=1", "--config.optim.learning_rate=0.0"]
    assert run_train(config, tmp_path / "run", *flags) == 0
    out = capsys.readouterr().out
    assert "the special tokens <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in out
    assert "2 rows are added, each the mean of the 300 there are" in out
    assert run_export(tmp_path / "run", tmp_path / "hf") == 0
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert before[name].shape[0] == 300 and after[name].shape[0] == 302
        assert np.array_equal(after[name][:300], before[name])  # not a step was taken: the rate is 0
        np.testing.assert_allclose(after[name][300:], np.tile(before[name].mean(0), (2, 1)), atol=1e-6)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        model.get_input_embeddings().weight.shape[0] == 302 and read_json(tmp_path / "hf", "config.json")["vocab_size"]
    )
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "who?"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|start_header_id|>user<|end_header_id|>\n\nwho?<|eot_id|>" + (
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    trained_with = load_tokenizer(str(base), "llama3")
    assert tokenizer.chat_template == trained_with.chat_template
    for record in make_chats(4, seed=1):
        ids = [t.apply_chat_template(record["messages"], return_dict=False) for t in (trained_with, tokenizer)]
        assert ids[0] == ids[1]
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert stop in np.atleast_1d(GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id)
    # What was exported is no base model any more: it needs no name.
    shutil.rmtree(tmp_path / "run")
    again = setting(tmp_path / "again", f"c.model.init_from = {str(tmp_path / 'hf')!r}", samples=8)
    assert run_prepare(again) == 0


def test_unknown_template_name_lists_the_known_ones(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prepare(config, "--config.data.chat_template=chatlm") == 2
    assert "'chatlm' is neither the name of a built-in template (chatml, granite, " in capsys.readouterr().err


def test_last_answer_alone_is_trained_where_that_is_asked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
    (config.parent / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    shown = []
    for train_on in ("all", "last"):
        flags = ["--config.data.chat_template=plain", f"--config.data.train_on={train_on}", "--inspect=1", "--ids"]
        assert run_prepare(config, *flags) == 0
        shown.append([line.split()[0] for line in capsys.readouterr().out.splitlines() if " * '" in line])
    every, last = shown
    assert last and len(every) > len(last) and every[-len(last) :] == last
