"""config.json of every family: both spellings of RoPE, published models, errors, and random parameters.

Parity of what is computed from them is in test_families.py.
"""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from helpers.families import CASES, ORIGINAL, POSITIONS, ROPES, SIZES, WRAPPED
from helpers.models import hf_arrays
from helpers.runs import REPOSITORY
from mice_jax.errors import UserError
from mice_jax.inference.generation_config import stop_ids_in
from mice_jax.models import hf
from mice_jax.models.families import FAMILIES
from mice_jax.models.families.rope_config import KINDS, read_rope, with_both_rope_spellings
from mice_jax.models.layer_groups import find_groups
from mice_jax.models.rope import frequencies
from mice_jax.models.spec import (
    AttentionKind,
    GatedDelta,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mamba2,
    ModelSpec,
    NTKScaling,
    ProportionalScaling,
    QueryScale,
    Rope,
    ShortConv,
    YarnScaling,
)
from mice_jax.models.transformer import make_decoder

FILE = Path("folder/config.json")
NEW = {"rope_parameters"}
OLD = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}

Config = dict[str, Any]


def their_config(case: str, **changes: Any) -> Any:
    architecture, odd = CASES[case]
    settings = {k: v for k, v in (SIZES | odd | changes).items() if k != "head_dim" or v is not None}
    config = getattr(transformers, architecture).config_class(**settings)
    config.architectures = [architecture]
    return config


@functools.cache
def written(case: str) -> str:
    return their_config(case).to_json_string()


def config_of(case: str, **changes: Any) -> Config:
    """The config.json that transformers writes for a case, with keys changed."""
    return json.loads(written(case)) | changes


def without(config: Config, keys: set[str]) -> Config:
    return {k: v for k, v in config.items() if k not in keys}


def spec_of(config: Config) -> ModelSpec:
    return hf.spec_from_config(copy.deepcopy(config), FILE)


def their_rope(config: Config) -> Config:
    """What transformers' config class makes of a config.json's rotary positions; `type` is the old `rope_type`."""
    model_class = getattr(transformers, config["architectures"][0])
    theirs = model_class.config_class.from_dict(copy.deepcopy(config))
    theirs.standardize_rope_params()  # its RoPE does so once more
    return without(theirs.rope_parameters, {"type"})


# ---------------------------------------------------------------------------------------- spellings
def check_spellings(config: Config, spec: ModelSpec, rope: Config) -> None:
    both = with_both_rope_spellings(config)
    assert both.keys() > NEW
    for spelled in (both, without(both, NEW), without(both, OLD)):
        assert spec_of(spelled) == spec
        assert their_rope(spelled) == rope


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gemma4")])  # which has one spelling
def test_each_rope_spelling_of_an_export_gives_the_imported_spec(case: str) -> None:
    config = config_of(case)
    assert config.keys() > NEW and "rope_theta" not in config
    check_spellings(config, spec_of(config), their_rope(config))
    assert {"rope_theta", "rope_scaling"} < with_both_rope_spellings(config).keys()


LLAMA3 = {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LISTS = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 3.0, 5.0]}
LONG = LongScaling((1.0, 1.1, 1.2), (1.5, 3.0, 5.0), math.sqrt(1 + math.log(5) / math.log(ORIGINAL)), ORIGINAL)
PHI3 = {"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
# As transformers 4 wrote them: what a case's config says in place of rope_parameters, and what its layers get.
AS_FOUR_WROTE: dict[str, tuple[str, Config, tuple[Rope, ...]]] = {
    "no key at all": ("llama", {}, (Rope(1e4, 12, None),)),
    "theta alone": ("llama", {"rope_theta": 5e5}, (Rope(5e5, 12, None),)),
    "theta and null": ("qwen3", {"rope_theta": 1e6, "rope_scaling": None}, (Rope(1e6, 12, None),)),
    "linear by type": (
        "llama",
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        (Rope(1e4, 12, LinearScaling(2.0)),),
    ),
    "linear without theta": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        (Rope(1e4, 12, LinearScaling(2.0)),),
    ),
    "llama3 by rope_type": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        (Rope(5e5, 12, Llama3Scaling(5.0, 1.0, 4.0, ORIGINAL)),),
    ),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope"} | LISTS} | PHI3, (Rope(1e4, 6, LONG),)),
    "longrope by its first name": ("phi3", {"rope_scaling": {"type": "su"} | LISTS} | PHI3, (Rope(1e4, 6, LONG),)),
    "Phi-3 without scaling": ("phi3-mini", {"rope_theta": 1e4, "rope_scaling": None}, (Rope(1e4, 12, None),)),
    "Gemma 3 with both thetas": (
        "gemma3",
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        (Rope(2e4, 12, None), Rope(1e6, 12, LinearScaling(8.0))),
    ),
    "Gemma 3 without a theta for windows": (
        "gemma3",
        {"rope_theta": 2e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        (Rope(1e4, 12, None), Rope(2e6, 12, LinearScaling(8.0))),
    ),
    "OLMo 3": (
        "olmo3",
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "yarn", "attention_factor": 1.2} | YARN},
        (Rope(5e5, 8, None), Rope(5e5, 8, YarnScaling(8.0, 32.0, 1.0, 1.2, ORIGINAL, truncate=True))),
    ),
    "OLMo 3 without any": ("olmo3", {}, (Rope(5e5, 8, None), Rope(5e5, 8, None))),
    "Hunyuan": (
        "hunyuan",
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "alpha": 1e3, "factor": 1.0, "beta_fast": 32}},
        (Rope(1e4, 12, NTKScaling(1e3)),),
    ),
    "Gemma 3 without any": ("gemma3", {}, (Rope(1e4, 12, None), Rope(1e6, 12, None))),
}


