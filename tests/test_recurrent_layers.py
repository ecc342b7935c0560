"""Models in which some layers have a recurrent mixer: size of the program, remat, costs, and what cannot branch.

Parity with transformers, packing and decoding are in test_families.py, test_family_sampling.py and test_scoring.py.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import mesh_of, packed, sample_of, spec_of
from helpers.runs import REPOSITORY
from mice_jax.hardware import train_flops
from mice_jax.inference.sampler import cast_params
from mice_jax.models import hf
from mice_jax.models.attention.tree import Trees
from mice_jax.models.mixers import MIXERS
from mice_jax.models.spec import GatedDelta, Mamba2, Mixer, ModelSpec, ShortConv
from mice_jax.models.transformer import Compute, Decoder, empty_cache, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import replicated_dims
from mice_jax.step import batch_loss

CONV = ShortConv(3, bias=False)
MAMBA = Mamba2(4, 8, 1, 16, taps=4, time_step_limits=(0, math.inf), bias=False, conv_bias=True)
DELTA = GatedDelta(2, 4, 8, 8, taps=4)
PERIOD: tuple[Mixer | None, ...] = (CONV, CONV, None)
ROWS = packed([[sample_of(20, slice(0, 20), np.random.default_rng(0))]], 96)  # more slots than MAX_DECODE_SLOTS


def spec_with(mixers: tuple[Mixer | None, ...], **changes: Any) -> ModelSpec:
    return spec_of(mixers=mixers, **{"num_layers": len(mixers)} | changes)


def program_of(decoder: Decoder, remat: str = "full") -> str:
    """The loss and its gradients before XLA compiles them."""
    compute = Compute(jnp.dtype("float32"), "reference", remat)

    def loss(params: Any, rows: Any) -> jax.Array:
        return batch_loss(decoder, params, rows, compute, chunk_size=96)[0]

    return str(jax.make_jaxpr(jax.value_and_grad(loss))(decoder.abstract, ROWS))


@functools.cache
def products_of(mixers: tuple[Mixer | None, ...], remat: str = "full") -> int:
    return program_of(make_decoder(spec_with(mixers)), remat).count("dot_general")


def test_the_program_does_not_grow_with_depth_but_with_irregularity() -> None:
    assert products_of(PERIOD * 2) == products_of(PERIOD * 3)
    assert products_of(PERIOD * 2) < products_of((*PERIOD, None, *PERIOD)) < products_of(PERIOD * 2) * 3
    head = products_of(PERIOD * 2) - products_of((None,) * 3)  # one more layer is compiled, a convolution
    assert 0 < head < products_of((None,) * 3)


def test_remat_recomputes_a_short_convolution_s_products_as_documented() -> None:
    none, dots, full = (products_of(PERIOD * 2, remat) for remat in ("none", "dots", "full"))
    # `full` computes again, in each of two layers, all products but the last of the MLP: four of a mixer and two. The
    # reference attention has two products besides those with weights, which `dots` computes again too.
    assert dots - none == 2 and full - none == 2 * (4 + 2) + 2


@pytest.mark.parametrize("mixer", [MAMBA, DELTA], ids=["mamba2", "gated delta"])
def test_remat_dots_does_not_compute_a_scan_again(mixer: Mixer) -> None:
    none, dots, full = (products_of((mixer, mixer), remat) for remat in ("none", "dots", "full"))
    assert dots <= none  # a scan has at least four
    assert full - dots > 8  # with the scan, and products with weights


def test_flops_of_short_convolutions_are_as_counted_by_hand() -> None:
    sizes = {"vocab_size": 11, "d_model": 6, "d_ff": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 5}
    # A token's multiply-adds: three projections of 6 x 6, three taps of 6 channels, an output of 6 x 6, an MLP of three
    # products of 6 x 10; and 6 x 11 logits at the end. The pairs of tokens are those of the one layer with attention.
    conv, attention, mlp = 4 * 36 + 18, 6 * (20 + 10 + 10) + 120, 180
    expected = 2 * 3 * (11 * (2 * conv + attention + 3 * mlp + 66) + (49 + 16) / 2 * (5 + 5) * 4)
    assert train_flops(spec_with((CONV, None, CONV), **sizes), np.array([7, 4])) == expected
    assert train_flops(spec_with((CONV, None, None), **sizes), np.array([7, 4])) != expected


def test_a_tree_with_branches_is_refused_by_a_recurrent_model() -> None:
    decoder = make_decoder(spec_with(PERIOD))
    slots = jnp.zeros((1, 32), jnp.int32)

    def hidden(params: Any) -> jax.Array:
        compute = Compute(jnp.dtype("float32"), "reference", "none")
        return decoder.bind(params).hidden_of_trees(slots, slots, Trees(slots, slots, slots, slots), compute)

    with pytest.raises(ValueError, match="ShortConvMixer cannot continue one state along several branches"):
        jax.eval_shape(hidden, decoder.abstract)


def test_kernels_stay_in_float32_and_are_no_matrices_for_muon() -> None:
    decoder = make_decoder(spec_with((ShortConv(3, bias=True), None)))
    cast = jax.eval_shape(lambda p: cast_params(p, jnp.bfloat16), decoder.abstract)["layers"]["short_conv"]
    assert {name for name, x in cast.items() if x.dtype == jnp.float32} == {"kernel", "kernel_bias"}
    settings: dict[str, Any] = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    state = jax.eval_shape(make_optimizer(name="muon", axes=decoder.axes, **settings).init, decoder.abstract)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    with_adam = {n.split("'")[-2] for n in names if ".nu" in n and "short_conv" in n}
    assert with_adam == {"kernel", "kernel_bias", "b_bias", "c_bias", "x_bias", "out_bias"}


def test_channels_are_split_over_the_tensor_axis() -> None:
    decoder = make_decoder(spec_with(PERIOD, d_model=36), 8)
    found = replicated_dims(decoder.abstract, decoder.axes, mesh_of(1, 1, 8))
    assert "layers.short_conv.kernel channels=36" in found
    found = replicated_dims(decoder.abstract, decoder.axes, mesh_of(1, 2, 4))
    assert not any("short_conv" in line for line in found)


def test_the_cache_of_a_recurrent_layer_is_its_state_and_does_not_grow() -> None:
    spec = spec_with(PERIOD)
    short, long = (empty_cache(spec, 2, slots, jnp.float32) for slots in (8, 64))
    assert [x.shape for x in short[:2]] == [x.shape for x in long[:2]] == [(2, 2, 32)] * 2
    assert short[2][0].shape == (2, 2, 12, 8) and long[2][0].shape == (2, 2, 12, 64)


# ---------------------------------------------------------------------------------------- memory
KINDS_OF_LAYERS: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": {"layer_types": "mamba"},
    "Qwen3.5-4B": {"layer_types": "linear_attention", "full_attention_interval": 99},
    "LFM2-1.2B": {"full_attn_idxs": []},
}


def spec_of_depth(release: str, layers: int) -> ModelSpec:
    """A published model with recurrent layers of one kind only."""
    config = json.loads((REPOSITORY / "tests" / "data" / "configs" / f"{release}.json").read_text())
    changes = KINDS_OF_LAYERS[release] | {"num_hidden_layers": layers}
    if kind := changes.get("layer_types"):
        changes["layer_types"] = [kind] * layers
    if text := config.get("text_config"):
        return hf.spec_from_config(config | {"text_config": text | changes}, Path("config.json"))
    return hf.spec_from_config(config | changes, Path("config.json"))


def saved_bytes_per_slot(spec: ModelSpec, slots: int) -> float:
    """The bytes per slot that JAX keeps for the backward pass in bfloat16, of arrays that have the slots as a dim."""
    decoder, compute = make_decoder(spec), Compute(jnp.bfloat16, "blockwise", "none")
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), decoder.abstract)
    row = jax.ShapeDtypeStruct((1, slots), jnp.int32)

    def backward(params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> Any:
        return jax.vjp(lambda p: decoder.bind(p).hidden(tokens, positions, segments, compute), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, row, row, row))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept if slots in x.shape) / slots


@pytest.mark.parametrize("release", KINDS_OF_LAYERS)
def test_memory_model_counts_what_jax_saves_of_a_recurrent_layer(release: str) -> None:
    two, four = (spec_of_depth(release, layers) for layers in (2, 4))
    of_layer = (saved_bytes_per_slot(four, 448) - saved_bytes_per_slot(two, 448)) / 2
    kind: Any = two.mixers[0]
    widths = MIXERS[type(kind)].widths(two, kind, tensor=1, lanes=1)
    counted = 2 * (10 * two.d_model + 6 * two.d_ff_of(kind) + widths.saved) + 4 * widths.saved_float32
    assert counted == pytest.approx(of_layer, rel=0.02)  # what has one number for each head or slot is left out
    assert release == "LFM2-1.2B" or counted - 2 * widths.saved_float32 < 0.9 * of_layer, "float32 counted as bfloat16"
