"""The attention backends: the reference one against numpy in float64, the others against the reference.

The kernels for TPUs and GPUs run here in interpreted mode. cuDNN's kernel cannot be interpreted; a function that does
what its documentation says takes its place.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from helpers.kernels import CUDNN, KERNELS, packed_attention
from helpers.models import QUICK, gap, mesh_of
from mice_jax.errors import UserError
from mice_jax.models.attention import BACKENDS, Backend, Kernel, attend
from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.cudnn import cudnn
from mice_jax.models.attention.pallas import Blocks, pallas
from mice_jax.models.attention.reference import masked, reference
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import first_visible_key, last_visible_query, zero_padding
from mice_jax.models.attention.splash import BLOCK
from mice_jax.packing_limits import max_segments

OTHERS = [name for name in KERNELS if name != "reference"]
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
PACKED = [(1, 44), (2, 74), (3, 1), (4, 32), (5, 100), (0, 49)]  # 300 slots, for blocks of 64 or 128

PLAIN = Scoring(scale=0.3, window=None, softcap=None)
CAPPED = dataclasses.replace(PLAIN, softcap=1.5)  # scores are of order 1: half of them bend by a tenth or more
BOTH = dataclasses.replace(CAPPED, window=20)  # more than a block, less than a long segment


def windowed(window: int | None) -> Scoring:
    return dataclasses.replace(PLAIN, window=window)


# Each scoring with others that the test must tell it apart from. A window longer than the row equals no window.
SCORINGS = {
    "window of one slot": (windowed(1), [windowed(2)]),
    "window that ends on the last slot of a block": (windowed(18), [windowed(17), windowed(19)]),
    "window over blocks": (windowed(33), [windowed(32), windowed(34)]),
    "window beyond the row": (windowed(100), [windowed(42)]),
    "window and soft cap": (
        BOTH,
        [
            CAPPED,
            windowed(20),
            *(dataclasses.replace(BOTH, window=w) for w in (19, 21)),
            dataclasses.replace(BOTH, softcap=1.6),
        ],
    ),
}
# The blockwise backend has all of them; each other one has the soft cap and a window at an edge of its own. Some have
# other heads of queries and keys than every other test.
HEADS = (4, 2)
SCORED = [
    *(("blockwise", name, (4, 4) if name == "window over blocks" else HEADS) for name in SCORINGS),
    *((backend, "window and soft cap", HEADS) for backend in ("reference", "pallas", "splash")),
    ("reference", "window of one slot", HEADS),
    ("pallas", "window that ends on the last slot of a block", HEADS),
    ("pallas", "window of one slot", (3, 1)),
    ("splash", "window over blocks", (3, 1)),
    ("splash", "window that ends on the last slot of a block", HEADS),
]


def segments_of(rows: list[list[tuple[int, int]]]) -> np.ndarray:
    return np.stack([np.concatenate([np.full(n, s, np.int32) for s, n in row]) for row in rows])


SEGMENTS = segments_of(list(ROWS.values()))


def draw(segments: np.ndarray, n: int, k: int, h: int = 8, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(*segments.shape, heads, h) for heads in (n, k, k, n)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def each_query(
    q: np.ndarray, k: np.ndarray, segments: np.ndarray, scoring: Scoring
) -> Iterator[tuple[tuple[int, int, int], tuple[int, list[int], int], np.ndarray, np.ndarray]]:
    """Where a query (row, slot, head) stands and where its keys do, their weights, and their capped scores' slopes."""
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        if segments[b, t] == 0:
            continue
        first = 0 if scoring.window is None else max(0, t + 1 - scoring.window)
        keys = b, [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]], n // group
        scores, slopes = k[keys] @ q[b, t, n] * scoring.scale, 1.0
        if scoring.softcap is not None:
            slopes = np.cosh(np.clip(scores / scoring.softcap, -300, 300)) ** -2.0  # beyond, cosh is infinite
            scores = np.tanh(scores / scoring.softcap) * scoring.softcap
        powers = np.exp(scores - scores.max())
        yield (b, t, n), keys, powers / powers.sum(), slopes * np.ones_like(scores)