@pytest.mark.parametrize("what", AS_FOUR_WROTE)
def test_configs_of_transformers_4_are_exported_in_both_spellings(what: str) -> None:
    case, said, ropes = AS_FOUR_WROTE[what]
    config = without(config_of(case), NEW | OLD | {"original_max_position_embeddings"}) | said
    spec = spec_of(config)
    assert spec.ropes == (ropes if len(ropes) > 1 else ropes * spec.num_layers)
    both = with_both_rope_spellings(config)
    # transformers 5 knows longrope by its later name alone
    theirs = their_rope(json.loads(json.dumps(config).replace('"su"', '"longrope"')))
    for spelled in (both, without(both, NEW), *([without(both, OLD)] if "rope_theta" in said else [])):
        assert spec_of(spelled) == spec
        assert their_rope(spelled) == theirs


def test_phi_3_s_default_factor_is_left_out_of_the_old_spelling() -> None:
    """transformers 4 wants three keys in Phi-3's rope_scaling and refuses a fourth."""
    parameters = ROPES["longrope"] | {"factor": POSITIONS / ORIGINAL}
    both = with_both_rope_spellings(config_of("phi3", rope_parameters=parameters))
    assert both["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert spec_of(both) == spec_of(without(both, NEW)) == spec_of(config_of("phi3"))
    other = with_both_rope_spellings(config_of("phi3", rope_parameters=parameters | {"factor": 2.0}))
    assert spec_of(other) == spec_of(without(other, NEW)) != spec_of(both)


# ---------------------------------------------------------------------------------------- frequencies
def settings(kind: str, dims: int) -> Iterator[Config]:
    """Parameters of a kind: those of well-known releases and others."""
    if kind == "linear":
        yield from ({"factor": f} for f in (1.5, 8.0, 40.0))
    elif kind == "llama3":
        yield from (LLAMA3 | {"factor": f, "original_max_position_embeddings": 8192} for f in (8.0, 32.0))
    elif kind == "yarn":
        plain = {"factor": 4.0, "original_max_position_embeddings": 32768}
        odd = [{}, {"truncate": False}, {"attention_factor": 1.25}, {"mscale": 1.0, "mscale_all_dim": 0.8}]
        odd += [{"mscale": 0.7, "mscale_all_dim": 0}, {"factor": 1.0}, {"beta_fast": 16.0, "beta_slow": 2.0}]
        yield from (plain | more for more in [*odd, {"factor": 40.0, "original_max_position_embeddings": 4096}])
    elif kind == "dynamic":
        yield from ({"factor": 1.0, "alpha": alpha} for alpha in (1000.0, 50.0, 1.0))
    elif kind == "longrope":
        rng = np.random.default_rng(dims)
        short, long = (1 + rng.random(dims // 2)).tolist(), (1 + 30 * rng.random(dims // 2)).tolist()
        lists = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 4096}
        yield from (lists | more for more in ({}, {"factor": 8.0}, {"attention_factor": 1.1}))
    else:
        yield {}


def their_frequencies(parameters: Config, dims: int) -> list[tuple[np.ndarray, float]]:
    """Of short samples and of long ones."""
    sizes = {"hidden_size": 2 * dims, "num_attention_heads": 2, "head_dim": dims, "max_position_embeddings": 131072}
    config = LlamaConfig(**sizes, rope_parameters=dict(parameters))
    kind = parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    if kind == "dynamic":  # in most architectures another kind, which depends on lengths
        compute = HunYuanDenseV1RotaryEmbedding.compute_ntk_alpha_rope_parameters
    found = [compute(config, seq_len=n) for n in (1, 10**6)]
    return [(tensor.numpy(), factor) for tensor, factor in found]


def frequency_gap(parameters: Config, dims: int) -> float:
    """The largest difference, in units in the last place of the frequency that is scaled."""
    rope = read_rope({"max_position_embeddings": 131072, "rope_parameters": parameters}, dims, 1e4, ntk=True)
    ours, theirs = frequencies(rope), their_frequencies(parameters, dims)
    plain = frequencies(Rope(rope.theta, dims, None)).short
    gaps = []
    for mine, (other, factor) in zip((ours.short, ours.short if ours.long is None else ours.long), theirs, strict=True):
        assert mine.dtype == other.dtype == np.float32 and mine.shape == other.shape == (dims // 2,)
        assert math.isclose(ours.factor, factor, rel_tol=1e-15)
        gaps.append(np.abs(mine.astype(np.float64) - other) / np.spacing(plain))
    return float(np.max(gaps))


# torch's float32 pow is off by one place in 1 of 150 frequencies (ours is rounded from float64); dividing, or
# blending as llama3 and YaRN do, can carry that into one place more.
PLACES = 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_rope_frequencies_equal_transformers_within_two_ulp(kind: str) -> None:
    for theta in (1e4, 5e5, 1e6, 5e6):
        for dims in (4, 6, 12, 64, 80, 96, 128, 256):
            for more in settings(kind, dims):
                gap = frequency_gap({"rope_type": kind, "rope_theta": theta} | more, dims)
                assert gap <= PLACES, (theta, dims, more)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("default", {"rope_theta": 5e5 * (1 + 1e-5)}),
        ("linear", {"factor": 1.5 * (1 + 1e-5)}),
        ("llama3", {"high_freq_factor": 4.001}),
        ("dynamic", {"alpha": 1000.0 * (1 + 1e-4)}),
        ("yarn", {"truncate": False}),
        ("yarn", {"beta_fast": 8.0}),
    ],
)
def test_a_wrong_rope_parameter_is_many_ulp_away(kind: str, change: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"rope_type": kind, "rope_theta": 5e5} | next(settings(kind, 64))
    assert frequency_gap(parameters, 64) <= PLACES
    theirs = their_frequencies(parameters, 64)
    monkeypatch.setitem(globals(), "their_frequencies", lambda *_: theirs)
    assert frequency_gap(parameters | change, 64) > 10 * PLACES


# ---------------------------------------------------------------------------------------- releases
# Releases whose config.json is tests/data/configs/<name>.json: their number of parameters as published (0 = none is
# known to the last digit), and the fields of the spec that differ from those of a plain Llama of the same sizes.
OLMO3 = Rope(5e5, 128, YarnScaling(8.0, 32.0, 1.0, 1.2079441541679836, 8192, truncate=True))
MAMBA = Mamba2(48, 32, 1, 128, 4, (0.0, float("inf")), bias=False, conv_bias=True)
CONV, LFM2 = ShortConv(3, bias=False), Rope(1e6, 64, None)
RELEASES: dict[str, tuple[int, Config]] = {
    "Llama-2-7b": (6_738_415_616, {}),
    "Llama-3.1-8B": (8_030_261_248, {}),
    "Llama-3.2-1B": (1_235_814_400, {"tie_embeddings": True}),
    "Llama-3.2-3B": (3_212_749_824, {"tie_embeddings": True}),
    "SmolLM2-135M": (134_515_008, {"tie_embeddings": True, "init_std": 1 / 24}),
    "granite-3b-code-base": (0, {"tie_embeddings": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "granite-3.3-2b-base": (
        0,
        {
            "tie_embeddings": True, "attention_scale": 0.015625, "logit_scale": 0.125, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
        },
    ),
    "granite-3.3-8b-base": (
        0,
        {
            "tie_embeddings": True, "attention_scale": 0.0078125, "logit_scale": 0.0625, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
        },
    ),
    "granite-4.0-micro": (
        0,
        {
            "tie_embeddings": True, "attention_scale": 0.015625, "logit_scale": 0.1, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22, "init_std": 0.1,
        },
    ),
    "granite-4.0-h-350m": (
        0,
        {
            "tie_embeddings": True, "attention_scale": 0.015625, "logit_scale": 1 / 3, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.246, "init_std": 0.1, "ropes": (None,) * 32,
            "mixers": tuple(None if i in (10, 13, 17, 27) else MAMBA for i in range(32)),
        },
    ),
    "Mistral-7B-v0.1": (7_241_732_096, {"windows": (4096,) * 32}),
    "Mistral-7B-v0.3": (7_248_023_552, {}),
    "Qwen2.5-0.5B": (494_032_768, {"tie_embeddings": True, "qkv_bias": True}),
    "Qwen2.5-7B": (7_615_616_512, {"qkv_bias": True}),
    "Qwen3-0.6B": (596_049_920, {"tie_embeddings": True, "qk_norm": "head", "head_dim": 128}),
    "Qwen3-4B": (4_022_468_096, {"tie_embeddings": True, "qk_norm": "head", "head_dim": 128}),
    "SmolLM3-3B": (3_075_098_624, {"tie_embeddings": True, "ropes": (*[Rope(5e6, 128, None)] * 3, None) * 9}),
    "OLMo-2-1B": (1_484_916_736, {"qk_norm": "all", "pre_norm": False, "post_norm": True}),
    "OLMo-2-7B": (0, {"qk_norm": "all", "pre_norm": False, "post_norm": True}),
    "OLMo-3-7B": (
        0,
        {
            "qk_norm": "all", "pre_norm": False, "post_norm": True, "windows": (4096, 4096, 4096, None) * 8,
            "ropes": (*[Rope(5e5, 128, None)] * 3, OLMO3) * 8,
        },
    ),
    "EXAONE-4.0-1.2B": (
        0,
        {
            "tie_embeddings": True, "qk_norm": "head", "pre_norm": False, "post_norm": True,
            "ropes": (Rope(1e6, 64, Llama3Scaling(16.0, 1.0, 4.0, 8192)),) * 30,
        },
    ),
    "LFM2-1.2B": (
        1_170_340_608,
        {
            "tie_embeddings": True, "qk_norm": "head", "d_ff": 8192, "norm_eps": 1e-5,
            "mixers": ((CONV, CONV, None) * 3 + (CONV, None) * 3 + (CONV,)),
            "ropes": ((None, None, LFM2) * 3 + (None, LFM2) * 3 + (None,)),
        },
    ),
    "LFM2-2.6B": (
        0,
        {
            "tie_embeddings": True, "qk_norm": "head", "norm_eps": 1e-5,
            "mixers": (CONV, CONV, None) * 2 + (CONV, CONV, CONV, None) * 4 + (CONV, CONV, None) * 2 + (CONV,) * 2,
        },
    ),
    "Hunyuan-7B": (0, {"qk_norm": "head_after_rope", "ropes": (Rope(1e4, 128, NTKScaling(1000.0)),) * 32}),
    "Phi-3-mini-4k": (3_821_079_552, {"windows": (2047,) * 32, "ropes": (Rope(1e4, 96, None),) * 32}),
    "Phi-3-mini-128k": (3_821_079_552, {"windows": (262144,) * 32}),
    "Phi-4-mini": (3_836_021_760, {"tie_embeddings": True, "windows": (262144,) * 32, "head_dim": 128}),
    "Gemma-2-2B": (
        2_614_341_888,
        {
            "tie_embeddings": True, "head_dim": 256, "attention_scale": 1 / 16, "windows": (4096, None) * 13,
            "attention_softcap": 50.0, "logit_softcap": 30.0, "post_norm": True, "norm_offset": 1.0,
            "embedding_multiplier": 48.0, "activation": "gelu_tanh",
        },
    ),
    "Gemma-3-1B": (
        999_885_952,
        {
            "tie_embeddings": True, "head_dim": 256, "attention_scale": 1 / 16, "qk_norm": "head", "post_norm": True,
            "windows": (*[512] * 5, None) * 4 + (512, 512), "norm_offset": 1.0, "embedding_multiplier": 1152**0.5,
            "ropes": (*[Rope(1e4, 256, None)] * 5, Rope(1e6, 256, None)) * 4 + (Rope(1e4, 256, None),) * 2,
            "activation": "gelu_tanh",
        },
    ),
}  # fmt: skip


def release_config(release: str) -> Config:
    """The config.json of a published model. Phi's RoPE factors are made up; their number is that of the release."""
    return json.loads((REPOSITORY / "tests" / "data" / "configs" / f"{release}.json").read_text())


def plain_fields(config: Config) -> Config:
    """The spec's fields where a release is as plain a Llama as its config's sizes allow."""
    layers, head_dim = config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"], "d_model": config["hidden_size"], "d_ff": config.get("intermediate_size"),
        "num_layers": layers, "num_heads": config["num_attention_heads"], "head_dim": head_dim,
        "num_kv_heads": config["num_key_value_heads"], "max_positions": config["max_position_embeddings"],
        "windows": (None,) * layers, "attention_softcap": None, "qk_norm": "none", "pre_norm": True,
        "post_norm": False, "norm_eps": config.get("rms_norm_eps"), "norm_offset": 0.0, "activation": "silu",
        "mixers": (None,) * layers,
        "qkv_bias": False, "out_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0, "logit_scale": 1.0, "logit_softcap": None, "tie_embeddings": False,
        "init_std": 0.02,
    }  # fmt: skip


def parameter_count(spec: ModelSpec) -> int:
    """Without the vocabulary's padding."""
    decoder = make_decoder(spec)
    leaves = zip(jax.tree.leaves(decoder.abstract), axes_of(decoder), strict=True)
    return sum(
        math.prod(spec.vocab_size if axis == "vocab" else n for n, axis in zip(leaf.shape, axes, strict=True))
        for leaf, axes in leaves
    )


def axes_of(decoder: Any) -> list[tuple[str, ...]]:
    return jax.tree.leaves(decoder.axes, is_leaf=lambda a: isinstance(a, tuple))


@pytest.mark.parametrize("release", RELEASES)
def test_a_published_config_has_the_parameter_count_of_transformers(release: str) -> None:
    config, (published, odd) = release_config(release), RELEASES[release]
    spec = spec_of(config)
    expected = plain_fields(config) | odd
    assert {k: getattr(spec, k) for k in expected} == expected
    if "attention_scale" not in odd:
        assert spec.attention_scale == spec.head_dim**-0.5
    with torch.device("meta"):
        kind = without(copy.deepcopy(config), {"model_type", "torch_dtype"})
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **kind))
    theirs = sum(p.numel() for p in model.parameters())  # a tied head is one parameter
    assert type(model).__name__ == config["architectures"][0]
    assert parameter_count(spec) == theirs
    assert published in (0, theirs)


