"""Low-rank adapters (LoRA, arXiv 2106.09685): which weights have one, and trees of parameters with and without them.

An adapted weight W [O... I...] stands in a tree of parameters as {"weight": W, "a": A [R I...], "b": B [O... R]}, and
its product is W x + scale * B (A x). With DoRA (arXiv 2402.09353) it has a "magnitude" m [O...] too, and its weight is
m V / |V| for V = W + scale * B A, with the norm |V| over the inputs of each output. Adapters alone are a tree of {"a",
"b"} and perhaps "magnitude", and the base is the tree that a decoder without adapters has. `split` and `join` only
rearrange dicts: they copy no array.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mice_jax.models.spec import ATTENTION_NAMES, MLP_NAMES

# The weights of a block that may have an adapter: those of the products of mixers and MLP with activations.
ADAPTABLE = (
    *(f"{part}.{weight}" for part in ATTENTION_NAMES for weight in ("q", "k", "v", "o")),
    *(f"mamba2.{weight}" for weight in ("gate", "x", "b", "c", "step", "out")),
    *(f"gated_delta.{weight}" for weight in ("q", "k", "v", "gate", "beta", "step", "out")),
    *(f"short_conv.{weight}" for weight in ("b", "c", "x", "out")),
    *(f"{part}.{weight}" for part in MLP_NAMES for weight in ("gate", "up", "down")),
)

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The adapters of a model.

    Attributes:
      rank: R, the number of rows of A and of columns of B.
      scale: The factor on what an adapter adds.
      targets: The adapted weights of each block, of ADAPTABLE.
      dora: Whether each output has a trained magnitude.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    dora: bool = False


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) for rank-stabilised adapters (arXiv 2312.03732)."""
    return alpha / (rank**0.5 if rslora else rank)


def split(tree: Tree) -> tuple[Tree, Tree]:
    """Returns the adapters and the base of a tree of parameters, or of anything that stands in their place."""
    adapters, base = {}, {}
    for name, value in tree.items():
        if not isinstance(value, dict):
            base[name] = value
        elif _is_adapted(value):
            adapters[name], base[name] = {k: v for k, v in value.items() if k != "weight"}, value["weight"]
        else:
            inner, base[name] = split(value)
            adapters |= {name: inner} if inner else {}
    return adapters, base


def join(adapters: Tree, base: Tree) -> Tree:
    """Returns the tree whose adapters and base these are."""

    def joined(value: Any, adapter: Tree | None) -> Any:
        if adapter is None:
            return value
        return join(adapter, value) if isinstance(value, dict) else {"weight": value, **adapter}

    return {name: joined(value, adapters.get(name)) for name, value in base.items()}


def merge(lora: LoRA, adapters: Tree, base: Tree) -> Tree:
    """Adds adapters to the weights of a base, in float32: W + scale * B A, with the magnitudes of DoRA.

    Args:
      lora: The adapters' scale.
      adapters: The adapters, stacked over layers. A magnitude that is NaN keeps the norm of its output.
      base: The base, stacked over layers.

    Returns:
      Parameters in the structure of the base.
    """

    def merged(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if not _is_adapted(node):
            return {name: merged(value) for name, value in node.items()}
        changed = _changed_weight(lora, node)
        if "magnitude" not in node:
            return changed
        norm, magnitude = _norms(changed, node["magnitude"]), node["magnitude"]
        factor = jnp.where(jnp.isnan(magnitude), 1.0, magnitude / norm)
        return changed * factor.reshape(factor.shape + (1,) * (changed.ndim - factor.ndim))

    return merged(join(adapters, base))


def with_magnitudes(adapters: Tree, base: Tree) -> Tree:
    """Returns adapters, whose B are zero, with the norms of the base's outputs as magnitudes, so that they change none.

    Args:
      adapters: The adapters, stacked over layers.
      base: The base, stacked over layers.
    """

    def measured(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if not _is_adapted(node):
            return {name: measured(value) for name, value in node.items()}
        return node | {"magnitude": _norms(node["weight"], node["magnitude"])}

    return split(measured(join(adapters, base)))[0]


def _is_adapted(node: Tree) -> bool:
    return node.keys() >= {"weight", "a", "b"}


def _changed_weight(lora: LoRA, node: Tree) -> jax.Array:
    """Computes W + scale * B A of a stack of layers, float32."""
    weight, a, b = node["weight"], node["a"], node["b"]
    flat_a, flat_b = a.reshape(*a.shape[:2], -1), b.reshape(b.shape[0], -1, b.shape[-1])  # [L R I] and [L O R]
    product = jax.lax.Precision.HIGHEST
    change = jnp.einsum("lor,lri->loi", flat_b, flat_a, precision=product, preferred_element_type=jnp.float32)
    return weight + lora.scale * change.reshape(weight.shape)


def _norms(weight: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Computes the norm over the inputs of each output, in the shape of the magnitudes."""
    squares = jnp.square(weight.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(squares, axis=tuple(range(magnitude.ndim, weight.ndim))))
