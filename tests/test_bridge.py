"""From a Hugging Face folder through a run and back: added tokens, odd sizes, every family, memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

from helpers.families import CASES, WRAPPED_CHANGES, torch_model, wrapped_model
from helpers.forked import fork_train
from helpers.models import hf_arrays, llama, load, mesh_of, same_bits, whole
from helpers.runs import REPOSITORY, make_tokenizer, read_metrics, run_export, run_train, setting
from mice_jax.errors import UserError
from mice_jax.model_source import check_vocabulary, load_params, resolve_source, with_vocabulary
from mice_jax.models import hf
from mice_jax.models.transformer import make_decoder
from mice_jax.sharding import param_shardings

STILL = ("--config.optim.learning_rate=0", "--config.optim.max_steps=1")
OWN, ADDED = 296, 3  # tokens of the tests' tokenizer: its own, and those added to it


# ---------------------------------------------------------------------------------------- added tokens
def small_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A model with an embedding for each of the tokenizer's own tokens and none for those added."""
    llama(folder, vocab_size=OWN, max_position_embeddings=256, **changes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_rows_of_added_tokens_are_the_mean_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = setting(tmp_path / "setting")
    init = small_llama(tmp_path / "hf", make_tokenizer())
    capsys.readouterr()
    assert run_train(config, tmp_path / "run", f"--config.model.init_from={init}", *STILL) == 0
    assert f"{ADDED} rows are added, each the mean of the {OWN} there are" in capsys.readouterr().out
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    before, after = whole(init), whole(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert np.array_equal(after[name][: len(old)], old), name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert after[name].shape == (OWN + ADDED, 32)
            mean = old.astype(np.float64).mean(axis=0)
            # A float32 sum of 296 numbers of order 0.2, divided: a few roundings of 1e-8.
            assert np.abs(after[name][OWN:] - mean).max() < 1e-7 < np.abs(old[0] - mean).max()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == OWN + ADDED == len(tokenizer)
    with torch.no_grad():
        assert model(torch.tensor([[OWN + ADDED - 1]])).logits.shape == (1, 1, OWN + ADDED)


@pytest.mark.parametrize("added", [ADDED, 100])  # within the padding of the vocabulary, and beyond it
def test_rows_of_added_tokens_of_a_tied_embedding_are_the_mean(added: int, tmp_path: Path) -> None:
    source = resolve_source(str(small_llama(tmp_path, make_tokenizer(), tie_word_embeddings=True)))
    ids = {f"token {i}": i for i in range(OWN + added)}
    decoder = make_decoder(with_vocabulary(source, ids, {f"token {OWN + i}" for i in range(added)}))
    assert decoder.spec.vocab_size == OWN + added and "head" not in decoder.abstract
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh_of(1, 1, 1)))
    table, old = np.asarray(params["embed"]["table"]), whole(tmp_path)["model.embed_tokens.weight"]
    assert np.array_equal(table[:OWN], old)
    assert np.abs(table[OWN : OWN + added] - old.astype(np.float64).mean(axis=0)).max() < 1e-7


def test_a_run_started_from_a_run_gets_rows_for_added_tokens(tmp_path: Path) -> None:
    config = setting(tmp_path / "setting")
    assert run_train(config, tmp_path / "first", *STILL) == 0
    source = resolve_source(str(tmp_path / "first"))
    ids = {f"token {i}": i for i in range(source.spec.vocab_size + 2)}
    spec = with_vocabulary(source, ids, {"token 300", "token 301"})
    assert spec == dataclasses.replace(source.spec, vocab_size=302)
    mesh = mesh_of(1, 4, 2)
    decoder = make_decoder(spec, 2)
    params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh))
    table, head = np.asarray(params["embed"]["table"]), np.asarray(params["head"]["weight"])
    assert table.shape[0] == decoder.vocab_rows and not table[302:].any() and not head[302:].any()
    assert np.abs(table[300:302] - table[:300].mean(axis=0)).max() < 1e-7
    assert np.abs(head[300:302] - head[:300].mean(axis=0)).max() < 1e-7