@pytest.mark.parametrize(
    ("model", "release"),
    [
        ("granite-7b", "Llama-2-7b"),
        ("granite-3b", "granite-3b-code-base"),
        ("llama-3.2-3b", "Llama-3.2-3B"),
        ("mistral-7b", "Mistral-7B-v0.3"),
    ],
)
def test_the_study_s_shapes_are_those_of_the_published_models(model: str, release: str) -> None:
    file = REPOSITORY / "configs" / "paper" / "shapes" / model / "config.json"
    assert hf.spec_from_config(hf.read_config(file), file) == spec_of(release_config(release))


def test_every_family_has_a_published_config() -> None:
    published = {release_config(name)["architectures"][0] for name in (*RELEASES, *WRAPPED_RELEASES)}
    inside = {CASES[WRAPPED[a]][0] for a in published & WRAPPED.keys()}
    assert published | inside == FAMILIES.keys()


# As published for all of the checkpoint; 0 = none is known to the last digit.
WRAPPED_RELEASES = {"Gemma-3-4B": 4_300_079_472, "Ministral-3-8B": 0, "Qwen3.5-4B": 0, "Gemma-4-E2B": 0}


@pytest.mark.parametrize("release", WRAPPED_RELEASES)
def test_a_wrapped_config_has_the_parameter_count_of_transformers(release: str) -> None:
    config = release_config(release)
    with torch.device("meta"):
        kind = without(copy.deepcopy(config), {"model_type", "torch_dtype"})
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **kind))
    assert type(model).__name__ == config["architectures"][0]
    head = [] if spec_of(config).tie_embeddings else [*model.lm_head.parameters()]
    scales = [b for name, b in model.get_decoder().named_buffers() if name.endswith("layer_scalar")]
    theirs = sum(p.numel() for p in (*model.get_decoder().parameters(), *head, *scales))
    assert parameter_count(spec_of(config)) == theirs
    assert WRAPPED_RELEASES[release] in (0, sum(p.numel() for p in model.parameters()))


