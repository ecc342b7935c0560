"""The attention backends: the plain one against numpy in float64, the others against the plain one."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import gap, mesh_of

from mice_jax.errors import UserError
from mice_jax.models.attention import BACKENDS, attend, choose_backend
from mice_jax.models.attention.blockwise import BLOCK, blockwise
from mice_jax.models.attention.reference import reference

# Entries are of order 1, and sums of up to 300 of them are kept in float32 (6e-8): their errors, in random
# directions, stay near 1e-6 forward. A gradient entry adds such sums over heads and queries and is of order 10.
FORWARD = 1e-5
GRADIENT = 1e-4

# [rows, slots] of segments, written as (segment, slots) pairs. `SMALL` are for blocks of 16 slots.
SMALL = {
    "one segment fills whole blocks": [[(1, 48)]],
    "the last block is cut": [[(1, 43)]],
    "less than one block": [[(1, 5)]],
    "segments start and end inside blocks": [[(1, 21), (2, 6), (3, 20), (0, 3)]],
    "segments start and end at block edges": [[(1, 16), (2, 32), (3, 2)]],
    "single-token segments": [[(i + 1, 1) for i in range(37)]],
    "single-token segments between long ones": [[(1, 15), (2, 1), (3, 1), (4, 19), (5, 1), (0, 4)]],
    "a row of padding among others": [[(1, 40)], [(0, 40)], [(1, 3), (2, 20), (0, 17)]],
    "padding alone": [[(0, 40)]],
    "a whole block of padding at the end": [[(1, 7), (0, 36)]],
    "padding before and between segments": [[(0, 3), (1, 20), (0, 18), (2, 2), (0, 1), (3, 10)]],
}
REAL = {
    "blocks of their real size": [[(1, 100), (2, 130), (3, 1), (4, 60), (0, 9)], [(1, 290), (0, 10)]],
}


def segments_of(rows: list[list[tuple[int, int]]]) -> np.ndarray:
    return np.stack([np.concatenate([np.full(n, s, np.int32) for s, n in row]) for row in rows])


def draw(segments: np.ndarray, n: int, k: int, h: int = 8, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(*segments.shape, heads, h) for heads in (n, k, k, n)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, scale: float) -> np.ndarray:
    """Each query by itself, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        if segments[b, t] == 0:
            continue
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = k[b, seen, n // group] @ q[b, t, n] * scale
        powers = np.exp(scores - scores.max())
        out[b, t, n] = powers / powers.sum() @ v[b, seen, n // group]
    return out


def with_gradients(f, arrays: tuple[np.ndarray, ...], segments: np.ndarray, scale: float = 0.3):  # noqa: ANN001, ANN201
    """The output, and the gradients by q, k and v."""
    *qkv, d_out = (jnp.asarray(x) for x in arrays)

    def run(q, k, v, segments):  # noqa: ANN001, ANN202
        out, pull = jax.vjp(lambda *x: f(*x, segments, scale), q, k, v)
        return out, pull(d_out)

    return jax.jit(run)(*qkv, jnp.asarray(segments))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The function hides the module of its name, hence by import_module.
    monkeypatch.setattr(importlib.import_module("mice_jax.models.attention.blockwise"), "BLOCK", 16)


# ---------------------------------------------------------------------------------------- reference
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", ["segments start and end inside blocks", "a row of padding among others"])
def test_reference_equals_attention_written_out_in_float64(
    name: str, heads: tuple[int, int], strict_dtypes: None
) -> None:
    segments = segments_of(SMALL[name])
    q, k, v, _ = draw(segments, *heads)
    expected = in_numpy(q, k, v, segments, 0.3)
    assert gap(reference(q, k, v, jnp.asarray(segments), 0.3), expected) < FORWARD
    assert gap(reference(q, k, v, jnp.asarray(segments), 0.33), expected) > 10 * FORWARD  # another scale
    merged = np.minimum(segments, 1)
    assert gap(reference(q, k, v, jnp.asarray(merged), 0.3), expected) > 10 * FORWARD
    if heads[1] == 2:  # key heads dealt to the wrong queries
        assert gap(reference(q, k[:, :, ::-1], v, jnp.asarray(segments), 0.3), expected) > 10 * FORWARD


def test_gradients_of_reference_are_the_slopes_of_attention_in_float64(strict_dtypes: None) -> None:
    segments = segments_of([[(1, 6), (2, 4), (0, 2)]])
    *qkv, d_out = arrays = draw(segments, 4, 2)
    _, grads = with_gradients(reference, arrays, segments)
    rng = np.random.default_rng(1)
    step = 1e-4  # central differences in float64 are then right to about 1e-7
    for i in range(3):
        for _ in range(10):
            at = tuple(rng.integers(0, n) for n in qkv[i].shape)
            sides = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in qkv]
                moved[i][at] += sign * step
                sides.append((in_numpy(*moved, segments, 0.3) * d_out).sum())
            assert abs((sides[0] - sides[1]) / (2 * step) - float(grads[i][at])) < FORWARD


# ---------------------------------------------------------------------------------------- blockwise
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", SMALL)
def test_blockwise_equals_reference_and_so_do_its_gradients(
    name: str, heads: tuple[int, int], small_blocks: None, strict_dtypes: None
) -> None:
    segments = segments_of(SMALL[name])
    arrays = draw(segments, *heads)
    out, grads = with_gradients(blockwise, arrays, segments)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    assert gap(out, expected) < FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g, e) < GRADIENT


