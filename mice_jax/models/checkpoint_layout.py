"""The tensors of a checkpoint of a decoder, and our parameters in each of them."""

import dataclasses
import itertools
from types import ModuleType

import jax

from mice_jax.models.layer_stacks import layers_of_stack
from mice_jax.models.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters, or one layer of it, as a range of rows of a checkpoint's tensor."""

    path: str  # dotted path of our parameter
    row: int | None  # index along the first dim of a stacked parameter
    shape: tuple[int, ...]  # the parameter's shape without the dim of layers and without padding of the vocabulary
    start: int  # first row in the tensor
    rows: int  # number of rows in the tensor


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor of a checkpoint, which may hold several of our parameters one after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def checkpoint_tensors(decoder: Decoder, family: ModuleType) -> list[HFTensor]:
    """Returns all tensors of a checkpoint of this decoder: those outside layers first, then layer by layer."""
    real = decoder.spec.vocab_size
    leaves = {dotted_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract)}
    axes = {
        dotted_path(path): a
        for path, a in jax.tree_util.tree_leaves_with_path(decoder.axes, is_leaf=lambda a: isinstance(a, tuple))
    }
    named = {path for name in family.NAMES for path in name.ours}
    assert leaves.keys() <= named, f"parameters without a name in the checkpoint: {leaves.keys() - named}"
    found = []
    for name in family.NAMES:
        if not leaves.keys() & set(name.ours):
            continue
        stacked = axes[name.ours[0]][0] == "layers"
        shapes = []
        for path in name.ours:
            dims = [real if a == "vocab" else n for n, a in zip(leaves[path].shape, axes[path], strict=True)]
            shapes.append(tuple(dims[stacked:]))
        flat = [_flat_shape(shape, axes[path][stacked:]) for path, shape in zip(name.ours, shapes, strict=True)]
        ends = list(itertools.accumulate(f[0] for f in flat))
        layers = layers_of_stack(decoder.spec, name.ours[0].split(".")[1]) if stacked else [None]
        for row, layer in enumerate(layers):
            parts = tuple(
                Part(path, row if stacked else None, shape, end - f[0], f[0])
                for path, shape, f, end in zip(name.ours, shapes, flat, ends, strict=True)
            )
            found.append((layer, HFTensor(name.hf.format(layer), (ends[-1], *flat[0][1:]), parts)))
    return [tensor for _, tensor in sorted(found, key=lambda t: -1 if t[0] is None else t[0])]


def _flat_shape(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the shape of one layer of a parameter in a checkpoint, where heads and head_dim are one dim."""
    flat: list[int] = []
    for n, axis in zip(shape, axes, strict=True):
        if axis == "head_dim" and len(shape) > 1:
            flat[-1] *= n
        else:
            flat.append(n)
    return tuple(flat)


def dotted_path(path: tuple) -> str:
    """Returns the path of a leaf in a tree of parameters, such as "layers.attention.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
