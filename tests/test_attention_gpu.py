"""The attention kernels for GPUs on a real one: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton

from helpers.kernels import PALLAS
from helpers.models import packed, random_params, sample_of, spec_of
from mice_jax.errors import UserError
from mice_jax.models.attention import AttentionRequirements, attend, choose_backend
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import make_mesh, num_shards, param_shardings, put_rows
from mice_jax.step import make_step

# From 0.11 on JAX says so of Triton in Pallas: a JAX without it will want other kernels.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

PLAIN = Scoring(scale=0.1, window=None, softcap=None)
ROWS = [[[300, 212]], [[44, 74, 1, 32, 300], [3, 500], [512]], [[7] * 64, []]]  # lengths of samples, of 512 slots
STEP = spec_of(num_heads=6, num_kv_heads=2, head_dim=80, attention_scale=0.1, windows=(None, 70))
STEP_ROWS = [[300, 212], [44, 74, 1, 32, 300]]
SCORINGS = [PLAIN, dataclasses.replace(PLAIN, window=70), dataclasses.replace(PLAIN, window=128, softcap=20.0)]


def segments_of(rows: list[list[int]]) -> np.ndarray:
    segments = np.zeros((len(rows), 512), np.int32)
    for row, lengths in zip(segments, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segments


def gpus(backend: str, spec: ModelSpec, dtype: str) -> list[Any]:
    """The GPUs of this machine; skips where there is none, or where the backend does not support them."""
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if not devices:
        pytest.skip("no GPU is here")
    capability = devices[0].compute_capability
    try:
        choose_backend(
            backend, AttentionRequirements(spec, "gpu", capability, dtype, max_length=512, deterministic=False)
        )
    except UserError as e:
        pytest.skip(str(e))
    return devices


def arrays_of(rows: list[list[int]], heads: tuple[int, int], head_dim: int) -> list[np.ndarray]:
    """Queries, keys, values, and the gradient of the output."""
    rng, (n, k) = np.random.default_rng(0), heads
    return [rng.normal(size=(len(rows), 512, count, head_dim)).astype(np.float32) for count in (n, k, k, n)]


def both_ways(
    backend: str,
    dtype: str,
    arrays: list[np.ndarray],
    segments: np.ndarray,
    scoring: Scoring,
    products: str = "highest",
) -> list[np.ndarray]:
    """The output and the gradients, in float32, of what is rounded to bfloat16 beforehand.

    `products`: the precision of those that do not ask for one, as JAX names it.
    """

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments), scoring, backend=backend), q, k, v)
        return out, *pull(d_out)

    with jax.default_matmul_precision(products):
        made = run(*(jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in made]


def errors(made: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    """Of the output and each gradient: the norm of the difference over the norm."""
    return np.array([np.linalg.norm(x - e) / np.linalg.norm(e) for x, e in zip(made, expected, strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("head_dim", "heads"), [(64, (8, 2)), (80, (6, 2)), (128, (8, 2)), (128, (6, 2)), (256, (8, 2))]
)
@pytest.mark.parametrize("backend", ["cudnn", "pallas"])
def test_a_kernel_errs_no_more_than_blockwise_in_bfloat16(
    backend: str, head_dim: int, heads: tuple[int, int], rows: list[list[int]], scoring: Scoring
) -> None:
    windows = (scoring.window,) * 2
    gpus(backend, spec_of(head_dim=head_dim, windows=windows, attention_softcap=scoring.softcap), "bfloat16")
    arrays, segments = arrays_of(rows, heads, head_dim), segments_of(rows)
    expected = both_ways("reference", "float32", arrays, segments, scoring)
    made = both_ways(backend, "bfloat16", arrays, segments, scoring)
    for x in made:
        assert not x[segments == 0].any()
    # Blockwise attention rounds the same values to bfloat16 (weights, their gradients, what comes out), in another
    # order: a kernel that does no more than that errs about as much.
    bound = 2 * errors(both_ways("blockwise", "bfloat16", arrays, segments, scoring), expected)
    assert (errors(made, expected) < bound).all()
    wrong = both_ways("reference", "float32", arrays, np.minimum(segments, 1), scoring)
    if len(rows[0]) > 1:
        assert (errors(made, wrong) > 10 * bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("head_dim", "heads"), [(64, (8, 2)), (80, (6, 2)), (256, (8, 2))])
def test_pallas_errs_in_float32_by_rounding_only(
    head_dim: int, heads: tuple[int, int], scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus("pallas", spec_of(head_dim=head_dim), "float32")
    arrays, segments = arrays_of(ROWS[1], heads, head_dim), segments_of(ROWS[1])
    expected = both_ways("reference", "float32", arrays, segments, scoring)
    # A score is of order 10 at most, and float32 holds it to 2^-24 of that, as do the GPU's exponentials: so a weight
    # is off by some 1e-6 of itself, and what is summed of them by no more of its norm.
    bound = 1e-5
    assert (errors(both_ways("pallas", "float32", arrays, segments, scoring, "default"), expected) < bound).all()
    # Inputs rounded to 10 bits (TF32) are off by up to 2^-11 of themselves, about 2e-4 in the mean square.
    monkeypatch.setattr(PALLAS, "_dot", triton.dot)
    rounded = both_ways("pallas", "float32", arrays, segments, scoring, "default")
    assert (errors(rounded, expected) > 10 * bound).all()


def step_sums(backend: str, dtype: str, devices: list[Any], merged: bool = False) -> tuple[float, np.ndarray]:
    """A microbatch's loss and gradient, as the train step makes them on a mesh; `merged`, each row is one sample."""
    tensor = 2 - len(devices) % 2
    mesh = make_mesh(1, -1, tensor, devices)
    rng = np.random.default_rng(0)
    rows = [[sample_of(n, slice(1, None), rng) for n in row] for row in STEP_ROWS * num_shards(mesh)]
    arrays = packed(rows, 512)
    if merged:
        arrays["segment_ids"] = np.minimum(arrays["segment_ids"], 1)
    decoder = make_decoder(STEP, tensor)
    params = jax.device_put(random_params(decoder), param_shardings(decoder.abstract, decoder.axes, mesh))
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    compute = Compute(jnp.dtype(dtype), backend, "full")
    fns = make_step(decoder, optimizer, mesh, compute)
    with jax.default_matmul_precision("highest"):
        sums = jax.device_get(fns.accumulate(params, fns.zero_sums(), put_rows(arrays, mesh)))
    return float(sums.loss_sum), np.concatenate([np.ravel(x) for x in jax.tree.leaves(sums.grads)])