def test_fields_of_the_decoder_in_a_wrapped_config() -> None:
    spec = spec_of(release_config("Gemma-3-4B"))
    assert spec.windows == (*[1024] * 5, None) * 5 + (1024,) * 4
    assert set(spec.ropes) == {Rope(1e4, 256, None), Rope(1e6, 256, LinearScaling(8.0))}
    spec = spec_of(release_config("Ministral-3-8B"))
    assert spec.windows == (None,) * 34 and spec.query_scale == QueryScale(0.1, 16384)
    assert set(spec.ropes) == {Rope(1e6, 128, YarnScaling(16.0, 32.0, 1.0, 1.0, 16384, truncate=True))}
    spec = spec_of(release_config("Qwen3.5-4B"))
    assert spec.mixers == (*[GatedDelta(16, 32, 128, 128, 4)] * 3, None) * 8
    assert spec.ropes == (*[None] * 3, Rope(1e7, 64, None)) * 8 and spec.tie_embeddings and spec.attention_gate
    spec = spec_of(release_config("Gemma-4-E2B"))
    local = AttentionKind("local_attention", 256, 1, False, "own", False)
    full = AttentionKind("global_attention", 512, 1, False, "own", False)
    lent = [dataclasses.replace(kind, keys="lent") for kind in (local, full)]
    late = [dataclasses.replace(kind, keys="borrowed", wide_mlp=True) for kind in (local, full)]
    assert spec.mixers == (*([local] * 4 + [full]) * 2, *[local] * 3, *lent, *([late[0]] * 4 + [late[1]]) * 4)
    assert spec.ropes == (*[Rope(1e4, 256, None)] * 4, Rope(1e6, 512, ProportionalScaling(64, 1.0))) * 7
    assert sum(len(group.runs) for group in find_groups(spec.mixers)) == 7