def in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, scoring: Scoring) -> np.ndarray:
    """Each query by itself, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for query, keys, weights, _ in each_query(q, k, segments, scoring):
        out[query] = weights @ v[keys]
    return out


def gradients_in_numpy(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, segments: np.ndarray, scoring: Scoring
) -> tuple[np.ndarray, ...]:
    """The gradients of sum(out * d_out) by q, k and v, likewise."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for query, keys, weights, slopes in each_query(q, k, segments, scoring):
        d_weights = v[keys] @ d_out[query]
        d_products = weights * (d_weights - weights @ d_weights) * slopes * scoring.scale
        dq[query] = d_products @ k[keys]
        dk[keys] += np.outer(d_products, q[query])
        dv[keys] += np.outer(weights, d_out[query])
    return dq, dk, dv


@functools.cache
def _jitted(f, scoring: Scoring, block: int):
    """`block` is read while `f` is traced, so it is part of the key of this cache."""

    def run(q, k, v, segments, d_out):
        out, pull = jax.vjp(lambda *x: f(*x, segments, scoring), q, k, v)
        return out, pull(d_out)

    return jax.jit(run, compiler_options=QUICK)


def with_gradients(f, arrays: tuple[np.ndarray, ...], segments: np.ndarray, scoring: Scoring = PLAIN):
    """The output, and the gradients by q, k and v."""
    q, k, v, d_out = arrays
    return _jitted(f, scoring, BLOCKWISE.BLOCK)(q, k, v, segments, d_out)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLOCKWISE, "BLOCK", 16)


# ---------------------------------------------------------------------------------------- reference
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("scoring", [PLAIN, BOTH])
def test_reference_equals_float64_attention(scoring: Scoring, heads: tuple[int, int], strict_dtypes: None) -> None:
    segments = segments_of([ROWS[INSIDE], ROWS["padding before and between segments"], ROWS["padding alone"]])
    q, k, v, _ = draw(segments, *heads)
    expected = in_numpy(q, k, v, segments, scoring)
    assert gap(reference(q, k, v, jnp.asarray(segments), scoring), expected) < FORWARD
    other_scale = dataclasses.replace(scoring, scale=0.33)
    assert gap(reference(q, k, v, jnp.asarray(segments), other_scale), expected) > 10 * FORWARD
    merged = np.minimum(segments, 1)
    assert gap(reference(q, k, v, jnp.asarray(merged), scoring), expected) > 10 * FORWARD
    if heads[1] == 2:  # key heads dealt to the wrong queries
        assert gap(reference(q, k[:, :, ::-1], v, jnp.asarray(segments), scoring), expected) > 10 * FORWARD


@pytest.mark.parametrize("scoring", [PLAIN, BOTH, dataclasses.replace(BOTH, window=3)])
def test_float64_gradients_equal_finite_differences(scoring: Scoring) -> None:
    segments = segments_of([[(1, 6), (2, 4), (0, 2)]])
    *qkv, d_out = arrays = draw(segments, 4, 2)
    grads = gradients_in_numpy(*arrays, segments, scoring)
    wrong = gradients_in_numpy(*arrays, segments, dataclasses.replace(scoring, scale=0.3001))
    rng = np.random.default_rng(1)
    # A third derivative of order 1 times step^2 / 6 is below 1e-8, and float64 adds 1e-16 / step.
    step, tolerance = 1e-4, 1e-7
    for i in range(3):
        errors = []
        for _ in range(10):
            at = tuple(rng.integers(0, n) for n in qkv[i].shape)
            sides = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in qkv]
                moved[i][at] += sign * step
                sides.append((in_numpy(*moved, segments, scoring) * d_out).sum())
            slope = (sides[0] - sides[1]) / (2 * step)
            assert abs(slope - grads[i][at]) < tolerance
            errors.append(abs(slope - wrong[i][at]))
        assert max(errors) > 10 * tolerance


