"""Low-rank adapters equal PEFT's: logits, loss, gradients and steps; and what a run that trains them leaves."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import Lfm2Config, LlamaConfig, LlamaForCausalLM

from helpers.families import CASES, torch_model
from helpers.models import (
    QUICK,
    Sample,
    gap,
    in_float64,
    llama,
    load,
    mesh_of,
    our_logits,
    packed,
    relative_gap,
    same_bits,
    sample_of,
)
from helpers.runs import (
    arrays,
    assert_equal_runs,
    make_chats,
    make_tokenizer,
    read_all_metrics,
    read_metrics,
    run_export,
    run_train,
    run_verb,
    setting,
    write_jsonl,
)
from mice_jax import average
from mice_jax.config import Config, ConfigError, locate
from mice_jax.errors import UserError
from mice_jax.hardware import matmul_flops, train_flops
from mice_jax.models import hf, lora, peft_format, peft_import
from mice_jax.models.lora import LoRA, scale_of
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import param_shardings, put_rows
from mice_jax.step import StepFunctions, TrainState, batch_loss, make_abstract_base, make_abstract_state, make_step
from mice_jax.training import build
from mice_jax.training.memory_model import MemoryEstimate, MemoryInputs, estimate_memory

RANK, ALPHA, RATE, SLOTS, STEPS = 3, 6.0, 1e-2, 24, 4
ARCHITECTURE = "LlamaForCausalLM"
# The rounding of float32 sums, against PEFT in float64, was measured: 1e-7 of the loss, 1.6e-6 of the largest entry of
# a gradient, and 8e-7 of the norm of four updates together. AdamW's first steps are g / |g|, so updates are compared by
# norms, as in test_step.py.
LOSS, GRADIENT, UPDATE = 5e-7, 1e-5, 1e-5

Rows = list[list[Sample]]

FULL = ["--config.model.lora.rank=0", "--config.model.lora.dora=False", "--config.model.lora.targets="]

# PEFT 0.21 asks for an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# ---------------------------------------------------------------------------------------- a model and its batches
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama(path)
    return path


@pytest.fixture(scope="module")
def steps() -> list[Rows]:
    rng = np.random.default_rng(0)
    row = lambda: [sample_of(9, slice(3, 9), rng), sample_of(12, [4, 7, 11], rng)]  # noqa: E731
    return [[row() for _ in range(8)] for _ in range(STEPS)]


def made_lora(targets: list[str], folder: Path, dora: bool = False) -> LoRA:
    spec = load(folder, mesh_of(1, 1, 1))[0].spec
    return LoRA(RANK, scale_of(RANK, ALPHA, False), peft_format.find_targets(spec, ARCHITECTURE, targets), dora)


class Ours:
    """A model with adapters on a mesh, whose B are not zero."""

    def __init__(self, folder: Path, made: LoRA, sizes: tuple[int, int, int], dtype: str = "float32"):
        self.mesh = mesh_of(*sizes)
        base_decoder, self.base = load(folder, self.mesh)
        self.decoder: Decoder = make_decoder(base_decoder.spec, sizes[2], made)
        optimizer = make_optimizer(grad_clip=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
        compute = Compute(jnp.dtype(dtype), "blockwise", "none")
        self.fns: StepFunctions = make_step(self.decoder, optimizer, self.mesh, compute)
        rng = np.random.default_rng(1)
        shapes, axes = (self.decoder.split(t)[0] for t in (self.decoder.abstract, self.decoder.axes))
        drawn = jax.tree_util.tree_map_with_path(
            lambda path, a: rng.normal(path[-1].key == "magnitude", 0.1, a.shape).astype(np.float32), shapes
        )
        self.adapters: Params = jax.device_put(drawn, param_shardings(shapes, axes, self.mesh))

    def whole(self, adapters: Params) -> Params:
        return self.decoder.join(adapters, self.base)

    def write(self, adapters: Params, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        made = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "base_model_name_or_path": "base"}
        made["use_dora"] = self.decoder.lora is not None and self.decoder.lora.dora
        held = jax.device_get(adapters)
        peft_format.write_adapter(folder, held, self.decoder.spec, ARCHITECTURE, config=made, dtype="float32")
        return folder

    def by_name(self, adapters: Params, folder: Path) -> dict[str, np.ndarray]:
        return load_file(self.write(adapters, folder) / peft_format.WEIGHTS)


def peft_of(base: Path, adapter: Path) -> Any:
    """PEFT's model in float64, ready to be trained."""
    model = in_float64(LlamaForCausalLM.from_pretrained(base))
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).double()


