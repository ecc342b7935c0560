"""The mesh, the one table that says which logical axis lies on which mesh axis, and the placing of batches.

Parameters name their logical axes where they are declared (models/transformer.py); nothing else in the project
speaks of mesh axes. A dimension that its mesh axis does not divide is held whole on every device, which
`replicated_dims` lists so that the run can say it; a vocabulary is padded beforehand instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mice_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # these split a batch's rows

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": None,
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "hidden": None,  # an activation's width; `embed` is a parameter's
}

# Where the first of a parameter's axes is not divided by its mesh axis, the second is split in its place.
INSTEAD = {"heads": "head_dim"}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices; one size may be -1 and takes what is left.

    Raises UserError where the sizes do not multiply to the devices there are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, ...]:
    """The sizes of a mesh's axes on so many devices, -1 filled in; UserError as in `make_mesh`."""
    sizes = [data, fsdp, tensor]
    given = math.prod(s for s in sizes if s != -1)
    filled = tuple(count // given if s == -1 else s for s in sizes)
    if math.prod(filled) != count:
        asked = f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor}"
        raise UserError(
            f"{asked} does not make the {count} devices there are: the sizes must multiply to {count}. One of them may "
            "be -1 for the devices that are left, if the others divide them."
        )
    return filled


def abstract_mesh(sizes: Sequence[int]) -> AbstractMesh:
    """A mesh of devices that need not be known: enough for shapes and shardings."""
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def num_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many ways a microbatch's rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_shards(mesh: Mesh) -> tuple[int, ...]:
    """The numbers, among `num_shards`, of the row blocks that this process's devices hold."""
    by_shard = mesh.devices.reshape(num_shards(mesh), -1)
    here = jax.process_index()
    return tuple(i for i, devices in enumerate(by_shard) if any(d.process_index == here for d in devices))


def array_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array's dims lie; a dim that is not divided stays whole."""
    return PartitionSpec(*(_mesh_axis(n, a, mesh) for n, a in zip(shape, axes, strict=True)))


def param_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """As `array_spec`; heads that are not divided are split within, so that no device holds them whole."""
    split = list(array_spec(shape, axes, mesh))
    for first, second in INSTEAD.items():
        if first in axes and second in axes and split[axes.index(first)] is None:
            rule, at = RULES[first], axes.index(second)
            split[at] = rule if shape[at] % mesh.shape[rule] == 0 else None
    return PartitionSpec(*split)


def replicated_dims(params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """`path dim name=size` for each dim whose mesh axis does not divide it."""
    said = []
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    for (path, leaf), dims in zip(flat, names, strict=True):
        split = param_spec(leaf.shape, dims, mesh)
        for size, name in zip(leaf.shape, dims, strict=True):
            rule = RULES[name] if name else None
            if rule and mesh.shape[rule] > 1 and rule not in split:
                said.append(f"{jax.tree_util.keystr(path, simple=True, separator='.')} {name}={size}")
    return said


def param_shardings(params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for each leaf of `params`, from the tree of their logical axes."""
    return jax.tree.map(lambda p, a: NamedSharding(mesh, param_spec(p.shape, a, mesh)), params, axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's logical axes to the mesh in force; does nothing outside one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, array_spec(x.shape, axes, mesh))


def constrain_param(x: jax.Array, *axes: str | None) -> jax.Array:
    """As `constrain`, for a parameter."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, param_spec(x.shape, axes, mesh))


def gather_split_heads(x: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter as it is used: heads that `param_spec` splits within are whole on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or param_spec(x.shape, axes, mesh) == array_spec(x.shape, axes, mesh):
        return x
    return constrain(x, *axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_rows(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a microbatch, as global arrays with their rows split over the mesh.

    `arrays` hold the rows of `local_shards(mesh)`, in that order.
    """
    shards, sharding = local_shards(mesh), batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        per_shard = rows.shape[0] // len(shards)

        def block(index: Any) -> np.ndarray:
            at = shards.index((index[0].start or 0) // per_shard) * per_shard
            return rows[at : at + per_shard]

        shape = (per_shard * num_shards(mesh), *rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, block)

    return {name: put(rows) for name, rows in arrays.items()}


def put_steps(steps: Iterator[dict[str, Any]], mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Each step as the loader gives it, all of its microbatches on their way to the devices."""
    for step in steps:
        yield step | {"microbatches": [put_rows(rows, mesh) for rows in step["microbatches"]]}


def _mesh_axis(size: int, axis: str | None, mesh: Any) -> str | tuple[str, ...] | None:
    rule = RULES[axis] if axis else None
    if rule is None:
        return None
    ways = math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule))
    return rule if size % ways == 0 else None
