"""The state space model of Mamba-2: a linear attention whose state forgets by a factor of each head and slot.

With a state S [P D] of each head, a slot computes (arXiv 2405.21060, section 6)

    S = exp(time_step * rate) S + time_step * x outer b
    output = S c + skip * x

What a chunk of C slots computes within itself, what it adds to the state and what it reads from the state before it are
products of matrices, for all chunks at once. Only the sum of the states goes from chunk to chunk, one after another.
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

# B rows, T slots, M chunks, C slots of a chunk, N heads, G groups, R = N/G heads of a group, P head dims, D state dims


def time_steps(raw: jax.Array, bias: jax.Array, limits: tuple[float, float]) -> jax.Array:
    """Computes the time steps of heads: softplus(raw + bias), within the limits.

    Args:
      raw: [B T N], any dtype.
      bias: [N].
      limits: the least and the greatest time step.

    Returns:
      [B T N] float32.
    """
    return jnp.clip(jax.nn.softplus(raw.astype(jnp.float32) + bias.astype(jnp.float32)), *limits)


def mamba2(
    x: jax.Array,
    time_step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    segment_ids: jax.Array,
    state: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Computes the state space model over packed rows; the state is reset at the start of each sample.

    The backward pass computes everything again from the inputs.

    Args:
      x: [B T N P].
      time_step: [B T N] float32, at least 0, as from `time_steps`. A slot with a time step of 0 leaves the state as it
        is.
      rate: [N] float32, negative.
      b: [B T G D], what a slot adds to the state by; heads n*R to n*R + R-1 share group n.
      c: [B T G D], what it reads from the state by.
      skip: [N].
      segment_ids: [B T] int32; slots of a sample follow one another.
      state: [B N P D] float32, which continues in the sample of the first slot; None for zeros.
      chunk: the number of slots of a chunk.

    Returns:
      The outputs [B T N P] in the dtype of `x`, and the state after the last slot [B N P D], float32.
    """
    if state is None:
        state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[3]), jnp.float32)
    compute = jax.checkpoint(functools.partial(_mamba2, chunk=chunk), prevent_cse=False)
    return compute(x, time_step, rate, b, c, skip, segment_ids, state)


def mamba2_of_rows(
    x: jax.Array,
    time_step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Computes the outputs of `mamba2` for whole rows, which several devices may share."""
    if num_parts(x.shape[1]) == 1:
        return mamba2(x, time_step, rate, b, c, skip, segment_ids)[0]

    def of_part(
        index: jax.Array,
        x: jax.Array,
        time_step: jax.Array,
        b: jax.Array,
        c: jax.Array,
        segment_ids: jax.Array,
        rate: jax.Array,
        skip: jax.Array,
    ) -> jax.Array:
        _, added = mamba2(x, time_step, rate, b, c, skip, segment_ids)
        one_sample = (segment_ids[:, :1] == segment_ids).all(axis=1, keepdims=True)
        remains = jnp.where(one_sample, jnp.exp(jnp.sum(time_step * rate, axis=1)), 0)  # [B N]

        def pass_on(state: jax.Array, part: tuple[jax.Array, jax.Array]) -> jax.Array:
            remains, added = part
            return remains[..., None, None] * state + added

        state = entering_state(index, segment_ids, (remains, added), pass_on)
        return mamba2(x, time_step, rate, b, c, skip, segment_ids, state)[0]

    return map_parts(of_part, (x, time_step, b, c, segment_ids), (rate, skip))


def mamba2_step(
    x: jax.Array,
    time_step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    state: jax.Array,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Continues rows, of one sample each, from the state after their last token.

    A few slots are computed one after another as in the formula above, and more of them in chunks.

    Args:
      x: [B T N P].
      time_step: [B T N] float32.
      rate: [N] float32.
      b: [B T G D].
      c: [B T G D].
      skip: [N].
      state: [B N P D] float32.
      num_tokens: [B] int32, the number of slots of each row that are tokens. The rest, at its end, is padding, whose
        outputs have no meaning and which leaves the state as it is.

    Returns:
      The outputs [B T N P] in the dtype of `x`, and the new state.
    """
    slots = jnp.arange(x.shape[1], dtype=jnp.int32)
    time_step = jnp.where((slots < num_tokens[:, None])[:, :, None], time_step, 0)
    if len(slots) > MAX_STEPS:
        return mamba2(x, time_step, rate, b, c, skip, jnp.ones(x.shape[:2], jnp.int32), state)
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (jnp.repeat(y, heads_per_group, axis=2) for y in (b, c))
    steps = [y.astype(jnp.float32).swapaxes(0, 1) for y in (x, time_step, b, c)]

    def slot(state: jax.Array, inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, time_step, b, c = inputs  # [B N P], [B N], [B N D], [B N D]
        added = (time_step[..., None] * x)[..., None] * b[:, :, None]
        state = state * jnp.exp(time_step * rate)[..., None, None] + added
        return state, jnp.sum(state * c[:, :, None], axis=-1)

    state, outputs = jax.lax.scan(slot, state, steps)
    return _with_skip(outputs.swapaxes(0, 1), x, skip), state


def _mamba2(
    x: jax.Array,
    time_step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    segment_ids: jax.Array,
    state: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    groups, (rows, slots, n, p) = b.shape[2], x.shape
    product = functools.partial(jnp.einsum, precision=product_precision(x.dtype))
    added = scaled(x.astype(jnp.float32), time_step, (0, 1, 2))
    arrays = (added, time_step * rate, b.astype(jnp.float32), c.astype(jnp.float32))
    segment_ids, added, log_decay, b, c = pad_rows(chunk, segment_ids, *arrays)
    added, b, c = (into_chunks(y, chunk) for y in (added, b, c))

    def grouped(y: jax.Array, heads: int) -> jax.Array:  # [... N ...] -> [... G R ...]
        return y.reshape(*y.shape[:heads], groups, n // groups, *y.shape[heads + 1 :])

    added = grouped(added, 2)
    pairs, from_start, to_end, through = (grouped(y, 2) for y in chunk_decays(log_decay, segment_ids, chunk))
    weights = scaled(pairs, product("mbgid,mbgjd->mbgij", c, b), (0, 1, 2, 4, 5))
    within = product("mbgrij,mbgrjp->mbgrip", weights, added)
    of_chunk = product("mbgrip,mbgid->mbgrpd", scaled(added, to_end, range(5)), b)

    def next_state(state: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        through, of_chunk = part
        return through[..., None, None] * state + of_chunk, state

    state, states = jax.lax.scan(next_state, grouped(state, 1), (through, of_chunk))
    outputs = within + scaled(product("mbgid,mbgrpd->mbgrip", c, states), from_start, range(5))
    outputs = from_chunks(outputs.reshape(outputs.shape[0], rows, n, chunk, p))[:, :slots]
    return _with_skip(outputs, x, skip), state.reshape(rows, n, *state.shape[3:])


def _with_skip(outputs: jax.Array, x: jax.Array, skip: jax.Array) -> jax.Array:
    """Adds skip * x to float32 outputs, and returns them in the dtype of `x`."""
    return (outputs + scaled(x.astype(jnp.float32), skip.astype(jnp.float32), (2,))).astype(x.dtype)
