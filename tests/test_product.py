"""The product with a weight: the same, however it is written, and written as a decoding step on a CPU wants it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.models.product import FEW, product

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