def hold_step(backend: str, devices: list[Any]) -> None:
    """Holds a backend's step in bfloat16 against plain attention's in float32."""
    loss, grads = step_sums(backend, "bfloat16", devices)
    expected_loss, expected = step_sums("reference", "float32", devices)
    assert abs(loss - expected_loss) < 2**-9 * expected_loss  # bfloat16's rounding, which a mean over tokens makes less
    # The rest of the model rounds alike, whatever its attention does.
    [bound] = 2 * errors([step_sums("blockwise", "bfloat16", devices)[1]], [expected])
    [error] = errors([grads], [expected])
    [wrong] = errors([step_sums("reference", "float32", devices, merged=True)[1]], [expected])
    assert error < bound < wrong / 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "pallas"])
def test_loss_and_gradient_of_a_step_equal_reference_attention(backend: str) -> None:
    """On all the GPUs that are here: with a tensor axis where their number is even."""
    hold_step(backend, gpus(backend, STEP, "bfloat16"))


@pytest.mark.gpu
def test_pallas_is_deterministic() -> None:
    if not any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("no GPU is here")
    arrays, segments = arrays_of(ROWS[1], (8, 2), 128), segments_of(ROWS[1])
    first = both_ways("pallas", "bfloat16", arrays, segments, PLAIN)
    for _ in range(5):
        again = both_ways("pallas", "bfloat16", arrays, segments, PLAIN)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