def peft_loss(model: Any, rows: Rows) -> torch.Tensor:
    """Every sample by itself; the sum of the losses of trained tokens over their number."""
    total, count = 0.0, 0
    for tokens, trained in (sample for row in rows for sample in row):
        ids, mask = torch.tensor(tokens), torch.tensor(trained[1:])
        ce = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, count = total + ce[mask].sum(), count + int(mask.sum())
    return total / count


def named(model: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, np.ndarray]:
    """A tensor of each parameter that PEFT trains, under its name in an adapter folder."""
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    found = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in found.items()}
    return {name: of(p).detach().numpy().copy() for name, p in found.items()}


# ---------------------------------------------------------------------------------------- equal to PEFT
@pytest.mark.parametrize(
    ("sizes", "targets", "dora"),
    [
        ((1, 4, 2), [], False),
        pytest.param((2, 2, 2), ["q_proj", "o_proj", "down_proj"], False, marks=pytest.mark.slow),
        ((2, 2, 2), ["q_proj", "o_proj", "down_proj"], True),  # the inputs of all three are split over devices
    ],
)
def test_loss_gradients_and_four_steps_equal_peft(
    sizes: tuple[int, int, int], targets: list[str], dora: bool, folder: Path, steps: list[Rows], tmp_path: Path
) -> None:
    ours = Ours(folder, made_lora(targets, folder, dora), sizes)
    start = ours.by_name(ours.adapters, tmp_path / "start")
    theirs = peft_of(folder, tmp_path / "start")
    assert named(theirs, lambda p: p).keys() == start.keys()
    assert len(start) == (3 if dora else 2) * 2 * (len(targets) or 7)  # A, B and magnitudes of two layers
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    state: TrainState = ours.fns.from_params(jax.tree.map(jnp.copy, ours.adapters))
    held = jax.device_get(ours.base)
    sums = ours.fns.zero_sums()
    for i, rows in enumerate(steps):
        optimizer.zero_grad()
        loss = peft_loss(theirs, rows)
        loss.backward()
        sums = ours.fns.accumulate(ours.whole(state.params), sums, put_rows(packed(rows, SLOTS), ours.mesh))
        if i == 0:  # later gradients are those of other weights
            count = float(sums.weight_sum)
            mean = jax.tree.map(lambda g, count=count: g / count, jax.device_get(sums.grads))
            expected = named(theirs, lambda p: p.grad)
            found = ours.by_name(mean, tmp_path / "gradients")
            assert relative_gap(found, expected) < GRADIENT
            halved = {k: v / 2 for k, v in found.items()}
            assert relative_gap(halved, expected) > 100 * GRADIENT, "the negative control"
        optimizer.step()
        state, sums, measured = ours.fns.apply(state, sums, RATE)
        assert abs(float(measured["loss"]) - loss.item()) < LOSS * loss.item()
    end, after = ours.by_name(state.params, tmp_path / "end"), named(theirs, lambda p: p)
    norm = lambda x: np.sqrt(sum(np.square(v).sum() for v in x.values()))  # noqa: E731
    gap = norm({k: end[k] - after[k] for k in end}) / norm({k: after[k] - start[k] for k in end})
    assert gap < UPDATE
    assert norm({k: end[k] - start[k] for k in end}) > 100 * UPDATE * norm(start), "the adapters have moved"
    jax.tree.map(np.testing.assert_array_equal, held, jax.device_get(ours.base))


