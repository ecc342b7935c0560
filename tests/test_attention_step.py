"""Each attention backend in the train step: dispatch, `shard_map`, scanned layers, rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import CUDNN, KERNELS, packed_attention
from helpers.models import mesh_of, packed, random_params, relative_gap, sample_of, spec_of
from mice_jax.models.attention import BACKENDS, Backend
from mice_jax.models.attention.cudnn import cudnn
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import param_shardings, put_rows
from mice_jax.step import make_step

# A layer without and one with a window, of fewer tokens than the long samples have. A soft cap too where it can be.
LAYERS = {"windows": (None, 9)}
SLOTS = 48
# float32 rounds a sum of 48 such terms by about 1e-6 of it, and the layers pass that on.
TOLERANCE = 2e-5


def rows() -> dict[str, np.ndarray]:
    """Eight rows: short samples, one long one, padding alone, and a sample that starts inside a block."""
    rng = np.random.default_rng(0)
    lengths = [[48], [7, 20, 1, 13], [], [30, 17], [16, 16, 16], [5] * 9, [1], [40]]
    return packed([[sample_of(n, slice(1, None), rng) for n in row] for row in lengths], SLOTS)


@functools.cache
def gradients(backend: str, sizes: tuple[int, int, int], heads: tuple[int, int], capped: bool, remat: str = "full"):
    """The sums of one microbatch, as the train step makes them on a mesh."""
    mesh = mesh_of(*sizes)
    cap = 1.5 if capped else None
    spec = spec_of(num_heads=heads[0], num_kv_heads=heads[1], attention_softcap=cap, **LAYERS)
    decoder = make_decoder(spec, mesh.shape["tensor"])
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    params = jax.device_put(random_params(decoder), shardings)
    compute = Compute(jnp.dtype("float32"), backend, remat)
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    fns = make_step(decoder, optimizer, mesh, compute)
    sums = fns.accumulate(params, fns.zero_sums(), put_rows(rows(), mesh))
    return jax.device_get((sums.grads, sums.loss_sum))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("splash", "pallas"):
        monkeypatch.setitem(BACKENDS, name, Backend(KERNELS[name]))
    monkeypatch.setitem(BACKENDS, "cudnn", Backend(cudnn))
    monkeypatch.setattr(CUDNN, "dot_product_attention", packed_attention)


# Key heads that the tensor axis does not divide; test_step has those that it divides. "dots" keeps the result of every
# backend but cudnn.
SIZES, HEADS, REMAT = (2, 2, 2), (6, 3), "dots"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["splash", "pallas", "cudnn", "blockwise"])
def test_loss_and_gradients_of_a_step_equal_reference_attention(backend: str, on_cpu: None) -> None:
    capped = backend != "cudnn"
    grads, loss = gradients(backend, SIZES, HEADS, capped, REMAT)
    expected, expected_loss = gradients("reference", SIZES, HEADS, capped)
    assert abs(loss - expected_loss) < TOLERANCE * expected_loss
    assert relative_gap(grads, expected) < TOLERANCE
    other, _ = gradients("reference", SIZES, HEADS, not capped)
    assert relative_gap(grads, other) > 10 * TOLERANCE
