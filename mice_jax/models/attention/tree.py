"""Attention over trees of tokens: the common prefix of several continuations is in a row only once.

A row has two parts. The first holds the trunks, one whole path through each tree, packed like samples, over which any
backend attends. The second holds the branches. A slot of a branch sees itself and the slots from which it descends.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mice_jax.models.attention import attend
from mice_jax.models.attention.reference import masked
from mice_jax.models.attention.score_function import Scoring

# B rows, T slots, P slots of trunks, N query heads, K key heads, H head_dim, C queries at a time

MAX_QUERIES = 128  # queries of branches whose scores exist at a time


class Trees(NamedTuple):
    """The place of each slot of a row in its tree.

    Slots are numbered in depth-first order, trunk first. The slots that descend from a slot, including itself, have
    numbers from its own up to its `reach`, exclusive. Padding has segment 0, number -1 and reach 0.
    """

    segment_ids: jax.Array  # [B P] int32, segments of the trunks
    positions: jax.Array  # [B T] int32
    number: jax.Array  # [B T] int32
    reach: jax.Array  # [B T] int32


def attend_branched(
    q: jax.Array, k: jax.Array, v: jax.Array, trees: Trees, scoring: Scoring, *, backend: str
) -> jax.Array:
    """Computes attention over rows of trees.

    Args:
      q: [B T N H].
      k: [B T K H].
      v: [B T K H].
      trees: the place of each slot in its tree.
      scoring: scale, window and soft cap.
      backend: the attention backend of the trunks, a key of `BACKENDS`.

    Returns:
      [B T N H].
    """
    trunks = trees.segment_ids.shape[1]
    out = attend(q[:, :trunks], k[:, :trunks], v[:, :trunks], trees.segment_ids, scoring, backend=backend)
    branches = q.shape[1] - trunks
    if not branches:
        return out
    size = math.gcd(MAX_QUERIES, branches)
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)

    def chunk(queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, number, positions = queries
        visible = (trees.number[:, None] <= number[:, :, None]) & (number[:, :, None] < trees.reach[:, None])
        if scoring.window is not None:
            visible &= positions[:, :, None] - trees.positions[:, None] < scoring.window
        return masked(q, keys, values, visible, scoring)

    def chunks(x: jax.Array) -> jax.Array:  # [B T ...] -> [chunks B C ...]
        return jnp.moveaxis(x[:, trunks:].reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    attended = jax.lax.map(chunk, (chunks(q), chunks(trees.number), chunks(trees.positions)))
    attended = jnp.moveaxis(attended, 0, 1).reshape(q.shape[0], branches, *q.shape[2:])
    return jnp.concatenate([out, attended], axis=1)
