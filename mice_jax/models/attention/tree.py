"""Attention over trees of tokens: what several continuations of one text have in common stands in a row once.

A row is two stretches of slots. The first holds the trunks, one whole path through each tree, packed as segments are:
any backend attends over it. The second holds what branches off. A slot there sees the slots that it descends from,
itself among them, and no other branch.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mice_jax.models.attention import attend
from mice_jax.models.attention.reference import masked
from mice_jax.models.attention.score_function import Scoring

# B rows, T slots, P slots of trunks, N query heads, K key heads, H head_dim, C queries at a time

QUERIES = 128  # of branches whose scores exist at a time, at most


class Trees(NamedTuple):
    """Where the slots of rows stand in their trees.

    Slots are numbered as a walk of the tree meets them, trunk first: those that descend from one, and no others, have
    the numbers from its own up to `reach`. Padding has segment 0, number -1 and reach 0.
    """

    segment_ids: jax.Array  # [B P], of the trunks
    positions: jax.Array  # [B T]
    number: jax.Array  # [B T]
    reach: jax.Array  # [B T]


def attend_branched(
    q: jax.Array, k: jax.Array, v: jax.Array, trees: Trees, scoring: Scoring, *, backend: str
) -> jax.Array:
    """[B T N H] queries over [B T K H] keys and values -> [B T N H]; `backend` is that of the trunks."""
    trunks = trees.segment_ids.shape[1]
    out = attend(q[:, :trunks], k[:, :trunks], v[:, :trunks], trees.segment_ids, scoring, backend=backend)
    branches = q.shape[1] - trunks
    if not branches:
        return out
    size = math.gcd(QUERIES, branches)
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)

    def chunk(queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, number, positions = queries
        seen = (trees.number[:, None] <= number[:, :, None]) & (number[:, :, None] < trees.reach[:, None])
        if scoring.window is not None:
            seen &= positions[:, :, None] - trees.positions[:, None] < scoring.window
        return masked(q, keys, values, seen, scoring)

    def chunks(x: jax.Array) -> jax.Array:  # [B T ...] -> [chunks B C ...]
        return jnp.moveaxis(x[:, trunks:].reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    mixed = jax.lax.map(chunk, (chunks(q), chunks(trees.number), chunks(trees.positions)))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], branches, *q.shape[2:])
    return jnp.concatenate([out, mixed], axis=1)
