"""Every model family against transformers' torch model: logits, loss, every gradient, import and export.

The cases are in helpers/families.py. Each is tiny, but 600 tokens go past its window and past the length for which its
RoPE was made. With any one of its features switched off, the logits are more than ten tolerances away.
"""

import copy
import dataclasses
import functools
import itertools
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from helpers.families import CASES, ORIGINAL, ROPES, VOCAB, WINDOW, WRAPPED, WRAPPED_CHANGES, torch_model, wrapped_model
from helpers.models import (
    QUICK,
    gap,
    hf_arrays,
    load,
    logits_of,
    mesh_of,
    our_logits,
    packed,
    same_bits,
    torch_logits,
    uncompiled_logits,
    whole,
)
from mice_jax.data.loader import Arrays
from mice_jax.errors import UserError
from mice_jax.models import hf, untrained
from mice_jax.models.families import FAMILIES
from mice_jax.models.families.rope_config import KINDS
from mice_jax.models.mixers import MIXERS
from mice_jax.models.spec import AttentionKind, ModelSpec, Rope, is_recurrent
from mice_jax.models.transformer import Compute, Decoder, Params, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import num_shards, param_shardings
from mice_jax.step import batch_loss

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 600).astype(np.int32)
# Logits of order 5 in float32, by sums of a few hundred products in another order: torch's own distance from
# float64 is up to 5e-5 here, where RoPE turns by 600 radians.
LOGITS = 1e-4
RELATIVE = 1e-4  # of loss, and of a gradient in units of the largest entry of its tensor
# The gradients of the decays of the gated delta rule are a hundred times smaller than others, the rest of sums that
# cancel: one rounding of each weight moves those of transformers by up to 1.2e-4.
RELATIVE_OF_DECAYS = 3e-4
# A row of four samples, long and short for each RoPE that distinguishes them. Its end is padding.
SAMPLES = [TOKENS[:ORIGINAL], TOKENS[200 : 200 + ORIGINAL + 1], TOKENS[:30], TOKENS]
SLOTS = 896
# Enough tokens to go past any window and the length before RoPE was scaled.
SOME = TOKENS[:256]

# The meshes of the families whose parameters are laid out or split differently: plain, with norms of all heads, with
# fused projections, with several mixers, with several kinds of attention whose heads differ and are normed each. The
# others run on one device. Some have more tensor shards than there are key heads.
MESHES = {
    "llama": (1, 1, 8), "olmo2": (2, 2, 2), "phi3": (1, 2, 4), "lfm2": (2, 2, 2), "granite4-hybrid": (1, 2, 4),
    "qwen3_5": (1, 4, 2), "gemma4": (1, 4, 2),
}  # fmt: skip


def row_of(*samples: np.ndarray, slots: int = 0) -> Arrays:
    """One row of samples, one after another; every token but each one's first is predicted."""
    return packed([[(tokens, np.ones(len(tokens), bool)) for tokens in samples]], slots or sum(map(len, samples)))


class Seen:
    """A decoder whose hidden states can be had beside the loss, without a second forward pass."""

    def __init__(self, decoder: Decoder):
        self.spec, self.vocab_rows, self._decoder = decoder.spec, decoder.vocab_rows, decoder

    def bind(self, params: Params) -> Any:
        model = self._decoder.bind(params)
        self.logits, hidden = model.logits, model.hidden

        def remembered(*inputs: Any) -> jax.Array:
            self.hidden = hidden(*inputs)
            return self.hidden

        return types.SimpleNamespace(hidden=remembered, output_weight=model.output_weight)


@functools.cache
def jitted(decoder: Decoder) -> Callable[[Params, Arrays], Any]:
    """The loss and logits [B T V] of rows, and the gradients of the loss, with the loss and attention of training."""
    compute = Compute(jnp.dtype("float32"), "blockwise", "full")

    def loss(params: Params, rows: Arrays) -> tuple[jax.Array, jax.Array]:
        seen = Seen(decoder)
        loss_sum, (weight_sum, _) = batch_loss(seen, params, rows, compute, chunk_size=128)
        return loss_sum / weight_sum, seen.logits(seen.hidden)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