def hybrid(case: str, folder: Path) -> tuple[Any, Decoder, Params, Params]:
    """Transformers' model of a case, and ours with an adapter for each matrix of its layers, also in PEFT's format."""
    model, mesh = torch_model(case, folder), mesh_of(1, 1, 1)
    plain, base = load(folder, mesh)
    targets = peft_format.find_targets(plain.spec, CASES[case][0], [])
    decoder = make_decoder(plain.spec, 1, LoRA(RANK, scale_of(RANK, ALPHA, False), targets, dora=True))
    rng, shapes = np.random.default_rng(1), decoder.split(decoder.abstract)[0]
    drawn = jax.tree_util.tree_map_with_path(
        lambda path, a: rng.normal(path[-1].key == "magnitude", 0.1, a.shape).astype(np.float32), shapes
    )
    return model, decoder, base, drawn


def tensors_of(adapters: Params, decoder: Decoder, architecture: str, folder: Path) -> dict[str, np.ndarray]:
    made = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "use_dora": True, "base_model_name_or_path": "base"}
    folder.mkdir(exist_ok=True)
    peft_format.write_adapter(folder, adapters, decoder.spec, architecture, config=made, dtype="float32")
    return load_file(folder / peft_format.WEIGHTS)


@pytest.mark.slow
def test_loss_and_gradients_of_a_mamba_hybrid_equal_peft(steps: list[Rows], tmp_path: Path) -> None:
    """Of DoRA in all of its matrices; five of a Mamba-2 layer are in one tensor there."""
    case = "granite4-hybrid"
    model, decoder, base, adapters = hybrid(case, tmp_path)
    tensors_of(adapters, decoder, CASES[case][0], tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    rows = steps[0][:1]
    loss = peft_loss(theirs, rows)
    loss.backward()
    compute = Compute(jnp.dtype("float32"), "blockwise", "none")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def ours(adapters: Params, base: Params, batch: Any) -> Any:
        def mean(own: Params) -> jax.Array:
            loss_sum, (weight_sum, _) = batch_loss(decoder, decoder.join(own, base), batch, compute)
            return loss_sum / weight_sum

        return jax.value_and_grad(mean)(adapters)

    found, grads = ours(adapters, base, packed(rows, SLOTS))
    assert abs(float(found) - loss.item()) < 1e-5 * loss.item()  # float32 on both sides
    expected = named(theirs, lambda p: p.grad)
    grads = tensors_of(jax.device_get(grads), decoder, CASES[case][0], tmp_path / "gradients")
    blocks = tensors_of(jax.tree.map(np.ones_like, adapters), decoder, CASES[case][0], tmp_path / "ones")
    assert grads.keys() == expected.keys() and any(x.shape[0] == 5 * RANK for x in grads.values())
    least = max(np.abs(x).max() for x in expected.values()) / 1000
    for name, x in expected.items():  # PEFT has gradients outside of the blocks too
        assert gap(grads[name], x * blocks[name]) < 1e-4 * max(np.abs(x).max(), least), name
    assert any(gap(grads[name], x) > 0.1 * np.abs(x).max() for name, x in expected.items()), "the negative control"


@pytest.mark.slow  # the fast lane has the adapters of a hybrid already
@pytest.mark.parametrize("case", ["lfm2", "qwen3_5"])
def test_adapters_of_other_mixers_equal_merged_weights_and_survive_export(case: str, tmp_path: Path) -> None:
    _, decoder, base, adapters = hybrid(case, tmp_path)
    assert len(adapters["layers"]["short_conv" if case == "lfm2" else "gated_delta"]) == (4 if case == "lfm2" else 7)
    row = packed([[(np.arange(3, 10), np.ones(7, bool))]], 8)

    def without_effect(base: Params) -> Params:
        zeros = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key != "b"), adapters)
        return decoder.join(lora.with_magnitudes(zeros, base), base)

    # One program computes all three.
    apart, merged, alone = (
        our_logits(decoder, params, row)
        for params in (
            decoder.join(adapters, base),
            without_effect(lora.merge(decoder.lora, adapters, base)),
            without_effect(base),
        )
    )
    assert gap(merged, apart) < 1e-4 < 1e-2 < gap(alone, apart)
    tensors_of(adapters, decoder, CASES[case][0], tmp_path / "adapter")
    read = peft_import.load_adapters(peft_import.read_adapter(tmp_path / "adapter"), decoder.spec, CASES[case][0])
    assert (read.lora, read.obstacle) == (decoder.lora, "")
    jax.tree.map(np.testing.assert_array_equal, read.arrays, adapters)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_equal_those_that_peft_merges(dora: bool, folder: Path, tmp_path: Path) -> None:
    """In float64 of PEFT's own merge, and of an adapter that is not merged."""
    made = made_lora([], folder, dora)
    ours = Ours(folder, made, (1, 1, 1))
    tokens = torch.tensor(np.random.default_rng(3).integers(0, 100, 17))[None]
    peft = peft_of(folder, ours.write(ours.adapters, tmp_path / "adapter"))
    merged = lora.merge(made, jax.device_get(ours.adapters), jax.device_get(ours.base))
    plain = in_float64(LlamaForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        expected, base = peft(tokens).logits, plain(tokens).logits
        weights = {"self_attn.q_proj": "attention.q", "self_attn.o_proj": "attention.o", "mlp.down_proj": "mlp.down"}
        whole = peft.merge_and_unload()
        for i in range(2):
            for name, path in weights.items():
                part, leaf = path.split(".")
                mine = np.asarray(merged["layers"][part][leaf][i], np.float64)
                theirs = whole.model.layers[i].get_submodule(name).weight.numpy()
                assert np.max(np.abs(mine.reshape(theirs.shape) - theirs)) < 3e-7 * max(1, np.max(np.abs(theirs)))
    assert float((expected - base).abs().max()) > 0.1, "the adapter matters"


def test_rank_stabilised_scale_and_new_adapters() -> None:
    assert scale_of(16, 32.0, False) == 2.0 and scale_of(16, 32.0, True) == 8.0
    shapes = {"layers": {"attention": {"q": {"weight": 0, "a": 1, "b": 2}, "k": 3}}, "embed": {"table": 4}}
    adapters, base = lora.split(shapes)
    assert adapters == {"layers": {"attention": {"q": {"a": 1, "b": 2}}}}
    assert base == {"layers": {"attention": {"q": 0, "k": 3}}, "embed": {"table": 4}}
    assert lora.join(adapters, base) == shapes


def test_new_adapters_change_nothing_until_they_are_trained(folder: Path) -> None:
    ours = Ours(folder, made_lora([], folder), (1, 1, 1))
    drawn, _ = ours.decoder.split(jax.jit(ours.decoder.init)(jax.random.key(0)))
    assert all(not np.any(x) for path, x in jax.tree_util.tree_leaves_with_path(drawn) if path[-1].key == "b")
    a = np.asarray(drawn["layers"]["mlp"]["down"]["a"])
    bound = 1 / np.sqrt(a.shape[-1])
    assert 0.9 * bound < np.max(np.abs(a)) <= bound and abs(np.std(a) * np.sqrt(3) / bound - 1) < 0.15
    drawn, base = jax.device_get((drawn, ours.base))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(ours.decoder.lora, drawn, base), base)
    dora = dataclasses.replace(ours.decoder.lora, dora=True)
    wrong = jax.tree_util.tree_map_with_path(lambda path, x: x["b"][..., 0] * 0 + 2, drawn, is_leaf=lambda x: "b" in x)
    drawn = jax.tree.map(lambda pair, m: pair | {"magnitude": m}, drawn, wrong, is_leaf=lambda x: "b" in x)
    assert relative_gap(lora.merge(dora, drawn, base), base) > 0.5, "the negative control"
    assert relative_gap(lora.merge(dora, lora.with_magnitudes(drawn, base), base), base) < 2e-7


