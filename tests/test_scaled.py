"""Products with factors that have some of an array's dims, against numpy in float64."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.numerics.scaled import scaled

pytestmark = pytest.mark.smoke
SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("dims", [(3,), (2, 3), (0, 1), (1, 3), (0, 1, 2, 3)], ids=str)
def test_product_and_both_gradients(dims: Sequence[int]) -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    factors = rng.normal(size=[SHAPE[dim] for dim in dims])
    others = tuple(dim for dim in range(4) if dim not in dims)
    broadcast = np.expand_dims(factors, others)

    def weighted(x: jax.Array, factors: jax.Array) -> jax.Array:
        return jnp.sum(scaled(x, factors, dims) * weights)

    d_x, d_factors = jax.grad(weighted, (0, 1))(jnp.float32(x), jnp.float32(factors))
    np.testing.assert_allclose(scaled(jnp.float32(x), jnp.float32(factors), dims), x * broadcast, rtol=1e-6)
    np.testing.assert_allclose(d_x, weights * broadcast, rtol=1e-6)
    np.testing.assert_allclose(d_factors, (weights * x).sum(others), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(d_factors) - weights.sum(others)).max() > 0.1, "the gradient depends on x"
