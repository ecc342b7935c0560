"""The figures of a compiled microbatch: their limits, counted by hand, and those of programs compiled for a TPU."""

import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from helpers.models import spec_of
from mice_jax.hardware import CHIPS, matmul_flops
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.planning import ahead_of_time, compiled_step
from mice_jax.planning.scheduled_hlo import Array, Collective, Copy, Counts, Instruction
from mice_jax.runtime import xla_flags
from mice_jax.sharding import make_mesh
from mice_jax.step import make_step
from mice_jax.training.precompile import abstract_batch

PROGRAM = Path(__file__).parent / "data" / "accumulate_v5p.hlo.txt.gz"
SPEC = spec_of(d_model=512, d_ff=1024, head_dim=128, vocab_size=512, tie_embeddings=True)
SLOTS, CHUNK = 256, 128
PARAMS, TOKENS = 1_000_000, 2048
MODEL = 3 * matmul_flops(SPEC) * TOKENS


def collective(kind: str, dtype: str, full_bytes: int, overlaps: bool = True) -> Collective:
    return Collective(kind, (dtype,), full_bytes, full_bytes, 1, True, overlaps, float(overlaps), "")


GOOD = Counts(
    flops=MODEL,
    kernel_flops=0.0,
    collectives=(
        collective("all-gather", "bf16", 2 * 2 * PARAMS),
        collective("reduce-scatter", "f32", 4 * PARAMS),
        collective("all-reduce", "f32", 40),  # of numbers, or of biases, which nothing splits
    ),
    copies=(
        Copy("copy", Array("f32", (512, 512)), 4, True, ""),
        Copy("convert", Array("f32", (2048, 512)), 1, False, ""),
    ),
    host_transfers=(),
    compute_s=0.9,
    exposed_s=0.09,
)
GATHER, REDUCE, SMALL = GOOD.collectives
BAD = {
    "FLOPs of products": {"flops": 1.04 * MODEL},
    "all-gathers of parameters": {"collectives": (collective("all-gather", "f32", 2 * 2 * PARAMS), REDUCE)},
    "reduction of gradients": {"collectives": (GATHER, collective("reduce-scatter", "bf16", 2 * PARAMS))},
    "bytes sent while products run": {"collectives": (GATHER, dataclasses.replace(REDUCE, overlapped_flops=0.0))},
    "time exposed": {"exposed_s": 0.11},
    "copies in loops above 1 MiB": {"copies": (Copy("transpose", Array("f32", (2048, 512)), 4, True, ""),)},
    "transfers to or from the host": {"host_transfers": ("infeed.1",)},
}


def off(counts: Counts, remat: str = "none") -> list[str]:
    found = compiled_step.figures(counts, SPEC, params=PARAMS, tokens=TOKENS, remat=remat, itemsize=2)
    return [figure.name for figure in found if not figure.kept]


def test_a_program_within_all_limits_keeps_them() -> None:
    assert off(GOOD) == []
    assert off(dataclasses.replace(GOOD, flops=MODEL * 4 / 3), "full") == []  # the forward pass runs twice


@pytest.mark.parametrize("name", BAD)
def test_each_figure_beyond_its_limit_is_off_by_itself(name: str) -> None:
    assert off(dataclasses.replace(GOOD, **BAD[name])) == [name]


@pytest.mark.parametrize(
    "reduction", [collective("all-reduce", "f32", 4 * PARAMS), collective("reduce-scatter", "f32", 8 * PARAMS)]
)
def test_an_all_reduce_or_a_second_reduction_of_gradients_is_off(reduction: Collective) -> None:
    assert off(dataclasses.replace(GOOD, collectives=(GATHER, reduction))) == ["reduction of gradients"]


