"""Adapter folders of PEFT: their logits equal PEFT's, and a key or tensor that is not supported is an error."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from helpers.models import VOCAB, llama, mesh_of, our_logits, packed
from mice_jax.config import Lora
from mice_jax.errors import UserError
from mice_jax.model_source import ModelSource, check_continues, check_weights, load_params, resolve_source
from mice_jax.models import peft_format, peft_import
from mice_jax.models.transformer import make_decoder
from mice_jax.sharding import param_shardings

RANK, ALPHA = 3, 5.0
TARGETS = ["q_proj", "o_proj", "down_proj"]
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 17)

# PEFT 0.21 asks for an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama(path)
    return path


def save_peft(model: Any, folder: Path, **changes: Any) -> np.ndarray:
    """Saves an adapter whose B are not zero; returns PEFT's logits [T V]."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    peft: Any = get_peft_model(model, LoraConfig(**config)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn_like(p) + (p if "magnitude" in name else 0))
        logits = peft(torch.tensor(TOKENS)[None]).logits[0].numpy()
    peft.save_pretrained(folder)
    return logits


def logits_of_source(source: ModelSource) -> np.ndarray:
    check_weights(source)
    decoder, mesh = make_decoder(source.spec), mesh_of(1, 2, 1)
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh))
    return our_logits(decoder, params, packed([[(TOKENS, np.ones(len(TOKENS), bool))]], len(TOKENS)))[0]


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder."""
    folder = tmp_path_factory.mktemp("plain")
    save_peft(LlamaForCausalLM.from_pretrained(base), folder, use_dora=True)
    return folder


# ---------------------------------------------------------------------------------------- what is computed
@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, ""),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, ""),
        ({"use_dora": True}, ""),
        (
            {"rank_pattern": {"layers.1.mlp.down_proj": 5}, "alpha_pattern": {"o_proj": 11, "down_.*": 2}},
            "layers.0.self_attn.o_proj has another rank or alpha",
        ),
        ({"layers_to_transform": [1], "use_dora": True}, "layers.0.self_attn.q_proj has no adapter"),
    ],
)
def test_logits_of_an_adapter_equal_peft_s(changes: dict[str, Any], obstacle: str, base: Path, tmp_path: Path) -> None:
    expected = save_peft(LlamaForCausalLM.from_pretrained(base), tmp_path, **changes)
    source = resolve_source(str(tmp_path))
    largest = np.max(np.abs(expected))
    assert np.max(np.abs(logits_of_source(source) - expected)) < 2e-5 * largest  # float32 on both sides: 2e-6 was seen
    assert np.max(np.abs(logits_of_source(source.base) - expected)) > 1e-2 * largest, "the negative control"
    assert source.adapter is not None
    said = peft_import.load_adapters(source.adapter, source.spec, source.architecture).obstacle
    assert said.startswith(f"model.{obstacle}" if obstacle else "") and bool(said) == bool(obstacle)
    kind = {"rslora": changes.get("use_rslora", False), "dora": changes.get("use_dora", False)}
    made = Lora(rank=RANK, alpha=ALPHA, targets=TARGETS, **kind)
    if not obstacle:
        check_continues(source, made)
    else:
        with pytest.raises(UserError, match=r"Set model\.lora\.rank=0"):
            check_continues(source, made)


def test_adapter_of_a_fused_matrix_equals_peft_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where "../base" is looked up first
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "base")
    expected = save_peft(model, tmp_path / "adapter", target_modules=["qkv_proj", "gate_up_proj"])
    config = tmp_path / "adapter" / peft_format.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../base"}))
    source = resolve_source(str(tmp_path / "adapter"))
    assert np.max(np.abs(logits_of_source(source) - expected)) < 2e-5 * np.max(np.abs(expected))
    with pytest.raises(UserError, match=r"qkv_proj holds several matrices here.*Set model.lora.rank=0"):
        check_continues(source, Lora(rank=RANK, alpha=ALPHA, targets=["qkv_proj", "gate_up_proj"]))


def test_every_bit_of_an_adapter_survives_import_and_export(plain: Path, tmp_path: Path) -> None:
    source = resolve_source(str(plain))
    assert source.adapter is not None
    held = peft_import.load_adapters(source.adapter, source.spec, source.architecture)
    made = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "base_model_name_or_path": "base"}
    for dtype, same in (("float32", True), ("bfloat16", False)):
        peft_format.write_adapter(tmp_path, held.arrays, source.spec, source.architecture, config=made, dtype=dtype)
        first, second = (load_file(folder / peft_format.WEIGHTS) for folder in (plain, tmp_path))
        assert first.keys() == second.keys()
        assert all(first[k].tobytes() == second[k].tobytes() for k in first) == same


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not supported"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' belongs to a changed base"),
        ({"fan_in_fan_out": True, "lora_bias": True}, "fan_in_fan_out=True is not supported; lora_bias=True is not"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]] is not supported"),
        ({"key_of_next_year": 1}, "key_of_next_year=1 is not supported"),
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": 4}, "q_proj.lora_A.weight has shape [3, 32] where [4, 32] is expected"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None, which names no model"),
        ({"base_model_name_or_path": "gone"}, "base_model_name_or_path='gone', which cannot be used. Set it to the"),
    ],
)
def test_key_that_is_not_supported_is_named(keys: dict[str, Any], said: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(plain, folder)
    config = folder / peft_format.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    with pytest.raises(UserError) as raised:
        check_weights(resolve_source(str(folder)))
    assert said in str(raised.value) and str(folder) in str(raised.value)


def test_tensors_that_do_not_fit_and_pickles_are_errors(plain: Path, tmp_path: Path) -> None:
    stored, name = load_file(plain / peft_format.WEIGHTS), "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    head = {"base_model.model.lm_head.weight": np.zeros((3, 3), np.float32)}
    cases = [
        (stored | head, "base_model.model.lm_head.weight matches no matrix that can have an adapter"),
        ({k: v for k, v in stored.items() if not k.startswith(name)}, f"{name}.weight is missing"),
        ({k: v for k, v in stored.items() if "magnitude" not in k}, r"lora_magnitude_vector is missing"),
        ({}, "holds no adapter"),
    ]
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    for tensors, said in cases:
        save_file(tensors, tmp_path / peft_format.WEIGHTS)
        with pytest.raises(UserError, match=said):
            check_weights(resolve_source(str(tmp_path)))
    (tmp_path / peft_format.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle, which could run code"):
        resolve_source(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds an adapter .* and a whole model"):
        resolve_source(str(tmp_path))
