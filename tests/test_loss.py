"""The chunked cross-entropy and its gradients against torch's in float64, and sums by source against numpy's."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.models import QUICK, gap, mesh_of
from mice_jax.loss import MAX_CHUNK_BYTES, SourceSums, cross_entropy_sums, tokens_per_chunk
from mice_jax.sharding import BATCH_AXES

# float32 keeps a sum of some 200 terms, and each term, a difference of logits of order 10, to a few 1e-7 of itself.
SUM = 1e-6  # of the value
GRADIENT = 1e-5  # entries are of order 1

B, T, D, VOCAB = 8, 30, 16, 37
SOURCES = 3  # of which the last has no slot


@functools.cache
def jitted(
    chunk: int, batch_axes: tuple[str, ...], vocab_size: int, factor: float, logit_scale: float, softcap: float | None
):
    def loss(hidden, weight, targets, loss_weights, sources):
        loss_sum, weight_sum, source_sums = cross_entropy_sums(
            hidden, weight, targets, loss_weights, sources, vocab_size=vocab_size, chunk_size=chunk,
            batch_axes=batch_axes, logit_scale=logit_scale, softcap=softcap, num_sources=SOURCES,
        )  # fmt: skip
        return loss_sum * jnp.float32(factor), (weight_sum, source_sums)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)


class Case:
    """Random inputs, with large differences between the rows' weights, and what makes logits of their products."""

    def __init__(
        self, seed: int = 0, rows: int = VOCAB, scale: float = 1.0,
        logit_scale: float = 1.0, softcap: float | None = None,
    ):  # fmt: skip
        self.logit_scale, self.softcap = logit_scale, softcap
        rng = np.random.default_rng(seed)
        self.hidden = (scale * rng.normal(size=(B, T, D))).astype(np.float32)
        self.weight = rng.normal(size=(D, rows)).T.astype(np.float32)
        self.targets = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
        self.loss_weights = rng.choice([0, 0.25, 1, 3], (B, T)).astype(np.float32)
        self.loss_weights[2] = 0
        self.sources = rng.integers(0, SOURCES - 1, (B, T)).astype(np.int32)
        self.source_sums = np.zeros((4, SOURCES))  # those of the latest call

    def ours(self, chunk: int = 8, batch_axes: tuple[str, ...] = (), vocab_size: int = VOCAB, factor: float = 1.0):
        """loss_sum, weight_sum and the gradients of factor * loss_sum by hidden and weight."""

        grad = jitted(chunk, batch_axes, vocab_size, factor, self.logit_scale, self.softcap)
        (loss_sum, (weight_sum, source_sums)), grads = grad(
            self.hidden, self.weight, self.targets, self.loss_weights, self.sources
        )
        assert {x.dtype for x in source_sums} == {jnp.dtype("float32")}
        self.source_sums = np.asarray(source_sums, np.float64)
        return loss_sum, weight_sum, *grads

    def in_torch(self, factor: float = 1.0, slopes: bool = True):
        """The same, in float64; without slopes the gradients pass a soft cap as if it were not there."""
        hidden = torch.tensor(np.asarray(self.hidden, np.float64), requires_grad=True)
        weight = torch.tensor(np.asarray(self.weight, np.float64), requires_grad=True)
        logits = (hidden @ weight[:VOCAB].T * self.logit_scale).reshape(-1, VOCAB)
        if self.softcap is not None:
            capped = self.softcap * torch.tanh(logits / self.softcap)
            logits = capped if slopes else logits + (capped - logits).detach()
        ce = torch.nn.functional.cross_entropy(logits, torch.tensor(self.targets).long().reshape(-1), reduction="none")
        loss_weights = torch.tensor(self.loss_weights).double()
        loss = (ce * loss_weights.reshape(-1)).sum()
        (factor * loss).backward()
        return loss.item() * factor, loss_weights.sum().item(), hidden.grad.numpy(), weight.grad.numpy()


def assert_equal(ours, expected) -> None:
    assert [x.dtype for x in ours[:2]] == [jnp.float32] * 2
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert abs(float(a) - b) <= SUM * abs(b)
    assert gap(ours[2:], expected[2:]) < GRADIENT * max(1, np.abs(expected[3]).max())