@pytest.mark.parametrize(
    ("name", "queries", "keys", "flops"),
    [
        (
            "splash_mha_fwd_segmented_residuals.3",
            (2, 32, 4096, 80),
            (2, 8, 4096, 80),
            2 * 2 * 2 * 32 * 4096**2 * 80 / 2,
        ),
        ("splash_mha_dkv_segmented_no_residuals.1", (32, 4096, 80), (8, 4096, 80), 4 * 2 * 32 * 4096**2 * 80 / 2),
        # One of four devices that share a row, with all of its keys.
        ("splash_mha_dq_segmented.1", (32, 1024, 80), (32, 4096, 80), 3 * 2 * 32 * 1024 * 4096 * 80 / 2),
        ("custom-call.7", (32, 4096, 80), (32, 4096, 80), 0.0),
    ],
)
def test_flops_of_splash_are_those_of_causal_rows(
    name: str, queries: tuple[int, ...], keys: tuple[int, ...], flops: float
) -> None:
    given = [Array("s32", (32, 8, 8)), *(Array("bf16", shape) for shape in (queries, keys, keys))]
    assert compiled_step.splash_flops(Instruction(name, "custom-call", (), (), ""), given) == flops


def test_compiler_options_leave_out_what_the_user_s_flags_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert xla_flags.compiler_options(sparse_cores=False) == {}
    assert xla_flags.compiler_options(sparse_cores=True) == xla_flags.SPARSE_CORE_OPTIONS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false --xla_other=1")
    left = xla_flags.compiler_options(sparse_cores=True)
    assert xla_flags.SPARSE_CORE_OPTIONS.keys() - left.keys() == {"xla_enable_async_all_gather"}


# ---------------------------------------------------------------------------------------- compiled programs
def check_gradients(text: str) -> None:
    """Gradients are summed over the four devices once, in float32, by reduce-scatters; weights are gathered twice."""
    decoder = make_decoder(SPEC, 1)
    counts = compiled_step.count_microbatch(text, CHIPS["v5p"], rows=1, slots=SLOTS, chunk=CHUNK)
    split = {path: x.size for path, x in jax.tree_util.tree_leaves_with_path(decoder.abstract) if x.size > 20_000}
    layers = sum(size for path, size in split.items() if path[0].key == "layers")
    embedding = sum(split.values()) - layers

    def large(kind: str, dtype: str) -> int:
        found = [c for c in counts.collectives if c.kind == kind and c.dtypes == (dtype,)]
        return sum(c.times * c.full_bytes for c in found if c.full_bytes > 100_000)  # no biases or norms

    assert large("reduce-scatter", "f32") == 4 * (layers + embedding)
    assert large("all-reduce", "f32") == large("all-reduce", "bf16") == large("reduce-scatter", "bf16") == 0
    assert large("all-gather", "bf16") == 2 * (2 * layers + embedding)  # the embedding is gathered once for both uses
    assert large("all-gather", "f32") == 0
    # All but the projection down are computed again; `reference` attention is made of products too.
    layer = 2 * SLOTS * layers
    assert 3.5 * layer < counts.flops < 5 * layer + 3 * 2 * SLOTS * embedding + 16 * SLOTS**2 * 4 * 128 * 2
    assert counts.host_transfers == ()
    # The model is too small for all of it: its first gathers and last reductions have nothing beside them.
    share = compiled_step.overlap(counts)
    assert share is not None and share > 0.5


def test_a_program_compiled_for_a_tpu_is_read() -> None:
    """The same program as below, without the compiler's notes on each instruction."""
    check_gradients(gzip.decompress(PROGRAM.read_bytes()).decode())


@pytest.mark.aot
def test_gradients_are_reduce_scattered_in_float32_on_a_tpu() -> None:
    mesh = make_mesh(1, 4, 1, ahead_of_time.find_topology("v5p:2x2x1").devices)
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    compute = Compute(jnp.dtype("bfloat16"), "reference", "full")
    options = xla_flags.compiler_options(sparse_cores=True)
    fns = make_step(make_decoder(SPEC, 1), optimizer, mesh, compute, compiler_options=options)
    batch = abstract_batch(mesh, 1, SLOTS)
    text = fns.accumulate.compile(fns.abstract_state.params, fns.abstract_sums, batch).as_text()
    check_gradients(text)
