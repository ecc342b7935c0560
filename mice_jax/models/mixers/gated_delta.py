"""The gated delta rule: a linear attention whose state forgets, and replaces what a key already recalls.

With a state S [D E] of each head, a slot computes (arXiv 2412.06464, equation 10)

    S = exp(log_decay) S
    S = S + k outer (beta (v - k S))
    output = q S

Queries and keys are first divided by their length, and queries by sqrt(D). In a chunk of C slots, the corrections
`beta (v - k S)` of all slots are the solution of a triangular system (section 3.3 of the paper). All chunks solve
theirs at once, for a state of zeros; then chunk after chunk corrects its solution for the state before it, by two
products.
"""

import functools

import jax
import jax.numpy as jnp

from mice_jax.models.mixers.chunks import (
    CHUNK,
    MAX_STEPS,
    chunk_decays,
    from_chunks,
    into_chunks,
    pad_rows,
    product_precision,
)
from mice_jax.models.mixers.split_rows import entering_state, map_parts, num_parts
from mice_jax.numerics.scaled import scaled

# B rows, T slots, M chunks, C slots of a chunk, K key heads, N value heads, G = N/K, D key dims, E value dims

BLOCK = 8  # the size of the blocks on the diagonal of a chunk's system that are inverted at once
LENGTH_EPS = 1e-6  # is added to the squared length by which queries and keys are divided


def gated_delta(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array,
    state: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gated delta rule over packed rows; the state is reset at the start of each sample.

    The backward pass computes everything again from the inputs.

    Args:
      q: [B T K D].
      k: [B T K D].
      v: [B T N E]; value heads n*G to n*G + G-1 share key head n.
      log_decay: [B T N] float32, at most 0.
      beta: [B T N], from 0 to 1. A slot with a beta and a log_decay of 0 leaves the state as it is.
      segment_ids: [B T] int32; slots of a sample follow one another.
      state: [B N D E] float32, which continues in the sample of the first slot; None for zeros.
      chunk: the number of slots of a chunk, a power of two.

    Returns:
      The outputs [B T N E] in the dtype of `v`, and the state after the last slot [B N D E], float32.
    """
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    compute = jax.checkpoint(functools.partial(_gated_delta, chunk=chunk), prevent_cse=False)
    return compute(q, k, v, log_decay, beta, segment_ids, state)


def gated_delta_of_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Computes the outputs of `gated_delta` for whole rows, which several devices may share."""
    if num_parts(q.shape[1]) == 1:
        return gated_delta(q, k, v, log_decay, beta, segment_ids)[0]

    def of_part(
        index: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array,
        beta: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        # The rule is linear in the values and the state, column by column. With the identity as more columns of the
        # state, and no values for them, these columns become the matrix by which a part multiplies the state.
        (rows, _, n, e), d = v.shape, q.shape[3]
        identity = jnp.broadcast_to(jnp.eye(d, d + e, e, dtype=jnp.float32), (rows, n, d, d + e))
        values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, d)))
        _, after = gated_delta(q, k, values, log_decay, beta, segment_ids, identity)

        def pass_on(state: jax.Array, part: tuple[jax.Array, jax.Array]) -> jax.Array:
            matrix, added = part
            return _exact_product(matrix, state) + added

        state = entering_state(index, segment_ids, (after[..., e:], after[..., :e]), pass_on)
        return gated_delta(q, k, v, log_decay, beta, segment_ids, state)[0]

    return map_parts(of_part, (q, k, v, log_decay, beta, segment_ids), ())


