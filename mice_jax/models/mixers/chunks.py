"""What the chunked scans of recurrent mixers share: rows in chunks, and decays that end at the borders of samples.

A state that decays by a factor per slot links two slots of a chunk by the product of the factors between them. Here
every such product is zero if a sample starts in between. This is how a state is reset at the start of each sample,
wherever in a chunk that is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# B rows, T slots, M chunks of a row, C slots of a chunk, N heads, H dims of a head

CHUNK = 64  # the slots of a chunk
MAX_STEPS = 8  # more slots of a sample that is continued are computed in chunks


class Decays(NamedTuple):
    """What remains of a state between the slots of a chunk, float32, from 0 to 1.

    Attributes:
      pairs: [M B N C C], from after the second slot to after the first; 0 if the second is the later one.
      from_start: [M B N C], from before the chunk to after each slot.
      to_end: [M B N C], from after each slot to the end of the chunk.
      through: [M B N], from before the chunk to its end.
    """

    pairs: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    through: jax.Array


def pad_rows(chunk: int, segment_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Pads rows to whole chunks with slots that leave the state after a row as it is.

    Args:
      chunk: the number of slots of a chunk.
      segment_ids: [B T]; the last one is repeated.
      *arrays: [B T ...], which are padded with zeros.

    Returns:
      The segment ids and the arrays.
    """
    pad = -segment_ids.shape[1] % chunk
    if not pad:
        return segment_ids, *arrays
    padded = [jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))) for x in arrays]
    return jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge"), *padded


def into_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Cuts rows [B T N ...] into chunks [M B N C ...]."""
    b, t, *rest = x.shape
    x = x.reshape(b, t // chunk, chunk, *rest)
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def from_chunks(x: jax.Array) -> jax.Array:
    """Joins chunks [M B N C ...] to rows [B T N ...]."""
    m, b, n, c, *rest = x.shape
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim)).reshape(b, m * c, n, *rest)


def chunk_decays(log_decay: jax.Array, segment_ids: jax.Array, chunk: int) -> Decays:
    """Computes the decays between the slots of each chunk.

    Args:
      log_decay: [B T N] float32, at most 0: the logarithm of the factor by which a slot multiplies the state, before it
        adds to it. That of the first slot of a sample has no effect, but for the first slot of a row.
      segment_ids: [B T]; slots of a sample follow one another.
      chunk: the number of slots of a chunk, which divides T.
    """
    log_decay = into_chunks(log_decay, chunk)  # [M B N C]
    segments = into_chunks(segment_ids[:, :, None], chunk)  # [M B 1 C]
    last = segments[..., -1:]
    before = jnp.concatenate([segments[:1, :, :, :1], last[:-1]])  # the segment whose state enters a chunk
    slots = jnp.arange(chunk, dtype=jnp.int32)
    not_later = slots[:, None] >= slots
    linked = not_later & (segments[..., :, None] == segments[..., None, :])
    # Sums from slot to slot, added up for each pair: differences of one running sum would lose the digits of small
    # sums behind a large one.
    sums = jnp.einsum(
        "il,mbnlj->mbnij",
        not_later.astype(jnp.float32),
        jnp.where(~not_later.T, log_decay[..., None], 0),
        precision=jax.lax.Precision.HIGHEST,
    )
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    return Decays(
        pairs=jnp.where(linked, jnp.exp(sums), 0),
        from_start=jnp.where(segments == before, from_start, 0),
        to_end=jnp.where(segments == last, jnp.exp(sums[..., -1, :]), 0),
        through=jnp.where(last == before, from_start[..., -1:], 0)[..., 0],
    )


def product_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of products of float32 arrays that were made from activations of a dtype.

    Accelerators multiply float32 numbers in fewer bits by default. This costs no accuracy if they were bfloat16 before.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