PER_LAYER = {"head_dim": 16, "num_key_value_heads": 1}


def test_heads_of_gemma_4_s_global_layers_are_read_in_both_spellings() -> None:
    written = config_of("gemma4-keys")
    assert written["per_layer_config"] == {"1": PER_LAYER} and "global_head_dim" not in written
    named = without(written, {"per_layer_config"}) | {"global_head_dim": 16, "num_global_key_value_heads": 1}
    both = named | {"per_layer_config": {"1": PER_LAYER}}
    assert spec_of(named) == spec_of(both) == spec_of(written)
    kind = spec_of(written).mixers[1]
    assert (kind.head_dim, kind.num_kv_heads, kind.values_are_keys) == (16, 1, True)
    usual = spec_of(without(written, {"per_layer_config"})).mixers[1]
    assert (usual.head_dim, usual.num_kv_heads) == (512, 2)  # what absent keys mean
    unspelled = without(written, {"rope_parameters"})
    theirs = transformers.Gemma4TextConfig.from_dict(copy.deepcopy(unspelled)).rope_parameters
    assert spec_of(unspelled) == spec_of(unspelled | {"rope_parameters": theirs})


WRAPPED_ERRORS: list[tuple[Config, str]] = [
    ({"odd_key": 1}, r"not supported for Gemma3ForConditionalGeneration: odd_key=1"),
    ({"text_config": None}, r"lacks 'text_config'"),
    ({"text_config": []}, r"text_config=\[\]; it must be an object"),
    ({"text_config": {"num_hidden_layers": "x"}}, r"in text_config, num_hidden_layers='x'; it must be a whole number"),
    ({"text_config": {"hidden_size": 8}}, r"lacks 'text_config\.num_hidden_layers'"),
    ({"tie_word_embeddings": False}, r"tie_word_embeddings=False; only True is supported"),
]


def test_errors_in_a_wrapped_config_name_the_key_inside() -> None:
    config = release_config("Gemma-3-4B")
    inside = [
        ({"odd_key": 1}, r"in text_config, keys that are not supported: odd_key=1"),
        ({"tie_word_embeddings": False}, r"in text_config, tie_word_embeddings=False; only True"),
        ({"final_logit_softcapping": 30.0}, r"in text_config, final_logit_softcapping=30\.0; only None"),
    ]
    inside = [({"text_config": config["text_config"] | change}, message) for change, message in inside]
    for change, message in [*WRAPPED_ERRORS, *inside]:
        with pytest.raises(UserError, match=message):
            spec_of(config | change)
    config = release_config("Ministral-3-8B")
    with pytest.raises(UserError, match=r"in text_config, model_type='mistral'; only 'ministral3'"):
        spec_of(config | {"text_config": config["text_config"] | {"model_type": "mistral"}})
    with pytest.raises(UserError, match=r"tie_word_embeddings=True \(true if absent\), and False in text_config"):
        spec_of(without(config, {"tie_word_embeddings"}))


