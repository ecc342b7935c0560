"""The gradients of weights are summed in float32, over the tokens of a device and over devices.

In bfloat16 the sum over eight devices is rounded seven times, by up to 2^-9 each; in float32 by 2^-24. The reference is
the same gradient from float32 parameters and operands that bfloat16 holds exactly, in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import QUICK, mesh_of, packed, random_params, sample_of, spec_of
from mice_jax.models.matmul import add_bias, look_up, matmul
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import batch_sharding, put_rows
from mice_jax.step import make_step

ROWS, SLOTS, INPUTS, HEADS, WIDTH, VOCAB = 8, 80, 16, 2, 4, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, SLOTS, INPUTS)).astype(jnp.bfloat16)
D_Y = RNG.normal(size=(ROWS, SLOTS, HEADS, WIDTH)).astype(jnp.bfloat16)
TOKENS = RNG.integers(0, VOCAB, (ROWS, SLOTS)).astype(np.int32)
# A sum of 640 products that are exact in float32: each addition rounds to 2^-24 of a partial sum, and partial sums are
# seldom larger than the sum of a quarter of the magnitudes.
FLOAT32 = ROWS * SLOTS * 2.0**-24
MESHES = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]


def gradients(sizes: tuple[int, int, int], reduce_dtype: str) -> dict[str, jax.Array]:
    """The gradients of a weight, a bias and a table with respect to sums that have D_Y and X as their gradients."""
    mesh = mesh_of(*sizes)
    rows = batch_sharding(mesh)
    x, d_y, tokens = (jax.device_put(jnp.asarray(a), rows) for a in (X, D_Y, TOKENS))
    weight, bias = jnp.ones((HEADS, WIDTH, INPUTS)), jnp.ones((HEADS, WIDTH))
    dtype = jnp.dtype(reduce_dtype)

    def total(weight: jax.Array, bias: jax.Array, table: jax.Array, x: Any, d_y: Any, tokens: Any) -> jax.Array:
        y = matmul(x, weight, axes=("heads", "head_dim", "embed"), reduce_dtype=dtype)
        y = add_bias(y, bias, axes=("heads", "head_dim"), reduce_dtype=dtype)
        embedded = look_up(table, tokens, jnp.bfloat16, axes=("vocab", "embed"), reduce_dtype=dtype)
        return jnp.sum((y * d_y).astype(jnp.float32)) + jnp.sum((embedded * x).astype(jnp.float32))

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=QUICK)
        found = gradient(weight, bias, jnp.ones((VOCAB, INPUTS)), x, d_y, tokens)
    return dict(zip(("weight", "bias", "table"), found, strict=True))


def exact_gradients() -> dict[str, np.ndarray]:
    x, d_y = X.astype(np.float64), D_Y.astype(np.float64)
    table = np.zeros((VOCAB, INPUTS))
    np.add.at(table, TOKENS, x)
    return {"weight": np.einsum("btnh,bti->nhi", d_y, x), "bias": d_y.sum((0, 1)), "table": table}


def apart(found: jax.Array, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("sizes", MESHES)
def test_gradients_are_summed_in_float32_from_bfloat16_operands(sizes: tuple[int, int, int]) -> None:
    found, exact = gradients(sizes, "float32"), exact_gradients()
    for name, gradient in found.items():
        assert gradient.dtype == jnp.float32 and apart(gradient, exact[name]) < FLOAT32, name
    # The same sums over devices in bfloat16, as a negative control.
    for name, gradient in gradients(sizes, "bfloat16").items():
        assert gradient.dtype == jnp.float32 and 30 * FLOAT32 < apart(gradient, exact[name]) < 8 * 2.0**-8, name


# ---------------------------------------------------------------------------------------- the whole step
def accumulated(batches: list[dict[str, np.ndarray]], reduce_dtype: str) -> list[Any]:
    """The gradients that `accumulate` gives on eight devices for each batch by itself, with bfloat16 products."""
    mesh = mesh_of(1, 8, 1)
    decoder = make_decoder(spec_of(), 1)
    compute = Compute(jnp.dtype("bfloat16"), "reference", "full", jnp.dtype(reduce_dtype))
    optimizer = make_optimizer(grad_clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    fns = make_step(decoder, optimizer, mesh, compute)
    params = jax.device_put(random_params(decoder), jax.tree.map(lambda a: a.sharding, fns.abstract_state.params))
    return [jax.device_get(fns.accumulate(params, fns.zero_sums(), put_rows(b, mesh)).grads) for b in batches]


@pytest.mark.slow
def test_a_step_sums_all_gradients_over_devices_in_float32() -> None:
    rng = np.random.default_rng(1)
    batch = packed([[sample_of(24, slice(4, 24), rng)] for _ in range(8)], 24)
    # The same program on the same rows, of which only those of one device have a loss: what this device contributes.
    alone = [batch | {"loss_weights": batch["loss_weights"] * (np.arange(8) == i)[:, None]} for i in range(8)]
    wide, *of_devices = accumulated([batch, *alone], "float32")
    exact = jax.tree.map(lambda *x: sum(np.asarray(a, np.float64) for a in x), *of_devices)
    [narrow] = accumulated([batch], "bfloat16")
    for (path, reference), x, y in zip(
        jax.tree_util.tree_leaves_with_path(exact), *map(jax.tree.leaves, (wide, narrow)), strict=True
    ):
        assert apart(x, reference) < 8 * 2.0**-24, path  # seven additions, of terms not much larger than the sum
        if path[-1].key != "scale":  # norms are always summed in float32
            assert apart(y, reference) > 2.0**-11, path
