"""Hugging Face folders: logits of transformers' torch Llama, bit-equal weights both ways, and errors."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import LlamaForCausalLM

from helpers.models import (
    gap,
    hf_arrays,
    in_float64,
    llama,
    load,
    mesh_of,
    our_logits,
    packed,
    same_bits,
    torch_logits,
    whole,
)
from mice_jax.errors import UserError
from mice_jax.models import hf
from mice_jax.models.spec import Rope
from mice_jax.models.transformer import Decoder, Params

# float32 logits of order 10 after two layers. The bound is this or three times torch's own distance from float64.
LOGITS = 1e-4
VOCAB = 1001
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 600)
ROW = packed([[(TOKENS, np.ones(600, bool))]], 600)
MESHES = [(1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, llama(folder, vocab_size=VOCAB, tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("untied")
    return folder, llama(folder, vocab_size=VOCAB)


@pytest.fixture
def copied(untied: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(untied[0], tmp_path / "copied"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def spec_of_config(folder: Path) -> Any:
    return hf.spec_from_config(hf.read_config(folder / "config.json"), folder / "config.json")


# ---------------------------------------------------------------------------------------- parity
def test_logits_on_600_tokens_equal_transformers(either: tuple[Path, LlamaForCausalLM], strict_dtypes: None) -> None:
    folder, model = either
    expected, exact = torch_logits(model, TOKENS), torch_logits(in_float64(model), TOKENS)
    noise = gap(expected, exact)
    assert 0 < noise < LOGITS < np.abs(exact).max() / 1000
    ours = our_logits(*load(folder, mesh_of(1, 1, 1)), ROW)[0]
    assert ours.shape == (600, VOCAB) and ours.dtype == np.float32
    assert gap(ours, expected) < max(LOGITS, 3 * noise)
    assert gap(ours, exact) < max(LOGITS, 3 * noise)


def switched_off(what: str, folder: Path) -> tuple[Decoder, Params]:
    one = mesh_of(1, 1, 1)
    if what == "another rope_theta":
        return load(folder, one, rope_parameters={"rope_type": "default", "rope_theta": 9000.0})
    if what == "a large norm_eps":
        return load(folder, one, rms_norm_eps=1e-2)
    decoder, params = load(folder, one)
    attention = dict(params["layers"]["attention"])
    if what == "query heads dealt to other key heads":
        for name in ("q", "q_bias"):
            attention[name] = attention[name][:, [0, 2, 1, 3]]
        attention["o"] = attention["o"][:, :, [0, 2, 1, 3]]
    elif what == "pairs for halves":
        pairs = np.arange(12).reshape(2, 6).T.reshape(-1)
        for name in ("q", "k", "q_bias", "k_bias"):
            attention[name] = attention[name][:, :, pairs]
    return decoder, params | {"layers": params["layers"] | {"attention": attention}}


OTHERS = [
    "another rope_theta",
    "a large norm_eps",
    "query heads dealt to other key heads",
    "pairs for halves",
]


def test_wrong_rope_norm_or_heads_change_the_logits(untied: tuple[Path, LlamaForCausalLM]) -> None:
    """Biases are switched off in test_families."""
    expected = torch_logits(untied[1], TOKENS)
    for what in OTHERS:
        assert gap(our_logits(*switched_off(what, untied[0]), ROW)[0], expected) > 10 * LOGITS, what


def test_logits_without_biases_and_with_the_default_head_dim(tmp_path: Path) -> None:
    plain = {"attention_bias": False, "mlp_bias": False, "head_dim": None, "num_key_value_heads": 4}
    model = llama(tmp_path, vocab_size=VOCAB, **plain)
    decoder, params = load(tmp_path, mesh_of(1, 1, 1))
    assert (decoder.spec.head_dim, decoder.spec.num_kv_heads) == (8, 4)
    assert not [name for name in params["layers"]["mlp"] if "bias" in name]
    assert gap(our_logits(decoder, params, ROW)[0], torch_logits(model, TOKENS)) < LOGITS


# ---------------------------------------------------------------------------------------- in and out
@pytest.mark.parametrize("sizes", MESHES)
def test_import_then_export_is_bit_equal_on_every_mesh(
    sizes: tuple[int, int, int], either: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    folder, model = either
    decoder, params = load(folder, mesh_of(*sizes))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params["layers"]["mlp"]["up"].sharding.is_fully_replicated == (sizes == (1, 1, 1))
    assert not np.asarray(params["embed"]["table"])[VOCAB:].any()
    hf.save_params(tmp_path, params, decoder, config_of(folder), "float32")
    exported = whole(tmp_path)
    assert same_bits(exported, whole(folder))
    assert exported["model.embed_tokens.weight"].shape == (VOCAB, 32)
    assert ("lm_head.weight" in exported) == (not model.config.tie_word_embeddings)
    changed = dict(exported, **{"model.norm.weight": np.nextafter(exported["model.norm.weight"], np.float32(9))})
    assert not same_bits(changed, whole(folder))  # the last bit of one tensor


def test_an_exported_folder_loads_in_transformers_with_equal_logits(
    either: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    folder, model = either
    decoder, params = load(folder, mesh_of(1, 4, 2))
    hf.save_params(tmp_path, params, decoder, config_of(folder), "float32")
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert next(again.parameters()).dtype == torch.float32
    assert np.array_equal(torch_logits(again, TOKENS), torch_logits(model, TOKENS))
    params["final_norm"]["scale"] *= 1.01
    other = tmp_path / "other"
    other.mkdir()
    hf.save_params(other, params, decoder, config_of(folder), "float32")
    changed = LlamaForCausalLM.from_pretrained(other).eval()
    assert gap(torch_logits(changed, TOKENS), torch_logits(model, TOKENS)) > 10 * LOGITS


def test_an_export_in_bfloat16_is_rounded_as_torch_rounds(
    untied: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    folder, model = untied
    decoder, params = load(folder, mesh_of(1, 4, 2))
    hf.save_params(tmp_path, params, decoder, config_of(folder), "bfloat16")
    exported, wide = load_torch(tmp_path / "model.safetensors"), model.state_dict()
    assert exported.keys() == wide.keys()
    cut = 0
    for name, tensor in exported.items():
        assert torch.equal(tensor.view(torch.int16), wide[name].bfloat16().view(torch.int16)), name
        cut += int(((wide[name].view(torch.int32) >> 16).short() != tensor.view(torch.int16)).sum())
    assert cut > 1000  # cutting the bits off instead of rounding would give others
    assert hf.stored_dtype(tmp_path) == "bfloat16"
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    assert next(LlamaForCausalLM.from_pretrained(tmp_path).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_checkpoints_of_other_dtypes_become_float32(
    dtype: torch.dtype, untied: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(untied[0], dtype=dtype)
    model.save_pretrained(tmp_path)
    _, params = load(tmp_path, mesh_of(1, 4, 2))
    table = np.asarray(params["embed"]["table"])[:VOCAB]
    assert np.array_equal(table, model.model.embed_tokens.weight.detach().float().numpy())
    gate = np.asarray(params["layers"]["mlp"]["gate"])[1]
    assert np.array_equal(gate, model.model.layers[1].mlp.gate_proj.weight.detach().float().numpy())
    assert hf.stored_dtype(tmp_path) == ("bfloat16" if dtype == torch.bfloat16 else "float32")


@pytest.fixture
def in_shards(untied: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export in several files."""
    decoder, params = load(untied[0], mesh_of(1, 8, 1))
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    folder = tmp_path / "shards"
    folder.mkdir()
    hf.save_params(folder, params, decoder, config_of(untied[0]), "float32")
    return folder