def test_masked_attention_uses_only_the_given_mask(strict_dtypes: None) -> None:
    q, k, v, _ = draw(SEGMENTS[:1], 4, 2)  # one segment
    causal = jnp.tril(jnp.ones((1, q.shape[1], q.shape[1]), bool))
    out = masked(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), causal, BOTH)
    assert gap(out, in_numpy(q, k, v, SEGMENTS[:1], CAPPED)) < FORWARD
    assert gap(out, in_numpy(q, k, v, SEGMENTS[:1], BOTH)) > 10 * FORWARD


# ---------------------------------------------------------------------------------------- windows and soft caps
@pytest.mark.parametrize(("backend", "name", "heads"), SCORED)
def test_windows_and_soft_caps_equal_float64_with_gradients(
    backend: str, name: str, heads: tuple[int, int], small_blocks: None, strict_dtypes: None
) -> None:
    scoring, others = SCORINGS[name]
    arrays = draw(SEGMENTS, *heads)
    out, grads = with_gradients(KERNELS[backend], arrays, SEGMENTS, scoring)
    expected, expected_grads = written_out(scoring, heads)
    for row, kind in enumerate(ROWS):
        assert gap(out[row], expected[row]) < FORWARD, kind
        for which, g, e in zip("qkv", grads, expected_grads, strict=True):
            assert gap(g[row], e[row]) < GRADIENT, f"{kind}: gradient by {which}"
    for other in others:
        wrong, wrong_grads = written_out(other, heads)
        assert gap(out, wrong) > 10 * FORWARD
        for g, e in zip(grads, wrong_grads, strict=True):
            assert gap(g, e) > 10 * GRADIENT