def gated_delta_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Continues rows, of one sample each, from the state after their last token.

    A few slots are computed one after another as in the formula above, and more of them in chunks.

    Args:
      q: [B T K D].
      k: [B T K D].
      v: [B T N E].
      log_decay: [B T N] float32.
      beta: [B T N].
      state: [B N D E] float32.
      num_tokens: [B] int32, the number of slots of each row that are tokens. The rest, at its end, is padding, whose
        outputs have no meaning and which leaves the state as it is.

    Returns:
      The outputs [B T N E] in the dtype of `v`, and the new state.
    """
    slots = jnp.arange(q.shape[1], dtype=jnp.int32)
    real = (slots < num_tokens[:, None])[:, :, None]
    log_decay, beta = jnp.where(real, log_decay, 0), jnp.where(real, beta, 0)
    if len(slots) > MAX_STEPS:
        return gated_delta(q, k, v, log_decay, beta, jnp.ones(q.shape[:2], jnp.int32), state)
    groups = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, groups, axis=2) for x in _unit(q, k))
    steps = [x.astype(jnp.float32).swapaxes(0, 1) for x in (q, k, v, log_decay, beta)]

    def slot(state: jax.Array, inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, beta = inputs  # [B N D], [B N D], [B N E], [B N], [B N]
        state = state * jnp.exp(log_decay)[..., None, None]
        recalled = jnp.sum(k[..., None] * state, axis=-2)
        correction = beta[..., None] * (v - recalled)
        state = state + k[..., None] * correction[..., None, :]
        return state, jnp.sum(q[..., None] * state, axis=-2)

    state, outputs = jax.lax.scan(slot, state, steps)
    return outputs.swapaxes(0, 1).astype(v.dtype), state


def _gated_delta(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array,
    state: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    b, t, key_heads, _ = q.shape
    n, dtype = v.shape[2], v.dtype
    groups = n // key_heads
    product = functools.partial(jnp.einsum, precision=product_precision(dtype))
    arrays = (*_unit(q, k), v.astype(jnp.float32), log_decay, beta.astype(jnp.float32))
    segment_ids, q, k, v, log_decay, beta = pad_rows(chunk, segment_ids, *arrays)
    q, k, v, beta = (into_chunks(x, chunk) for x in (q, k, v, beta))

    def grouped(x: jax.Array, heads: int) -> jax.Array:  # [... N ...] -> [... K G ...]
        return x.reshape(*x.shape[:heads], key_heads, groups, *x.shape[heads + 1 :])

    v, beta = grouped(v, 2), grouped(beta, 2)
    pairs, from_start, to_end, through = (grouped(x, 2) for x in chunk_decays(log_decay, segment_ids, chunk))

    # What a slot's correction takes from the values that earlier slots of the chunk have added.
    overlaps = scaled(scaled(pairs, product("mbkid,mbkjd->mbkij", k, k), (0, 1, 2, 4, 5)), beta, range(5))
    solved = _inverse_of_unit_lower(jnp.tril(overlaps, -1))  # [M B K G C C]
    # The corrections are those of a state of zeros, less a product with the state before the chunk.
    of_zeros = product("mbkgij,mbkgje->mbkgie", solved, scaled(v, beta, range(5)))
    of_state = product("mbkgij,mbkjd->mbkgid", scaled(solved, beta * from_start, (0, 1, 2, 3, 5)), k)

    def one_chunk(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        of_zeros, of_state, k, to_end, through = inputs
        corrections = of_zeros - product("bkgid,bkgde->bkgie", of_state, state)
        added = product("bkid,bkgie->bkgde", k, scaled(corrections, to_end, range(4)))
        return scaled(state, through, range(3)) + added, (state, corrections)

    chunks = (of_zeros, of_state, k, to_end, through)
    state, (states, corrections) = jax.lax.scan(one_chunk, grouped(state, 1), chunks)
    weights = scaled(pairs, product("mbkid,mbkjd->mbkij", q, k), (0, 1, 2, 4, 5))
    before = scaled(product("mbkid,mbkgde->mbkgie", q, states), from_start, range(5))
    outputs = before + product("mbkgij,mbkgje->mbkgie", weights, corrections)
    outputs = from_chunks(outputs.reshape(outputs.shape[0], b, n, *outputs.shape[4:]))
    return outputs[:, :t].astype(dtype), state.reshape(b, n, *state.shape[3:])


def _unit(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides queries and keys by their lengths, and queries by sqrt(D) too; returns them in float32."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return scaled(x, jax.lax.rsqrt(jnp.sum(x * x, axis=-1) + LENGTH_EPS), range(x.ndim - 1))

    return unit(q) * q.shape[-1] ** -0.5, unit(k)


@jax.custom_vjp
def _inverse_of_unit_lower(lower: jax.Array) -> jax.Array:
    """Inverts I + lower for strictly lower triangular matrices [... C C], in products of matrices only.

    Blocks on the diagonal are inverted first, and then blocks of twice the size from them: the corner of
    [[A, 0], [B, D]] becomes -inverse(D) B inverse(A).
    """
    *batch, c, _ = lower.shape
    size = min(c, BLOCK)
    if c & (c - 1):
        raise ValueError(f"a chunk of {c} slots is not a power of two")
    inverse = _inverse_of_blocks(jnp.einsum("...mimj->...mij", lower.reshape(*batch, c // size, size, c // size, size)))
    while size < c:
        pairs = lower.reshape(*batch, c // (2 * size), 2, size, c // (2 * size), 2, size)
        corners = jnp.einsum("...mimj->...mij", pairs[..., :, 1, :, :, 0, :])
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corners = -_exact_product(_exact_product(second, corners), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corners, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def _inverse_of_blocks(lower: jax.Array) -> jax.Array:
    """Inverts I + lower for small matrices, as (I - lower) (I + lower^2) (I + lower^4) ...

    The terms of this product cancel. They are at most 35 in blocks of 8, but up to 1e18 in chunks of 64.
    """
    inverse, power, size = jnp.eye(lower.shape[-1], dtype=jnp.float32) - lower, lower, 2
    while size < lower.shape[-1]:
        power = _exact_product(power, power)
        inverse += _exact_product(inverse, power)
        size *= 2
    return inverse


def _exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse_of_unit_lower(lower)
    return inverse, inverse


def _inverse_backward(inverse: jax.Array, d_inverse: jax.Array) -> tuple[jax.Array]:
    transposed = inverse.swapaxes(-1, -2)
    return (jnp.tril(-_exact_product(_exact_product(transposed, d_inverse), transposed), -1),)


_inverse_of_unit_lower.defvjp(_inverse_forward, _inverse_backward)
