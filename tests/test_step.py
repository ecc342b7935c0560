"""The step: sums over microbatches and devices, one division, clip, AdamW; against torch in float64."""

import copy
import dataclasses
import functools
import math
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.models import Sample, gap, in_float64, llama, load, mesh_of, packed, sample_of, spec_of
from mice_jax import step as step_module
from mice_jax.loss import SourceSums, tokens_per_chunk
from mice_jax.models.transformer import Compute, Params, make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import num_shards, put_rows
from mice_jax.step import Jitted, StepFunctions, Sums, TrainState, make_step
from mice_jax.training.precompile import abstract_batch

# Losses and norms are sums of hundreds of float32 terms (6e-8) whose errors largely cancel.
LOSS = 1e-6  # of the value
NORM = 2e-6  # of the value
# AdamW's first steps are g / |g|: an entry whose gradient is as small as the rounding of its terms may come out as
# anything, so updates are compared by the norm of the difference, in units of the update's norm.
UPDATE = 3e-4

RATE = 1e-2
SLOTS = 24
ADAM = {"grad_clip": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}

ATTENTION = {(1, 1, 1): "reference", (1, 8, 1): "reference", (2, 2, 2): "blockwise"}
ALONE = (1, 1, 1)

Rows = list[list[Sample]]


def schedule(step: int) -> float:
    return RATE / (1 + step)  # 0.01, then 0.005


@dataclasses.dataclass
class Run:
    fns: StepFunctions
    mesh: jax.sharding.Mesh
    params: Params  # as loaded
    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)  # of the microbatches accumulated

    def batches(self, rows: Rows, rows_per_microbatch: int, loss_reduction: str = "token") -> list[dict]:
        arrays = packed(rows, SLOTS, loss_reduction)
        starts = range(0, len(rows), rows_per_microbatch)
        parts = [{k: x[i : i + rows_per_microbatch] for k, x in arrays.items()} for i in starts]
        return [put_rows(part, self.mesh) for part in parts]

    def state(self) -> TrainState:
        return self.fns.from_params(jax.tree.map(lambda p: jax.device_put(np.array(p), p.sharding), self.params))

    def accumulate(self, state: TrainState, sums: Sums, batches: Sequence[dict]) -> Sums:
        for batch in batches:
            self.shapes.add(batch["tokens"].shape)
            sums = self.fns.accumulate(state.params, sums, batch)
        return sums

    def steps(
        self, steps: Sequence[Rows], rows_per_microbatch: int, loss_reduction: str = "token"
    ) -> tuple[TrainState, list[dict[str, float]]]:
        state, sums, metrics = self.state(), self.fns.zero_sums(), []
        for step, rows in enumerate(steps):
            sums = self.accumulate(state, sums, self.batches(rows, rows_per_microbatch, loss_reduction))
            state, sums, measured = self.fns.apply(state, sums, schedule(step))
            metrics.append({k: float(x) for k, x in measured.items()})
        return state, metrics


@functools.cache
def run_on(folder: Path, sizes: tuple[int, int, int]) -> Run:
    """Of each mesh once, since compiling is what takes the time; one of them attends in blocks."""
    mesh = mesh_of(*sizes)
    decoder, params = load(folder, mesh)
    compute = Compute(jnp.dtype("float32"), ATTENTION[sizes], "none")
    return Run(make_step(decoder, make_optimizer(**ADAM), mesh, compute), mesh, params)