def torch_gradients(model: PreTrainedModel, *samples: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss of all predictions in some samples, each alone in a forward pass, and its gradients."""
    model.zero_grad()
    predictions, total = sum(len(tokens) - 1 for tokens in samples), 0.0
    for tokens in samples:
        batch = torch.tensor(tokens)[None].long()
        loss = model(batch, labels=batch).loss * ((len(tokens) - 1) / predictions)
        loss.backward()
        total += loss.item()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    fixed = {name: np.zeros(1, np.float32) for name, _ in model.named_buffers() if name.endswith("layer_scalar")}
    return total, grads | fixed


def relative_gaps(
    grads: Params, decoder: Decoder, architecture: str, theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """By the checkpoint's names: the distance of our gradients from theirs, in units of the largest entry of theirs.

    The unit is never below a thousandth of the largest entry of any: the bias of keys that do not turn adds the same
    to all of a query's scores, so that its gradient is nothing but rounding.
    """
    ours = dict(hf_arrays(grads, decoder, architecture))
    assert ours.keys() == theirs.keys()
    largest = {name: float(np.abs(g).max()) for name, g in theirs.items()}
    least = max(largest.values()) / 1000
    return {name: gap(ours[name], g) / max(largest[name], least) for name, g in theirs.items()}


def assert_small(gaps: dict[str, float], case: str) -> None:
    """The distances of gradients are those of rounding."""
    decays = {name for name in gaps if case == "qwen3_5" and name.endswith(("A_log", "dt_bias"))}
    assert max(gaps[name] for name in gaps.keys() - decays) < RELATIVE, gaps
    assert max((gaps[name] for name in decays), default=0) < RELATIVE_OF_DECAYS, gaps


@functools.cache
def made(case: str) -> PreTrainedModel:
    return torch_model(case)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a case, written when it is first asked for."""

    @functools.cache
    def folder(case: str) -> Path:
        path = tmp_path_factory.mktemp(case)
        made(case).save_pretrained(path)
        return path

    return folder


# ---------------------------------------------------------------------------------------- the table
def test_cases_cover_every_family_and_every_rope_scaling() -> None:
    assert {architecture for architecture, _ in CASES.values()} | WRAPPED.keys() == FAMILIES.keys()
    assert ROPES.keys() == set(KINDS)
    said = json.dumps([odd for _, odd in CASES.values()])
    assert all(f'"rope_type": "{kind}"' in said for kind in KINDS)
    assert len(TOKENS) >= 600 > max(WINDOW, ORIGINAL)


# ---------------------------------------------------------------------------------------- parity
# A bias, a window, layers without RoPE, and keys for values: the rest is slow. test_family_sampling has some of it.
QUICK_CASES = {"llama-linear", "mistral", "qwen2", "smollm3", "gemma4-keys"}
PARITY = [pytest.param(case, marks=[] if case in QUICK_CASES else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", PARITY)
def test_packed_logits_loss_and_gradients_equal_transformers(case: str, folders: Any, strict_dtypes: None) -> None:
    """Each sample of a packed row is as transformers has it alone."""
    model, sizes = made(case), MESHES.get(case, (1, 1, 1))
    mesh = mesh_of(*sizes)
    decoder, params = load(folders(case), mesh)
    row = row_of(*SAMPLES, slots=SLOTS)
    rows = {k: np.repeat(v, num_shards(mesh), axis=0) for k, v in row.items()}
    with jax.set_mesh(mesh):
        (loss, logits), grads = jitted(decoder)(params, rows)
    assert logits.shape == (num_shards(mesh), SLOTS, VOCAB) and logits.dtype == np.float32
    expected = np.concatenate([torch_logits(model, tokens) for tokens in SAMPLES])
    assert np.abs(expected).max() > 1  # large enough that the tolerance is small
    assert gap(logits[:, : len(expected)], np.broadcast_to(expected, (len(logits), *expected.shape))) < LOGITS
    their_loss, their_grads = torch_gradients(model, *SAMPLES)
    assert abs(float(loss) / their_loss - 1) < RELATIVE
    grads = jax.device_put(grads, param_shardings(decoder.abstract, decoder.axes, mesh))
    gaps = relative_gaps(grads, decoder, CASES[case][0], their_grads)
    assert_small(gaps, case)
    check_four_steps(case, decoder, params, rows, mesh)


# Of AdamW. Rounding moves gradients by 1e-7 or so, and with a usual eps Adam would make steps of it where a gradient is
# nearly zero.
RATE, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-3, 0.1
# The distance between two updates of all weights, in units of an update's length: with an eps of 1e-4, 3e-5 was seen,
# and 7e-4 to 1e-3 of gemma4.
UPDATES = 1e-3


def check_four_steps(case: str, decoder: Decoder, params: Params, rows: Arrays, mesh: Mesh) -> None:
    """Compares the losses of four steps of AdamW with torch's, and then the weights."""
    model, architecture = copy.deepcopy(made(case)), CASES[case][0]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, RATE, BETAS, EPS, DECAY)
    trained = hf.trained_mask(decoder, architecture, ())
    adamw = make_optimizer(grad_clip=0, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, trained=trained)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def updated(params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        directions, state = adamw.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - RATE * d, params, directions), state

    first, state = dict(hf_arrays(params, decoder, architecture)), adamw.init(params)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    for _ in range(4):
        with jax.set_mesh(mesh):
            (loss, _), grads = jitted(decoder)(params, rows)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            params, state = updated(params, grads, state)
        params = jax.device_put(params, shardings)
        their_loss, _ = torch_gradients(model, *SAMPLES)
        their_optimizer.step()
        assert abs(float(loss) / their_loss - 1) < RELATIVE
    last, theirs = dict(hf_arrays(params, decoder, architecture)), model.state_dict()
    ours, expected, decays = (
        np.concatenate([of(name).ravel() for name in first])
        for of in (
            lambda name: last[name] - first[name],
            lambda name: theirs[name].numpy() - first[name],
            lambda name: -4 * RATE * DECAY * first[name] * (first[name].ndim > 1),
        )
    )
    length = np.linalg.norm(expected)
    assert np.linalg.norm(ours - expected) < UPDATES * length
    assert np.linalg.norm(ours - decays - expected) > 10 * UPDATES * length  # a negative control: without decay


@pytest.mark.slow
def test_exaone_4_without_windows_rotates_every_layer(tmp_path: Path) -> None:
    full = {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": ROPES["llama3"]}
    model = torch_model("exaone4", tmp_path, **full)
    decoder, params = load(tmp_path, mesh_of(1, 1, 1))
    logits = uncompiled_logits(decoder, params, row_of(SOME))[0]
    assert gap(logits, torch_logits(model, SOME)) < LOGITS
    half = make_decoder(dataclasses.replace(decoder.spec, ropes=(decoder.spec.ropes[0], None)))
    wrong = uncompiled_logits(half, params, row_of(SOME))[0]
    assert gap(wrong, torch_logits(model, SOME)) > 10 * LOGITS


def switched_off(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The spec with each of its features taken away in turn: whatever a plain decoder would not have."""
    attended = [rope for rope, kind in zip(spec.ropes, spec.mixers, strict=True) if not is_recurrent(kind)]
    full = Rope(attended[0].theta, spec.head_dim, None) if attended[0] else None
    plain = {
        "windows": (None,) * spec.num_layers,
        "attention_scale": spec.head_dim**-0.5,
        "query_scale": None,
        "attention_softcap": None,
        "attention_gate": False,
        "qk_norm": "none",
        "pre_norm": False,
        "post_norm": False,
        "norm_offset": 0.0,
        "value_norm": False,
        "layer_scales": False,
        "per_layer_dim": 0,
        "activation": "silu",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logit_scale": 1.0,
        "logit_softcap": None,
    }
    off = {k: dataclasses.replace(spec, **{k: v}) for k, v in plain.items() if getattr(spec, k) != v}
    if any(attended):
        off["ropes: none"] = dataclasses.replace(spec, ropes=(None,) * spec.num_layers)
    else:
        off["ropes: some"] = dataclasses.replace(spec, ropes=(Rope(1e4, spec.head_dim, None),) * spec.num_layers)
    if len(set(attended)) > 1 and not any(isinstance(kind, AttentionKind) for kind in spec.mixers):
        off["ropes: one for all layers"] = dataclasses.replace(spec, ropes=spec.ropes[:1] * spec.num_layers)
        off["ropes: scaled in all layers"] = dataclasses.replace(spec, ropes=spec.ropes[-1:] * spec.num_layers)
    if spec.qk_norm == "head_after_rope":
        off["qk_norm: before RoPE"] = dataclasses.replace(spec, qk_norm="head")
    unscaled = tuple(r and dataclasses.replace(r, scaling=None) for r in spec.ropes)
    if unscaled != spec.ropes:
        off["ropes: scaling"] = dataclasses.replace(spec, ropes=unscaled)
    if full and all(rope and rope.dims != spec.max_head_dim for rope in attended):
        off["ropes: partial"] = dataclasses.replace(spec, ropes=(full,) * spec.num_layers)
    for i, window in enumerate(spec.windows):  # the window in this layer alone, a slot too wide
        if window is not None:
            wider = (*spec.windows[:i], window + 1, *spec.windows[i + 1 :])
            off[f"windows: {i} one wider"] = dataclasses.replace(spec, windows=wider)
            break
    lends = [i for i, kind in enumerate(spec.mixers) if isinstance(kind, AttentionKind) and kind.keys == "lent"]
    if lends:  # by another layer of the same kind
        kinds = list(spec.mixers)
        first = next(i for i, kind in enumerate(kinds) if kind.name == kinds[lends[0]].name)
        kinds[first], kinds[lends[0]] = kinds[lends[0]], kinds[first]
        off["mixers: lent by another layer"] = dataclasses.replace(spec, mixers=tuple(kinds))
    for kind in {kind for kind in spec.mixers if is_recurrent(kind)}:
        for bias in {"bias", "conv_bias"} & vars(kind).keys():
            unbiased = tuple(k and dataclasses.replace(k, **{bias: False}) for k in spec.mixers)
            off[f"mixers: {bias} of {type(kind).__name__}"] = dataclasses.replace(spec, mixers=unbiased)
    return off


def pruned(params: Any, wanted: Any) -> Any:
    """The parameters that `wanted` has."""
    if isinstance(wanted, dict):
        return {k: pruned(params[k], w) for k, w in wanted.items()}
    return params if params.shape == wanted.shape else params[tuple(map(slice, wanted.shape))]


EXPECTED_OFF = {
    "llama": {"qkv_bias", "out_bias", "mlp_bias", "ropes: scaling"},
    "llama-linear": {"activation", "ropes: scaling"},
    "mistral": {"windows"},
    "mistral-full": {"ropes: scaling"},
    "granite": {
        "embedding_multiplier", "attention_scale", "residual_multiplier", "logit_scale", "qkv_bias", "out_bias",
        "mlp_bias",
    },
    "granite4": {
        "embedding_multiplier", "attention_scale", "residual_multiplier", "logit_scale", "qkv_bias", "out_bias",
    },
    "granite4-hybrid": {
        "embedding_multiplier", "attention_scale", "residual_multiplier", "logit_scale", "mixers: bias of Mamba2",
        "mixers: conv_bias of Mamba2",
    },
    "qwen3_5": {"attention_gate", "qk_norm", "norm_offset", "qkv_bias", "out_bias", "ropes: partial"},
    "qwen2": {"qkv_bias", "windows", "ropes: scaling"},
    "qwen3": {"qk_norm", "qkv_bias", "out_bias", "windows"},
    "smollm3": {"ropes: one for all layers", "qkv_bias", "out_bias", "mlp_bias", "windows"},
    "olmo2": {"post_norm", "qk_norm", "qkv_bias", "out_bias"},
    "olmo3": {
        "post_norm", "qk_norm", "qkv_bias", "out_bias", "windows", "ropes: scaling", "ropes: one for all layers",
        "ropes: scaled in all layers",
    },
    "exaone4": {"post_norm", "qk_norm", "windows", "ropes: one for all layers"},
    "hunyuan": {"qk_norm", "qk_norm: before RoPE", "ropes: scaling", "qkv_bias", "out_bias"},
    "ministral3": {"query_scale", "ropes: scaling", "windows"},
    "lfm2": {"qk_norm", "mixers: bias of ShortConv"},
    "phi3": {"ropes: scaling", "ropes: partial", "windows"},
    "phi3-mini": {"pre_norm"},
    "gemma2": {
        "attention_softcap", "logit_softcap", "attention_scale", "norm_offset", "post_norm", "activation",
        "embedding_multiplier", "windows", "qkv_bias", "out_bias",
    },
    "gemma3": {
        "logit_softcap", "attention_scale", "norm_offset", "post_norm", "activation", "embedding_multiplier", "qk_norm",
        "windows", "ropes: scaling", "ropes: one for all layers", "qkv_bias", "out_bias",
    },
    "gemma4": {
        "logit_softcap", "attention_scale", "post_norm", "activation", "embedding_multiplier", "qk_norm", "windows",
        "ropes: scaling", "qkv_bias", "out_bias", "value_norm", "layer_scales", "per_layer_dim",
        "mixers: lent by another layer",
    },
    "gemma4-keys": {"attention_scale", "qk_norm", "ropes: scaling", "value_norm", "layer_scales"},
}  # fmt: skip


@pytest.mark.parametrize("case", PARITY)
def test_switching_off_any_feature_moves_logits_ten_tolerances(case: str, folders: Any) -> None:
    decoder, params = load(folders(case), mesh_of(1, 1, 1))
    expected = torch_logits(made(case), SOME)
    off = switched_off(decoder.spec)
    assert EXPECTED_OFF[case] | {"ropes: none" if any(decoder.spec.ropes) else "ropes: some"} <= off.keys()
    # A recurrent layer has thousands of operations, which take longer one after another than to compile.
    logits_by = our_logits if decoder.spec.is_recurrent else uncompiled_logits
    for what, spec in off.items():
        other = make_decoder(spec)
        logits = logits_by(other, pruned(params, other.abstract), row_of(SOME))[0]
        assert not gap(logits, expected) <= 10 * LOGITS, what  # NaN is as wrong


def test_a_pad_token_that_is_a_real_token_has_its_gradient(tmp_path: Path) -> None:
    """Its embedding has none in transformers (`padding_idx`), even where it is the token that ends a turn."""
    pad, table, mesh = int(TOKENS[100]), "model.embed_tokens.weight", mesh_of(1, 1, 1)
    model = torch_model("mistral", tmp_path, pad_token_id=pad, eos_token_id=pad)
    decoder, params = load(tmp_path, mesh)
    with jax.set_mesh(mesh):  # so that it is the program of the parity test
        grads = jitted(decoder)(params, row_of(*SAMPLES, slots=SLOTS))[1]
    theirs = torch_gradients(model, *SAMPLES)[1]
    assert not theirs[table][pad].any()
    assert relative_gaps(grads, decoder, "MistralForCausalLM", theirs)[table] > 10 * RELATIVE
    model.get_input_embeddings().padding_idx = None
    theirs = torch_gradients(model, *SAMPLES)[1]
    assert max(relative_gaps(grads, decoder, "MistralForCausalLM", theirs).values()) < RELATIVE


# ---------------------------------------------------------------------------------------- packing
@pytest.mark.slow  # as phi3's own parity
def test_longrope_factors_of_the_whole_row_change_its_short_samples(folders: Any) -> None:
    """What a choice of the factors for a whole batch gives, as a negative control of packing."""
    decoder, params = load(folders("phi3"), mesh_of(1, 1, 1))
    short, spec = TOKENS[:ORIGINAL], decoder.spec
    long = dataclasses.replace(spec.ropes[0].scaling, short_factors=spec.ropes[0].scaling.long_factors)
    ropes = (dataclasses.replace(spec.ropes[0], scaling=long),) * spec.num_layers
    wrong = uncompiled_logits(make_decoder(dataclasses.replace(spec, ropes=ropes)), params, row_of(short, SOME[:128]))
    assert gap(wrong[0, :ORIGINAL], torch_logits(made("phi3"), short)) > 10 * LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lfm2", "granite4-hybrid", "qwen3_5"])
def test_mixers_that_continue_over_borders_change_the_next_sample(
    case: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control of packing: transformers' own mixers continue so in a packed row."""
    decoder, params = load(folders(case), mesh_of(1, 1, 1))
    ends = [0, 64, 129, 145, 256]
    samples = [TOKENS[start:end] for start, end in itertools.pairwise(ends)]
    (mixer,) = {MIXERS[type(kind)] for kind in decoder.spec.mixers if is_recurrent(kind)}
    inside = mixer.__call__
    monkeypatch.setattr(mixer, "__call__", lambda m, x, segments, dtype: inside(m, x, jnp.ones_like(segments), dtype))
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    wrong = jax.jit(lambda *x: logits_of(decoder, *x, compute), compiler_options=QUICK)(params, row_of(*samples))[0]
    first, *others = (torch_logits(made(case), tokens) for tokens in samples)
    assert gap(wrong[:64], first) < LOGITS
    assert all(gap(wrong[at], right[0]) > 10 * LOGITS for at, right in zip(ends[1:-1], others, strict=True))


# ---------------------------------------------------------------------------------------- in and out
@pytest.mark.parametrize("case", CASES)
def test_import_then_export_is_bit_equal_and_loads_in_transformers(case: str, folders: Any, tmp_path: Path) -> None:
    decoder, params = load(folders(case), mesh_of(1, 2, 4))
    hf.save_params(tmp_path, params, decoder, hf.read_config(folders(case) / "config.json"), "float32")
    assert same_bits(whole(tmp_path), whole(folders(case)))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(made(case))
    assert np.array_equal(torch_logits(again, TOKENS), torch_logits(made(case), TOKENS))
    changed = jax.tree.map(lambda x: x, params)
    changed["final_norm"]["scale"] = changed["final_norm"]["scale"] + np.float32(0.01)
    hf.save_params(tmp_path, changed, decoder, hf.read_config(folders(case) / "config.json"), "float32")
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert gap(torch_logits(other, TOKENS), torch_logits(made(case), TOKENS)) > 10 * LOGITS


# ---------------------------------------------------------------------------------------- wrapped checkpoints
@pytest.mark.parametrize("architecture", WRAPPED)
def test_decoder_of_a_wrapped_checkpoint_is_that_of_its_family(architecture: str, tmp_path: Path) -> None:
    """For us bit for bit, and for transformers to rounding: the family's logits and gradients are compared above."""
    model, alone = wrapped_model(architecture, tmp_path / "wrapped"), tmp_path / "alone"
    of_family = torch_model(WRAPPED[architecture], alone, **WRAPPED_CHANGES[WRAPPED[architecture]])
    decoder, params = load(tmp_path / "wrapped", mesh_of(1, 1, 1))
    expected_decoder, expected = load(alone, mesh_of(1, 1, 1))
    assert decoder.spec == expected_decoder.spec and jax.tree.structure(params) == jax.tree.structure(expected)
    assert gap(params, expected) == 0
    theirs = torch_logits(model, SOME)
    assert gap(torch_logits(of_family, SOME), theirs) < LOGITS / 10
    with torch.no_grad():
        of_family.model.norm.weight += 0.01
    assert gap(torch_logits(of_family, SOME), theirs) > 10 * LOGITS


@pytest.mark.parametrize("architecture", WRAPPED)
def test_vision_tower_is_exported_bit_for_bit_by_a_run_of_a_run(architecture: str, tmp_path: Path) -> None:
    source, first, second, out = (tmp_path / name for name in ("source", "first", "second", "out"))
    for folder in (first, second, out):
        folder.mkdir()
    model = wrapped_model(architecture, source)
    untrained.keep(FAMILIES[architecture], source, first)
    untrained.keep(FAMILIES[architecture], first, second)
    decoder, params = load(source, mesh_of(1, 2, 4))
    config = hf.read_config(source / "config.json")
    hf.save_params(out, params, decoder, config, "float32", second)
    assert same_bits(whole(out), whole(source))
    assert (second / "preprocessor_config.json").read_text() == (source / "preprocessor_config.json").read_text()
    again, info = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert np.array_equal(torch_logits(again.eval(), TOKENS), torch_logits(model, TOKENS))
    with pytest.raises(
        UserError, match=r"has no untrained\.safetensors, .*(multi_modal_projector|model\.visual|mtp|audio_tower)\."
    ):
        hf.save_params(out, params, decoder, config, "float32", source)
