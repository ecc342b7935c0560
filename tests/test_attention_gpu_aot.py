"""Attention lowered for NVIDIA GPUs on a machine without one: which kernels are called, with which shapes.

Triton compiles to its own intermediate code here; the use of registers and shared memory is not seen.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from helpers.kernels import CUDNN, PALLAS
from helpers.models import mesh_of, spec_of
from mice_jax.models.attention.pallas import Blocks, pallas
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.planning import ahead_of_time
from mice_jax.sharding import AXES
from mice_jax.step import make_step
from mice_jax.training.precompile import abstract_batch

# From 0.11 on JAX says so of Triton in Pallas: a JAX without it will want other kernels.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

SLOTS, HEAD_DIM = 640, 80
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
CALL = re.compile(r"stablehlo\.custom_call @(__gpu\$xla\.gpu\.triton|__cudnn\$\w+)")
PLAIN = Scoring(scale=0.1, window=None, softcap=None)

# Of two kinds of layers, each once: forward, again forward in the backward pass (remat), and backward.
PALLAS_CALLS = {"attention_forward": 4, "attention_query_gradient": 2, "attention_key_gradient": 2}
CUDNN_CALLS = {"fmhaSoftmax": 4, "fmhaSoftmaxBackward": 2}

Shape = tuple[int, ...]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What JAX asks of cuDNN and of the GPU before it calls cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    with ahead_of_time.assume_compute_capability("9.0"):
        yield


def step_calls(backend: str, tensor: int, heads: tuple[int, int]) -> Counter[tuple[str, Shape, Shape]]:
    """The kernels in a train step's program for four GPUs, with the shapes of one device's queries and keys."""
    sizes = (1, 4 // tensor, tensor)
    all_sizes = (*sizes[:2], 1, tensor)
    mesh: Any = AbstractMesh(all_sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=H100)
    entered = jax.sharding.use_abstract_mesh
    if backend == "cudnn":  # which splits itself, and for that wants devices, of whatever kind
        mesh, entered = mesh_of(*sizes), jax.set_mesh
    spec = spec_of(num_heads=heads[0], num_kv_heads=heads[1], head_dim=HEAD_DIM, windows=(None, 256))
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    compute = Compute(jnp.dtype("bfloat16"), backend, "full")
    fns = make_step(make_decoder(spec, tensor), optimizer, mesh, compute)
    arguments = fns.abstract_state.params, fns.abstract_sums, abstract_batch(mesh, 3, SLOTS)
    with entered(mesh):
        return calls_in(fns.accumulate.jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text())


def calls_in(text: str) -> Counter[tuple[str, Shape, Shape]]:
    made: Counter[tuple[str, Shape, Shape]] = Counter()
    for line in text.splitlines():
        if called := CALL.search(line):
            own = re.search(r'\bname = "(attention_\w+)"', line)
            arrays = re.findall(r"tensor<([\dx]+)x[a-z]+\d+>", line.rsplit(" : (", 1)[1])
            q, k = (tuple(map(int, x.split("x"))) for x in arrays[:2])
            made[own[1] if own else called[1].removeprefix("__cudnn$"), q, k] += 1
    return made


def expected(kernels: dict[str, int], q: Shape, k: Shape) -> Counter[tuple[str, Shape, Shape]]:
    return Counter({(name, q, k): count for name, count in kernels.items()})


# Query and key heads, and those of one device of two.
HEADS = [
    ((8, 2), (4, 1)),
    ((6, 2), (3, 1)),
    ((6, 3), (3, 3)),  # key heads that 2 does not divide are repeated
    ((3, 1), (2, 2)),  # and query heads joined by one of zeros
]


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "own"), HEADS)
def test_a_gpu_step_calls_pallas_kernels_for_its_own_heads(heads: tuple[int, int], own: tuple[int, int]) -> None:
    def shapes(n: int, k: int) -> tuple[Shape, Shape]:
        return (3, SLOTS, k, n // k, 128), (3, SLOTS, k, 128)  # 80 dims are made a power of two

    assert step_calls("pallas", 2, heads) == expected(PALLAS_CALLS, *shapes(*own))
    if heads == HEADS[0][0]:
        assert step_calls("pallas", 1, heads) == expected(PALLAS_CALLS, *shapes(*heads))
        assert not step_calls("blockwise", 2, heads)


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "own"), HEADS)
def test_a_gpu_step_calls_cudnn_kernels_for_its_own_heads(
    heads: tuple[int, int], own: tuple[int, int], hopper: None
) -> None:
    repeated = jax.__version_info__ < CUDNN.COUNTS_KEY_HEADS

    def shapes(n: int, k: int) -> tuple[Shape, Shape]:
        return (3, SLOTS, n, HEAD_DIM), (3, SLOTS, n if repeated else k, HEAD_DIM)

    assert step_calls("cudnn", 2, heads) == expected(CUDNN_CALLS, *shapes(*own))
    if heads == HEADS[0][0]:
        assert step_calls("cudnn", 1, heads) == expected(CUDNN_CALLS, *shapes(*heads))


def both_ways(kernel: Any, head_dim: int, dtype: str, scoring: Scoring) -> Any:
    """One kernel's output and gradients, traced."""
    q, k, segments = ((2, 300, 6, head_dim), (2, 300, 2, head_dim), (2, 300))
    arrays = [jax.ShapeDtypeStruct(x, dtype) for x in (q, k, k, q)]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, segments: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: kernel(*x, segments, scoring), q, k, v)
        return out, pull(d_out)

    return jax.jit(run).trace(*arrays, jax.ShapeDtypeStruct(segments, jnp.int32))


def kernels_of(traced: Any) -> Counter[str]:
    calls = calls_in(traced.lower(lowering_platforms=("cuda",)).as_text())
    return Counter({name: count for (name, *_), count in calls.items()})


# Each size of blocks that `pallas._blocks` chooses. One case stays in the ordinary tests.
TRITON = [(8, "float32"), (36, "bfloat16"), (64, "bfloat16"), (128, "float32"), (200, "float32"), (256, "bfloat16")]


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, "bfloat16"), *(pytest.param(*case, marks=pytest.mark.aot) for case in TRITON)]
)
def test_triton_accepts_the_kernels_in_every_head_dim_and_dtype(head_dim: int, dtype: str) -> None:
    gpu = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(gpu):
        for scoring in (PLAIN, Scoring(scale=0.1, window=70, softcap=20.0)):
            assert kernels_of(both_ways(pallas, head_dim, dtype, scoring)) == Counter(dict.fromkeys(PALLAS_CALLS, 1))
        odd = functools.partial(pallas, blocks=Blocks(48, 48, 48, 48))
        with pytest.raises(Exception, match="power of 2"):
            kernels_of(both_ways(odd, head_dim, dtype, PLAIN))


def products(traced: Any) -> tuple[int, int]:
    """How many a program has, and of how many the precision is float32's own."""
    text = str(traced.jaxpr)
    return text.count("dot_general["), text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_pallas_products_of_float32_are_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(both_ways(pallas, 64, "float32", PLAIN)) == (9, 9)  # 2 forward, 3 for queries, 4 for keys
    monkeypatch.setattr(PALLAS, "_dot", triton.dot)
    assert products(both_ways(pallas, 64, "float32", PLAIN)) == (9, 0)
