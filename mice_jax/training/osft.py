"""Orthogonal subspace fine-tuning (OSFT, arXiv 2504.07097) as a wrapper of any optimizer.

Each matrix W0 = U S V^T of a layer is decomposed once. The first k left and right singular vectors, U_k and V_k, span
what is frozen: with W the matrix after any number of steps, U_k^T (W - W0) = 0 and (W - W0) V_k = 0. The paper trains
the other singular vectors and values as parameters; the matrices that these can reach are exactly those with this
property, so here W itself is trained and what the optimizer does is projected:

  P(D) = (I - U_k U_k^T) D (I - V_k V_k^T)

Gradients are projected first, so that clipping and moments see the trained part alone. The optimizer's direction is
projected again, because the division by the root of the second moment, entry by entry, and weight decay lead out of
the subspace. The vectors are part of the optimizer's state: they are those of the weights that a run or a phase began
with, which a resumed run no longer has.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mice_jax.numerics.basis import Basis
from mice_jax.optim import matrix_dims

# L layers, O... outputs, I... inputs, K frozen directions

Tree = Any
# In matrices with at least this many directions, K is a multiple of RANK_MULTIPLE, so that a mesh divides it.
LARGE, RANK_MULTIPLE = 1024, 64


class OsftState(NamedTuple):
    """The state of the wrapper."""

    bases: Tree  # a Basis for each matrix with a frozen direction, optax.MaskedNode for other parameters
    inner: Any  # the state of the optimizer


def frozen_rank(ratio: float, outputs: int, inputs: int) -> int:
    """Returns how many directions of a matrix are frozen.

    Args:
      ratio: The share of its directions, at least 0 and less than 1.
      outputs: The number of its outputs.
      inputs: The number of its inputs.
    """
    directions = min(outputs, inputs)
    multiple = RANK_MULTIPLE if directions >= LARGE else 1
    return min(round(ratio * directions / multiple) * multiple, directions - 1)


def freeze_subspaces(
    inner: optax.GradientTransformation, ratio: float, axes: Tree, trained: Tree = None
) -> optax.GradientTransformation:
    """Wraps an optimizer so that the leading directions of each matrix of the layers do not change.

    Args:
      inner: The optimizer.
      ratio: The share of each matrix's directions that is frozen.
      axes: The tree of the parameters' logical axes, by which matrices are found.
      trained: A tree like the parameters', of bool arrays; a leaf without a true entry has no basis.

    Returns:
      An optax transformation.
    """

    def init(params: optax.Params) -> OsftState:
        trees = (params, axes) if trained is None else (params, axes, trained)
        return OsftState(jax.tree.map(functools.partial(_new_basis, ratio), *trees), inner.init(params))

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[optax.Updates, Any]:
        directions, moments = inner.update(project(updates, state.bases), state.inner, params)
        return project(directions, state.bases), OsftState(state.bases, moments)

    return optax.GradientTransformation(init, cast(Any, update))


def project(tree: Tree, bases: Tree) -> Tree:
    """Removes from each matrix of a tree what lies in its frozen directions, on either side.

    Args:
      tree: Arrays in the structure of the parameters.
      bases: As in `OsftState`.
    """
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, structure.flatten_up_to(bases), strict=True)
    return structure.unflatten(_projected(x, b) if isinstance(b, Basis) else x for x, b in pairs)


def new_bases(old: Tree, params: Tree) -> Tree:
    """Computes the bases of some weights, of the same ranks as others.

    Args:
      old: Bases, of which the shapes alone are read.
      params: The parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, structure.flatten_up_to(old), strict=True)
    return structure.unflatten(
        _leading(x, b.outputs.ndim - 2, b.outputs.shape[-1]) if isinstance(b, Basis) else b for x, b in pairs
    )


def _new_basis(
    ratio: float, param: jax.Array, axes: tuple[str | None, ...], trained: Any = True
) -> Basis | optax.MaskedNode:
    """Returns the basis of a parameter; nothing if it is no matrix of the layers, is not trained or has rank 0."""
    dims = matrix_dims(axes) if axes[0] == "layers" else None
    if dims is None or not np.any(trained):
        return optax.MaskedNode()
    outputs = len(cast(tuple, dims.output_axis))
    sizes = param.shape[1:]
    rank = frozen_rank(ratio, int(np.prod(sizes[:outputs])), int(np.prod(sizes[outputs:])))
    return _leading(param, outputs, rank) if rank else optax.MaskedNode()


def _leading(param: jax.Array, outputs: int, rank: int) -> Basis:
    """Decomposes a stack of matrices layer by layer, so that one of them at a time is gathered on each device.

    Args:
      param: [L O... I...].
      outputs: The number of dims of outputs.
      rank: K.
    """
    layers, *sizes = param.shape
    num_outputs = int(np.prod(sizes[:outputs]))

    def of_layer(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, _, vt = jnp.linalg.svd(weight.reshape(num_outputs, -1).astype(jnp.float32), full_matrices=False)
        return u[:, :rank], vt[:rank].T

    u, v = jax.lax.map(of_layer, param)
    return Basis(u.reshape(layers, *sizes[:outputs], rank), v.reshape(layers, *sizes[outputs:], rank))


def _projected(x: jax.Array, basis: Basis) -> jax.Array:
    """Computes (I - U U^T) x (I - V V^T) of a stack of matrices, float32."""
    rank = basis.outputs.shape[-1]
    u, v = (side.reshape(len(x), -1, rank) for side in basis)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    flat = x.reshape(len(x), u.shape[1], v.shape[1])
    flat -= product("lok,lki->loi", u, product("lok,loi->lki", u, flat))
    flat -= product("lok,lik->loi", product("loi,lik->lok", flat, v), v)
    return flat.reshape(x.shape)
