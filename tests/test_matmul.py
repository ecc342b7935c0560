"""The matrix product with a weight: its values, its operand order on a CPU, and its precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.models.matmul import MAX_DECODE_SLOTS, matmul
from mice_jax.runtime.precision import set_float32_matmul_precision

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(24, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("slots", [1, MAX_DECODE_SLOTS // 2, MAX_DECODE_SLOTS, MAX_DECODE_SLOTS + 1])
def test_matmul_of_few_and_of_many_slots_equals_float64(slots: int, strict_dtypes: None) -> None:
    x = RNG.normal(size=(2 if slots > 1 else 1, -(-slots // 2), 3, 8)).astype(np.float32)
    exact = np.einsum("btnh,onh->bto", x.astype(np.float64), WEIGHT.astype(np.float64))
    tolerance = 24 * 2**-24 * np.abs(exact).max()  # so many products are summed
    assert np.abs(matmul(x, WEIGHT, 2) - exact).max() < tolerance
    assert np.abs(matmul(x, WEIGHT[:, :, ::-1], 2) - exact).max() > 1e4 * tolerance  # of other weights


def test_matmul_sums_in_the_requested_dtype(strict_dtypes: None) -> None:
    x, weight = jnp.full((1, 1, 4096), 1 + 2**-7, jnp.bfloat16), jnp.ones((2, 4096))
    assert matmul(x, weight, out_dtype=jnp.float32).tolist() == [[[4128.0, 4128.0]]]  # 4096 in bfloat16
    assert matmul(x, weight).dtype == jnp.bfloat16


@pytest.mark.parametrize(("slots", "weight_first"), [(MAX_DECODE_SLOTS, True), (MAX_DECODE_SLOTS + 1, False)])
def test_matmul_has_the_weight_on_the_left_for_few_slots(slots: int, weight_first: bool) -> None:
    x, weight = jnp.ones((1, slots, 256)), jnp.ones((1024, 256))
    program = jax.jit(matmul).lower(x, weight).compile().as_text()
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", program)
    assert found == [("1024", str(slots)) if weight_first else (str(slots), "1024")]


@pytest.fixture
def default_precision(request: pytest.FixtureRequest) -> None:
    """Restores jax's default precision of products after the test."""
    request.addfinalizer(lambda: jax.config.update("jax_default_matmul_precision", None))


@pytest.mark.parametrize(
    ("dtype", "platform", "precision"),
    [
        ("float32", "gpu", "HIGHEST"),
        ("float32", "tpu", "HIGHEST"),
        ("bfloat16", "gpu", "DEFAULT"),
        ("float32", "cpu", "DEFAULT"),
    ],
)
def test_float32_runs_multiply_in_full_precision_on_accelerators(
    dtype: str, platform: str, precision: str, default_precision: None
) -> None:
    set_float32_matmul_precision(dtype, platform)
    x, weight = jax.ShapeDtypeStruct((1, MAX_DECODE_SLOTS + 1, 8), dtype), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    both_ways = jax.jit(jax.grad(lambda x, w: matmul(x, w).astype(jnp.float32).sum(), (0, 1)))
    lowered = both_ways.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", lowered)
    assert products and set(products) == {(precision, precision)}


def test_the_user_s_matmul_precision_is_kept(default_precision: None) -> None:
    jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    set_float32_matmul_precision("float32", "gpu")
    assert jax.config.jax_default_matmul_precision == "tensorfloat32"
