"""Attention on GPUs: the algorithm of blockwise.py as Pallas kernels, compiled by Triton.

The softmax is accumulated over key blocks and recomputed in the backward pass (FlashAttention-2, arXiv 2307.08691). A
query block visits the key blocks that it sees, and a key block visits the query blocks that see it. The cost therefore
grows with the squared lengths of the samples, and no sum depends on an order that changes from run to run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import first_visible_key, last_visible_query, mark_saveable, pad_to_multiple
from mice_jax.models.attention.split_rows import (
    WHOLE_ROW,
    RowSplit,
    block_starts,
    cut_parts,
    pad_parts,
    query_segments,
)

LOWEST = float(jnp.finfo(jnp.float32).min)
MIN_HEAD_DIM = 16  # Triton multiplies only matrices whose dims are powers of two of at least 16

# B rows, T query slots, U key slots, P parts of queries, N query heads, K key heads, G = N/K, H head_dim
# X slots of the block that a program keeps; Q and S slots of queries and keys, one of them kept, the other visited


class Blocks(NamedTuple):
    """Slots per block. A program keeps one block of `keep` slots and visits blocks of `visit` slots one by one."""

    keep: int
    visit: int
    keep_backward: int
    visit_backward: int


class _Call(NamedTuple):
    """The static arguments of the kernels."""

    scoring: Scoring
    blocks: Blocks
    interpret: bool
    parts: int  # of a row that the queries are


class _Rows(NamedTuple):
    """Where queries and keys are: the queries of a device may be parts of the row, each of them whole blocks."""

    q_slots: jax.Array  # [T] int32, the slots of the row
    q_segments: jax.Array  # [B T] int32
    k_segments: jax.Array  # [B U] int32


def pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scoring: Scoring,
    split: RowSplit = WHOLE_ROW,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention as `attention.attend` describes it, on one device.

    Args:
      q: [B T N H].
      k: [B U K H].
      v: [B U K H].
      segment_ids: [B U] int32.
      scoring: scale, window and soft cap.
      split: the parts of the row that the queries are.
      blocks: block sizes; None chooses them.
      interpret: runs the kernels' code on any device, slowly.

    Returns:
      [B T N H].
    """
    (b, t, n, h), group = q.shape, q.shape[2] // k.shape[2]
    dims = max(MIN_HEAD_DIM, pl.next_power_of_2(h))
    blocks = blocks or _blocks(dims, q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, dims - h))) for x in (q, k, v))  # zeros do not change products
    q, own = pad_parts(max(blocks), split, q, query_segments(split, t, segment_ids))
    k, v, segment_ids = pad_to_multiple(max(blocks), k, v, segment_ids)
    rows = _Rows(block_starts(t, q.shape[1], 1, split), own, segment_ids)
    grouped = q.reshape(b, q.shape[1], n // group, group, dims)
    out: Any = _attend(grouped, k, v, rows, _Call(scoring, blocks, interpret, split.parts))
    return cut_parts(t, split, out.reshape(b, -1, n, dims)[..., :h])


def _blocks(dims: int, dtype: Any) -> Blocks:
    """Returns block sizes that fit the registers and shared memory of every GPU from capability 8.0 on.

    Capabilities 8.6, 8.9 and 12.0 have the least shared memory, 99 KiB per block; compiled for them, the kernels take
    at most 73 KiB.
    """
    if dtype == jnp.float32:
        if dims <= 64:
            return Blocks(64, 32, 64, 32)
        return Blocks(32, 32, 32, 32) if dims <= 128 else Blocks(32, 16, 16, 16)
    return Blocks(128, 64, 64, 64) if dims <= 128 else Blocks(64, 32, 32, 32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: _Rows, call: _Call) -> jax.Array:
    """Computes attention of queries [B T K G H] over keys and values [B U K H]; returns [B T K G H]."""
    return _forward(q, k, v, rows, call)[0]


# ---------------------------------------------------------------------------------------- kernels
# A ref holds one row and one key or query head of an array, with all its slots or with the kept ones.
def _scores(
    q: jax.Array, k: jax.Array, q_slots: jax.Array, k_slots: jax.Array, q_seg: jax.Array, k_seg: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes float32 scores [Q S], LOWEST where masked, and the mask from queries [Q H] and keys [S H]."""
    mask = scoring.position_mask(q_slots, k_slots) & (q_seg[:, None] == k_seg[None, :]) & (q_seg > 0)[:, None]
    return jnp.where(mask, scoring.scores(_dot(q, k.T)), LOWEST), mask


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_slots_ref: Any, q_segments_ref: Any, segments_ref: Any, first_ref: Any,
    out_ref: Any, log_total_ref: Any, *, scoring: Scoring, keep: int, visit: int,
) -> None:  # fmt: skip
    i = pl.program_id(0)
    q, q_seg, start = q_ref[...], q_segments_ref[pl.ds(i * keep, keep)], q_slots_ref[i * keep]
    q_slots = start + jnp.arange(keep, dtype=jnp.int32)

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        at = pl.ds(j * visit, visit)
        k_slots = j * visit + jnp.arange(visit, dtype=jnp.int32)
        scores, mask = _scores(q, k_ref[at, :], q_slots, k_slots, q_seg, segments_ref[at], scoring)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.where(mask, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        v = v_ref[at, :]
        mixed = _dot(weights.astype(v.dtype), v)
        return new_top, total * shrink + weights.sum(axis=1), out * shrink[:, None] + mixed

    zeros = jnp.zeros(keep, jnp.float32)
    empty = (zeros + LOWEST, zeros, jnp.zeros(q.shape, jnp.float32))
    top, total, out = lax.fori_loop(first_ref[i], _last_block(start + keep, visit, k_ref), key_block, empty)
    safe = jnp.where(total > 0, total, 1.0)  # a query of padding has summed nothing
    out_ref[...] = (out / safe[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = top + jnp.log(safe)


def _query_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_slots_ref: Any, q_segments_ref: Any, segments_ref: Any, first_ref: Any,
    d_out_ref: Any, log_total_ref: Any, row_dots_ref: Any, dq_ref: Any, *, scoring: Scoring, keep: int, visit: int,
) -> None:  # fmt: skip
    """Computes the gradient of the kept queries."""
    i = pl.program_id(0)
    q, d_out, q_seg = q_ref[...], d_out_ref[...], q_segments_ref[pl.ds(i * keep, keep)]
    log_total, row_dots, start = log_total_ref[...], row_dots_ref[...], q_slots_ref[i * keep]
    q_slots = start + jnp.arange(keep, dtype=jnp.int32)

    def key_block(j: jax.Array, dq: jax.Array) -> jax.Array:
        at = pl.ds(j * visit, visit)
        k_slots = j * visit + jnp.arange(visit, dtype=jnp.int32)
        k = k_ref[at, :]
        scores, mask = _scores(q, k, q_slots, k_slots, q_seg, segments_ref[at], scoring)
        _, d_products = _score_gradients(scores, mask, _dot(d_out, v_ref[at, :].T), log_total, row_dots, scoring)
        return dq + _dot(d_products.astype(k.dtype), k)

    end = _last_block(start + keep, visit, k_ref)
    dq = lax.fori_loop(first_ref[i], end, key_block, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _key_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_slots_ref: Any, q_segments_ref: Any, segments_ref: Any, begin_ref: Any,
    end_ref: Any, d_out_ref: Any, log_total_ref: Any, row_dots_ref: Any, dk_ref: Any, dv_ref: Any,
    *, scoring: Scoring, keep: int, visit: int, parts: int,
) -> None:  # fmt: skip
    """Computes the gradients of the kept keys and values, over all query heads that share them."""
    j = pl.program_id(0)
    k, v, k_seg = k_ref[...], v_ref[...], segments_ref[pl.ds(j * keep, keep)]
    k_slots = j * keep + jnp.arange(keep, dtype=jnp.int32)

    def head(g: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def query_block(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk, dv = grads
            at = pl.ds(i * visit, visit)
            q_slots = q_slots_ref[i * visit] + jnp.arange(visit, dtype=jnp.int32)
            q, d_out = q_ref[at, g, :], d_out_ref[at, g, :]
            scores, mask = _scores(q, k, q_slots, k_slots, q_segments_ref[at], k_seg, scoring)
            d_weights = _dot(d_out, v.T)
            weights, d_products = _score_gradients(
                scores, mask, d_weights, log_total_ref[g, at], row_dots_ref[g, at], scoring
            )
            dv += _dot(weights.astype(d_out.dtype).T, d_out)
            return dk + _dot(d_products.astype(q.dtype).T, q), dv

        for part in range(parts):
            of_part = part * pl.num_programs(0) + j
            grads = lax.fori_loop(begin_ref[of_part], end_ref[of_part], query_block, grads)
        return grads

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _score_gradients(
    scores: jax.Array, mask: jax.Array, d_weights: jax.Array, log_total: jax.Array, row_dots: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Recomputes the weights [Q S], and computes the gradients of the products that they came from."""
    weights = jnp.where(mask, jnp.exp(scores - log_total[:, None]), 0.0)
    # Masked scores are set to 0, because LOWEST squared is infinite, and 0 times infinity is NaN.
    score_grad = scoring.score_grad(jnp.where(mask, scores, 0.0))
    return weights, weights * (d_weights - row_dots[:, None]) * score_grad


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies bfloat16 or float32 matrices with float32 sums; by default Triton rounds float32 to 10 bits (TF32)."""
    return triton.dot(a, b, precision=lax.Precision.HIGHEST)


def _last_block(slots: Any, size: int, k_ref: Any) -> Any:
    """Returns the number of blocks of `size` keys that hold the first `slots` slots of a row, at most all."""
    return jnp.minimum(lax.div(slots + (size - 1), size), k_ref.shape[0] // size)


# ---------------------------------------------------------------------------------------- calls of the kernels
def _forward(q: jax.Array, k: jax.Array, v: jax.Array, rows: _Rows, call: _Call) -> tuple[jax.Array, jax.Array]:
    """Computes the output, and the log of each query's softmax denominator [B K G T]."""
    keep, visit = call.blocks[:2]
    specs, first = _Specs(q.shape, k.shape[1], keep), _first(rows, call.scoring, keep, visit)
    return pl.pallas_call(
        functools.partial(_forward_kernel, scoring=call.scoring, keep=keep, visit=visit),
        grid=(q.shape[1] // keep, q.shape[0], k.shape[2] * q.shape[3]),
        in_specs=[specs.queries, specs.all_keys, specs.all_keys, *specs.rows, _of_row(first)],
        out_specs=[specs.queries, specs.query_sums],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), _sums_of(q)],
        compiler_params=_params(4 if q.shape[-1] <= 64 and q.dtype == jnp.bfloat16 else 8),
        interpret=call.interpret,
        name="attention_forward",
    )(q, k, v, *rows, first)


def _save(q: jax.Array, k: jax.Array, v: jax.Array, rows: _Rows, call: _Call) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = mark_saveable(*_forward(q, k, v, rows, call))
    return out, (q, k, v, rows, out, log_total)


def _backward(call: _Call, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, rows, out, log_total = saved
    keep, visit = call.blocks[2:]
    specs, (b, t, kv_heads, group, _) = _Specs(q.shape, k.shape[1], keep), q.shape
    first, visiting = _first(rows, call.scoring, keep, visit), _visiting_queries(rows, call, keep, visit)
    sizes = {"scoring": call.scoring, "keep": keep, "visit": visit}
    rest = {"compiler_params": _params(8), "interpret": call.interpret}
    # The sum over keys of weight * d_weight equals the product of d_out with the output.
    row_dots = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).transpose(0, 2, 3, 1)
    dq = pl.pallas_call(
        functools.partial(_query_kernel, **sizes),
        grid=(t // keep, b, kv_heads * group),
        in_specs=[specs.queries, specs.all_keys, specs.all_keys, *specs.rows, _of_row(first), specs.queries]
        + [specs.query_sums] * 2,
        out_specs=specs.queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attention_query_gradient",
        **rest,
    )(q, k, v, *rows, first, d_out, log_total, row_dots)
    dk, dv = pl.pallas_call(
        functools.partial(_key_kernel, **sizes, parts=call.parts),
        grid=(k.shape[1] // keep, b, kv_heads),
        in_specs=[specs.all_queries, specs.keys, specs.keys, *specs.rows, *map(_of_row, visiting), specs.all_queries]
        + [specs.all_query_sums] * 2,
        out_specs=[specs.keys, specs.keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="attention_key_gradient",
        **rest,
    )(q, k, v, *rows, *visiting, d_out, log_total, row_dots)
    return dq, dk, dv, None


_attend.defvjp(_save, _backward)


class _Specs:
    """The part of each array that a program gets: one row, one head, and the kept slots or all slots.

    A program's indices are its block, its row and its head, which is a query head, or a key head where keys are kept.
    """

    def __init__(self, shape: tuple[int, ...], keys: int, keep: int):
        _, t, _, g, h = shape
        self.rows = (
            pl.BlockSpec((t,), lambda i, b, n: (0,)),
            pl.BlockSpec((None, t), lambda i, b, n: (b, 0)),
            pl.BlockSpec((None, keys), lambda i, b, n: (b, 0)),
        )
        self.queries = pl.BlockSpec((None, keep, None, None, h), lambda i, b, n: (b, i, n // g, n % g, 0))
        self.query_sums = pl.BlockSpec((None, None, None, keep), lambda i, b, n: (b, n // g, n % g, i))
        self.all_keys = pl.BlockSpec((None, keys, None, h), lambda i, b, n: (b, 0, n // g, 0))
        self.keys = pl.BlockSpec((None, keep, None, h), lambda j, b, n: (b, j, n, 0))
        self.all_queries = pl.BlockSpec((None, t, None, g, h), lambda j, b, n: (b, 0, n, 0, 0))
        self.all_query_sums = pl.BlockSpec((None, None, g, t), lambda j, b, n: (b, n, 0, 0))


def _of_row(x: jax.Array) -> pl.BlockSpec:
    """Gives a program what an array [B X] has for its row."""
    return pl.BlockSpec((None, x.shape[1]), lambda i, b, n: (b, 0))


def _sums_of(q: jax.Array) -> jax.ShapeDtypeStruct:
    b, t, kv_heads, group, _ = q.shape
    return jax.ShapeDtypeStruct((b, kv_heads, group, t), jnp.float32)


def _params(num_warps: int) -> triton.CompilerParams:
    """Returns parameters with which at most 100 bytes of registers per thread spill on capabilities 8.0 to 12.0."""
    return triton.CompilerParams(num_warps=num_warps, num_stages=2)


def _first(rows: _Rows, scoring: Scoring, keep: int, visit: int) -> jax.Array:
    """Computes the first key block that each query block sees, [B T/X]; past the last one for padding."""
    first = first_visible_key(rows.k_segments, scoring.window)[:, rows.q_slots[::keep]] // visit
    return jnp.where(_real(rows.q_segments, keep), first, rows.k_segments.shape[1])


def _visiting_queries(rows: _Rows, call: _Call, keep: int, visit: int) -> tuple[jax.Array, jax.Array]:
    """Computes the first query block that sees each key block, and one past the last, in each part of the queries.

    Returns:
      Two arrays [B P*U/X] int32; the second is 0 for padding.
    """
    (b, slots), blocks = rows.k_segments.shape, rows.q_slots.size // call.parts // visit
    starts = rows.q_slots.reshape(call.parts, -1)[:, :1]  # [P 1]
    of_parts = jnp.arange(call.parts, dtype=jnp.int32)[:, None] * blocks
    last = last_visible_query(rows.k_segments, call.scoring.window)[:, keep - 1 :: keep]  # [B U/X]
    begin = jnp.clip((jnp.arange(0, slots, keep, dtype=jnp.int32) - starts) // visit, 0, blocks) + of_parts
    end = jnp.clip((last[:, None] - starts) // visit + 1, 0, blocks) + of_parts  # [B P U/X]
    end = jnp.where(_real(rows.k_segments, keep)[:, None], end, 0)
    return jnp.broadcast_to(begin, end.shape).reshape(b, -1), end.reshape(b, -1)


def _real(segments: jax.Array, keep: int) -> jax.Array:
    return segments.reshape(segments.shape[0], -1, keep).max(axis=2) > 0
