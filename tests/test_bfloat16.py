"""Computing in bfloat16: a packed row equals its samples alone, and the drift from float32 is bounded.

bfloat16 has 8 bits of mantissa: an input of a product is off by at most u = 2^-9 of itself. A loss averages errors that
do not agree in sign over hundreds of tokens, so it is off by less than u. A gradient has passed through the products of
each layer, forward and back, a dozen in turn: off by about sqrt(12) u of its norm, by less than twice that. Sums over
microbatches are float32 and add nothing to it: in bfloat16 they stall, since a sum of n terms swallows what is below
u of itself, which makes an error that grows with n.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import Sample, llama, load, mesh_of, packed, sample_of
from mice_jax.models.transformer import Compute, Decoder, Params
from mice_jax.optim import make_optimizer
from mice_jax.sharding import put_rows
from mice_jax.step import Batch, StepFunctions, Sums, make_step

U = 2.0**-9
PRODUCTS = 12
GRADIENT = 2 * PRODUCTS**0.5 * U  # of a gradient's norm: 0.0135
SLOTS, MICROBATCHES = 48, 512
MESH = (1, 1, 1)
PLAIN = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Params]:
    folder = tmp_path_factory.mktemp("llama")
    llama(folder)
    return load(folder, mesh_of(*MESH))


@functools.cache
def functions(decoder: Decoder, dtype: str, accumulate_dtype: str = "float32") -> StepFunctions:
    compute = Compute(jnp.dtype(dtype), "blockwise", "none")
    optimizer = make_optimizer(**PLAIN)
    return make_step(decoder, optimizer, mesh_of(*MESH), compute, None, accumulate_dtype)


def batch_of(rows: list[list[Sample]]) -> Batch:
    return put_rows(packed(rows, SLOTS), mesh_of(*MESH))


def sums_of(fns: StepFunctions, params: Params, microbatches: list[Batch]) -> Sums:
    sums = fns.zero_sums()
    for batch in microbatches:
        sums = fns.accumulate(params, sums, batch)
    return jax.device_get(sums)


def loss(sums: Sums) -> float:
    return float(sums.loss_sum) / float(sums.weight_sum)


def apart(a: Params, b: Params) -> float:
    """The norm of the difference of two gradients, of the norm of the second."""
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    norm = sum((y**2).sum() for _, y in pairs) ** 0.5
    return float(sum(((x - y) ** 2).sum() for x, y in pairs) ** 0.5 / norm)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    return [sample_of(n, slice(2, n), rng) for n in (17, 20, 11)]


def test_a_packed_row_equals_its_samples_alone_in_bfloat16(
    loaded: tuple[Decoder, Params], samples: list[Sample]
) -> None:
    decoder, params = loaded
    fns = functions(decoder, "bfloat16")
    together = sums_of(fns, params, [batch_of([samples])])
    alone = sums_of(fns, params, [batch_of([[s]]) for s in samples])
    # The same products of the same roundings, token by token; only what is summed in another order differs.
    assert loss(together) == pytest.approx(loss(alone), rel=U / 4)
    assert apart(together.grads, alone.grads) < GRADIENT / 2
    # A neighbour that can be seen through is far beyond that: the same tokens as one sample.
    merged = (np.concatenate([t for t, _ in samples]), np.concatenate([m for _, m in samples]))
    seen = sums_of(fns, params, [batch_of([[merged]])])
    assert apart(seen.grads, alone.grads) > 4 * GRADIENT


@pytest.fixture(scope="module")
def many() -> list[Batch]:
    rng = np.random.default_rng(4)
    return [batch_of([[sample_of(SLOTS, slice(2, SLOTS), rng, vocab=12)]]) for _ in range(MICROBATCHES)]


@pytest.fixture(scope="module")
def exact(loaded: tuple[Decoder, Params], many: list[Batch]) -> Sums:
    decoder, params = loaded
    return sums_of(functions(decoder, "float32"), params, many)


@pytest.mark.slow
def test_drift_from_float32_is_that_of_rounded_inputs(
    loaded: tuple[Decoder, Params], many: list[Batch], exact: Sums
) -> None:
    decoder, params = loaded
    found = sums_of(functions(decoder, "bfloat16"), params, many)
    assert 0 < abs(loss(found) / loss(exact) - 1) < U
    assert U / 8 < apart(found.grads, exact.grads) < GRADIENT


@pytest.mark.slow
def test_a_bfloat16_accumulator_drifts_beyond_the_bound(
    loaded: tuple[Decoder, Params], many: list[Batch], exact: Sums
) -> None:
    """The negative control of the bound, and the reason why `optim.accumulate_dtype` is float32 by default."""
    decoder, params = loaded
    stalled = sums_of(functions(decoder, "float32", "bfloat16"), params, many)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(stalled.grads))
    assert apart(stalled.grads, exact.grads) > GRADIENT
    assert loss(stalled) == loss(exact)  # of which the sums stay float32
    few = sums_of(functions(decoder, "float32", "bfloat16"), params, many[:2])
    assert apart(few.grads, sums_of(functions(decoder, "float32"), params, many[:2]).grads) < 2 * U  # it does add
