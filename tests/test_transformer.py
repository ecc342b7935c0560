"""The decoder: a packed row equals its samples run alone; remat, meshes and a cache change rounding only."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import QUICK, VOCAB, Sample, gap, mesh_of, packed, random_params, relative_gap, sample_of, spec_of
from mice_jax.models.transformer import Compute, Decoder, Params, empty_cache, make_decoder
from mice_jax.sharding import param_shardings
from mice_jax.step import batch_loss

# Logits are of order 10 and gradients are compared in units of the largest entry of their parameter: a few tens of
# float32 roundings (6e-8) of values added in another order.
LOGITS = 1e-4
GRADIENT = 1e-5
LOSS = 1e-6  # of the value

DECODER = make_decoder(spec_of())
PLAIN = Compute(jnp.dtype("float32"), "reference", "none")
BLOCKED = dataclasses.replace(PLAIN, attention="blockwise")

Result = tuple[jax.Array, jax.Array, Any]  # logits [B T V], loss_sum, its gradients


def forward_and_backward(decoder: Decoder, compute: Compute):
    def loss(params, batch):
        loss_sum, _ = batch_loss(decoder, params, batch, compute, chunk_size=32)
        return loss_sum

    def run(params, batch):
        model = decoder.bind(params)
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], compute)
        return model.logits(hidden), *jax.value_and_grad(loss)(params, batch)

    return run


@functools.cache
def params() -> Params:
    return random_params(DECODER)


@functools.cache
def _jitted(decoder: Decoder, compute: Compute):
    return jax.jit(forward_and_backward(decoder, compute), compiler_options=QUICK)


def run(batch: dict[str, np.ndarray], compute: Compute = PLAIN) -> Result:
    return _jitted(DECODER, compute)(params(), batch)


def alone(sample: Sample) -> dict[str, np.ndarray]:
    """One sample in a row of its own of 60 slots, so that one program runs all, written without the loader."""
    tokens, trained = (np.pad(x, (0, 60 - len(x)))[None] for x in sample)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, axis=1).astype(np.int32),
        "segment_ids": (np.arange(60)[None] < len(sample[0])).astype(np.int32),
        "positions": np.arange(60, dtype=np.int32)[None],
        "loss_weights": np.append(trained[:, 1:], [[False]], axis=1).astype(np.float32),
    }


# ---------------------------------------------------------------------------------------- packing
@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """They start and end inside blocks of attention. One is a single token, one starts with a trained token."""
    rng = np.random.default_rng(0)
    parts = [(60, slice(30, 60)), (1, slice(0, 0)), (60, slice(0, 60)), (60, [59])]
    return [sample_of(n, trained, rng) for n, trained in parts]


@pytest.fixture(scope="module")
def row(samples: list[Sample]) -> dict[str, np.ndarray]:
    return packed([samples], 190)  # nine slots of padding


@pytest.fixture(scope="module")
def run_alone(samples: list[Sample]) -> Result:
    results = jax.device_get([run(alone(s)) for s in samples])
    logits = np.concatenate([r[0][:, : len(s[0])] for r, s in zip(results, samples, strict=True)], axis=1)
    return logits, sum(r[1] for r in results), jax.tree.map(lambda *g: sum(g), *(r[2] for r in results))


@pytest.mark.parametrize("compute", [PLAIN, BLOCKED], ids=lambda c: c.attention)
def test_a_packed_row_equals_its_samples_run_alone(
    compute: Compute, row: dict[str, np.ndarray], run_alone: Result, strict_dtypes: None
) -> None:
    logits, loss, grads = run(row, compute)
    expected_logits, expected_loss, expected_grads = run_alone
    assert gap(logits[:, :181], expected_logits) < LOGITS
    assert abs(loss - expected_loss) < LOSS * expected_loss
    assert relative_gap(grads, expected_grads) < GRADIENT


@pytest.mark.parametrize("wrong", ["segments merged", "an edge one slot late", "positions that stand still"])
def test_wrong_masks_or_positions_change_a_packed_row(
    wrong: str, row: dict[str, np.ndarray], run_alone: Result
) -> None:
    segments = row["segment_ids"]
    if wrong == "segments merged":
        changed = {"segment_ids": np.minimum(segments, 1)}
    elif wrong == "an edge one slot late":
        changed = {"segment_ids": np.roll(segments, 1, axis=1) * (segments > 0)}
    else:
        changed = {"positions": row["positions"] // 2}
    logits, loss, grads = run(row | changed, BLOCKED)
    assert gap(logits[:, :181], run_alone[0]) > 10 * LOGITS
    assert abs(loss - run_alone[1]) > 10 * LOSS * run_alone[1]
    # Not one parameter's gradient is right, but for the norms' and biases' it is a matter of degree.
    gaps = jax.tree.leaves(jax.tree.map(relative_gap, grads, run_alone[2]))
    assert min(gaps) > 10 * GRADIENT


def test_positions_that_do_not_restart_change_rounding_only(row: dict[str, np.ndarray], run_alone: Result) -> None:
    """Rotations are relative, so logits cannot show it; tests/test_step.py checks the positions themselves."""
    logits, _, _ = run(row | {"positions": np.arange(190, dtype=np.int32)[None]}, BLOCKED)
    assert 0 < gap(logits[:, :181], run_alone[0]) < LOGITS


def test_padding_content_changes_neither_loss_nor_gradients(row: dict[str, np.ndarray]) -> None:
    before = run(row, BLOCKED)
    tokens, targets, positions = row["tokens"].copy(), row["targets"].copy(), row["positions"].copy()
    tokens[:, 181:], targets[:, 181:], positions[:, 181:] = 7, 9, 100
    after = run(row | {"tokens": tokens, "targets": targets, "positions": positions}, BLOCKED)
    assert float(before[1]) == float(after[1])
    assert gap(before[2], after[2]) == 0
    tokens[:, 180] = (tokens[:, 180] + 1) % VOCAB  # the last real token is not padding
    assert gap(run(row | {"tokens": tokens}, BLOCKED)[0][:, :181], before[0][:, :181]) > 10 * LOGITS


# ---------------------------------------------------------------------------------------- remat
def products_of(compute: Compute, batch: dict[str, np.ndarray]) -> int:
    return str(jax.make_jaxpr(forward_and_backward(DECODER, compute))(params(), batch)).count("dot_general")


@pytest.mark.slow
def test_remat_policies_give_equal_gradients_and_recompute_as_documented(
    row: dict[str, np.ndarray], strict_dtypes: None
) -> None:
    batch = {name: x[:, :64] for name, x in row.items()}
    results, products = {}, {}
    for remat in ("none", "dots", "full", "offload"):
        compute = dataclasses.replace(PLAIN, remat=remat)
        results[remat] = run(batch, compute)
        products[remat] = products_of(compute, batch)
    assert products["none"] < products["dots"] < products["full"]
    assert products["offload"] == products["full"]
    assert relative_gap(results["offload"][2], results["full"][2]) == 0
    for remat in ("dots", "full"):
        assert gap(results[remat][0], results["none"][0]) < LOGITS
        assert relative_gap(results[remat][2], results["none"][2]) < GRADIENT
    again = dataclasses.replace(BLOCKED, remat="dots")
    assert relative_gap(run(batch, again)[2], results["none"][2]) < GRADIENT
    blocked = {r: products_of(dataclasses.replace(BLOCKED, remat=r), batch) for r in ("none", "dots", "full")}
    assert blocked["none"] == blocked["dots"] < blocked["full"]  # our own attention kernel is not run twice
    other = run(batch | {"tokens": np.roll(batch["tokens"], 1)})
    assert relative_gap(other[2], results["none"][2]) > 10 * GRADIENT


# ---------------------------------------------------------------------------------------- init
@functools.cache
def drawn(sizes: tuple[int, int, int], seed: int) -> Params:
    """Random parameters that were drawn on a mesh."""
    tree = _init(sizes)(jax.random.key(seed))
    assert tree["embed"]["table"].sharding.is_fully_replicated == (sizes == (1, 1, 1))
    return jax.device_get(tree)


@functools.cache
def _init(sizes: tuple[int, int, int]):
    mesh, decoder = mesh_of(*sizes), make_decoder(SPEC, sizes[2])
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    # As in a run: without fusion emitters, which tests leave out, the last bit depends on how arrays are split.
    options = QUICK | {"xla_cpu_use_fusion_emitters": True}
    return jax.jit(decoder.init, out_shardings=shardings, compiler_options=options)


SPEC = spec_of(vocab_size=1001, d_model=48)


def test_random_parameters_are_the_same_on_every_mesh() -> None:
    trees = []
    for sizes in [(1, 1, 1), (1, 2, 3)]:
        tree = {name: dict(part) for name, part in drawn(sizes, 3).items()}
        assert gap(tree, drawn(sizes, 4)) > 0.1
        for part, name in (("embed", "table"), ("head", "weight")):
            rows = make_decoder(SPEC, sizes[2]).vocab_rows
            assert tree[part][name].shape[0] == rows and rows % sizes[2] == 0 and not tree[part][name][1001:].any()
            tree[part][name] = tree[part][name][:1001]  # a tensor axis of 3 asks for more padding
        trees.append(tree)
    assert SPEC.vocab_size % 3 and gap(*trees) == 0


def test_random_parameters_are_normal_and_differ_between_layers() -> None:
    params = drawn((1, 1, 1), 3)
    assert set(params) == {"embed", "layers", "final_norm", "head"}
    for weight in (params["embed"]["table"][:1001], params["layers"]["mlp"]["gate"]):
        n = weight.size  # the deviation of n draws is right to 1 / sqrt(2n); four of those
        assert abs(float(jnp.std(weight)) / 0.2 - 1) < 4 / np.sqrt(2 * n)
        assert abs(float(jnp.mean(weight))) < 4 * 0.2 / np.sqrt(n)
    gate = params["layers"]["mlp"]["gate"]
    assert gap(gate[0], gate[1]) > 0.2
    assert gap(params["layers"]["mlp_norm"]["scale"], 1) == 0
    assert not np.asarray(params["layers"]["attention"]["q_bias"]).any()


# ---------------------------------------------------------------------------------------- decoding
def test_decoding_with_a_cache_equals_the_whole_sequence(strict_dtypes: None) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (3, 12))
    segments = np.ones((3, 12), np.int32)
    expected = jax.jit(lambda *x: DECODER.bind(params()).hidden(*x, PLAIN), compiler_options=QUICK)(
        tokens, positions, segments
    )
    layers = DECODER.unstack(params())
    step = jax.jit(lambda *x: DECODER.bind(params()).decode(*x, layers), compiler_options=QUICK)

    def decoded(late: int = 0) -> jax.Array:
        """Four tokens at once, four more, then one by one; `late` slots too far from the fifth on."""
        cache = empty_cache(DECODER.spec, 3, 20, jnp.float32)
        out = []
        for start, stop in [(0, 4), (4, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
            shifted = positions[:, start:stop] + np.int32(late if start else 0)
            hidden, cache = step(tokens[:, start:stop], shifted, np.full(3, 12, np.int32), cache)
            out.append(hidden)
        return jnp.concatenate(out, axis=1)

    hidden_tolerance = 1e-5  # normalised: of order 1
    assert gap(decoded(), expected) < hidden_tolerance
    wrong = decoded(late=1)
    assert gap(wrong[:, :4], expected[:, :4]) < hidden_tolerance < gap(wrong[:, 4:], expected[:, 4:]) / 10
