"""Rows whose slots are split over devices: attention, loss and gradients equal those of one device."""

import dataclasses
import functools
import importlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.kernels import KERNELS
from helpers.models import QUICK, gap, mesh_of, packed, random_params, relative_gap, sample_of, spec_of
from helpers.runs import make_chats, read_metrics, run_train, setting, write_jsonl
from mice_jax.config_checks import row_problem
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.errors import UserError
from mice_jax.models import rope
from mice_jax.models.attention import BACKENDS, AttentionRequirements, attend, choose_backend
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.split_rows import (
    RowSplit,
    in_balanced_order,
    in_row_order,
    moved_parts,
    sample_lengths,
)
from mice_jax.models.spec import GatedDelta, Mamba2, ShortConv
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import put_rows
from mice_jax.step import make_step

BLOCKWISE = importlib.import_module("mice_jax.models.attention.blockwise")  # a function hides it by its name
SPLITTING = [name for name, backend in BACKENDS.items() if backend.splits_rows]


# ---------------------------------------------------------------------------------------- order
def test_devices_share_a_row_in_parts_from_both_of_its_ends() -> None:
    order = Shape(1, 24, balanced_over=3).order
    assert order is not None and Shape(1, 24).order is None
    parts = [[0, 1, 2, 3], [20, 21, 22, 23], [4, 5, 6, 7], [16, 17, 18, 19], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert order.reshape(6, 4).tolist() == parts
    rows = np.arange(2 * 24 * 5).reshape(2, 24, 5)
    assert np.array_equal(jax.jit(in_balanced_order, static_argnums=1)(rows, 3), rows[:, order])
    assert np.array_equal(jax.jit(in_row_order, static_argnums=1)(rows[:, order], 3), rows)
    segment_ids = np.repeat([1, 2, 0], [7, 13, 4]).astype(np.int32)[None]
    with jax.set_mesh(mesh_of(1, 1, 1, sequence=3)):
        lengths = np.asarray(jax.jit(sample_lengths, static_argnums=1)(segment_ids[:, order], 2))
    assert np.array_equal(lengths, np.asarray(jax.jit(rope.sample_lengths)(segment_ids))[:, order])


@pytest.mark.parametrize(("devices", "in_row_order"), [(2, 1.5), (3, 1.67), (4, 1.75), (16, 1.94)])
def test_queries_move_so_that_devices_have_equal_work(devices: int, in_row_order: float) -> None:
    """The work of the busiest device over the mean, for one sample: under causality, slot t sees t + 1 keys."""
    moves = np.array(moved_parts(devices))
    for exchange in (moves[0::2], moves[1::2]):  # each device sends one part and receives one
        assert np.array_equal(np.sort(exchange, axis=0).T, [range(devices)] * 2)
    keys = np.arange(1, 2 * devices * 128 + 1).reshape(2 * devices, 128).sum(axis=1)
    before, after = (np.bincount(of_parts, keys) for of_parts in moves.T)
    assert (round(before.max() / before.mean(), 2), np.ptp(after)) == (in_row_order, 0)


@pytest.mark.parametrize(("max_length", "devices"), [(131072, 64), (16384, 8), (48, 2), (4096, 2)])
def test_every_microbatch_shape_divides_into_the_parts_of_devices(max_length: int, devices: int) -> None:
    for shape in microbatch_shapes(max_length, 2, 2 * devices, devices):
        assert shape.slots % (2 * devices) == 0 and sorted(shape.order) == list(range(shape.slots))
    assert row_problem(max_length, devices) == row_problem(max_length + 1, 1) == ""
    assert f"set it to {max_length + 2 * devices}," in row_problem(max_length + 1, devices)


# ---------------------------------------------------------------------------------------- kernels
# 48 slots, of which each of three devices has 16: samples that cross one or several of their borders, and padding.
SEGMENTS = np.stack([np.repeat(s, n).astype(np.int32) for s, n in (([1], [48]), ([1, 2, 3, 4, 0], [7, 20, 1, 12, 8]))])
SCORINGS = {"plain": Scoring(0.3, None, None), "window and soft cap": Scoring(0.3, 9, 1.5)}
ORDER = np.array(Shape(1, 48, balanced_over=3).order)


@functools.cache
def drawn() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, 48, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4))