@functools.cache
def written_out(scoring: Scoring, heads: tuple[int, int] = HEADS) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Output and gradients in float64 on SEGMENTS."""
    arrays = draw(SEGMENTS, *heads)
    return in_numpy(*arrays[:3], SEGMENTS, scoring), gradients_in_numpy(*arrays, SEGMENTS, scoring)


def test_softcap_gradient_without_its_derivative_is_detected() -> None:
    slopeless = list(each_query(*draw(SEGMENTS, 4, 2)[:2], SEGMENTS, CAPPED))
    assert min(slopes.min() for *_, slopes in slopeless) < 0.1  # some scores are well into the cap
    q, k, v, d_out = draw(SEGMENTS, 4, 2)
    dq = np.zeros(q.shape)
    for query, keys, weights, _ in slopeless:
        d_weights = v[keys] @ d_out[query]
        dq[query] = weights * (d_weights - weights @ d_weights) * CAPPED.scale @ k[keys]
    assert gap(dq, written_out(CAPPED)[1][0]) > 10 * GRADIENT


def test_window_and_softcap_equal_gemma_2_in_transformers() -> None:
    segments = SEGMENTS[:1]  # one segment: transformers' mask knows no other
    q, k, v, _ = draw(segments, 4, 2)

    def in_transformers(window: int, softcap: float) -> np.ndarray:
        sees = sliding_window_causal_mask_function(window)
        slots = torch.arange(q.shape[1])
        mask = torch.where(sees(0, 0, slots[:, None], slots[None, :]), 0.0, -torch.inf)[None, None]
        module = SimpleNamespace(num_key_value_groups=2, head_dim=q.shape[3], training=False)
        heads_first = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, *heads_first, mask, scaling=BOTH.scale, softcap=softcap)[0].numpy()

    out = in_numpy(q, k, v, segments, BOTH)  # which every backend equals
    assert gap(out, in_transformers(20, 1.5)) < FORWARD
    for other in ((19, 1.5), (21, 1.5), (20, 1.6)):
        assert gap(out, in_transformers(*other)) > 10 * FORWARD


# Ten blocks of 16 slots. From the last number on, no query block reads the first four key blocks: with a window of 33,
# block 6 starts at slot 96 and reaches back to slot 64.
UNVISITED = {"window": ([(1, 160)], 33, 96), "segment": ([(1, 64), (2, 96)], 100, 64)}


@pytest.mark.parametrize("bound", UNVISITED)
@pytest.mark.parametrize("backend", ["blockwise", "pallas"])
def test_key_blocks_out_of_reach_are_never_read(
    backend: str, bound: str, small_blocks: None, strict_dtypes: None
) -> None:
    blocks = Blocks(keep=16, visit=16, keep_backward=16, visit_backward=16)
    kernel = functools.partial(pallas, blocks=blocks, interpret=True) if backend == "pallas" else blockwise
    row, window, clean = UNVISITED[bound]
    segments, scoring = segments_of([row]), dataclasses.replace(CAPPED, window=window)
    q, k, v, d_out = arrays = draw(segments, 4, 2)
    expected, expected_grads = in_numpy(q, k, v, segments, scoring), gradients_in_numpy(*arrays, segments, scoring)
    k, v = k.copy(), v.copy()
    k[:, :64] = v[:, :64] = np.nan  # which stays NaN even under a weight of zero
    poisoned = q, k, v, d_out
    out, grads = with_gradients(kernel, poisoned, segments, scoring)
    assert np.isnan(out[:, :64]).all()
    assert gap(out[:, clean:], expected[:, clean:]) < FORWARD
    for g, e in zip(grads, expected_grads, strict=True):  # keys from `clean` on have only clean queries
        assert gap(g[:, clean:], e[:, clean:]) < GRADIENT
    shifted = np.roll(expected, 1, axis=1)
    assert gap(out[:, clean:], shifted[:, clean:]) > 10 * FORWARD
    # Reading a poisoned block shows: with a window one slot longer, with one segment, or where all blocks are read.
    if bound == "window":
        visits = with_gradients(kernel, poisoned, segments, dataclasses.replace(scoring, window=window + 1))
    else:
        visits = with_gradients(kernel, poisoned, np.ones_like(segments), scoring)
    for x in (visits[0], *visits[1], with_gradients(reference, poisoned, segments, scoring)[0]):
        assert np.isnan(x[:, clean : clean + 16]).any()


@pytest.mark.parametrize("window", [None, 1, 5, 20, 100])
def test_visible_slot_bounds_agree_with_the_mask(window: int | None) -> None:
    slots = np.arange(SEGMENTS.shape[1])
    sees = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.asarray(windowed(window).position_mask(slots, slots))
    real = SEGMENTS > 0
    assert (np.asarray(first_visible_key(SEGMENTS, window)) == sees.argmax(axis=2))[real].all()
    last = slots[-1] - sees[:, ::-1].argmax(axis=1)
    assert (np.asarray(last_visible_query(SEGMENTS, window)) == last)[real].all()


def test_zero_padding_clears_outputs_and_gradients() -> None:
    segments, x = jnp.array([[0, 1, 1, 0]]), jnp.full((1, 4, 2, 8), jnp.nan).at[:, 1:3].set(2.0)
    out, pull = jax.vjp(lambda x: zero_padding(segments, x)[0], x)
    for y in (out, *pull(x)):
        assert (np.asarray(y)[0, :, 0, 0] == [0, 2, 2, 0]).all()


# ---------------------------------------------------------------------------------------- each of the kernels
def assert_is_reference(
    kernel: Kernel, segments: np.ndarray, heads: tuple[int, int], names: Iterable[str], scoring: Scoring = PLAIN,
    head_dim: int = 8,
) -> None:  # fmt: skip
    arrays = draw(segments, *heads, h=head_dim)
    out, grads = with_gradients(kernel, arrays, segments, scoring)
    expected, expected_grads = with_gradients(reference, arrays, segments, scoring)
    for row, name in enumerate(names):
        assert gap(out[row], expected[row]) < FORWARD, name
        for which, g, e in zip("qkv", grads, expected_grads, strict=True):
            assert gap(g[row], e[row]) < GRADIENT, f"{name}: gradient by {which}"


# Other heads are in the test of windows. Ten whole blocks are in test_key_blocks_out_of_reach_are_never_read.
@pytest.mark.parametrize("backend", OTHERS)
def test_backends_equal_reference_with_gradients(backend: str, small_blocks: None, strict_dtypes: None) -> None:
    assert_is_reference(KERNELS[backend], SEGMENTS, HEADS, ROWS)


# For the interpreted kernels it is one more row that does not fill a block.
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=[] if b == "blockwise" else pytest.mark.slow) for b in OTHERS]
)
def test_backends_equal_reference_on_one_slot(backend: str, small_blocks: None, strict_dtypes: None) -> None:
    assert_is_reference(KERNELS[backend], SEGMENTS[:, :1], HEADS, ROWS)


def of_head_dim(head_dim: int, window: int, softcap: float | None = 1.5) -> Scoring:
    """Scores of order 1, as CAPPED has them: a sum of 256 products errs by some 1e-6, and by a 16th of it scaled."""
    return Scoring(scale=head_dim**-0.5, window=window, softcap=softcap)


def assert_tolerances_tell_apart(segments: np.ndarray, scoring: Scoring, head_dim: int) -> None:
    """A head's last dim left out, and a window of one slot more."""
    q, k, v, d_out = arrays = draw(segments, 4, 2, h=head_dim)
    expected, expected_grads = with_gradients(reference, arrays, segments, scoring)
    cut = np.where(np.arange(head_dim) < head_dim - 1, q, 0).astype(np.float32), k, v, d_out
    wider = dataclasses.replace(scoring, window=scoring.window + 1)
    for changed, used in ((cut, scoring), (arrays, wider)):
        wrong, wrong_grads = with_gradients(reference, changed, segments, used)
        assert gap(wrong, expected) > 10 * FORWARD
        for g, e in zip(wrong_grads, expected_grads, strict=True):
            assert gap(g, e) > 10 * GRADIENT