def test_target_modules_of_the_folder_name_no_other_module() -> None:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    config = Lfm2Config(**sizes, **heads).to_dict() | {"architectures": ["Lfm2ForCausalLM"]}
    spec = hf.spec_from_config({k: v for k, v in config.items() if k != "pad_token_id"}, Path("config.json"))
    modules = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "out_proj")]
    found = peft_format._shortest_names(modules, spec, "Lfm2ForCausalLM")
    assert found == ["q_proj", "self_attn.out_proj"], "a convolution has an out_proj too"


# ---------------------------------------------------------------------------------------- bad input
def test_tokens_without_trained_embedding_rows_are_an_error() -> None:
    ids = {"a": 0, "<|im_end|>": 11, "<|im_start|>": 10}
    source, tokenizer = SimpleNamespace(spec=SimpleNamespace(vocab_size=10)), SimpleNamespace(get_vocab=lambda: ids)
    found: Any = SimpleNamespace(source=source, tokenizer=tokenizer, spec=lambda: SimpleNamespace(vocab_size=12))
    with pytest.raises(UserError, match=r"2 tokens beyond the model's 10 .*<\|im_start\|>.*Set data"):
        build._check_all_tokens_have_rows(found)
    found.spec = lambda: source.spec
    build._check_all_tokens_have_rows(found)  # the rows that there are suffice


