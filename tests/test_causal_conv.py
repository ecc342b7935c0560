"""The causal convolution against numpy's on each sample alone, packed and in the pieces in which prompts come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import gap, mesh_of
from mice_jax.models.mixers.causal_conv import causal_conv, causal_conv_step, empty_conv_state

CHANNELS = 5
LENGTHS = [7, 1, 2, 12]  # shorter and longer than the kernels, and three slots of padding
SLOTS = 25
RNG = np.random.default_rng(0)
X = RNG.normal(size=(1, SLOTS, CHANNELS)).astype(np.float32)
D_Y = RNG.normal(size=X.shape).astype(np.float32)
BIAS = RNG.normal(size=CHANNELS).astype(np.float32)
SEGMENTS = np.repeat([1, 2, 3, 4, 0], [*LENGTHS, 3])[None].astype(np.int32)
# Sums of at most five products of order 1, or of 22 for the kernel's gradient: a few float32 roundings of 2^-24 each.
ROUNDING = 5e-6

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def kernel_of(taps: int) -> np.ndarray:
    return np.random.default_rng(taps).normal(size=(CHANNELS, taps)).astype(np.float32)


def alone(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The outputs [T C] of one sample [T C], in float64."""
    wide = x.astype(np.float64)
    return np.stack([np.convolve(wide[:, c], weight[c, ::-1])[: len(x)] for c in range(CHANNELS)], axis=1) + BIAS


def samples() -> list[slice]:
    ends = np.cumsum(LENGTHS)
    return [slice(end - n, end) for n, end in zip(LENGTHS, ends, strict=True)]


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_packed_convolution_equals_each_sample_s_own(taps: int) -> None:
    weight = kernel_of(taps)
    conv = jax.jit(causal_conv)
    y = np.asarray(conv(X, weight, SEGMENTS, BIAS))[0]
    leaked = np.asarray(conv(X, weight, (SEGMENTS > 0).astype(np.int32), BIAS))[0]
    for sample in samples():
        wanted = alone(weight, X[0, sample])
        assert gap(y[sample], wanted) < ROUNDING
        if sample.start and taps > 1:  # a row without borders differs right behind one
            assert gap(leaked[sample][:1], wanted[:1]) > 1e4 * ROUNDING


def test_parts_of_rows_on_several_devices_convolve_as_the_whole_row() -> None:
    """Five devices of five slots each, whose first outputs need inputs of the device before."""

    def run(x: jax.Array, weight: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda *x: causal_conv(*x, segments, jnp.asarray(BIAS)), x, weight)
        return y, *pull(jnp.asarray(D_Y))

    arrays = jnp.asarray(X), jnp.asarray(kernel_of(4))
    wanted = jax.jit(run)(*arrays, SEGMENTS)
    with jax.set_mesh(mesh_of(1, 1, 1, sequence=5)):
        function = jax.jit(run)
        found = function(*arrays, SEGMENTS)
        apart = function(*arrays, SEGMENTS + 10 * (np.arange(SLOTS, dtype=np.int32) // 5))  # nothing crosses
    assert gap(found, wanted) < 2 * ROUNDING
    assert all(gap(a, w) > 1e3 * ROUNDING for a, w in zip(apart, wanted, strict=True))


def test_convolution_s_gradients_stay_within_samples_and_match_numpy() -> None:
    weight = kernel_of(3)

    def total(x: jax.Array, weight: jax.Array) -> jax.Array:
        kept = jnp.where(SEGMENTS[..., None] > 0, D_Y, 0)
        return jnp.sum(causal_conv(x, weight, jnp.asarray(SEGMENTS)) * kept)

    d_x, d_weight = jax.jit(jax.grad(total, (0, 1)))(X, weight)
    wanted_x, wanted_weight = np.zeros((SLOTS, CHANNELS)), np.zeros((CHANNELS, 3))
    for sample in samples():
        for t in range(sample.start, sample.stop):
            for distance in range(min(3, t - sample.start + 1)):
                wanted_x[t - distance] += D_Y[0, t] * weight[:, 2 - distance]
                wanted_weight[:, 2 - distance] += D_Y[0, t].astype(np.float64) * X[0, t - distance]
    assert gap(d_x[0], wanted_x) < ROUNDING and gap(d_weight, wanted_weight) < ROUNDING


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    x = np.ones((1, 3, CHANNELS), jnp.bfloat16)
    weight = np.tile(np.array([-256.0, 1.0, 256.0], np.float32), (CHANNELS, 1))  # 256 + 1 is 256 in bfloat16
    y = np.asarray(jax.jit(causal_conv)(x, weight, np.ones((1, 3), np.int32)))
    assert y.dtype == jnp.bfloat16 and y[0, 2, 0] == 1


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_ragged_rows_continued_in_pieces_equal_whole_rows(taps: int) -> None:
    """Pieces shorter and longer than the kernel; what follows a row's end is padding, and more tokens follow that."""
    weight, rng, step = kernel_of(taps), np.random.default_rng(1), jax.jit(causal_conv_step)
    pieces = [[3, 0, 2], [1, 2, 5], [6, 6, 1], [1, 1, 1]]  # the number of tokens of each of three rows
    state = empty_conv_state(3, CHANNELS, taps, jnp.float32)
    inputs: list[list[np.ndarray]] = [[], [], []]
    outputs: list[list[np.ndarray]] = [[], [], []]
    for sizes in pieces:
        piece = rng.normal(size=(3, max(sizes), CHANNELS)).astype(np.float32)
        y, state = step(piece, weight, state, np.array(sizes, np.int32), BIAS)
        assert state.shape == (3, taps - 1, CHANNELS)
        for row, n in enumerate(sizes):
            inputs[row].append(piece[row, :n])
            outputs[row].append(np.asarray(y)[row, :n])
    for ours, theirs in zip(outputs, inputs, strict=True):
        assert gap(np.concatenate(ours), alone(weight, np.concatenate(theirs))) < ROUNDING
    if taps > 1:  # a negative control: padding that enters the state
        full = np.full(3, 3, np.int32)
        steps = [step(X[:, :3].repeat(3, 0), weight, state, n, BIAS) for n in (full, full - 2)]
        assert gap(steps[0][1], steps[1][1]) > 1e4 * ROUNDING
