"""Attention within segments: one contract, a table of backends, and the choice between them.

A token attends causally within its own segment, and within the window that the model may have; padding (segment 0)
attends to nothing and gives zeros. A backend that cannot honour segment ids has no place in the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mice_jax.errors import UserError
from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.scoring import Scoring
from mice_jax.sharding import BATCH_AXES

Backend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Scoring], jax.Array]

BACKENDS: dict[str, Backend] = {
    "reference": reference,  # one [T, T] mask a row; for short rows, and what the others are tested against
    "blockwise": blockwise,  # memory linear in T; skips the key blocks outside a query block's segments and window
}


def choose_backend(name: str) -> str:
    """The backend of `model.attention`; "auto" takes the one that is right everywhere and linear in memory."""
    if name == "auto":
        return "blockwise"
    if name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is no attention backend: take auto or one of {', '.join(BACKENDS)}.")
    return name


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring, *, backend: str
) -> jax.Array:
    """[B T N H] queries over [B T K H] keys and values, segments [B T] -> [B T N H] in q's dtype.

    Under a mesh each device works on its own rows and heads. K heads that the tensor axis does not divide are
    repeated to the query heads they serve; query heads that it does not divide are joined by heads of zeros.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return BACKENDS[backend](q, k, v, segment_ids, scoring)
    n, tensor = q.shape[2], mesh.shape["tensor"]
    if k.shape[2] % tensor:
        k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    if n % tensor:  # then k and v have been repeated to n heads
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -n % tensor), (0, 0))) for x in (q, k, v))
    heads, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
    local = jax.shard_map(
        lambda q, k, v, s: BACKENDS[backend](q, k, v, s, scoring),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )
    return local(q, k, v, segment_ids)[:, :, :n]