def test_target_that_matches_nothing_names_what_there_is(folder: Path) -> None:
    with pytest.raises(UserError, match=r"targets has 'query', which matches no matrix.*q_proj, k_proj") as raised:
        made_lora(["query"], folder)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model.lora.rank": -1}, "model.lora.rank=-1 must be at least 0"),
        ({"model.lora.rank": 4, "model.lora.alpha": 0.0}, "model.lora.alpha=0.0 must be more than 0"),
        ({"model.lora.alpha": 8.0}, "nothing reads model.lora.alpha=8.0: set a rank"),
        ({"model.lora.dora": True}, "nothing reads model.lora.dora=True: set a rank"),
        ({"model.lora.targets": ["q_proj"]}, "nothing reads model.lora.targets=['q_proj']"),
        ({"model.lora.rank": 4, "optim.frozen": ["model.norm.*"]}, "leave optim.frozen empty"),
    ],
)
def test_wrong_adapter_fields_are_reported(fields: dict[str, Any], said: str) -> None:
    config = Config()
    for name, value in fields.items():
        section, last = locate(config, name)
        setattr(section, last, value)
    with pytest.raises(ConfigError) as raised:
        config.validate()
    assert said in str(raised.value)


# ---------------------------------------------------------------------------------------- the cost of a step
def test_base_in_the_compute_dtype_changes_no_number(folder: Path, steps: list[Rows]) -> None:
    """With bfloat16 products; the base is held in bfloat16, but for the scales of norms."""
    ours = Ours(folder, made_lora([], folder), (1, 1, 1), "bfloat16")
    kept = jax.tree.map(lambda held, p: p.astype(held.dtype), ours.fns.abstract_base, ours.base)
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"bfloat16", "float32"}
    assert kept["layers"]["mlp"]["up"].dtype == kept["embed"]["table"].dtype == jnp.bfloat16
    batch = put_rows(packed(steps[0], SLOTS), ours.mesh)
    held = ours.fns.evaluate(ours.decoder.join(ours.adapters, kept), batch)
    assert [float(x) for x in held] == [float(x) for x in ours.fns.evaluate(ours.whole(ours.adapters), batch)]