def test_stop_tokens_inside_a_wrapped_config_count_where_none_are_outside() -> None:
    inside = {"text_config": {"eos_token_id": 0}}
    assert stop_ids_in(inside) == stop_ids_in(inside | {"eos_token_id": None}) == [0]
    assert stop_ids_in(inside | {"eos_token_id": [1, 106]}) == [1, 106]


def test_rope_of_a_wrapped_config_is_exported_in_both_spellings() -> None:
    config = release_config("Gemma-3-4B")
    both = with_both_rope_spellings(config)
    text = both["text_config"]
    assert spec_of(both) == spec_of(both | {"text_config": without(text, NEW)}) == spec_of(config)
    theirs = [transformers.Gemma3TextConfig.from_dict(dict(t)).rope_parameters for t in (text, config["text_config"])]
    assert theirs[0] == theirs[1]


# ---------------------------------------------------------------------------------------- errors
def rope(kind: str, **more: Any) -> Config:
    return {"rope_parameters": ROPES[kind] | more}


def rope_of_windows(**more: Any) -> Config:
    full = ROPES["default"] | {"rope_theta": 5e5}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": full | more}}


UNSUPPORTED: list[tuple[str, Config, str]] = [
    ("llama", rope("linear", rope_type="ntk"), r"rope_type='ntk'; supported are default, linear"),
    ("llama", rope("dynamic"), r"rope_type='dynamic' among its RoPE parameters, which depends on the length"),
    ("hunyuan", rope("dynamic", alpha=None), r"alpha=None among its RoPE parameters; it must be a number above 0"),
    ("hunyuan", rope("dynamic", factor=2.0), r"a factor other than 1 among its RoPE parameters"),
    ("hunyuan", {"use_cla": True}, r"use_cla=True; only False is supported"),
    ("hunyuan", {"num_experts": 16}, r"not supported for HunYuanDenseV1ForCausalLM: num_experts=16"),
    ("olmo3", rope_of_windows(rope_theta=1e4), r"sliding_attention must have the rope_theta of full_attention"),
    ("olmo3", rope_of_windows(rope_type="linear", factor=2.0), r"sliding_attention must .*and rope_type 'default'"),
    ("olmo3", {"sliding_window": None}, r"layer_types=.* but no sliding_window"),
    ("ministral3", rope("yarn"), r"llama_4_scaling_beta=None among its RoPE parameters; it must be a number above 0"),
    ("ministral3", rope("linear", llama_4_scaling_beta=0.1), r"a rope_type that this architecture does not have"),
    ("exaone4", {"sliding_window": None}, r"layer_types=.* but no sliding_window"),
    ("exaone4", {"layer_types": None}, r"sliding_window_pattern='LG'; it must be a whole number"),
    ("lfm2", {"layer_types": ["conv"] * 6 + ["mamba"]}, r"layer_types=.* must list full_attention or conv for each"),
    ("lfm2", {"full_attn_idxs": [2, 7]}, r"full_attn_idxs=\[2, 7\]; it must list indices of 7 layers"),
    ("lfm2", {"full_attn_idxs": [2]}, r"layer_types=.* but full_attn_idxs=\[2\]; remove the wrong one"),
    ("lfm2", {"block_ff_dim": 50}, r"block_ff_dim=50 and intermediate_size=48, which mean the same"),
    ("lfm2", {"tie_embedding": False}, r"tie_embedding=False and tie_word_embeddings=True, which mean the same"),
    ("lfm2", {"intermediate_size": 1}, r"an MLP of width 0 after block_auto_adjust_ff_dim, from 1"),
    ("lfm2", {"conv_dim": 16}, r"conv_dim=16; only 32 is supported"),
    ("lfm2", {"block_use_swiglu": False}, r"block_use_swiglu=False; only True is supported"),
    ("llama", rope("linear", rope_type=[]), r"rope_type=\[\]"),
    ("llama", rope("linear", mrope_section=[2, 2]), r"mrope_section=\[2, 2\] among its RoPE.*rope_type='linear'"),
    ("llama", rope("linear", factor="2"), r"factor='2'"),
    ("llama", rope("linear", factor=None), r"factor=None"),
    ("llama", rope("linear", factor=-2.0), r"factor=-2\.0"),
    ("llama", rope("linear", factor=True), r"factor=True"),
    ("llama", rope("llama3", original_max_position_embeddings="8192"), r"original_max_position_embeddings='8192'"),
    ("llama", rope("llama3", original_max_position_embeddings=1), "original_max_position_embeddings=1 among"),
    ("llama", rope("linear", rope_theta=1), r"rope_theta=1\.0; it must be above 1"),
    ("llama", rope("llama3", high_freq_factor=1.0), r"high_freq_factor=1\.0 .*above low_freq_factor"),
    ("mistral-full", rope("yarn", truncate="no"), r"truncate='no'"),
    ("mistral-full", rope("yarn", mscale="1"), r"mscale='1'"),
    ("llama", {"rope_theta": 9e3}, r"rope_theta=9000\.0 in the old.* and 50000\.0 in the new"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 5.0}}, r"rope_type='linear' in the old.* and 'llama3'"),
    ("llama", {"rope_scaling": "linear"}, r"rope_scaling='linear'; it must be an object"),
    ("llama", rope("default", partial_rotary_factor=0.5), r"partial_rotary_factor that rotates 6 of 12 dims; .* all"),
    ("gemma3", {"rope_parameters": ROPES["default"]}, r"rope_parameters=.*must hold an object 'full_attention'"),
    ("phi3-mini", rope("default", partial_rotary_factor=0.25), r"partial_rotary_factor that rotates 3 of 12 dims"),
    ("phi3-mini", rope("default", partial_rotary_factor=0.01), r"partial_rotary_factor that rotates 0 of 12 dims"),
    ("phi3-mini", rope("default", partial_rotary_factor=1.5), r"partial_rotary_factor that rotates 18 of 12 dims"),
    ("phi3", rope("longrope", short_factor=[1.0, 1.1]), r"short_factor=\[1\.0, 1\.1\] .*must list 3 numbers"),
    ("phi3", rope("longrope", long_factor=[1.0, 1.1, "2"]), r"long_factor=\[1\.0, 1\.1, '2'\]"),
    ("phi3", {"original_max_position_embeddings": None}, r"lacks 'original_max_position_embeddings'"),
    ("phi3", rope("yarn"), r"a rope_type that this architecture does not have; it has default and longrope"),
    ("gemma3", {"layer_types": ["full_attention"] * 3}, r"layer_types=.*for each of 2 layers"),
    ("gemma2", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, r"layer_types=.*chunked_attention"),
    ("gemma2", {"layer_types": [["full_attention"]] * 3}, r"layer_types="),
    ("gemma2", {"sliding_window": None}, r"layer_types=.* but no sliding_window"),
    ("qwen2", {"max_window_layers": "1"}, r"max_window_layers='1'"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]; it must list 0 or 1 for each of 2"),
    ("smollm3", {"no_rope_layers": [1, "yes"]}, r"no_rope_layers=\[1, 'yes'\]"),
    ("qwen3", {"hidden_act": "relu"}, r"hidden_act='relu'; supported are silu"),
    ("gemma2", {"hidden_activation": ["silu"]}, r"hidden_activation=\['silu'\]; supported are silu"),
    ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True; only False is supported"),
    ("gemma3", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True; only False is supported"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0; only None is supported"),
    ("llama", {"rope_interleaved": True}, r"rope_interleaved=True; only False is supported"),
    ("llama", {"hidden_size": "32"}, r"hidden_size='32'; it must be a whole number"),
    ("llama", {"hidden_size": True}, r"hidden_size=True; it must be a whole number"),
    ("llama", {"num_hidden_layers": -3}, r"num_hidden_layers=-3; it must be a whole number"),
    ("llama", {"vocab_size": 1001.0}, r"vocab_size=1001\.0; it must be a whole number"),
    ("llama", {"attention_bias": "true"}, r"attention_bias='true'; it must be true or false"),
    ("granite", {"tie_word_embeddings": 1}, r"tie_word_embeddings=1; it must be true or false"),
    ("granite", {"residual_multiplier": float("inf")}, r"residual_multiplier=inf; it must be a number above 0"),
    ("granite4", {"num_local_experts": 8}, r"num_local_experts=8; mixture-of-experts layers are not supported"),
    ("granite4", {"num_local_experts": None}, r"num_local_experts=8; .*must be 0"),
    ("granite4", {"layer_types": ["mamba"]}, r"layer_types=\['mamba'\]; it must list one of attention, "),
    ("granite4", {"position_embedding_type": "alibi"}, r"position_embedding_type='alibi'; only 'rope' and 'nope'"),
    ("gemma4", {"enable_moe_block": True}, r"enable_moe_block=True; mixture-of-experts layers are not supported"),
    ("gemma4", {"use_bidirectional_attention": "all"}, r"use_bidirectional_attention='all'; only None is supported"),
    ("gemma4", {"vocab_size_per_layer_input": 900}, r"vocab_size_per_layer_input=900; only vocab_size=1001 is"),
    ("gemma4", {"num_kv_shared_layers": 3}, r"num_kv_shared_layers=3; a layer before them must have each"),
    ("gemma4", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, r"the last layer must have full_att"),
    ("gemma4", {"rope_theta": 1e4}, r"rope_theta=10000\.0; only None is supported"),
    ("gemma4", {"global_head_dim": 20}, r"per_layer_config=.* and global_head_dim=20; remove the wrong one"),
    ("gemma4", {"per_layer_config": {"1": PER_LAYER}}, r"per_layer_config=.*full_attention \(2, 4\), and of no others"),
    ("gemma4-keys", {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, r"3 key heads in layers with full_att"),
    ("gemma4", {"architectures": ["Gemma4UnifiedForConditionalGeneration"]}, r"Gemma4Unified.*: LlamaForCausalLM"),
    ("granite4-hybrid", {"mamba_d_head": 7}, r"mamba_n_heads=8; it must divide .*=64 into heads of mamba_d_head=7"),
    ("granite4-hybrid", {"time_step_limit": [0.1]}, r"time_step_limit=\[0\.1\]; it must be the least and the greatest"),
    ("granite4-hybrid", {"hidden_act": "gelu"}, r"hidden_act='gelu'; only 'silu' is supported with Mamba-2 layers"),
    ("qwen3_5", {"layer_types": ["mamba", "full_attention"]}, r"layer_types=.* linear_attention or full_attention for"),
    ("qwen3_5", {"linear_num_value_heads": 3}, r"linear_num_value_heads=3; it must be a multiple of .*heads=2"),
    ("qwen3_5", {"attn_output_gate": False}, r"attn_output_gate=False; only True is supported"),
    ("olmo2", {"rms_norm_eps": "1e-6"}, r"rms_norm_eps='1e-6'; it must be a number above 0"),
    ("mistral", {"sliding_window": -1}, r"sliding_window=-1; it must be a number above 0"),
    ("mistral", {"sliding_window": 4.5}, r"sliding_window=4\.5; it must be a whole number"),
    ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*: " + ", ".join(FAMILIES)),
    ("gemma3", {"architectures": ["Gemma3nForConditionalGeneration"]}, r"Gemma3nForConditionalGeneration.*: LlamaFor"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "message"), UNSUPPORTED)
