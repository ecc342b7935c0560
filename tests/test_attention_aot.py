"""Splash compiled for TPUs on a machine without one: errors of Mosaic, the compiler, show here."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from helpers.models import spec_of
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.splash import splash
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.planning import ahead_of_time
from mice_jax.sharding import make_mesh
from mice_jax.step import make_step

KERNELS = ("splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented")


@pytest.fixture
def tpus() -> Sequence[Any]:
    """Eight chips of a v5e that need not be present."""
    return ahead_of_time.find_topology("v5e:2x4").devices or []


def kernels_in(compiled: Any) -> dict[str, int]:
    """How often each of splash's kernels is called."""
    calls = re.findall(r'^.*custom_call_target="tpu_custom_call"', compiled.as_text(), flags=re.MULTILINE)
    return {name: sum(name in call for call in calls) for name in KERNELS}


@pytest.mark.aot
@pytest.mark.parametrize(("remat", "forward"), [("full", 4), ("dots", 2)])
def test_splash_in_a_train_step_compiles_for_a_v5e(remat: str, forward: int, tpus: Sequence[Any]) -> None:
    mesh = make_mesh(1, 4, 2, tpus)
    spec = spec_of(d_model=128, num_heads=6, num_kv_heads=3, head_dim=80, windows=(None, 256), attention_softcap=50.0)
    decoder = make_decoder(spec, 2)
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    compute = Compute(jnp.dtype("bfloat16"), "splash", remat)
    fns = make_step(decoder, optimizer, mesh, compute)
    batch = ahead_of_time.abstract_batch(mesh, 2, 640)
    compiled = fns.accumulate.compile(fns.abstract_state.params, fns.abstract_sums, batch)
    # There are two windows; full rematerialisation runs the forward kernel again in the backward pass.
    assert kernels_in(compiled) == dict(zip(KERNELS, (forward, 2, 2), strict=True))


# Head dims, slots and scorings; the first case stays in the slow tests.
COMPILED = [
    (96, 1000, Scoring(0.1, 300, 50.0)),
    (64, 512, Scoring(0.125, None, None)),
    (128, 4096, Scoring(0.1, 4096, 50.0)),
    (256, 1024, Scoring(0.0625, 512, 50.0)),
]


@pytest.mark.parametrize(
    "cases", [pytest.param(COMPILED[:1], marks=pytest.mark.slow), pytest.param(COMPILED[1:], marks=pytest.mark.aot)]
)
def test_splash_compiles_for_a_v5e(cases: list[tuple[int, int, Scoring]], tpus: Sequence[Any]) -> None:
    mesh = make_mesh(1, 1, 1, tpus[:1])
    whole = NamedSharding(mesh, PartitionSpec())

    def array(slots: int, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, slots, *rest), jnp.bfloat16 if rest else jnp.int32, sharding=whole)

    def both_ways(arrays: list[Any]) -> list[Any]:
        made = []
        for (q, k, v, segments, d_out), (_, _, scoring) in zip(arrays, cases, strict=True):
            out, pull = jax.vjp(lambda *x, s=segments, c=scoring: splash(*x, s, c), q, k, v)
            made.append((out, pull(d_out)))
        return made

    arrays = [(array(t, 4, h), array(t, 2, h), array(t, 2, h), array(t), array(t, 4, h)) for h, t, _ in cases]
    compiled = jax.jit(both_ways).lower(arrays).compile()
    assert kernels_in(compiled) == dict.fromkeys(KERNELS, len(cases))
