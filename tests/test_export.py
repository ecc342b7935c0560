"""An exported folder gives transformers the run's own logits, tokenizer, template and stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from helpers import models
from helpers.runs import chat, make_tokenizer, read_json, read_metrics, run_export, run_train, setting
from mice_jax.inference.generation_config import GenerationDefaults, defaults_in, fields_of_export
from mice_jax.model_source import load_params, resolve_source
from mice_jax.models.transformer import make_decoder
from mice_jax.sharding import make_mesh, param_shardings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def workdir(folder: Path) -> Path:
    """A run of two steps, each saved."""
    config = setting(folder, "c.checkpoint.every_samples = 8", samples=16)
    assert run_train(config, folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(workdir: Path, folder: Path) -> Path:
    assert run_export(workdir, folder / "hf") == 0
    return folder / "hf"


def our_logits(workdir: Path, ids: np.ndarray, step: int | None = None) -> np.ndarray:
    source = resolve_source(str(workdir))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    decoder = make_decoder(source.spec)
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh), step=step)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    rows = {"tokens": ids, "positions": positions, "segment_ids": np.ones(ids.shape, np.int32)}
    return models.our_logits(decoder, params, rows, "reference")


def torch_logits(folder: Path, ids: np.ndarray, dtype: Any = torch.float32) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


IDS = np.random.default_rng(0).integers(0, 298, (2, 60), dtype=np.int32)


def test_transformers_gives_our_logits(workdir: Path, exported: Path, tmp_path: Path) -> None:
    theirs, ours = torch_logits(exported, IDS), our_logits(workdir, IDS)
    assert theirs.shape == (2, 60, 300)
    # Float32 on both sides, logits of some units: about 1e-6 each, by sums in another order.
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    # One step of training makes far more of a difference: it is the newest checkpoint that was exported.
    first = our_logits(workdir, IDS, step=1)
    assert np.abs(theirs - first).max() > 1e-2
    assert run_export(workdir, tmp_path / "first", "--step=1") == 0
    np.testing.assert_allclose(torch_logits(tmp_path / "first", IDS), first, atol=2e-5)


def test_export_is_complete_and_in_the_dtype_of_the_start(workdir: Path, exported: Path, folder: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    assert tensors["model.embed_tokens.weight"].shape == (300, 16)  # without the padding of the vocabulary
    assert sum(t.size for t in tensors.values()) == 18_512 - 2 * 16 * (-300 % 128)
    config = AutoConfig.from_pretrained(exported)
    assert (config.architectures, config.vocab_size) == (["LlamaForCausalLM"], 300)
    assert config.dtype == torch.float32
    assert not list(folder.glob(".*partial"))
    card = (exported / "README.md").read_text()
    assert "\n# hf\n" in card and "| steps | 2 of 2 |" in card and "| batch size | 8 samples |" in card
    assert f"| loss | {read_metrics(workdir)[-1]['loss']:.4g} |" in card
    assert str(folder) not in card and "base_model" not in card  # it started from random weights


def test_bfloat16_export_is_the_same_weights_rounded(workdir: Path, exported: Path, tmp_path: Path) -> None:
    assert run_export(workdir, tmp_path / "small", "--dtype=bfloat16") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    whole = LlamaForCausalLM.from_pretrained(exported, dtype="auto")
    assert (model.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    for (name, small), large in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(small, large.to(torch.bfloat16)), name
    assert not torch.equal(model.lm_head.weight.float(), whole.lm_head.weight)
    assert read_json(tmp_path / "small", "config.json")["dtype"] == "bfloat16"


def test_export_has_the_tokenizer_and_its_template(exported: Path) -> None:
    messages = chat("who?", "mice")["messages"]
    theirs, ours = AutoTokenizer.from_pretrained(exported), make_tokenizer()
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt, "return_dict": False}
        assert theirs.apply_chat_template(messages, **options) == ours.apply_chat_template(messages, **options)
    assert theirs.get_vocab() == ours.get_vocab()


def test_generation_stops_where_a_turn_ends(exported: Path) -> None:
    generation, tokenizer = GenerationConfig.from_pretrained(exported), make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.eos_token_id == [end] or generation.eos_token_id == end
    assert generation.pad_token_id == tokenizer.pad_token_id != end
    model = LlamaForCausalLM.from_pretrained(exported)
    with torch.no_grad():  # made to say nothing but the end
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(16, 300)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[end] = 1.0
    prompt = torch.tensor([[5, 6]])
    assert model.generate(prompt, max_new_tokens=9).tolist() == [[5, 6, end]]


def test_export_starts_a_run_with_another_template(exported: Path, folder: Path, tmp_path: Path) -> None:
    """A run from an export, without an update, exports the same tensors, and the template that it trained with."""
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ '<|endoftext|>' }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    base = shutil.copytree(exported, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    flags = [f"--config.model.init_from={base}", "--config.optim.max_steps=1", "--config.optim.learning_rate=0"]
    assert (
        run_train(folder / "run.py", tmp_path / "run", f"--config.data.chat_template={tmp_path}/chat.jinja", *flags)
        == 0
    )
    assert run_export(tmp_path / "run", tmp_path / "hf") == 0
    before, after = (load_file(f / "model.safetensors") for f in (exported, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "base_model" not in card and '\nlicense: "mit"\n' in card and "`base`" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == template
    stops = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in stops


def test_existing_output_is_not_overwritten(workdir: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in exported.iterdir()}
    assert run_export(workdir, exported) == 2
    assert f"--output={exported} already exists" in capsys.readouterr().err
    assert {f.name: f.stat().st_mtime_ns for f in exported.iterdir()} == before


def test_export_fills_an_empty_folder(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run_export(workdir, tmp_path / "empty") == 0
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["vocab_size"] == 300


def test_unknown_step_is_an_error_with_the_known_ones(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(workdir, tmp_path / "hf", "--step=7") == 2
    assert "has no step 7; it has 1, 2." in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


# ---------------------------------------------------------------------------------------- generation_config.json
def test_export_keeps_what_the_base_says_of_sampling(tmp_path: Path) -> None:
    base = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    told = {"eos_token_id": [2, 7], "pad_token_id": 5, "_from_model_config": True, "transformers_version": "4.57.0"}
    written = fields_of_export(base | told, [9, 2], bos_id=1, pad_id=3)
    assert written == base | {"eos_token_id": [9, 2, 7], "bos_token_id": 1, "pad_token_id": 3}
    defaults = defaults_in(written, tmp_path / "generation_config.json")
    assert defaults == GenerationDefaults((9, 2, 7), 0.6, 0.95, 20, ("repetition_penalty=1.1",))
    assert fields_of_export(None, [9], bos_id=None, pad_id=None) == {"do_sample": False, "eos_token_id": [9]}
    assert fields_of_export({"eos_token_id": 4}, [], bos_id=None, pad_id=None)["eos_token_id"] == [4]