def test_an_unsupported_value_is_an_error_with_key_value_and_file(case: str, change: Config, message: str) -> None:
    spec_of(config_of(case))  # valid before the change
    with pytest.raises(UserError, match=message) as e:
        spec_of(config_of(case, **change))
    assert str(FILE) in str(e.value)


def places(config: Config, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def replaced(config: Config, place: tuple[str, ...], value: Any) -> Config:
    key, *rest = place
    return config | {key: replaced(config[key], tuple(rest), value) if rest else value}


ODD_VALUES = [None, -1, 0, "x", [], {}, True, 1e30, [1], 1, 1.5, math.inf, math.nan, [[]], [{}], {"x": 1}]


@pytest.mark.parametrize("case", CASES)
def test_any_value_of_any_key_gives_a_spec_or_a_user_error(case: str) -> None:
    both = with_both_rope_spellings(config_of(case))
    refused = accepted = 0
    for config in (config_of(case), both, without(both, NEW)):
        for place in places(config):
            for value in ODD_VALUES:
                try:
                    spec = spec_of(replaced(config, place, value))
                except UserError as e:
                    assert str(FILE) in str(e)
                    refused += 1
                else:
                    assert all(np.isfinite(frequencies(r).short).all() for r in set(spec.ropes) if r)
                    accepted += 1
    assert refused > 200 and accepted > 200


# ---------------------------------------------------------------------------------------- a random start
SPREAD = 0.03  # no family's default
DEVIATIONS = 5.0  # of an estimate from a sample: about 2000 of them, and one such chance in two million each


def larger(case: str) -> Any:
    return their_config(case, hidden_size=48, intermediate_size=160, initializer_range=SPREAD)


def their_start(case: str) -> dict[str, np.ndarray]:
    config = larger(case)
    torch.manual_seed(1)
    model = getattr(transformers, CASES[case][0])(config)
    scales = {name: b.numpy() for name, b in model.named_buffers() if name.endswith("layer_scalar")}
    return {name: p.detach().numpy() for name, p in model.named_parameters()} | scales


def our_start(case: str) -> dict[str, np.ndarray]:
    decoder = make_decoder(spec_of(json.loads(larger(case).to_json_string())))
    params = decoder.init(jax.random.key(1))  # not jitted: cases share the shapes of their operations
    return dict(hf_arrays(params, decoder, CASES[case][0]))


def is_normal(x: np.ndarray, spread: float = SPREAD) -> bool:
    """Whether mean, variance and fourth moment are a normal sample's: in units of their own deviations."""
    z = x.astype(np.float64).ravel() / spread
    moments = [z.mean(), (z**2).mean() - 1, (z**4).mean() - 3]
    return all(abs(m) < DEVIATIONS * (v / z.size) ** 0.5 for m, v in zip(moments, (1, 2, 96), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_random_parameters_are_drawn_as_in_transformers(case: str) -> None:
    ours, theirs = our_start(case), their_start(case)
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    for name, x in theirs.items():
        if x.std() == 0:  # norms and biases
            assert x.ndim == 1 and np.array_equal(ours[name], x), name
        elif name.endswith("A_log"):  # the same rates of decay, or drawn from the same range
            drawn = [np.exp(rates) for rates in (x, ours[name])]
            assert np.allclose(*drawn) or all(0.01 <= rate <= 16 for rate in np.concatenate(drawn))
        else:
            assert x.ndim == (3 if name.endswith(("conv.weight", "conv1d.weight")) else 2), name
            assert is_normal(x) and is_normal(ours[name]), name
    weights = np.concatenate([x.ravel() for x in ours.values() if x.ndim > 1])
    assert is_normal(weights)
    layers = [x for name, x in ours.items() if name.endswith(("down_proj.weight", "w2.weight", "output_linear.weight"))]
    assert not np.array_equal(layers[0], layers[1])


def test_is_normal_rejects_other_means_spreads_and_shapes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, SPREAD, 48 * 160)
    assert is_normal(x)
    assert not is_normal(x * 1.1)
    assert not is_normal(x + 0.1 * SPREAD)
    assert not is_normal(rng.uniform(-1, 1, x.size) * SPREAD * 3**0.5)
    cut = np.concatenate([y[np.abs(y) < 2] for y in rng.normal(size=(4, 10 * x.size))])  # as nnx's default draws
    assert not is_normal(cut / cut.std() * SPREAD)