def test_a_tokenizer_larger_than_the_model_is_an_error(tmp_path: Path) -> None:
    source = resolve_source(str(small_llama(tmp_path, make_tokenizer())))
    ids = {f"token {i}": i for i in range(OWN + 1)}
    with pytest.raises(UserError, match=rf"ids go up to {OWN}, .* has {OWN} rows"):
        with_vocabulary(source, ids, set())
    assert with_vocabulary(source, ids, {f"token {OWN}"}).vocab_size == OWN + 1
    assert with_vocabulary(source, {"token 0": 0}, set()).vocab_size == OWN  # rows beyond the tokenizer stay
    with pytest.raises(UserError, match=rf"id {OWN} \('token {OWN}'\) has no embedding"):
        check_vocabulary(source, ids)


# ---------------------------------------------------------------------------------------- odd sizes
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)])
def test_odd_vocabulary_and_heads_are_exported_as_imported(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    llama(tmp_path / "in", vocab_size=49155, num_attention_heads=6, num_key_value_heads=3, hidden_size=24)
    decoder, params = load(tmp_path / "in", mesh_of(*sizes))
    assert decoder.vocab_rows % sizes[2] == 0 and decoder.vocab_rows > 49155
    assert sizes[2] == 1 or not params["embed"]["table"].sharding.is_fully_replicated
    (tmp_path / "out").mkdir()
    hf.save_params(tmp_path / "out", params, decoder, hf.read_config(tmp_path / "in" / "config.json"), "float32")
    assert same_bits(whole(tmp_path / "out"), whole(tmp_path / "in"))


@pytest.mark.slow
def test_a_run_on_three_devices_equals_one_on_eight(
    tmp_path: Path,
) -> None:
    config = setting(tmp_path / "setting")
    flags = ("--config.mesh.tensor=3", "--config.mesh.fsdp=1", "--config.optim.max_steps=2")
    process = fork_train(config, tmp_path / "three", *flags, devices=3)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "mesh.tensor=3 does not divide them" in output  # two heads
    assert run_train(config, tmp_path / "eight", "--config.optim.max_steps=2") == 0
    three, eight = (read_metrics(tmp_path / name) for name in ("three", "eight"))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in three] == pytest.approx([r[key] for r in eight], rel=1e-5)
        assert three[0][key] != pytest.approx(three[1][key], rel=1e-4)
    assert run_export(tmp_path / "three", tmp_path / "three_hf") == 0
    exported = whole(tmp_path / "three_hf")
    assert exported["lm_head.weight"].shape == (300, 16)
    source = resolve_source(str(tmp_path / "three"))
    for tensor in (1, 2):
        decoder = make_decoder(source.spec, tensor)
        mesh = mesh_of(1, 4, tensor)
        params = load_params(source, decoder, param_shardings(decoder.abstract, decoder.axes, mesh))
        assert same_bits(dict(hf_arrays(params, decoder, source.architecture)), exported)


# ---------------------------------------------------------------------------------------- every family
@pytest.mark.slow
@pytest.mark.parametrize("case", ["phi3", "gemma4"])  # test_families imports and exports every one
def test_family_is_trained_exported_and_loaded_in_transformers(case: str, tmp_path: Path) -> None:
    """A step with learning rate 0 gives back every bit; another changes every tensor."""
    config = setting(tmp_path / "setting")
    changes: dict[str, Any] = {"vocab_size": 300}
    if case == "gemma4":  # of the three kinds of layers by their keys, one each: own, lent and borrowed
        changes |= WRAPPED_CHANGES[case] | {"vocab_size_per_layer_input": 300, "pad_token_id": None}
    torch_model(case, tmp_path / "hf", **changes)
    make_tokenizer().save_pretrained(tmp_path / "hf")
    start = f"--config.model.init_from={tmp_path / 'hf'}"
    before = whole(tmp_path / "hf")
    if case == "phi3":  # whose tensors hold several of ours
        assert run_train(config, tmp_path / "still", start, *STILL) == 0
        assert run_export(tmp_path / "still", tmp_path / "still_hf") == 0
        assert same_bits(before, whole(tmp_path / "still_hf"))
    assert run_train(config, tmp_path / "run", start, "--config.optim.max_steps=1") == 0
    assert run_export(tmp_path / "run", tmp_path / "run_hf") == 0
    trained = whole(tmp_path / "run_hf")
    assert trained.keys() == before.keys()
    assert all(name.endswith("layer_scalar") == np.array_equal(trained[name], before[name]) for name in before)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run_hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == CASES[case][0]
    stops = model.generation_config.eos_token_id
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert end in (stops if isinstance(stops, list) else [stops])