@pytest.mark.parametrize("chunk", [7, 239, 240, 512])
def test_sums_and_gradients_equal_torch_whatever_the_chunk(chunk: int, strict_dtypes: None) -> None:
    assert_equal(Case().ours(chunk), Case().in_torch())


def test_wrong_weights_targets_or_inputs_are_detected() -> None:
    expected = Case().in_torch()
    for change in ("weights", "targets", "inputs"):
        case = Case(seed=1 if change == "inputs" else 0)
        if change == "weights":
            case.loss_weights = (case.loss_weights > 0).astype(np.float32)
        if change == "targets":
            case.targets = (case.targets + 1) % VOCAB
        wrong = case.ours()
        assert abs(float(wrong[0]) - expected[0]) > 10 * SUM * expected[0]
        assert gap(wrong[2:3], expected[2:3]) > 10 * GRADIENT
        assert gap(wrong[3:], expected[3:]) > 10 * GRADIENT * np.abs(expected[3]).max()


# Logits are of order 4 before: a cap of 3 bends most of them.
LOGITS = {"scaled": (0.125, None), "capped": (1.0, 3.0), "scaled, then capped": (0.7, 3.0)}


@pytest.mark.parametrize(("name", "rows"), [("scaled", VOCAB), ("capped", 64), ("scaled, then capped", 64)])
def test_scaled_and_capped_logits_equal_torch(name: str, rows: int, strict_dtypes: None) -> None:
    logit_scale, softcap = LOGITS[name]
    case = Case(rows=rows, logit_scale=logit_scale, softcap=softcap)
    ours, expected = case.ours(), case.in_torch()
    assert_equal(ours, expected)
    assert not np.asarray(ours[3])[VOCAB:].any()
    others = [(1.0, None), (1.001 * logit_scale, softcap)]
    if softcap is not None:
        others += [(logit_scale, None), (logit_scale, 1.001 * softcap)]
    if softcap is not None and logit_scale != 1:
        others += [(logit_scale, logit_scale * softcap)]  # which is to scale the capped logits
    for case.logit_scale, case.softcap in others:
        assert_differs(ours, case.in_torch())


def assert_differs(ours, wrong) -> None:
    assert abs(float(ours[0]) - wrong[0]) > 10 * SUM * abs(wrong[0])
    assert_gradients_differ(ours, wrong)


def assert_gradients_differ(ours, wrong) -> None:
    for g, w in zip(ours[2:], wrong[2:], strict=True):
        assert gap(g, w) > 10 * GRADIENT * max(1, np.abs(wrong[3]).max())


@pytest.mark.parametrize("name", LOGITS)
def test_gradients_without_scale_or_cap_derivative_are_detected(name: str, strict_dtypes: None) -> None:
    logit_scale, softcap = LOGITS[name]
    case = Case(rows=VOCAB if name == "scaled" else 64, logit_scale=logit_scale, softcap=softcap)
    ours = case.ours()
    if logit_scale != 1:
        assert_gradients_differ(ours, [x / logit_scale for x in case.in_torch()])
    if softcap is not None:
        assert_gradients_differ(ours, case.in_torch(slopes=False))


def test_a_factor_on_the_loss_scales_its_gradients(strict_dtypes: None) -> None:
    assert_equal(Case().ours(factor=-2.5), Case().in_torch(factor=-2.5))


def test_vocabulary_padding_has_no_influence_and_no_gradient(strict_dtypes: None) -> None:
    case = Case(rows=64)
    case.weight[VOCAB:] *= 50  # were they seen, these rows would be predicted
    ours, expected = case.ours(), case.in_torch()
    assert_equal(ours, expected)
    assert not np.asarray(ours[3])[VOCAB:].any()
    seen = case.ours(vocab_size=64)
    assert abs(float(seen[0]) - expected[0]) > 10 * SUM * expected[0]
    assert np.asarray(seen[3])[VOCAB:].any()


def test_weights_of_zero_give_sums_and_gradients_of_zero(strict_dtypes: None) -> None:
    case = Case()
    assert all(np.asarray(x).any() for x in case.ours())
    case.loss_weights[:] = 0
    assert not any(np.asarray(x).any() for x in case.ours())


def test_the_target_of_a_slot_without_weight_does_not_matter(strict_dtypes: None) -> None:
    case = Case()
    expected = case.in_torch()
    case.targets[case.loss_weights == 0] = -100
    assert_equal(case.ours(), expected)
    case.targets[case.loss_weights > 0] = 0
    assert abs(float(case.ours()[0]) - expected[0]) > 10 * SUM * expected[0]