# ---------------------------------------------------------------------------------------- data and reference
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The model of `folder`: llama() draws the same weights each time."""
    return in_float64(llama())


@pytest.fixture(scope="module")
def two_steps() -> list[Rows]:
    """Two steps of 16 rows, with from 0 to 23 trained tokens a row; those of the longest samples, most of which stand
    in the first half, come from 12 ids and have a loss of their own. The second step has few, and a larger gradient.
    """
    rng = np.random.default_rng(0)

    def row(kind: int) -> list[Sample]:
        if kind == 0:
            return []  # padding
        if kind == 1:
            return [sample_of(20, slice(0, 0), rng)]  # nothing trained
        if kind == 2:
            return [sample_of(SLOTS, slice(1, SLOTS), rng, vocab=12)]
        return [sample_of(7, [6], rng), sample_of(1, slice(0, 0), rng), sample_of(12, slice(11 - kind, 12), rng)]

    first = [2, 3, 1, 0, 4, 2, 3, 4, 3, 5, 0, 1, 3, 4, 3, 4]
    second = [0, 1, 1, 0, 1, 0, 3, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    return [[row(k) for k in kinds] for kinds in (first, second)]


def torch_loss(model: LlamaForCausalLM, rows: Rows, loss_reduction: str = "token") -> torch.Tensor:
    """Every sample by itself; the sum of their weighted losses over the sum of the weights."""
    losses, weights = [], []
    for tokens, trained in (s for row in rows for s in row if s[1][1:].any()):
        ids = torch.tensor(tokens)
        ce = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        ce = ce[torch.tensor(trained[1:])]
        losses.append(ce.mean() if loss_reduction == "sample" else ce.sum())
        weights.append(1 if loss_reduction == "sample" else len(ce))
    return sum(losses) / sum(weights)


def torch_steps(
    model: LlamaForCausalLM,
    steps: list[Rows],
    max_norm: float = 1.0,
    beta2: float = 0.95,
) -> tuple[Any, list[dict]]:
    """The model after torch's clipping and AdamW, and each step's loss and gradient norm."""
    model, metrics = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0)
    for i, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + i)
        optimizer.zero_grad()
        loss = torch_loss(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        metrics.append({"loss": loss.item(), "grad_norm": norm.item()})
    return model, metrics


def in_our_form(model: LlamaForCausalLM, folder: Path) -> Params:
    model.float().save_pretrained(folder)
    return load(folder, mesh_of(1, 1, 1))[1]


@pytest.fixture(scope="module")
def expected(
    model: LlamaForCausalLM, two_steps: list[Rows], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Params, list[dict]]:
    """Parameters after two steps of torch, and its metrics."""
    updated, metrics = torch_steps(model, two_steps)
    return in_our_form(updated, tmp_path_factory.mktemp("updated")), metrics


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))


def difference(a: Params, b: Params) -> Params:
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)


def update_gap(params: Params, expected: Params, start: Params) -> float:
    """How far from `expected`, in units of how far that is from `start`."""
    return norm(difference(params, expected)) / norm(difference(expected, start))


# ---------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize(
    ("sizes", "rows_per_microbatch"),
    [(ALONE, 1), ((1, 8, 1), 8), ((2, 2, 2), 8)],  # one microbatch for each sample, and fewer
)
def test_loss_norm_and_update_equal_torch_on_every_mesh(
    sizes: tuple[int, int, int],
    rows_per_microbatch: int,
    folder: Path,
    two_steps: list[Rows],
    expected: tuple[Params, list[dict]],
) -> None:
    run = run_on(folder, sizes)
    state, metrics = run.steps(two_steps, rows_per_microbatch)
    for ours, theirs in zip(metrics, expected[1], strict=True):
        assert theirs["grad_norm"] > 1.5  # so that clipping matters
        assert abs(ours["loss"] - theirs["loss"]) < LOSS * theirs["loss"]
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) < NORM * theirs["grad_norm"]
        assert ours["finite"] == 1
    assert update_gap(state.params, expected[0], run.params) < UPDATE
    assert int(state.step) == 2
    shards = num_shards(run.mesh)
    weights = packed(two_steps[0], SLOTS)["loss_weights"].reshape(-1, shards, rows_per_microbatch // shards, SLOTS)
    tokens_of_devices = weights.sum(axis=(0, 2, 3))
    if shards > 1:
        assert tokens_of_devices.min() == 0 and tokens_of_devices.max() > 20


def test_a_mean_of_microbatch_means_gives_another_loss_and_update(
    folder: Path, two_steps: list[Rows], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    [rows] = two_steps[:1]
    run = run_on(folder, (1, 8, 1))
    state, means = run.state(), []
    for batch in run.batches(rows, 8):
        sums = jax.device_get(run.accumulate(state, run.fns.zero_sums(), [batch]))
        means.append(jax.tree.map(lambda x, s=sums: x / s.weight_sum, sums))
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *means)
    shardings = jax.tree.map(lambda x: x.sharding, run.fns.zero_sums())
    wrong, _, metrics = run.fns.apply(state, jax.device_put(mean, shardings), RATE)
    updated, [theirs] = torch_steps(model, [rows])
    assert abs(float(metrics["loss"]) - theirs["loss"]) > 10 * LOSS * theirs["loss"]
    assert abs(float(metrics["grad_norm"]) - theirs["grad_norm"]) > 10 * NORM * theirs["grad_norm"]
    assert update_gap(wrong.params, in_our_form(updated, tmp_path), run.params) > 10 * UPDATE


@pytest.mark.parametrize("change", [{"max_norm": math.inf}, {"beta2": 0.5}])
def test_other_clipping_or_betas_give_other_updates(
    change: dict[str, float],
    folder: Path,
    two_steps: list[Rows],
    model: LlamaForCausalLM,
    expected: tuple[Params, list[dict]],
    tmp_path: Path,
) -> None:
    """A negative control: the comparison tells them apart."""
    updated, _ = torch_steps(model, two_steps, **change)
    start = run_on(folder, ALONE).params
    assert update_gap(in_our_form(updated, tmp_path), expected[0], start) > 10 * UPDATE


def test_norms_and_rate_in_metrics_are_those_of_the_update(folder: Path, two_steps: list[Rows]) -> None:
    run = run_on(folder, (1, 8, 1))
    state, metrics = run.steps(two_steps[:1], 16)
    exact = 1e-6  # of the same float32 numbers: their sum of squares alone is rounded
    assert abs(metrics[0]["param_norm"] / norm(state.params) - 1) < exact
    assert abs(metrics[0]["param_norm"] / norm(run.params) - 1) > 10 * exact  # after the update, not before
    # An update of 0.01 is read off weights of order 1, which are rounded to 6e-8.
    assert abs(metrics[0]["update_norm"] / norm(difference(state.params, run.params)) - 1) < NORM
    assert metrics[0]["learning_rate"] == np.float32(RATE)
    _, metrics = run.steps(two_steps, 16)
    assert metrics[1]["learning_rate"] == np.float32(RATE / 2)


def test_corrected_norm_is_that_of_the_gradients_of_microbatches(folder: Path, two_steps: list[Rows]) -> None:
    """On a mesh with all three axes, where a squared norm is a sum over shards; test_noise.py has its statistics."""
    run = run_on(folder, (2, 2, 2))
    state, sums, parts, weights = run.state(), run.fns.zero_sums(), [], []
    for batch in run.batches(two_steps[0], 8):
        alone = run.accumulate(state, run.fns.zero_sums(), [batch])
        parts.append(np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(alone.grads)]))
        weights.append(float(alone.weight_sum))
        sums = run.accumulate(state, sums, [batch])
    whole = sum(weights)
    of_step, of_parts = norm(sum(parts)) ** 2 / whole**2, sum(norm(p) ** 2 for p in parts) / whole**2
    expected = (of_step - of_parts) / (1 - sum(w * w for w in weights) / whole**2)
    _, zeroed, measured = run.fns.apply(state, sums, RATE)
    # Two float32 norms of about 15,000 terms, whose difference is of their own size.
    assert float(measured["grad_sq_corrected"]) == pytest.approx(expected, rel=1e-4)
    assert float(measured["grad_norm"]) ** 2 != pytest.approx(expected, rel=1e-2)
    assert not float(zeroed.grad_sq_sum) and not float(zeroed.weight_sq_sum)


def test_evaluate_gives_the_sums_of_accumulate(folder: Path, two_steps: list[Rows], expected: Any) -> None:
    run = run_on(folder, (2, 2, 2))
    state = run.state()
    parts = [run.fns.evaluate(state.params, b) for b in run.batches(two_steps[0], 4)]
    loss, weight = (sum(float(p[i]) for p in parts) for i in (0, 1))
    assert abs(loss / weight - expected[1][0]["loss"]) < LOSS * expected[1][0]["loss"]
    assert weight == packed(two_steps[0], SLOTS)["loss_weights"].sum()
    mean = np.mean([float(p[0]) / float(p[1]) for p in parts])
    assert abs(mean - expected[1][0]["loss"]) > 10 * LOSS * expected[1][0]["loss"]


# ---------------------------------------------------------------------------------------- loss reduction
def test_loss_reduction_sample_weighs_samples_equally(folder: Path, model: LlamaForCausalLM) -> None:
    rng = np.random.default_rng(1)
    # 1, 11 and 6 predicted tokens: the first token of the last is trained, but nothing predicts it.
    samples = [sample_of(8, [5], rng), sample_of(12, slice(1, 12), rng), sample_of(9, [0, 2, 3, 4, 6, 7, 8], rng)]
    rows = [[samples[0], samples[1]], [samples[2]]]
    arrays = packed(rows, SLOTS, "sample")
    by_hand = np.zeros((2, SLOTS))
    by_hand[0, 4] = 1  # slot 4 predicts token 5
    by_hand[0, 8:19] = 1 / 11
    by_hand[1, [1, 2, 3, 5, 6, 7]] = 1 / 6
    assert gap(arrays["loss_weights"], by_hand) < 1e-7
    assert arrays["positions"][0, :20].tolist() == [*range(8), *range(12)]  # they restart
    assert arrays["segment_ids"][0].tolist() == [1] * 8 + [2] * 12 + [0] * 4
    run = run_on(folder, ALONE)
    with torch.no_grad():
        by_sample, by_token = (float(torch_loss(model, rows, r)) for r in ("sample", "token"))
    _, [metrics] = run.steps([rows], 1, "sample")
    assert abs(metrics["loss"] - by_sample) < LOSS * by_sample
    assert abs(metrics["loss"] - by_token) > 10 * LOSS * by_token
    _, [metrics] = run.steps([rows], 1, "token")
    assert abs(metrics["loss"] - by_token) < LOSS * by_token


# ---------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("bad", ["an infinite weight", "a gradient that is not a number", "no weight at all"])
def test_a_non_finite_loss_or_gradient_leaves_the_state_unchanged(
    bad: str, folder: Path, two_steps: list[Rows]
) -> None:
    run = run_on(folder, (1, 8, 1))
    state, sums = run.steps(two_steps, 16)[0], run.fns.zero_sums()  # moments and counts that are not zero
    before = jax.tree.map(np.asarray, jax.device_get(state))
    [batch] = run.batches(two_steps[0], 16)
    if bad == "an infinite weight":
        batch["loss_weights"] = batch["loss_weights"].at[0, 3].set(jnp.inf)
    sums = run.accumulate(state, sums, [batch])
    if bad == "a gradient that is not a number":
        grads = dict(sums.grads, final_norm={"scale": sums.grads["final_norm"]["scale"].at[5].set(jnp.nan)})
        sums = sums._replace(grads=grads)
    if bad == "no weight at all":
        sums = run.fns.zero_sums()
    state, sums, metrics = run.fns.apply(state, sums, RATE)
    assert not metrics["finite"]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, jax.device_get(state))))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(sums))  # nothing of it enters the next step
    state, _, metrics = run.fns.apply(state, run.accumulate(state, sums, run.batches(two_steps[0], 16)), RATE)
    assert metrics["finite"]
    same = jax.tree.leaves(jax.tree.map(np.array_equal, before, jax.device_get(state)))
    assert not any(same), "a good step changes everything"


# ---------------------------------------------------------------------------------------- compilation, memory
@pytest.mark.slow
def test_each_shape_is_compiled_once_over_many_steps(folder: Path, two_steps: list[Rows]) -> None:
    run = run_on(folder, (2, 2, 2))
    state, sums = run.state(), run.fns.zero_sums()
    for _ in range(3):
        for rows_per_microbatch in (8, 4):
            sums = run.accumulate(state, sums, run.batches(two_steps[0], rows_per_microbatch))
        state, sums, _ = run.fns.apply(state, sums, RATE)
    assert {(8, SLOTS), (4, SLOTS)} <= run.shapes
    assert run.fns.accumulate.jitted._cache_size() == len(run.shapes)
    assert run.fns.apply.jitted._cache_size() == 1
    before = len(run.shapes)
    run.accumulate(state, sums, [put_rows(packed([[]] * 4, SLOTS + 1), run.mesh)])
    assert run.fns.accumulate.jitted._cache_size() == before + 1  # so the count does count


def test_donated_arrays_are_deleted_and_params_are_not(folder: Path, two_steps: list[Rows]) -> None:
    run = run_on(folder, (1, 8, 1))

    def deleted(tree: Any) -> set[bool]:
        return {x.is_deleted() for x in jax.tree.leaves(tree)}

    given = jax.tree.map(jnp.copy, run.params)
    state = run.fns.from_params(given)
    assert deleted(given) == {True}
    sums = run.fns.zero_sums()
    [batch] = run.batches(two_steps[0], 16)
    more = run.accumulate(state, sums, [batch])
    assert deleted(sums) == {True}
    assert deleted(state) == deleted(batch) == {False}
    new_state, new_sums, _ = run.fns.apply(state, more, RATE)
    assert deleted((state, more)) == {True}
    assert deleted((new_state, new_sums)) == {False}


def test_sums_and_state_are_updated_in_place(folder: Path, two_steps: list[Rows]) -> None:
    run = run_on(folder, ALONE)
    state, sums = run.state(), run.fns.zero_sums()
    batch, *_ = run.batches(two_steps[0], 1)

    def held(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    def shared(program: Any) -> int:
        return program.memory_analysis().alias_size_in_bytes

    assert shared(run.fns.accumulate.compile(state.params, sums, batch)) == held(sums)
    assert shared(run.fns.apply.compile(state, sums, RATE)) == held((state, sums))
    assert shared(run.fns.evaluate.compile(state.params, batch)) == 0  # nothing is donated


def plain_cross_entropy(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, loss_weights: jax.Array, *_: Any, **__: Any
) -> tuple[jax.Array, jax.Array, SourceSums]:
    """All logits at once."""
    logits = jnp.einsum("btd,vd->btv", hidden, weight)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss_sum = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - at_target) * loss_weights)
    return loss_sum, jnp.sum(loss_weights), SourceSums(*[jnp.zeros(1)] * 4)


def largest_array(program: Any) -> int:
    """Entries of the largest array in a compiled program's text, on one device."""
    found = re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", program.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in found)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