@pytest.mark.parametrize("name", REAL)
def test_blockwise_equals_reference_at_the_block_size_of_a_run(name: str, strict_dtypes: None) -> None:
    segments = segments_of(REAL[name])
    assert segments.shape[1] > 2 * BLOCK and segments.shape[1] % BLOCK
    arrays = draw(segments, 4, 2)
    out, grads = with_gradients(blockwise, arrays, segments)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    assert gap(out, expected) < FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g, e) < GRADIENT


@pytest.mark.parametrize("wrong", ["merged", "an edge one slot late", "padding seen"])
def test_blockwise_given_wrong_segments_differs_in_its_output_and_in_each_gradient(
    wrong: str, small_blocks: None
) -> None:
    segments = segments_of(SMALL["segments start and end inside blocks"])
    arrays = draw(segments, 4, 2)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    if wrong == "merged":
        changed = np.where(segments > 0, 1, 0).astype(np.int32)
    elif wrong == "padding seen":
        changed = np.where(segments > 0, segments, 3).astype(np.int32)
    else:
        changed = np.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    out, grads = with_gradients(blockwise, arrays, changed)
    assert gap(out, expected) > 10 * FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g, e) > 10 * GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gives_zeros_and_takes_no_gradient(backend: str, small_blocks: None) -> None:
    segments = segments_of(SMALL["a row of padding among others"])
    out, grads = with_gradients(BACKENDS[backend], draw(segments, 4, 2), segments)
    for x in (out, *grads):
        assert not np.asarray(x)[segments == 0].any()
        assert np.asarray(x)[segments > 0].any(axis=(1, 2)).mean() > 0.9  # and elsewhere it is not all zero


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_padding_has_no_influence(backend: str, small_blocks: None) -> None:
    segments = segments_of(SMALL["padding before and between segments"])
    arrays = draw(segments, 4, 2)
    other = tuple(np.where((segments == 0)[..., None, None], 1e4, x).astype(np.float32) for x in arrays)
    (out, grads), (out2, grads2) = (with_gradients(BACKENDS[backend], a, segments) for a in (arrays, other))
    assert gap(out, out2) == 0
    assert gap(grads, grads2) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_scores_do_not_overflow(backend: str, small_blocks: None) -> None:
    segments = segments_of(SMALL["the last block is cut"])
    arrays = draw(segments, 4, 2)
    scale = 1e3  # scores of several thousand: exp of one is infinite in float32
    out, grads = with_gradients(BACKENDS[backend], arrays, segments, scale)
    # A score of 1e4 is rounded by 5e-4, and a weight with it: by far the largest error here.
    assert gap(out, in_numpy(*arrays[:3], segments, scale)) < 5e-3
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_attention_differs_by_the_rounding_of_its_weights_and_values(
    backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    segments = segments_of(SMALL["segments start and end inside blocks"])
    arrays = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in draw(segments, 4, 2))
    narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    out = jax.jit(lambda q, k, v: BACKENDS[backend](q, k, v, jnp.asarray(segments), 0.3))(*narrow[:3])
    assert out.dtype == jnp.bfloat16
    # Scores are float32. Each weight is rounded to bfloat16 (2^-9 of itself) and so is the output: together they
    # err by at most 2^-8 of the largest value in reach.
    bound = 2**-8 * np.abs(arrays[2]).max()
    expected = in_numpy(*arrays[:3], segments, 0.3)
    assert gap(out, expected) < bound
    # Scores in bfloat16 would not do: those of a few units err by 2^-7, and weights by as much of themselves.
    rounded = in_numpy(*arrays[:3], np.minimum(segments, 1), 0.3)
    assert gap(rounded, expected) > 10 * bound  # nor wrong segments


# ---------------------------------------------------------------------------------------- meshes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 3), (3, 1)])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_attention_on_a_mesh_equals_attention_on_one_device(
    sizes: tuple[int, int, int], heads: tuple[int, int], backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    rows = [[(1, 21), (2, 6), (0, 6)], [(0, 33)], [(i + 1, 1) for i in range(33)], [(1, 33)]] * 2
    segments = segments_of(rows)
    arrays = draw(segments, *heads)
    expected, expected_grads = with_gradients(reference, arrays, segments)

    def on_mesh(q, k, v, s, scale):  # noqa: ANN001, ANN202
        return attend(q, k, v, s, scale=scale, backend=backend)

    with jax.set_mesh(mesh_of(*sizes)):
        out, grads = with_gradients(on_mesh, arrays, segments)
        wrong, _ = with_gradients(on_mesh, arrays, np.roll(segments, 1, axis=0))
    assert gap(out, expected) < FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g, e) < GRADIENT
    assert gap(wrong, expected) > 10 * FORWARD  # each row with the segments of another


def test_auto_takes_a_backend_that_is_there_and_an_unknown_name_is_refused() -> None:
    assert choose_backend("auto") in BACKENDS
    assert choose_backend("reference") == "reference"
    with pytest.raises(UserError, match=r"model\.attention='flash'.*reference, blockwise"):
        choose_backend("flash")
