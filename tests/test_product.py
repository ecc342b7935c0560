"""The product with a weight: the same, however it is written, and written as a decoding step on a CPU wants it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.models.matmul import FEW, product
from mice_jax.runtime.precision import multiply_in

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(24, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("slots", [1, FEW // 2, FEW, FEW + 1])
def test_products_of_few_and_of_many_slots_are_those_of_float64(slots: int, strict_dtypes: None) -> None:
    x = RNG.normal(size=(2 if slots > 1 else 1, -(-slots // 2), 3, 8)).astype(np.float32)
    exact = np.einsum("btnh,onh->bto", x.astype(np.float64), WEIGHT.astype(np.float64))
    tolerance = 24 * 2**-24 * np.abs(exact).max()  # so many products are summed
    assert np.abs(product(x, WEIGHT, 2) - exact).max() < tolerance
    assert np.abs(product(x, WEIGHT[:, :, ::-1], 2) - exact).max() > 1e4 * tolerance  # of other weights


def test_few_slots_in_bfloat16_are_summed_in_the_dtype_asked_for(strict_dtypes: None) -> None:
    x, weight = jnp.full((1, 1, 4096), 1 + 2**-7, jnp.bfloat16), jnp.ones((2, 4096))
    assert product(x, weight, out_dtype=jnp.float32).tolist() == [[[4128.0, 4128.0]]]  # 4096 in bfloat16
    assert product(x, weight).dtype == jnp.bfloat16


@pytest.mark.parametrize(("slots", "weight_first"), [(FEW, True), (FEW + 1, False)])
def test_the_weight_stays_on_the_left_of_few_slots(slots: int, weight_first: bool) -> None:
    x, weight = jnp.ones((1, slots, 256)), jnp.ones((1024, 256))
    program = jax.jit(product).lower(x, weight).compile().as_text()
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", program)
    assert found == [("1024", str(slots)) if weight_first else (str(slots), "1024")]


@pytest.fixture
def jax_s_own(request: pytest.FixtureRequest) -> None:
    """The precision of products is what jax has it be, before and after."""
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
def test_a_run_in_float32_multiplies_in_float32_on_devices_that_would_round(
    dtype: str, platform: str, precision: str, jax_s_own: None
) -> None:
    multiply_in(dtype, platform)
    x, weight = jax.ShapeDtypeStruct((1, FEW + 1, 8), dtype), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    both_ways = jax.jit(jax.grad(lambda x, w: product(x, w).astype(jnp.float32).sum(), (0, 1)))
    lowered = both_ways.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", lowered)
    assert products and set(products) == {(precision, precision)}


def test_what_the_user_asks_of_jax_stays(jax_s_own: None) -> None:
    jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    multiply_in("float32", "gpu")
    assert jax.config.jax_default_matmul_precision == "tensorfloat32"
