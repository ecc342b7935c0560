"""The attention backends: the plain one against numpy in float64, the others against the plain one."""

import functools
import importlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.errors import UserError
from mice_jax.models.attention import BACKENDS, attend, choose_backend
from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.reference import reference
from models import QUICK, gap, mesh_of

BLOCKWISE = importlib.import_module("mice_jax.models.attention.blockwise")  # a function hides it by its name

# Entries are of order 1, and sums of up to 300 of them are kept in float32 (6e-8): their errors, in random
# directions, stay near 1e-6 forward. A gradient entry adds such sums over heads and queries and is of order 10.
FORWARD = 1e-5
GRADIENT = 1e-4

# Rows of 43 slots, written as (segment, slots) pairs; blocks are of 16 slots, so that the last one is cut.
ROWS = {
    "one segment through all blocks": [(1, 43)],
    "segments start and end inside blocks": [(1, 21), (2, 6), (3, 13), (0, 3)],
    "segments start and end at block edges": [(1, 16), (2, 16), (3, 11)],
    "single-token segments": [(i + 1, 1) for i in range(43)],
    "single-token segments between long ones": [(1, 15), (2, 1), (3, 1), (4, 19), (5, 1), (0, 6)],
    "padding alone": [(0, 43)],
    "whole blocks of padding at the end": [(1, 7), (0, 36)],
    "padding before and between segments": [(0, 3), (1, 20), (0, 10), (2, 2), (0, 1), (3, 7)],
    "one token at the very end": [(0, 42), (1, 1)],
}
INSIDE = "segments start and end inside blocks"


def segments_of(rows: list[list[tuple[int, int]]]) -> np.ndarray:
    return np.stack([np.concatenate([np.full(n, s, np.int32) for s, n in row]) for row in rows])


SEGMENTS = segments_of(list(ROWS.values()))


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


@functools.cache
def _jitted(f, scale: float, block: int):
    """`block`, which is read where `f` is traced, keeps two sizes of it apart."""

    def run(q, k, v, segments, d_out):
        out, pull = jax.vjp(lambda *x: f(*x, segments, scale), q, k, v)
        return out, pull(d_out)

    return jax.jit(run, compiler_options=QUICK)


def with_gradients(f, arrays: tuple[np.ndarray, ...], segments: np.ndarray, scale: float = 0.3):
    """The output, and the gradients by q, k and v."""
    q, k, v, d_out = arrays
    return _jitted(f, scale, BLOCKWISE.BLOCK)(q, k, v, segments, d_out)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLOCKWISE, "BLOCK", 16)


# ---------------------------------------------------------------------------------------- reference
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_reference_equals_attention_written_out_in_float64(heads: tuple[int, int], strict_dtypes: None) -> None:
    segments = segments_of([ROWS[INSIDE], ROWS["padding before and between segments"], ROWS["padding alone"]])
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
def assert_blockwise_is_reference(segments: np.ndarray, heads: tuple[int, int], names: Iterable[str]) -> None:
    arrays = draw(segments, *heads)
    out, grads = with_gradients(blockwise, arrays, segments)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    for row, name in enumerate(names):
        assert gap(out[row], expected[row]) < FORWARD, name
        for which, g, e in zip("qkv", grads, expected_grads, strict=True):
            assert gap(g[row], e[row]) < GRADIENT, f"{name}: gradient by {which}"


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_blockwise_equals_reference_and_so_do_its_gradients(
    heads: tuple[int, int], small_blocks: None, strict_dtypes: None
) -> None:
    assert_blockwise_is_reference(SEGMENTS, heads, ROWS)


@pytest.mark.parametrize("slots", [1, 5, 32])
def test_blockwise_equals_reference_whatever_the_number_of_slots(
    slots: int, small_blocks: None, strict_dtypes: None
) -> None:
    assert_blockwise_is_reference(SEGMENTS[:, :slots], (4, 2), ROWS)