@pytest.mark.parametrize("trained", [64, 65])
def test_no_logits_are_computed_for_tokens_without_weight(trained: int, strict_dtypes: None) -> None:
    case = Case()
    at = np.random.default_rng(1).permutation(B * T)[:trained]
    weights = np.zeros(B * T, np.float32)
    weights[at] = 1.5
    case.loss_weights = weights.reshape(B, T)
    expected = case.in_torch()
    case.hidden[case.loss_weights == 0] = np.nan
    ours = case.ours(chunk=32)
    if trained == 64:  # two chunks, in which every token has a weight
        assert_equal(ours, expected)
    else:  # the third has one, and what fills it up is seen
        assert np.isnan(float(ours[0])) and np.isnan(np.asarray(ours[3])).all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_memory_per_token_does_not_depend_on_the_vocabulary(with_gradient: bool) -> None:
    def temporary(tokens: int, vocab: int, chunk: int = 64) -> int:
        shapes = [((2, tokens // 2, D), jnp.float32), ((vocab, D), jnp.float32), ((2, tokens // 2), jnp.int32)]
        arrays = [jax.ShapeDtypeStruct(*s) for s in [*shapes, ((2, tokens // 2), jnp.float32)]]

        def loss(*x: jax.Array) -> jax.Array:
            keys = {"vocab_size": vocab - 3, "chunk_size": chunk, "logit_scale": 1.0, "softcap": None}
            return cross_entropy_sums(*x, None, **keys)[0]

        f = jax.value_and_grad(loss, argnums=(0, 1)) if with_gradient else loss
        return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    few, many = 1024, 8192
    more = [temporary(many, v) - temporary(few, v) for v in (1024, 8192)]
    # What is alive at the peak is packed otherwise, which moves some KB; one [tokens, vocab] would grow by 205 MB.
    assert abs(more[1] - more[0]) < 0.01 * (many - few) * (8192 - 1024) * 4
    # What the vocabulary costs is its gradient, and a few arrays of a chunk's logits.
    assert temporary(many, 8192) < 8192 * D * 4 * with_gradient + 4 * 64 * 8192 * 4 + 8 * many * D * 4
    assert temporary(many, 8192, chunk=many) > many * 8192 * 4  # negative control: all at once


@pytest.mark.parametrize("vocab", [128, 32_000, 49_152, 128_256, 151_936, 200_064, 262_208, 10**9])
def test_logits_of_a_chunk_stay_within_their_memory_limit(vocab: int) -> None:
    tokens = tokens_per_chunk(vocab)
    assert 4 * vocab * tokens <= MAX_CHUNK_BYTES or tokens == 1
    assert tokens == 512 or 4 * vocab * (tokens + 128) > MAX_CHUNK_BYTES
    assert tokens == {128_256: 512, 200_064: 384, 262_208: 256}.get(vocab, tokens)


def test_large_logits_do_not_overflow(strict_dtypes: None) -> None:
    case = Case(scale=1e3)
    logits = case.hidden @ case.weight.T
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(logits)).mean() > 0.1  # without the shift by the largest
    expected = case.in_torch()
    assert expected[0] > 1e5
    ours = case.ours()
    assert abs(float(ours[0]) - expected[0]) <= SUM * expected[0]
    # Logits of 1e4 are rounded by 1e-3, and so are probabilities; those of a token move its gradient by hidden = 1e3
    # times that, and by the rows of the weight.
    assert gap(ours[2], expected[2]) < 1e-2
    assert gap(ours[3], expected[3]) < 1e-5 * np.abs(expected[3]).max()


def test_large_logits_under_a_cap_give_finite_gradients(strict_dtypes: None) -> None:
    case = Case(rows=64, scale=1e3, softcap=30.0)
    ours, expected = case.ours(), case.in_torch()
    assert abs(float(ours[0]) - expected[0]) <= SUM * expected[0]
    # Products of up to 1e4 are rounded by 1e-3, and so a slope by 0.8 / 30 of that, 3e-5. A token's gradient is off
    # by that times a loss weight of up to 3, times the weight's entries of up to 3 or hidden's of up to 3e3; few
    # tokens have a logit where the cap bends, so that such errors hardly meet.
    assert gap(ours[2], expected[2]) < 3e-4
    assert gap(ours[3], expected[3]) < 0.3
    case.softcap = 31.0
    wrong = case.in_torch()
    assert gap(ours[2], wrong[2]) > 10 * 3e-4
    assert gap(ours[3], wrong[3]) > 10 * 0.3


@pytest.mark.parametrize(("sizes", "rows"), [((1, 8, 1), 64), ((1, 4, 2), VOCAB), ((2, 2, 2), 64)])
def test_sums_and_gradients_on_a_mesh_equal_torch(sizes: tuple[int, int, int], rows: int, strict_dtypes: None) -> None:
    # The third row has no weight: with eight shards of rows, the third device has no token to learn from.
    case = Case(rows=rows, logit_scale=0.7, softcap=3.0)
    expected = case.in_torch()
    with jax.set_mesh(mesh_of(*sizes)):
        assert_equal(case.ours(batch_axes=BATCH_AXES), expected)
        case.loss_weights[5] = 0
        without_a_row = case.ours(batch_axes=BATCH_AXES)
    assert abs(float(without_a_row[0]) - expected[0]) > 10 * SUM * expected[0]


# ---------------------------------------------------------------------------------------- by source
def source_sums_in_numpy(case: Case) -> np.ndarray:
    """The sums by source in float64, [4 N] in the order of SourceSums, token by token."""
    logits, _ = in_numpy(case)
    sums = dict.fromkeys(SourceSums._fields, np.zeros(SOURCES))
    for at in np.ndindex(B, T):
        p = np.exp(logits[at][:VOCAB] - logits[at][:VOCAB].max())
        p /= p.sum()
        one = np.eye(SOURCES)[case.sources[at]] * case.loss_weights[at]
        correct = float(np.argmax(p) == case.targets[at])
        of_token = {"loss": -np.log(p[case.targets[at]]), "weight": 1.0, "correct": correct}
        of_token["entropy"] = -(p * np.log(p)).sum()
        sums = {name: total + one * of_token[name] for name, total in sums.items()}
    return np.stack([sums[name] for name in SourceSums._fields])


def gap_by_source(case: Case, expected: np.ndarray) -> float:
    return float((np.abs(case.source_sums - expected) / np.maximum(expected, 1)).max())


@pytest.mark.parametrize("sizes", [None, (1, 8, 1), (1, 4, 2)])
def test_sums_by_source_over_microbatches_equal_numpy(sizes: tuple[int, int, int] | None, strict_dtypes: None) -> None:
    """Two microbatches that have every second slot each; the targets of every third slot are what is predicted."""
    case = Case(rows=VOCAB if sizes == (1, 4, 2) else 64, logit_scale=0.7, softcap=3.0)
    logits, _ = in_numpy(case)
    case.targets[:, ::3] = logits[:, ::3, :VOCAB].argmax(axis=-1)
    expected, loss_weights = source_sums_in_numpy(case), case.loss_weights
    assert expected[2, :2].min() > 20 and not expected[:, 2].any()
    total = np.zeros_like(expected)
    with jax.set_mesh(mesh_of(*sizes)) if sizes else contextlib.nullcontext():
        for first in (0, 1):
            case.loss_weights = np.where(np.arange(T) % 2 == first, loss_weights, np.float32(0))
            loss_sum, *_ = case.ours(batch_axes=BATCH_AXES if sizes else ())
            assert case.source_sums[0].sum() == pytest.approx(float(loss_sum), rel=SUM)
            total += case.source_sums
    case.loss_weights, case.source_sums = loss_weights, total
    assert gap_by_source(case, expected) < SUM
    # What the sums would be with other sources, weights or targets, or over the padding of the vocabulary, is seen.
    for name, wrong in {"sources": 1 - case.sources, "loss_weights": case.loss_weights > 0, "targets": 0}.items():
        right = getattr(case, name)
        setattr(case, name, np.broadcast_to(wrong, (B, T)).astype(right.dtype))
        assert gap_by_source(case, source_sums_in_numpy(case)) > 10 * SUM, name
        setattr(case, name, right)


def test_the_first_of_equal_largest_logits_is_predicted(strict_dtypes: None) -> None:
    case = Case()
    case.hidden[:] = 0
    case.targets[:] = 0
    case.targets[:, 5:] = 1
    case.ours()
    assert case.source_sums[2].sum() == case.loss_weights[:, :5].sum()
    uniform = case.loss_weights.sum(dtype=np.float64) * np.log(VOCAB)
    assert case.source_sums[3].sum() == pytest.approx(uniform, rel=SUM)


# ---------------------------------------------------------------------------------------- bfloat16
# bfloat16 keeps 8 bits: rounding moves a number by at most 2^-8 of itself.
ROUNDING = 2.0**-8


def in_bfloat16(case: Case) -> Case:
    case.hidden, case.weight = jnp.asarray(case.hidden, jnp.bfloat16), jnp.asarray(case.weight, jnp.bfloat16)
    return case


@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.7, 3.0)])
def test_loss_of_bfloat16_inputs_errs_by_their_rounding_only(
    logit_scale: float, softcap: float | None, strict_dtypes: None
) -> None:
    exact = Case(logit_scale=logit_scale, softcap=softcap)
    case = in_bfloat16(Case(logit_scale=logit_scale, softcap=softcap))
    ours, expected = case.ours(), case.in_torch()
    # From the rounded inputs on, everything is float32.
    assert abs(float(ours[0]) - expected[0]) <= SUM * expected[0]
    # The rounding itself: a product moves by at most (2 * 2^-8 + 2^-16) * sum |h||w|, its logit by no more than its
    # scale times that, and CE by twice the largest move.
    moves = (2 + ROUNDING) * ROUNDING * (np.abs(exact.hidden) @ np.abs(exact.weight.T)).max(axis=-1)
    bound = float((2 * logit_scale * moves * exact.loss_weights).sum())
    assert abs(float(ours[0]) - exact.in_torch()[0]) < bound
    # Logits rounded to bfloat16 are what the first bound is there to forbid.
    logits, _ = in_numpy(case)
    rounded = torch.tensor(np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)).reshape(-1, VOCAB)
    ce = torch.nn.functional.cross_entropy(rounded, torch.tensor(case.targets).long().reshape(-1), reduction="none")
    wrong = float((ce.numpy() * case.loss_weights.reshape(-1)).sum())
    assert abs(wrong - expected[0]) > 10 * SUM * expected[0]


def in_numpy(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B T V] in float64, and their derivatives by the products of hidden states and weight."""
    logits = np.asarray(case.hidden, np.float64) @ np.asarray(case.weight, np.float64).T * case.logit_scale
    if case.softcap is None:
        return logits, np.full(logits.shape, case.logit_scale)
    return case.softcap * np.tanh(logits / case.softcap), case.logit_scale * np.cosh(logits / case.softcap) ** -2.0


@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.7, 3.0)])
def test_gradients_of_bfloat16_inputs_err_by_two_roundings(
    logit_scale: float, softcap: float | None, strict_dtypes: None
) -> None:
    case = in_bfloat16(Case(logit_scale=logit_scale, softcap=softcap))
    *_, d_hidden, d_weight = case.ours()
    *_, expected_hidden, expected_weight = case.in_torch()
    assert d_hidden.dtype == d_weight.dtype == jnp.bfloat16
    hidden, weight = np.asarray(case.hidden, np.float64), np.asarray(case.weight, np.float64)
    logits, slopes = in_numpy(case)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    d_products = (probabilities - np.eye(VOCAB)[case.targets]) * case.loss_weights[..., None] * slopes
    # One rounding of each product's gradient, one of the sum; float32 between them.
    slack = 1 + 1e-3
    hidden_bound = slack * ROUNDING * (np.abs(d_products) @ np.abs(weight) + np.abs(expected_hidden)) + 1e-6
    sums = np.einsum("btv,btd->vd", np.abs(d_products), np.abs(hidden))
    weight_bound = slack * ROUNDING * (sums + np.abs(expected_weight)) + 1e-6
    assert (np.abs(np.asarray(d_hidden, np.float64) - expected_hidden) <= hidden_bound).all()
    assert (np.abs(np.asarray(d_weight, np.float64) - expected_weight) <= weight_bound).all()
    shifted = np.roll(expected_hidden, 1, axis=1)
    assert (np.abs(np.asarray(d_hidden, np.float64) - shifted) > 10 * hidden_bound).mean() > 0.5