@functools.cache
def of_whole_rows(scoring: Scoring):
    return with_gradients(lambda *x: reference(*x, jnp.asarray(SEGMENTS), scoring))(*drawn())


def with_gradients(function):
    def run(q, k, v, d_out, *rest):
        out, pull = jax.vjp(lambda *x: function(*x, *rest), q, k, v)
        return out, pull(d_out)

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("backend", SPLITTING)
def test_queries_of_each_device_attend_as_those_of_the_whole_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three devices in turn; the gradients of keys and values are sums over them."""
    monkeypatch.setattr(BLOCKWISE, "BLOCK", 6)  # does not divide a device's parts of 8 slots
    scoring = SCORINGS["window and soft cap"]

    def split_over_three(q: jax.Array, k: jax.Array, v: jax.Array, devices: jax.Array) -> jax.Array:
        def of_device(own: tuple[jax.Array, jax.Array]) -> jax.Array:
            split = RowSplit(3, own[1])
            return KERNELS[backend](own[0], k, v, jnp.asarray(SEGMENTS), scoring, split)

        queries = jnp.stack(jnp.split(q[:, ORDER], 3, axis=1))
        return jnp.concatenate(list(jax.lax.map(of_device, (queries, devices))), axis=1)[:, np.argsort(ORDER)]

    run = with_gradients(split_over_three)
    out, grads = run(*drawn(), jnp.arange(3))
    expected, expected_grads = of_whole_rows(scoring)
    assert gap(out, expected) < 1e-5 and gap(grads, expected_grads) < 1e-4  # as in test_attention.py
    misplaced, wrong_grads = run(*drawn(), jnp.array([1, 2, 0]))  # with the mask of another device's slots
    assert gap(misplaced, expected) > 0.1 and gap(wrong_grads, expected_grads) > 0.1


# Where queries are moved to is in no way special to the Pallas kernel.
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] if name == "pallas" else []) for name in SPLITTING]
)
def test_rows_in_row_order_attend_on_three_devices_as_on_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLOCKWISE, "BLOCK", 6)
    interpreted = dataclasses.replace(BACKENDS[backend], kernel=KERNELS[backend])
    monkeypatch.setitem(BACKENDS, backend, interpreted)
    scoring, segment_ids = SCORINGS["plain"], jnp.asarray(SEGMENTS)

    def split_over_three(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, segment_ids, scoring, backend=backend, row_parts=1)

    with jax.set_mesh(mesh_of(1, 1, 1, sequence=3)):
        out, grads = with_gradients(split_over_three)(*drawn())
    expected, expected_grads = of_whole_rows(scoring)
    assert gap(out, expected) < 1e-5 and gap(grads, expected_grads) < 1e-4  # as in test_attention.py
    assert gap(out[:, ORDER], expected) > 0.1  # where results are not moved back


def test_a_backend_that_cannot_split_rows_names_those_that_can() -> None:
    run = AttentionRequirements(spec_of(), "gpu", "9.0", "bfloat16", 4096, deterministic=False)
    split = dataclasses.replace(run, sequence=2)
    assert (choose_backend("auto", run), choose_backend("auto", split)) == ("cudnn", "pallas")
    with pytest.raises(UserError, match=r"mesh\.sequence=2 splits them over devices.* one of pallas, blockwise"):
        choose_backend("cudnn", split)


# ---------------------------------------------------------------------------------------- the step
SLOTS = 64
LENGTHS = [[64], [7, 33, 1, 13], [], [30, 17]]
# float32 rounds a sum of 64 such terms by about 1e-6 of it, and three layers pass that on.
TOLERANCES = {"attention": 2e-5, "recurrent": 1e-4}  # the latter as for all recurrent families (test_families.py)
MAMBA = Mamba2(2, head_dim=4, num_groups=1, state_dim=4, taps=4, time_step_limits=(0, 9), bias=False, conv_bias=True)
DELTA = GatedDelta(num_key_heads=2, num_value_heads=2, key_dim=4, value_dim=4, taps=3)
LAYERS = {
    "attention": {"num_layers": 3, "windows": (None, 9, None)},
    "recurrent": {"num_layers": 4, "mixers": (ShortConv(3, bias=False), MAMBA, DELTA, None)},
}


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return packed([[sample_of(n, slice(1, None), rng) for n in row] for row in LENGTHS], SLOTS)


def step_on(sizes: tuple[int, int, int], sequence: int, backend: str, parts: int, kind: str):
    """The gradients and sums of one microbatch, and the program that computes them."""
    mesh = mesh_of(*sizes, sequence=sequence)
    decoder = make_decoder(spec_of(num_heads=4, num_kv_heads=2, **LAYERS[kind]), mesh.shape["tensor"])
    compute = Compute(jnp.dtype("float32"), backend, "dots", row_parts=parts)
    optimizer = make_optimizer(name="sgd", grad_clip=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    fns = make_step(decoder, optimizer, mesh, compute)
    params = jax.device_put(random_params(decoder), jax.tree.map(lambda a: a.sharding, fns.abstract_state.params))
    order = Shape(1, SLOTS, sequence if parts == 2 else 1).order
    arrays = rows() if order is None else {name: x[:, order] for name, x in rows().items()}
    sums = jax.device_get(fns.accumulate(params, fns.zero_sums(), put_rows(arrays, mesh)))
    return sums.grads, (sums.loss_sum, sums.weight_sum, *sums.sources)


@functools.cache
def on_one_device(kind: str):
    return step_on((1, 1, 1), 1, "reference", 0, kind)


@pytest.mark.parametrize(
    ("sizes", "sequence", "backend", "parts", "kind"),
    [
        ((1, 2, 1), 4, "blockwise", 2, "attention"),
        pytest.param((1, 2, 2), 2, "reference", 1, "recurrent", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_of_split_rows_equal_one_device(
    sizes: tuple[int, int, int], sequence: int, backend: str, parts: int, kind: str
) -> None:
    expected, expected_sums = on_one_device(kind)
    grads, sums = step_on(sizes, sequence, backend, parts, kind)
    assert relative_gap(sums, expected_sums) < 2e-5
    assert relative_gap(grads, expected) < TOLERANCES[kind]


# ---------------------------------------------------------------------------------------- runs
@pytest.mark.slow
def test_a_run_on_split_rows_logs_the_metrics_of_a_run_on_whole_rows(tmp_path: Path) -> None:
    """It begins on whole rows, and goes on after one of three steps where four devices share a row."""
    held = write_jsonl(tmp_path / "held.jsonl", make_chats(4, seed=5))
    body = f"c.data.validation = [Source(path='{held}')]\nc.checkpoint.every_samples = 8"
    config = setting(tmp_path, body, samples=24)
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert run_train(config, whole) == 0
    shutil.copytree(whole, split)
    for step in ("2", "3"):
        shutil.rmtree(split / "checkpoints" / step)
    assert run_train(config, split, "--config.mesh.sequence=4", "--config.mesh.fsdp=2") == 0
    there, here = read_metrics(split), read_metrics(whole)
    for key in ("step", "samples", "tokens", "loss_tokens"):
        assert [line[key] for line in there] == [line[key] for line in here]
    for key in ("loss", "grad_norm", "eval/loss"):
        values = [np.array([line[key] for line in lines if key in line]) for lines in (there, here)]
        # Sums in another order: 1e-7 of the loss in a step, which the updates make larger.
        np.testing.assert_allclose(*values, rtol=1e-5)
    assert here[1]["loss"] != there[1]["loss"] and len(here) == 3
