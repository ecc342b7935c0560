"""Attention block by block in plain JAX, for any device: memory is linear in T, and cost depends on the segments.

The softmax is accumulated over key blocks and recomputed in the backward pass (FlashAttention, arXiv 2205.14135).
A query block visits the key blocks from the start of its first segment, or of its window, up to itself. Packed short
samples therefore cost the same as alone, and the cost of a long sample is bounded by its window. Rows are computed one
after another, because each visits different blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import first_visible_key, mark_saveable, pad_to_multiple
from mice_jax.models.attention.split_rows import (
    WHOLE_ROW,
    RowSplit,
    block_starts,
    cut_parts,
    pad_parts,
    query_segments,
)

BLOCK = 64  # slots of a query or key block; on a CPU, blocks of 64 are twice as fast as 128 for short samples
LOWEST = float(jnp.finfo(jnp.float32).min)

# T query slots, S key slots, N query heads, K key heads, G = N/K, H head_dim
# I blocks of queries and J blocks of keys, of C slots; X = G*C query rows of one block


class _Blocks(NamedTuple):
    """Where the blocks of a row are, and its segments there; the queries of a device may be a part of the row."""

    starts: jax.Array  # [I] int32, the slot of the row at which each block of queries starts
    q_segments: jax.Array  # [I C]
    k_segments: jax.Array  # [J C]


def blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scoring: Scoring,
    split: RowSplit = WHOLE_ROW,
) -> jax.Array:
    """Computes attention as `attention.attend` describes it, on one device.

    Args:
      q: [B T N H].
      k: [B S K H].
      v: [B S K H].
      segment_ids: [B S] int32.
      scoring: scale, window and soft cap.
      split: the parts of the row that the queries are.

    Returns:
      [B T N H].
    """
    t = q.shape[1]
    size = min(BLOCK, t // split.parts)
    q, own = pad_parts(size, split, q, query_segments(split, t, segment_ids))
    starts = block_starts(t, q.shape[1], size, split)
    k, v, segment_ids = pad_to_multiple(size, k, v, segment_ids)

    def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, own, segments = arrays
        return _row(q, k, v, _Blocks(starts, own.reshape(-1, size), segments.reshape(-1, size)), scoring)

    return cut_parts(t, split, lax.map(row, (q, k, v, own, segment_ids)))


def _row(q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scoring: Scoring) -> jax.Array:
    """Computes one row: [T N H], [S K H] -> [T N H]."""
    t, n, h = q.shape
    kv_heads = k.shape[1]
    (num_blocks, size), group = blocks.q_segments.shape, n // kv_heads

    def queries(x: jax.Array) -> jax.Array:  # [T N H] -> [I K X H]
        return x.reshape(num_blocks, size, kv_heads, group, h).transpose(0, 2, 3, 1, 4).reshape(
            num_blocks, kv_heads, group * size, h
        )  # fmt: skip

    def keys(x: jax.Array) -> jax.Array:  # [S K H] -> [J K C H]
        return x.reshape(-1, size, kv_heads, h).transpose(0, 2, 1, 3)

    out: Any = _attend_blocks(queries(q), keys(k), keys(v), blocks, scoring)
    out = out.reshape(num_blocks, kv_heads, group, size, h).transpose(0, 3, 1, 2, 4)
    return out.reshape(t, n, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scoring: Scoring) -> jax.Array:
    return _forward(q, k, v, blocks, scoring)[0]


def _visited(blocks: _Blocks, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Computes the first key block that each query block visits, and one past the last, [I] both.

    A query block of padding visits none.
    """
    num_blocks, size = blocks.k_segments.shape
    # The first query reaches farthest back.
    first = first_visible_key(blocks.k_segments.reshape(-1), window)[blocks.starts] // size
    ends = jnp.minimum((blocks.starts + (2 * size - 1)) // size, num_blocks)
    return jnp.where(blocks.q_segments.max(axis=1) > 0, first, num_blocks), ends


def _scores(
    q_block: jax.Array, k_block: jax.Array, q_seg: jax.Array, k_seg: jax.Array, start: jax.Array, j: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes float32 scores [K X C], LOWEST where masked, and the mask [1 X C] from [K X H] and [K C H]."""
    size = k_seg.size
    slots = jnp.arange(size, dtype=jnp.int32)
    mask = scoring.position_mask(start + slots, j * size + slots)
    mask &= (q_seg[:, None] == k_seg[None, :]) & (q_seg > 0)[:, None]
    mask = jnp.tile(mask, (q_block.shape[1] // size, 1))[None]
    products = jnp.einsum("kxh,kch->kxc", q_block, k_block, preferred_element_type=jnp.float32)
    return jnp.where(mask, scoring.scores(products), LOWEST), mask


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """Computes the output [I K X H], and the log of each query's softmax denominator [I K X]."""
    starts, q_segments, k_segments = blocks
    first, ends = _visited(blocks, scoring.window)
    rows = q.shape[1:3]

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            scores, mask = _scores(q[i], k[j], q_segments[i], k_segments[j], starts[i], j, scoring)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            mixed = jnp.einsum("kxc,kch->kxh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new_top, total, out * shrink[..., None] + mixed

        zeros = jnp.zeros(rows, jnp.float32)
        empty = (zeros + LOWEST, zeros, jnp.zeros((*rows, q.shape[3]), jnp.float32))
        top, total, out = lax.fori_loop(first[i], ends[i], key_block, empty)
        safe = jnp.where(total > 0, total, 1.0)  # a query of padding has summed nothing
        return (out / safe[..., None]).astype(q.dtype), top + jnp.log(safe)

    return lax.map(query_block, jnp.arange(q.shape[0], dtype=jnp.int32))


def _save(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scoring: Scoring
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = mark_saveable(*_forward(q, k, v, blocks, scoring))
    return out, (q, k, v, blocks, out, log_total)


def _backward(
    scoring: Scoring, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, blocks, out, log_total = saved
    starts, q_segments, k_segments = blocks
    first, ends = _visited(blocks, scoring.window)
    # The sum over keys of weight * d_weight equals the product of d_out with the output.
    exact = lax.Precision.HIGHEST
    row_dots = jnp.einsum("...d,...d->...", d_out.astype(jnp.float32), out.astype(jnp.float32), precision=exact)

    def query_block(grads: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            scores, mask = _scores(q[i], k[j], q_segments[i], k_segments[j], starts[i], j, scoring)
            weights = jnp.where(mask, jnp.exp(scores - log_total[i][..., None]), 0.0)
            d_weights = jnp.einsum("kxh,kch->kxc", d_out[i], v[j], preferred_element_type=jnp.float32)
            # Masked scores are set to 0, because LOWEST squared is infinite, and 0 times infinity is NaN.
            score_grad = scoring.score_grad(jnp.where(mask, scores, 0.0))
            d_products = (weights * (d_weights - row_dots[i][..., None]) * score_grad).astype(q.dtype)
            sums = {"preferred_element_type": jnp.float32}
            dv = dv.at[j].add(jnp.einsum("kxc,kxh->kch", weights.astype(v.dtype), d_out[i], **sums))
            dk = dk.at[j].add(jnp.einsum("kxc,kxh->kch", d_products, q[i], **sums))
            dq += jnp.einsum("kxc,kch->kxh", d_products, k[j], **sums)
            return dq, dk, dv

        dq = jnp.zeros(q.shape[1:], jnp.float32)
        dq, dk, dv = lax.fori_loop(first[i], ends[i], key_block, (dq, *grads))
        return (dk, dv), dq

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = lax.scan(query_block, zeros, jnp.arange(q.shape[0], dtype=jnp.int32))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend_blocks.defvjp(_save, _backward)
