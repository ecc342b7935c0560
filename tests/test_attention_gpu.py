"""The attention kernels for GPUs on a real one: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax.errors import UserError
from mice_jax.models.attention import attend, choose_backend
from mice_jax.models.attention.scoring import Scoring
from models import spec_of

PLAIN = Scoring(scale=0.1, window=None, softcap=None)
ROWS = [[[300, 212]], [[44, 74, 1, 32, 300], [3, 500], [512]], [[7] * 64, []]]  # lengths of samples, of 512 slots
SCORINGS = [PLAIN, dataclasses.replace(PLAIN, window=70), dataclasses.replace(PLAIN, window=128, softcap=20.0)]


def segments_of(rows: list[list[int]]) -> np.ndarray:
    segments = np.zeros((len(rows), 512), np.int32)
    for row, lengths in zip(segments, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segments


def both_ways(backend: str, dtype: str, arrays: list[np.ndarray], segments: np.ndarray, scoring: Scoring) -> list:
    """The output and the gradients, in float32, of what is rounded to bfloat16 beforehand."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments), scoring, backend=backend), q, k, v)
        return out, *pull(d_out)

    with jax.default_matmul_precision("highest"):
        made = run(*(jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in made]


def errors(made: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    """Of the output and each gradient: the norm of the difference over the norm."""
    return np.array([np.linalg.norm(x - e) / np.linalg.norm(e) for x, e in zip(made, expected, strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("backend", ["cudnn", "pallas"])
def test_a_kernel_errs_no_more_than_bfloat16_does_in_blocks(
    backend: str, head_dim: int, rows: list[list[int]], scoring: Scoring
) -> None:
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if not devices:
        pytest.skip("no GPU is here")
    spec = spec_of(head_dim=head_dim, windows=(scoring.window,) * 2, attention_softcap=scoring.softcap)
    run = {"dtype": "bfloat16", "max_length": 512, "deterministic": False}
    capability = devices[0].compute_capability
    try:
        choose_backend(backend, spec, platform="gpu", compute_capability=capability, **run)
    except UserError as e:
        pytest.skip(str(e))
    rng, segments = np.random.default_rng(0), segments_of(rows)
    shapes = [(len(rows), 512, n, head_dim) for n in (8, 2, 2, 8)]
    arrays = [rng.normal(size=s).astype(np.float32) for s in shapes]
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
def test_the_kernel_of_deterministic_runs_gives_the_same_bits_again() -> None:
    if not any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("no GPU is here")
    rng, segments = np.random.default_rng(0), segments_of(ROWS[1])
    arrays = [rng.normal(size=(len(segments), 512, n, 128)).astype(np.float32) for n in (8, 2, 2, 8)]
    first = both_ways("pallas", "bfloat16", arrays, segments, PLAIN)
    for _ in range(5):
        again = both_ways("pallas", "bfloat16", arrays, segments, PLAIN)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