def test_no_program_of_a_step_holds_the_logits_of_all_tokens(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = mesh_of(*sizes)
    decoder = make_decoder(spec_of(num_layers=1, vocab_size=1400), mesh.shape["tensor"])
    compute = Compute(jnp.dtype("float32"), "blockwise", "none")
    columns = decoder.vocab_rows // mesh.shape["tensor"]
    batch = abstract_batch(mesh, 2, 640)  # rows of a device: two chunks and a half
    chunk, tokens = tokens_per_chunk(decoder.vocab_rows), 2 * 640

    def functions() -> StepFunctions:
        return make_step(decoder, make_optimizer(name="adamw", **ADAM), mesh, compute)

    fns = functions()
    params, sums = fns.abstract_state.params, fns.abstract_sums
    # Nothing else in it is nearly as large as a chunk's logits, which are seen.
    for program in (fns.accumulate.compile(params, sums, batch), fns.evaluate.compile(params, batch)):
        assert chunk * columns <= largest_array(program) < tokens * columns
    monkeypatch.setattr(step_module, "cross_entropy_sums", plain_cross_entropy)
    assert largest_array(functions().evaluate.compile(params, batch)) >= tokens * columns


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_state_and_sums_have_the_abstract_state_s_shardings(sizes: tuple[int, int, int], folder: Path) -> None:
    run = run_on(folder, sizes)
    state, sums = run.state(), run.fns.zero_sums()
    for a, x in zip(jax.tree.leaves(run.fns.abstract_state), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (x.shape, x.dtype) and a.sharding.is_equivalent_to(x.sharding, x.ndim)
    [moments] = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    trees = zip(*(jax.tree.leaves(t) for t in (state.params, moments.mu, moments.nu, sums.grads)), strict=True)
    for leaves in trees:
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
        assert all(x.sharding.is_equivalent_to(leaves[0].sharding, x.ndim) for x in leaves)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    total = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert held < total / (sizes[1] * sizes[2]) * 1.1  # biases of heads are small, and not split by fsdp


# ---------------------------------------------------------------------------------------- compilation
def test_call_waits_for_its_own_program_in_another_thread_alone() -> None:
    begin = threading.Event()

    def double(x: jax.Array) -> jax.Array:
        assert x.shape == () or begin.wait(60)  # while it is traced
        return 2 * x

    function = Jitted(double, mesh_of(1, 1, 1))
    with ThreadPoolExecutor(1) as threads:
        function.compile_in(threads, jax.ShapeDtypeStruct((3,), jnp.float32))
        function.compile_in(threads, jax.ShapeDtypeStruct((4,), jnp.float32))
        assert function(jnp.ones(())) == 2  # has a program of its own
        threading.Timer(0.2, begin.set).start()
        np.testing.assert_array_equal(function(jnp.ones(3)), 2 * np.ones(3))
        begin.clear()
        threads.shutdown(wait=False, cancel_futures=True)
        function.forget_cancelled()
        begin.set()
        np.testing.assert_array_equal(function(jnp.ones(4)), 2 * np.ones(4))


def test_error_in_another_thread_is_raised_by_the_call() -> None:
    def fail(x: jax.Array) -> jax.Array:
        raise ValueError("cannot be traced")

    function = Jitted(fail, mesh_of(1, 1, 1))
    with ThreadPoolExecutor(1) as threads:
        function.compile_in(threads, jax.ShapeDtypeStruct((), jnp.float32))
        with pytest.raises(ValueError, match="cannot be traced"):
            function(jnp.ones(()))