def test_memory_model_counts_moments_of_adapters_alone(folder: Path) -> None:
    ours, bf16, f32 = Ours(folder, made_lora([], folder), (1, 1, 1), "bfloat16"), jnp.dtype("bfloat16"), jnp.float32
    optimizer = make_optimizer(grad_clip=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)

    def estimate(decoder: Decoder) -> MemoryEstimate:
        held = make_abstract_base(decoder, ours.mesh, bf16)
        state = make_abstract_state(decoder, optimizer, ours.mesh)
        made = MemoryInputs(decoder, state, ours.mesh, bf16, "blockwise", jnp.dtype(f32), jnp.dtype(f32), 64, held)
        return estimate_memory(made, 1, "full")

    adapters, full = estimate(ours.decoder), estimate(ours.decoder.base)
    own = 4 * sum(x.size for x in jax.tree.leaves(ours.adapters))
    scales = sum(x.size for x in jax.tree.leaves(ours.base) if x.ndim == 1 or x.shape == (2, 32)) * 4
    assert own < adapters.optimizer <= 2 * own + 8 and adapters.sums == adapters.gradients == own
    assert full.params / 2 < adapters.params - own <= full.params / 2 + scales
    assert adapters.total < full.total / 2 + adapters.activations + adapters.working


def test_frozen_base_saves_a_third_of_the_products_of_weights(folder: Path) -> None:
    spec, length = load(folder, mesh_of(1, 1, 1))[0].spec, np.array([1])
    saved = train_flops(spec, length) - train_flops(spec, length, frozen=True)
    assert saved == matmul_flops(spec)


# ---------------------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048}
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    rest = {"initializer_range": 0.1, "rms_norm_eps": 1e-5}  # as in helpers/runs.py, whose runs have its programs
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    held = write_jsonl(folder / "held.jsonl", make_chats(6, seed=5))
    body = f"""c.model.init_from = '{base}'
c.model.lora.rank = 4
c.model.lora.dora = True
c.model.lora.targets = ['q_proj', 'v_proj', 'down_proj']
c.data.validation = [Source(path='{held}')]
c.checkpoint.every_samples = 8
c.train.ema_half_life = 12.0"""
    return setting(folder, body, samples=36)


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that paused after three of five steps and went on."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert run_train(config, workdir, "--config.train.pause_at_share=0.5") == 75
    assert run_train(config, workdir) == 0
    return workdir


@pytest.mark.slow
def test_resumed_run_with_adapters_is_bit_equal(config: Path, run: Path, tmp_path: Path) -> None:
    assert run_train(config, tmp_path / "run") == 0
    assert_equal_runs(tmp_path / "run", run, 5)


def test_resumed_run_checks_the_base_before_it_reads_data(
    base: Path, config: Path, run: Path, tmp_path: Path, capsys
) -> None:
    damaged = shutil.copytree(base, tmp_path / "base")
    os.truncate(damaged / "model.safetensors", 5000)
    assert run_train(config, run, f"--config.model.init_from={damaged}") == 2
    assert "model.safetensors (5000 bytes) is damaged or truncated" in capsys.readouterr().err


def test_checkpoint_holds_adapters_and_their_moments_alone(run: Path) -> None:
    found = arrays(run, 5)
    adapters = {k: v.shape for k, v in found.items() if k.startswith("params")}
    assert {k.split("['layers']")[1]: shape for k, shape in adapters.items()} == {
        "['attention']['q']['a']": (2, 4, 16), "['attention']['q']['b']": (2, 2, 8, 4),
        "['attention']['v']['a']": (2, 4, 16), "['attention']['v']['b']": (2, 1, 8, 4),
        "['mlp']['down']['a']": (2, 4, 48), "['mlp']['down']['b']": (2, 16, 4),
        "['attention']['q']['magnitude']": (2, 2, 8), "['attention']['v']['magnitude']": (2, 1, 8),
        "['mlp']['down']['magnitude']": (2, 16),
    }  # fmt: skip
    moments = [v for k, v in found.items() if k.startswith("opt_state") and v.ndim > 1]
    assert sum(m.size for m in moments) == 2 * sum(np.prod(s) for s in adapters.values())
    assert read_metrics(run)[-1]["eval/loss"] < read_all_metrics(run)[0]["eval/loss"]