# Neither 80 nor 256 is a tile of 128 lanes: the one is cut from it or padded to it, the other takes two. Blocks have 64
# slots, or 128 in splash and in the forward pass on GPUs; the last of them is cut, and the window is longer than each.
@pytest.mark.parametrize("head_dim", [80, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", OTHERS)
def test_backends_equal_reference_with_head_dims_and_blocks_of_real_models(
    backend: str, head_dim: int, strict_dtypes: None
) -> None:
    segments, scoring = segments_of([PACKED, [(1, 297), (0, 3)]]), of_head_dim(head_dim, window=130)
    kernel = functools.partial(pallas, interpret=True) if backend == "pallas" else KERNELS[backend]
    assert_is_reference(kernel, segments, HEADS, ["packed", "one long segment"], scoring, head_dim)
    assert_tolerances_tell_apart(segments, scoring, head_dim)


@pytest.mark.parametrize(("head_dim", "tiles"), [(80, 1), (256, 2)])
def test_splash_tiles_query_statistics_over_wide_heads(
    head_dim: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread, tile = [], jnp.tile
    monkeypatch.setattr(jnp, "tile", lambda x, reps: spread.append((x.dtype, reps)) or tile(x, reps))
    segments, scoring = segments_of([PACKED]), of_head_dim(head_dim, window=70)
    jax.eval_shape(lambda *x: KERNELS["splash"](*x, segments, scoring), *draw(segments, 4, 2, h=head_dim)[:3])
    # Blocks are of one tile of slots here, so that nothing else is spread over several.
    assert {reps for dtype, reps in spread if dtype == jnp.float32} == {(1, 1), (1, tiles)}


@pytest.mark.slow
def test_splash_equals_reference_at_its_largest_block(strict_dtypes: None) -> None:
    # Two blocks of 512 slots. The second segment crosses from one to the other, farther than the window reaches.
    segments = segments_of([[(1, 300), (2, 424), (3, 188), (0, 112)]])
    assert segments.shape[1] == 2 * BLOCK
    scoring = of_head_dim(64, window=270)
    assert_is_reference(KERNELS["splash"], segments, (4, 2), ["two blocks"], scoring, 64)
    assert_tolerances_tell_apart(segments, scoring, 64)


@pytest.mark.parametrize("wrong", ["merged", "an edge one slot late", "padding seen"])
@pytest.mark.parametrize("backend", OTHERS)
def test_wrong_segments_change_output_and_every_gradient(backend: str, wrong: str, small_blocks: None) -> None:
    segments = SEGMENTS
    arrays = draw(segments, 4, 2)
    expected, expected_grads = with_gradients(reference, arrays, segments)
    if wrong == "merged":
        changed = np.minimum(segments, 1)
    elif wrong == "padding seen":
        changed = np.where(segments > 0, segments, 3).astype(np.int32)
    else:
        changed = np.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    out, grads = with_gradients(KERNELS[backend], arrays, changed)
    row = list(ROWS).index(INSIDE)
    assert gap(out[row], expected[row]) > 10 * FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g[row], e[row]) > 10 * GRADIENT


@pytest.mark.parametrize("scoring", [PLAIN, BOTH])
@pytest.mark.parametrize("backend", KERNELS)
def test_padding_is_zero_without_gradient_or_influence(backend: str, scoring: Scoring, small_blocks: None) -> None:
    arrays = draw(SEGMENTS, 4, 2)
    out, grads = with_gradients(KERNELS[backend], arrays, SEGMENTS, scoring)
    for x in (out, *grads):
        assert not np.asarray(x)[SEGMENTS == 0].any()
        assert np.asarray(x)[SEGMENTS > 0].any(axis=(1, 2)).mean() > 0.7  # a lone token's q and k take none either
    other = tuple(np.where((SEGMENTS == 0)[..., None, None], 1e4, x).astype(np.float32) for x in arrays)
    assert gap(with_gradients(KERNELS[backend], other, SEGMENTS, scoring), (out, grads)) == 0
    padding_seen = np.where(SEGMENTS == 0, 1, SEGMENTS).astype(np.int32)
    seen = with_gradients(KERNELS[backend], other, padding_seen, scoring)
    assert gap(seen[0], out) > 1e3  # what stands there is large: seen, it would show


@pytest.mark.parametrize("scoring", [PLAIN, BOTH])
@pytest.mark.parametrize("backend", KERNELS)
def test_very_large_scores_do_not_overflow(backend: str, scoring: Scoring, small_blocks: None) -> None:
    q, k, v, d_out = draw(SEGMENTS, 4, 2)
    large = (q * np.float32(3e3)).astype(np.float32)  # scores of up to 1e4, whose exp is infinite in float32
    out, grads = with_gradients(KERNELS[backend], (large, k, v, d_out), SEGMENTS, scoring)
    # A score of 1e4 is rounded by 5e-4, and a weight with it: by far the largest error here.
    tolerance = 5e-3
    assert gap(out, in_numpy(large, k, v, SEGMENTS, scoring)) < tolerance
    assert gap(out, in_numpy(large / 10, k, v, SEGMENTS, scoring)) > 10 * tolerance
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_error_is_the_rounding_of_weights_and_output(
    backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(SEGMENTS, 4, 2))
    out, grads = with_gradients(KERNELS[backend], narrow, SEGMENTS, BOTH)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    q, k, v, _ = (np.asarray(x, np.float64) for x in narrow)
    # Scores are float32. Each weight is rounded to bfloat16 (2^-8 of itself) and so is the output: together they
    # err by at most 2^-7 of the largest value in reach.
    bound = 2**-7 * np.abs(v).max()
    assert gap(out, in_numpy(q, k, v, SEGMENTS, BOTH)) < bound
    assert gap(out, in_numpy(q, k, v, np.minimum(SEGMENTS, 1), BOTH)) > 10 * bound


# ---------------------------------------------------------------------------------------- cuDNN's front end
@pytest.fixture
def emulated_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDNN, "dot_product_attention", packed_attention)


@pytest.mark.parametrize(("window", "heads"), [(None, (4, 2)), (5, (3, 1))])
def test_cudnn_receives_every_segment(
    window: int | None, heads: tuple[int, int], emulated_cudnn: None, strict_dtypes: None
) -> None:
    assert_is_reference(cudnn, SEGMENTS, heads, ROWS, windowed(window))


@pytest.mark.slow
def test_cudnn_receives_every_segment_at_a_padded_head_dim(emulated_cudnn: None, strict_dtypes: None) -> None:
    head_dim = 36  # which is padded to a multiple of 8
    segments, scoring = segments_of([PACKED]), of_head_dim(head_dim, window=70, softcap=None)
    assert_is_reference(cudnn, segments, (4, 2), ["packed"], scoring, head_dim)
    assert_tolerances_tell_apart(segments, scoring, head_dim)


def test_cudnn_repeats_key_heads_where_jax_miscounts_their_offsets(
    emulated_cudnn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = draw(SEGMENTS, 4, 2)
    expected, _ = with_gradients(reference, arrays, SEGMENTS)
    counted_right = jax.__version_info__ >= CUDNN.COUNTS_KEY_HEADS
    monkeypatch.setattr(CUDNN, "COUNTS_KEY_HEADS", (0, 0, 0))
    out, _ = with_gradients(lambda *x: cudnn(*x), arrays, SEGMENTS)  # a new function is traced again
    assert gap(out, expected) < FORWARD if counted_right else gap(out, expected) > 10 * FORWARD


def test_cudnn_row_with_too_many_segments_is_nan(emulated_cudnn: None) -> None:
    most = max_segments(140)
    rows = [[(i + 1, 2) for i in range(most)] + [(0, 140 - 2 * most)], [(i + 1, 2) for i in range(70)]]
    assert 140 - 2 * most > 0 and most < 70
    segments = segments_of(rows)
    arrays = draw(segments, 2, 1)
    out, grads = with_gradients(cudnn, arrays, segments)
    assert gap(out[:1], with_gradients(reference, arrays, segments)[0][:1]) < FORWARD
    assert np.isnan(out[1]).all() and not any(np.isnan(g[0]).any() for g in grads)


def test_cudnn_query_entries_beyond_32_bits_raise(emulated_cudnn: None) -> None:
    q, segments = jax.ShapeDtypeStruct((9, 2**20, 8, 32), jnp.bfloat16), jax.ShapeDtypeStruct((9, 2**20), jnp.int32)
    said = r"9 rows of 1,048,576 slots by 8 heads of 32 dims are 2,415,919,104, .*Lower train\.rows_per_device"
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda q, s: cudnn(q, q, q, s, PLAIN), q, segments)


# ---------------------------------------------------------------------------------------- meshes
@pytest.mark.parametrize(
    ("sizes", "heads", "backend"),
    [
        ((1, 4, 2), (4, 2), "blockwise"),
        ((2, 2, 2), (6, 3), "reference"),  # the tensor axis does not divide the key heads
        ((1, 2, 4), (8, 2), "reference"),
        ((1, 2, 4), (3, 1), "blockwise"),  # nor the query heads
    ],
)
def test_attention_on_a_mesh_equals_attention_on_one_device(
    sizes: tuple[int, int, int], heads: tuple[int, int], backend: str, small_blocks: None, strict_dtypes: None
) -> None:
    segments = SEGMENTS[:8]
    arrays = draw(segments, *heads)
    expected, expected_grads = with_gradients(reference, arrays, segments, BOTH)

    def on_mesh(q, k, v, s, scoring):
        return attend(q, k, v, s, scoring, backend=backend)

    with jax.set_mesh(mesh_of(*sizes)):
        out, grads = with_gradients(on_mesh, arrays, segments, BOTH)
        wrong, _ = with_gradients(on_mesh, arrays, np.roll(segments, 1, axis=0), BOTH)
    assert gap(out, expected) < FORWARD
    for g, e in zip(grads, expected_grads, strict=True):
        assert gap(g, e) < GRADIENT
    assert gap(wrong, expected) > 10 * FORWARD  # each row with the segments of another


@pytest.mark.parametrize(
    ("heads", "local"), [((8, 4), (2, 1)), ((8, 2), (2, 2)), ((6, 3), (2, 2)), ((3, 1), (1, 1)), ((4, 4), (1, 1))]
)
def test_each_device_of_the_tensor_axis_computes_its_own_heads(
    heads: tuple[int, int], local: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(q, k, v, segments, scoring):
        seen.append((q.shape[2], k.shape[2], v.shape[2]))
        return q

    monkeypatch.setitem(BACKENDS, "spy", Backend(spy))
    q, k, v, _ = draw(SEGMENTS[:8], *heads)
    with jax.set_mesh(mesh_of(1, 2, 4)):
        out = jax.eval_shape(lambda *x: attend(*x, PLAIN, backend="spy"), q, k, v, SEGMENTS[:8])
    assert seen == [(*local, local[1])]
    assert out.shape == q.shape