@pytest.mark.slow
def test_a_run_keeps_the_vision_tower_and_processor_files(tmp_path: Path) -> None:
    config, hf_folder, out = setting(tmp_path / "setting"), tmp_path / "hf", tmp_path / "out"
    wrapped_model("Gemma3ForConditionalGeneration", hf_folder, vocab_size=OWN)
    make_tokenizer().save_pretrained(hf_folder)
    assert run_train(config, tmp_path / "run", f"--config.model.init_from={hf_folder}", *STILL) == 0
    assert run_export(tmp_path / "run", out) == 0
    before, after = whole(hf_folder), whole(out)
    table = "language_model.model.embed_tokens.weight"
    assert after[table].shape == (OWN + ADDED, 32)
    after[table] = after[table][:OWN]
    assert same_bits(before, after)
    assert (out / "preprocessor_config.json").read_bytes() == (hf_folder / "preprocessor_config.json").read_bytes()
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.text_config.vocab_size == OWN + ADDED == len(AutoTokenizer.from_pretrained(out))


# ---------------------------------------------------------------------------------------- memory
MEASURE = """
import json, sys, threading
from pathlib import Path
import jax, numpy as np
from mice_jax.models import hf
from mice_jax.models.transformer import make_decoder
from mice_jax.sharding import make_mesh, param_shardings

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon:"))

folder, output, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
file = folder / "config.json"
config = hf.read_config(file)
decoder = make_decoder(hf.spec_from_config(config, file))
if how == "make":
    params = jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.5, x.dtype), decoder.abstract)
    hf.save_params(folder, params, decoder, config, config["torch_dtype"])
    sys.exit()
shardings = param_shardings(decoder.abstract, decoder.axes, make_mesh(1, -1, 1))
before, peaks, stop = anonymous(), [0], threading.Event()

def watch():
    while not stop.wait(0.002):
        peaks[-1] = max(peaks[-1], anonymous() - before)

watcher = threading.Thread(target=watch)
watcher.start()
if how == "plain":  # every tensor read, then stacked
    from safetensors.numpy import load_file
    tensors = {n: x for f in folder.glob("*.safetensors") for n, x in load_file(f).items()}
    names = {n.replace(".0.", ".{}.") for n in tensors if ".0." in n}
    params = [jax.numpy.asarray(np.stack([tensors[n.format(i)].astype(np.float32)
              for i in range(config["num_hidden_layers"])])) for n in sorted(names)]
else:
    params = jax.block_until_ready(hf.load_params(folder, decoder, "LlamaForCausalLM", shardings))
    peaks.append(0)
    hf.save_params(output, params, decoder, config, "bfloat16")
stop.set()
watcher.join()
share = sum(x.size * 4 for x in jax.tree.leaves(decoder.abstract if how != "plain" else params))
print(json.dumps([share, *peaks]))
"""


@pytest.mark.slow
def test_import_and_export_need_no_more_memory_than_the_parameters(tmp_path: Path) -> None:
    """Files in bfloat16, on eight devices: every tensor is converted and split, which might need a copy."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 49155, "max_position_embeddings": 4096,
        "num_hidden_layers": 8, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir(), output.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes))

    def measured(how: str, devices: int) -> list[int]:
        command = [sys.executable, "-c", MEASURE, str(folder), str(output), how]
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PATH": "", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout or "[]")

    measured("make", 1)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 0.4e9
    share, imported, exported = measured("ours", 8)
    assert share > 0.8e9
    # Both counted from before the import: the parameters are among them.
    assert imported < 1.15 * share and exported < 1.15 * share, (imported / share, exported / share)
    assert imported > 0.95 * share  # the parameters themselves are seen
    assert len(whole(output)) == 9 * config["num_hidden_layers"] + 3
    share, plain = measured("plain", 1)
    assert plain > 1.5 * share  # what a plain reader needs
    jax.clear_caches()