def test_exports_of_a_run_give_peft_and_transformers_the_same_logits(
    base: Path, run: Path, tmp_path: Path, capsys
) -> None:
    assert run_export(run, tmp_path / "merged") == 0
    assert "weights: merged with the adapter, those after step 5" in capsys.readouterr().out
    assert run_export(run, tmp_path / "adapter", "--adapter") == 0
    assert "weights: the adapter alone, those after step 5" in capsys.readouterr().out
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "v_proj", "down_proj"] and said["base_model_name_or_path"] == str(base)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 300, 30))[None]
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(base)
        original = plain(tokens).logits
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")(tokens).logits
    assert float((merged - peft).abs().max()) < 1e-5 * float(peft.abs().max())
    assert float((original - peft).abs().max()) > 1e-3 * float(peft.abs().max()), "the negative control"


@pytest.mark.slow
def test_run_goes_on_from_an_exported_adapter_or_from_the_merged_weights(
    base: Path, config: Path, run: Path, tmp_path: Path, capsys
) -> None:
    assert run_export(run, tmp_path / "adapter", "--adapter") == 0
    said = tmp_path / "adapter" / "adapter_config.json"
    said.write_text(said.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.1'))
    still = ["--config.optim.learning_rate=0", "--config.optim.max_steps=1"]
    start = f"--config.model.init_from={tmp_path / 'adapter'}"
    assert run_train(config, tmp_path / "on", start, *still) == 0
    assert "lora_dropout=0.1 of the adapter is not applied" in capsys.readouterr().out
    adapters, ours = ({k: v for k, v in arrays(d, s).items() if k.startswith("params")} for d, s in
                      ((tmp_path / "on", 1), (run, 5)))  # fmt: skip
    assert same_bits(adapters, ours)
    expected = read_metrics(run)[-1]["eval/loss"]
    assert read_metrics(tmp_path / "on")[-1]["eval/loss"] == expected
    assert run_train(config, tmp_path / "full", start, *still, *FULL) == 0
    assert abs(read_metrics(tmp_path / "full")[-1]["eval/loss"] - expected) < 1e-5
    assert run_export(tmp_path / "on", tmp_path / "again", "--adapter") == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    assert run_train(config, tmp_path / "other", start, "--config.model.lora.rank=2") == 2
    said = capsys.readouterr().err
    assert "model.lora.rank=2 differs from the adapter. Set model.lora.rank=4; or set model.lora.rank=0" in said


def test_run_from_an_average_of_adapters_starts_from_the_merged_weights(
    config: Path, run: Path, tmp_path: Path
) -> None:
    last = read_metrics(run)[-1]
    full = [*FULL, "--config.train.ema_half_life=0", "--config.optim.max_steps=1"]
    start = f"--config.model.init_from={run}/checkpoints/5/average"  # merges the average of the adapters
    assert run_train(config, tmp_path / "next", start, *full) == 0
    assert abs(read_all_metrics(tmp_path / "next")[0]["eval/loss"] - last["eval/average/loss"]) < 1e-5
    assert abs(last["eval/loss"] - last["eval/average/loss"]) > 1e-4, "the negative control"


def test_mean_of_checkpoints_with_adapters_is_that_of_merged_weights(run: Path, tmp_path: Path) -> None:
    assert run_verb(average.main, [f"--workdir={run}", "--last=2", f"--output={tmp_path / 'mean'}"]) == 0
    tensors = []
    for workdir, flags, name in ((tmp_path / "mean", [], "m"), (run, ["--step=4"], "4"), (run, ["--step=5"], "5")):
        assert run_export(workdir, tmp_path / name, *flags) == 0
        tensors.append(load_file(tmp_path / name / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"])
    assert np.max(np.abs(tensors[0] - (tensors[1] + tensors[2]) / 2)) < 1e-7
    assert np.max(np.abs(tensors[1] - tensors[2])) > 1e-5


def test_adapter_of_a_run_without_one_and_a_wrong_target_end_with_code_2(config: Path, tmp_path: Path, capsys) -> None:
    assert run_train(config, tmp_path / "run", "--config.model.lora.targets=query") == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "model.lora.targets has 'query'" in said
    assert not (tmp_path / "run" / "config.json").exists()