def test_an_export_in_several_files_has_an_index_and_loads_everywhere(
    untied: tuple[Path, LlamaForCausalLM], in_shards: Path
) -> None:
    folder, model = untied
    files = sorted(p.name for p in in_shards.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((in_shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name in files:
        tensors = load_file(in_shards / name)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 40_000
        assert {k for k, f in index["weight_map"].items() if f == name} == set(tensors)
    assert same_bits(whole(in_shards), whole(folder))
    loaded, expected = load(in_shards, mesh_of(1, 4, 2))[1], load(folder, mesh_of(1, 4, 2))[1]
    assert gap(loaded, expected) == 0
    again = LlamaForCausalLM.from_pretrained(in_shards).eval()
    assert np.array_equal(torch_logits(again, TOKENS), torch_logits(model, TOKENS))
    assert hf.stored_dtype(in_shards) == "float32"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])  # each shape of a slice is compiled
def test_slices_cut_on_a_device_equal_those_cut_on_the_host(
    sizes: tuple[int, int, int], untied: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code path of devices other than a CPU."""
    decoder, params = load(untied[0], mesh_of(*sizes))
    monkeypatch.setattr(hf, "PIECE_BYTES", 10_000)
    looked = dict(hf_arrays(params, decoder, "LlamaForCausalLM"))
    monkeypatch.setattr(hf, "_block", lambda x, starts, counts: np.asarray(jax.lax.dynamic_slice(x, starts, counts)))
    assert same_bits(dict(hf_arrays(params, decoder, "LlamaForCausalLM")), looked)
    assert same_bits(looked, whole(untied[0]))


# ---------------------------------------------------------------------------------------- bad checkpoints
def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut_file(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), rf"{UP} is missing"),
    "an extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.2.extra": np.zeros(3, np.float32)})),
        r"model\.layers\.2\.extra is unexpected",
    ),
    "a wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].T.copy()})),
        rf"{UP} has shape \[32, 48\], config\.json makes it \[48, 32\]",
    ),
    "a wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].astype(np.int8)})),
        rf"{UP} is stored as I8",
    ),
    "another vocabulary": (
        lambda f: edit_config(f, lambda c: c.update(vocab_size=1000)),
        r"embed_tokens\.weight has shape \[1001, 32\], config\.json makes it \[1000, 32\]",
    ),
    "one layer more in the config": (
        lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=3)),
        r"model\.layers\.2\.\S+ is missing",
    ),
    "one layer less in the config": (
        lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=1)),
        r"model\.layers\.1\.\S+ is unexpected",
    ),
    "no biases in the config": (
        lambda f: edit_config(f, lambda c: c.update(mlp_bias=False)),
        r"mlp\.\w+_proj\.bias is unexpected",
    ),
    "a file cut short": (lambda f: cut_file(f / "model.safetensors", 100_000), r"model\.safetensors \(100000 bytes\)"),
    "a file cut in its header": (lambda f: cut_file(f / "model.safetensors", 20), r"model\.safetensors \(20 bytes\)"),
    "an empty file": (lambda f: cut_file(f / "model.safetensors", 0), r"model\.safetensors \(0 bytes\)"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"neither model\.safetensors nor model\.safetensors\.index\.json.*Only safetensors is read",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_bad_checkpoint_is_an_error_that_names_the_problem(what: str, copied: Path) -> None:
    load(copied, mesh_of(1, 1, 1))  # valid before the change
    damage, message = DAMAGED[what]
    damage(copied)
    with pytest.raises(UserError, match=message) as e:
        load(copied, mesh_of(1, 1, 1))
    assert str(copied) in str(e.value)


def test_every_problem_of_a_checkpoint_is_reported_at_once(copied: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"], tensors[UP]
        tensors["more"] = np.zeros(1, np.float32)

    edit_tensors(copied, damage)
    with pytest.raises(UserError) as e:
        load(copied, mesh_of(1, 1, 1))
    assert all(f"{name} is missing" in str(e.value) for name in ("model.norm.weight", UP))
    assert "more is unexpected" in str(e.value)


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def drop_from_shard(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    save_file({k: x for k, x in load_file(file).items() if k != name}, file)


DAMAGED_SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: second_shard(f).unlink(), r"index\.json names files.*model-00002-of-\d+\.safe"),
    "a shard is cut short": (
        lambda f: cut_file(second_shard(f), second_shard(f).stat().st_size - 4),
        r"model-00002-of-\d+\.safetensors \(\d+ bytes",
    ),
    "the index is not JSON": (lambda f: cut_file(f / "model.safetensors.index.json", 50), r"index\.json is not JSON"),
    "the index leaves a tensor out": (lambda f: edit_index(f, lambda m: m.pop(UP)), UP),
    "the index names the wrong file of a tensor": (
        lambda f: edit_index(f, lambda m: m.update({UP: m["model.embed_tokens.weight"]})),
        UP,
    ),
    "a shard lacks a tensor that the index names": (lambda f: drop_from_shard(f, UP), rf"{UP} is missing"),
}


@pytest.mark.parametrize("what", DAMAGED_SHARDS)
def test_a_bad_sharded_checkpoint_is_an_error_that_names_the_problem(what: str, in_shards: Path) -> None:
    damage, message = DAMAGED_SHARDS[what]
    damage(in_shards)
    with pytest.raises(UserError, match=message):
        load(in_shards, mesh_of(1, 1, 1))


def test_the_stored_dtype_of_a_damaged_shard_is_a_user_error(in_shards: Path) -> None:
    cut_file(second_shard(in_shards), second_shard(in_shards).stat().st_size - 4)
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors"):
        hf.stored_dtype(in_shards)


def test_old_buffers_and_a_stored_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    llama(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path, mesh_of(1, 1, 1))[1]

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)

    edit_tensors(tmp_path, add)
    assert gap(load(tmp_path, mesh_of(1, 1, 1))[1], expected) == 0


def test_stored_head_that_differs_from_the_tied_embedding_is_an_error(tmp_path: Path) -> None:
    llama(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][3, 5] += 1

    edit_tensors(tmp_path, add)
    with pytest.raises(UserError, match=r"tie_word_embeddings=true.*lm_head\.weight in model\.safetensors differs"):
        load(tmp_path, mesh_of(1, 1, 1))
    edit_config(tmp_path, lambda c: c.update(tie_word_embeddings=False))  # the fix that the error names
    assert load(tmp_path, mesh_of(1, 1, 1))[0].spec.tie_embeddings is False


def test_weights_that_a_folder_holds_twice_are_an_error(untied: tuple[Path, LlamaForCausalLM], in_shards: Path) -> None:
    shutil.copy(untied[0] / "model.safetensors", in_shards)
    for read in (lambda: load(in_shards, mesh_of(1, 1, 1)), lambda: hf.stored_dtype(in_shards)):
        with pytest.raises(UserError, match=r"twice: in model\.safetensors, and in .* model\.safetensors\.index\.json"):
            read()


def test_one_complete_set_of_weights_is_taken_whichever_it_is(
    untied: tuple[Path, LlamaForCausalLM], in_shards: Path
) -> None:
    expected = load(untied[0], mesh_of(1, 1, 1))[1]
    single = in_shards / "model.safetensors"
    shutil.copy(untied[0] / "model.safetensors", single)
    edit_tensors(in_shards, lambda tensors: tensors.pop(UP))  # the file is not complete, and the shards are
    assert gap(load(in_shards, mesh_of(1, 1, 1))[1], expected) == 0
    shutil.copy(untied[0] / "model.safetensors", single)
    second_shard(in_shards).unlink()  # now the shards are not complete, and the file is
    assert gap(load(in_shards, mesh_of(1, 1, 1))[1], expected) == 0


# ---------------------------------------------------------------------------------------- config.json
def set_keys(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_keys(architectures=["MambaForCausalLM"]), r"architectures=\['MambaForCausalLM'\].*LlamaForCausalLM"),
        (lambda c: c.pop("architectures"), r"architectures=.*LlamaForCausalLM"),
        (set_keys(sliding_window=4096), r"sliding_window=4096"),
        (set_keys(logits_scaling=8, residual_multiplier=0.2), r"logits_scaling=8, residual_multiplier=0\.2"),
        (set_keys(hidden_act="relu"), r"hidden_act='relu'; supported are silu"),
        (lambda c: c.pop("hidden_size"), r"lacks 'hidden_size'"),
        (set_keys(num_key_value_heads=3), r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_an_unsupported_config_is_an_error_that_names_the_key(
    change: Callable[[dict[str, Any]], Any], message: str, copied: Path
) -> None:
    spec_of_config(copied)  # valid before the change
    edit_config(copied, change)
    with pytest.raises(UserError, match=message) as e:
        spec_of_config(copied)
    assert str(copied / "config.json") in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds a list"), ("\udc80", "JSON")]
)
def test_a_missing_or_malformed_config_file_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*{message}"):
        hf.read_config(file)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(spelling: dict[str, Any], copied: Path) -> None:
    assert spec_of_config(copied).ropes == (Rope(10000.0, 12, None),) * 2
    edit_config(copied, set_keys(**spelling))
    assert spec_of_config(copied).ropes == (Rope(5e5, 12, None),) * 2


def test_null_keys_and_keys_without_effect_are_ignored(copied: Path) -> None:
    before = spec_of_config(copied)
    edit_config(copied, set_keys(quantization_config=None, use_cache=False, pad_token_id=3, torch_dtype="bfloat16"))
    assert spec_of_config(copied) == before


def test_an_export_changes_only_the_dtype_of_its_config(untied: tuple[Path, LlamaForCausalLM], in_shards: Path) -> None:
    before, after = config_of(untied[0]), config_of(in_shards)
    for config in (before, after):
        config.pop("dtype", None), config.pop("torch_dtype", None)
    old_spelling = {"rope_theta": 10000.0, "rope_scaling": None}
    assert after == before | old_spelling