def test_blockwise_equals_reference_at_the_block_size_of_a_run(strict_dtypes: None) -> None:
    size = BLOCKWISE.BLOCK
    packed = [(1, size - 20), (2, size + 10), (3, 1), (4, size // 2), (0, 5)]
    slots = sum(n for _, n in packed)
    assert 2 * size < slots < 3 * size
    segments = segments_of([packed, [(1, slots - 3), (0, 3)]])
    assert_blockwise_is_reference(segments, (4, 2), ["packed", "one long segment"])


@pytest.mark.parametrize("wrong", ["merged", "an edge one slot late", "padding seen"])
def test_blockwise_given_wrong_segments_differs_in_its_output_and_in_each_gradient(
    wrong: str, small_blocks: None
) -> None:
    segments = SEGMENTS
    arrays = draw(segments, 4, 2)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    if wrong == "merged":
        changed = np.minimum(segments, 1)
    elif wrong == "padding seen":
        changed = np.where(segments > 0, segments, 3).astype(np.int32)
    else:
        changed = np.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    out, grads = with_gradients(blockwise, arrays, changed)
    row = list(ROWS).index(INSIDE)
    assert gap(out[row], expected[row]) > 10 * FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g[row], e[row]) > 10 * GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gives_zeros_takes_no_gradient_and_has_no_influence(backend: str, small_blocks: None) -> None:
    arrays = draw(SEGMENTS, 4, 2)
    out, grads = with_gradients(BACKENDS[backend], arrays, SEGMENTS)
    for x in (out, *grads):
        assert not np.asarray(x)[SEGMENTS == 0].any()
        assert np.asarray(x)[SEGMENTS > 0].any(axis=(1, 2)).mean() > 0.7  # a lone token's q and k take none either
    other = tuple(np.where((SEGMENTS == 0)[..., None, None], 1e4, x).astype(np.float32) for x in arrays)
    assert gap(with_gradients(BACKENDS[backend], other, SEGMENTS), (out, grads)) == 0
    seen = with_gradients(BACKENDS[backend], other, np.where(SEGMENTS == 0, 1, SEGMENTS).astype(np.int32))
    assert gap(seen[0], out) > 1e3  # what stands there is large: seen, it would show


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_scores_do_not_overflow(backend: str, small_blocks: None) -> None:
    arrays = draw(SEGMENTS, 4, 2)
    scale = 1e3  # scores of up to 1e4: exp of one is infinite in float32
    out, grads = with_gradients(BACKENDS[backend], arrays, SEGMENTS, scale)
    # A score of 1e4 is rounded by 5e-4, and a weight with it: by far the largest error here.
    tolerance = 5e-3
    assert gap(out, in_numpy(*arrays[:3], SEGMENTS, scale)) < tolerance
    assert gap(out, in_numpy(*arrays[:3], SEGMENTS, scale / 10)) > 10 * tolerance
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_attention_differs_by_the_rounding_of_its_weights_and_output(
    backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(SEGMENTS, 4, 2))
    out, grads = with_gradients(BACKENDS[backend], narrow, SEGMENTS)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    q, k, v, _ = (np.asarray(x, np.float64) for x in narrow)
    # Scores are float32. Each weight is rounded to bfloat16 (2^-8 of itself) and so is the output: together they
    # err by at most 2^-7 of the largest value in reach.
    bound = 2**-7 * np.abs(v).max()
    expected = in_numpy(q, k, v, SEGMENTS, 0.3)
    assert gap(out, expected) < bound
    assert gap(out, in_numpy(q, k, v, np.minimum(SEGMENTS, 1), 0.3)) > 10 * bound


# ---------------------------------------------------------------------------------------- meshes
@pytest.mark.parametrize(
    ("sizes", "heads", "backend"),
    [
        ((1, 8, 1), (4, 2), "blockwise"),
        ((1, 4, 2), (4, 2), "blockwise"),
        ((2, 2, 2), (4, 2), "reference"),
        ((1, 4, 2), (6, 3), "blockwise"),  # key heads that the tensor axis does not divide
        ((2, 2, 2), (6, 3), "reference"),
        ((1, 2, 4), (8, 2), "blockwise"),
        ((2, 2, 2), (3, 1), "blockwise"),  # nor does it divide the query heads
    ],
)
def test_attention_on_a_mesh_equals_attention_on_one_device(
    sizes: tuple[int, int, int], heads: tuple[int, int], backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    segments = SEGMENTS[:8]
    arrays = draw(segments, *heads)
    expected, expected_grads = with_gradients(reference, arrays, segments)

    def on_mesh(q, k, v, s, scale):
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
