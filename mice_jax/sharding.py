"""The mesh, the one table that maps logical axes to mesh axes, and the placement of batches.

Parameters name their logical axes where they are declared (models/transformer.py); no other module names mesh axes. A
dim that its mesh axis does not divide is replicated, and `replicated_dims` lists such dims so that the run can report
them. A vocabulary is padded instead, so that it is always divided.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mice_jax.errors import UserError
from mice_jax.numerics.basis import Basis
from mice_jax.runtime.devices import find_devices

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the rows of a microbatch
LENGTH_AXIS = "sequence"  # the mesh axis that splits the slots of each row
SLOT_AXES = (*BATCH_AXES, LENGTH_AXIS)

# The mesh axis, or axes, that split each logical axis; None = replicated.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": LENGTH_AXIS,
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "channels": "tensor",  # of recurrent mixers
    "head_dim": None,
    "rank": None,  # of low-rank adapters
    "hidden": None,  # d_model of activations; that of parameters is `embed`
}

# If its mesh axis does not divide the first of these logical axes of a parameter, the second is split instead.
FALLBACK_AXES = {"heads": "head_dim"}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None, *, sequence: int = 1) -> Mesh:
    """Makes the mesh of a run.

    Args:
      data: the size of the data axis; one of the sizes may be -1, which takes the remaining devices.
      fsdp: the size of the fsdp axis.
      tensor: the size of the tensor axis.
      devices: the devices; None for all.
      sequence: the size of the sequence axis.

    Returns:
      A mesh with the axes `AXES`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = find_devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices), sequence=sequence)
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # the size of an axis is not a product of sides of the TPU's torus
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, types)


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int, *, sequence: int = 1) -> tuple[int, ...]:
    """Fills in the size -1 of a mesh.

    Args:
      data: as in `make_mesh`.
      fsdp: as in `make_mesh`.
      tensor: as in `make_mesh`.
      count: the number of devices.
      sequence: as in `make_mesh`.

    Returns:
      The sizes of the axes `AXES`.

    Raises:
      UserError: the sizes do not multiply to `count`.
    """
    requested = [data, fsdp, sequence, tensor]
    given = math.prod(size for size in requested if size != -1)
    sizes = tuple(count // given if size == -1 else size for size in requested)
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} x mesh.sequence={sequence} does not multiply "
            f"to the number of devices, {count} (of a CPU, JAX_NUM_CPU_DEVICES sets another). Change the sizes; one of "
            f"them may be -1 for the remaining devices, if the others divide {count}."
        )
    return sizes


def abstract_mesh(sizes: Sequence[int]) -> AbstractMesh:
    """A mesh of these sizes without devices, for computing shapes and shardings."""
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards into which the rows of a microbatch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_shards(mesh: Mesh) -> tuple[int, ...]:
    """The indices, among `num_shards`, of the row shards on this process's devices."""
    by_shard = mesh.devices.reshape(num_shards(mesh), -1)
    here = jax.process_index()
    return tuple(i for i, devices in enumerate(by_shard) if any(d.process_index == here for d in devices))


def array_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Computes how an array is split; a dim that its mesh axis does not divide is not.

    Args:
      shape: the array's shape.
      axes: the logical axis of each dim, a key of `RULES`, or None.
      mesh: the mesh.

    Returns:
      The mesh axis of each dim.
    """
    return PartitionSpec(*(_mesh_axis(n, a, mesh) for n, a in zip(shape, axes, strict=True)))


def param_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Computes how a parameter is split: as `array_spec`, but query heads that are not divided are split inside.

    Args:
      shape: the parameter's shape.
      axes: the logical axis of each dim, a key of `RULES`, or None.
      mesh: the mesh.

    Returns:
      The mesh axis of each dim.
    """
    split = list(array_spec(shape, axes, mesh))
    for first, second in FALLBACK_AXES.items():
        if first in axes and second in axes and split[axes.index(first)] is None:
            rule, dim = RULES[first], axes.index(second)
            split[dim] = rule if shape[dim] % mesh.shape[rule] == 0 else None
    return PartitionSpec(*split)


def basis_sharding(basis: Basis, of_param: NamedSharding) -> Basis:
    """Computes how a basis of a stack of matrices is split: as the matrices are, and its directions as the other side.

    Args:
      basis: the basis, with jax.ShapeDtypeStruct as leaves.
      of_param: the sharding of the matrices, [L O... I...].

    Returns:
      The shardings of its sides.
    """
    mesh, (stack, *dims) = of_param.mesh, of_param.spec
    count = len(basis.outputs.shape) - 2
    outputs, inputs = dims[:count], dims[count:]

    def sharding(side: Any, own: list, other: list) -> NamedSharding:
        axis = next((axis for axis in other if axis is not None), None)
        divides = axis is not None and side.shape[-1] % mesh.shape[axis] == 0
        return NamedSharding(mesh, PartitionSpec(stack, *own, axis if divides else None))

    return Basis(sharding(basis.outputs, outputs, inputs), sharding(basis.inputs, inputs, outputs))


def replicated_dims(params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """Lists the dims of parameters that are replicated because their mesh axis does not divide them.

    Args:
      params: a tree of arrays or shapes.
      axes: the tree of their logical axes.
      mesh: the mesh.

    Returns:
      Entries such as "layers.attention.k kv_heads=3".
    """
    replicated = []
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    for (path, leaf), dims in zip(flat, names, strict=True):
        split = param_spec(leaf.shape, dims, mesh)
        for size, name in zip(leaf.shape, dims, strict=True):
            rule = RULES[name] if name else None
            if rule and mesh.shape[rule] > 1 and rule not in split:
                replicated.append(f"{jax.tree_util.keystr(path, simple=True, separator='.')} {name}={size}")
    return replicated


def param_shardings(params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Computes the sharding of each parameter.

    Args:
      params: a tree of arrays or shapes.
      axes: the tree of their logical axes.
      mesh: the mesh.

    Returns:
      A tree of NamedSharding.
    """
    return jax.tree.map(lambda p, a: NamedSharding(mesh, param_spec(p.shape, a, mesh)), params, axes)


def split_like(shape: Sequence[int], sharding: NamedSharding) -> PartitionSpec:
    """Computes how an array is split if its dims correspond to those of an array with this sharding.

    Args:
      shape: the array's shape.
      sharding: the sharding of the other array, whose dims may have other sizes.

    Returns:
      The mesh axes of each dim: those of the other array's where they divide it.
    """

    def divides(axes: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    return PartitionSpec(*(a if divides(a, n) else None for a, n in zip(sharding.spec, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to its sharding on the current mesh; does nothing without a mesh.

    Args:
      x: an array of any shape.
      *axes: the logical axis of each dim.

    Returns:
      The same array.
    """
    return _constrain_by(x, lambda mesh: array_spec(x.shape, axes, mesh))


def constrain_param(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains a parameter to its sharding on the current mesh, with arguments as for `constrain`."""
    return _constrain_by(x, lambda mesh: param_spec(x.shape, axes, mesh))


def _constrain_by(x: jax.Array, spec_on: Callable[[AbstractMesh], PartitionSpec]) -> jax.Array:
    """Constrains an array to the spec that it has on the current mesh; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec_on(mesh))


def gather_split_heads(x: jax.Array, *axes: str | None) -> jax.Array:
    """Gathers a parameter whose heads `param_spec` splits inside, before it is used.

    Args:
      x: a parameter of any shape.
      *axes: the logical axis of each dim.

    Returns:
      The same array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or param_spec(x.shape, axes, mesh) == array_spec(x.shape, axes, mesh):
        return x
    return constrain(x, *axes)


def gather_over_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Gathers a parameter over the axes that split rows, before it is used with many rows.

    XLA would gather it by itself, but once for each form in which the parameter is used.

    Args:
      x: a parameter of any shape.
      *axes: the logical axis of each dim.

    Returns:
      The same array.
    """

    def without_rows(mesh: AbstractMesh) -> PartitionSpec:
        spec = array_spec(x.shape, axes, mesh)
        return PartitionSpec(*(a if a not in BATCH_AXES else None for a in spec))

    return _constrain_by(x, without_rows)


@dataclasses.dataclass(frozen=True)
class GradientSum:
    """How the gradient of a parameter is summed over devices, each of which has that of its own rows.

    The sum is a reduce-scatter along the axis that splits the parameter and an all-reduce along the others. XLA, left
    to choose, takes an all-reduce for most parameters, which moves twice the bytes.
    """

    axes: tuple[str, ...]  # the mesh axes over which rows and their slots are split
    spec: PartitionSpec  # which of them split the dims of the sum
    dtype: Any  # in which the devices' gradients are added

    @property
    def slots(self) -> PartitionSpec:
        """How an array [B T ...] of the slots is split over these axes."""
        rows = tuple(axis for axis in self.axes if axis in BATCH_AXES)
        return PartitionSpec(rows or None, LENGTH_AXIS if LENGTH_AXIS in self.axes else None)

    def add(self, gradient: jax.Array) -> jax.Array:
        """Adds the gradients of all devices, float32, and returns the device's part of the sum, float32."""
        if self.dtype == jnp.float32:
            return self._add(gradient)
        # On CPUs, XLA adds terms of fewer bits in float32, and then rounds the sum; it aborts if the tensor axis is not
        # manual. Here the same is said in operations that it accepts.
        bits = jnp.finfo(self.dtype)
        rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)
        return jax.lax.platform_dependent(
            gradient,
            cpu=lambda g: rounded(self._add(rounded(g))),
            default=lambda g: self._add(g.astype(self.dtype)).astype(jnp.float32),
        )

    def _add(self, gradient: jax.Array) -> jax.Array:
        others = set(self.axes)
        for dim, axis in enumerate(self.spec):
            if axis is not None:
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
                others.remove(axis)
        return jax.lax.psum(gradient, tuple(axis for axis in self.axes if axis in others)) if others else gradient


def gradient_sum(shape: Sequence[int], axes: Sequence[str | None], dtype: Any) -> GradientSum:
    """Returns how the gradient of a parameter is summed over the devices of the current mesh.

    Args:
      shape: the shape of the parameter.
      axes: the logical axis of each of its dims, a key of `RULES`, or None.
      dtype: the dtype in which devices' gradients are added.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return GradientSum((), PartitionSpec(), dtype)
    split = tuple(axis for axis in SLOT_AXES if mesh.shape[axis] > 1)
    spec = (axis if axis in split else None for axis in param_spec(shape, axes, mesh))
    return GradientSum(split, PartitionSpec(*spec), dtype)


def sum_over_devices(
    sum_own_rows: Callable[..., jax.Array], arrays: Sequence[jax.Array], gradient_sum: GradientSum
) -> jax.Array:
    """Computes the gradient of a parameter from the rows of all devices.

    Args:
      sum_own_rows: computes the gradient, float32, from the rows of one device.
      arrays: its arguments, [B T ...] each.
      gradient_sum: how the devices' gradients are added.

    Returns:
      The gradient, float32, split as the parameter is.
    """
    if not gradient_sum.axes:
        return sum_own_rows(*arrays)
    # Only the axes of slots are manual in the function. XLA splits the other dims over the tensor axis.
    return jax.shard_map(
        lambda *own: gradient_sum.add(sum_own_rows(*own)),
        in_specs=(gradient_sum.slots,) * len(arrays),
        out_specs=gradient_sum.spec,
        axis_names=set(gradient_sum.axes),
        check_vma=False,
    )(*arrays)


def splits_slots() -> bool:
    """Whether the current mesh splits the slots of rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[LENGTH_AXIS] > 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the arrays [B T] of a microbatch: rows and slots are split over their axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, LENGTH_AXIS))


def put_rows(arrays: Mapping[str, np.ndarray], mesh: Mesh, *, whole: bool = False) -> dict[str, jax.Array]:
    """Makes the global arrays of a microbatch from this process's rows.

    Args:
      arrays: by name, the rows of the shards `local_shards(mesh)` in that order, [rows T].
      mesh: the mesh.
      whole: whether each device has whole rows; otherwise the sequence axis splits their slots.

    Returns:
      By name, global arrays with their rows split over the mesh, [B T].
    """
    shards = local_shards(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES)) if whole else batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        per_shard = rows.shape[0] // len(shards)

        def shard_rows(index: Any) -> np.ndarray:
            start = shards.index((index[0].start or 0) // per_shard) * per_shard
            return rows[start : start + per_shard, *index[1:]]

        shape = (per_shard * num_shards(mesh), *rows.shape[1:])
        return _put(shape, sharding, shard_rows)

    return {name: put(rows) for name, rows in arrays.items()}


def put_scalar(value: float, mesh: Mesh) -> jax.Array:
    """Makes a float32 scalar on all devices, of the same number in every process."""
    everywhere, scalar = NamedSharding(mesh, PartitionSpec()), np.asarray(value, np.float32)
    return _put((), everywhere, lambda index: scalar)


def _put(shape: tuple[int, ...], sharding: NamedSharding, shard: Callable[[Any], np.ndarray]) -> jax.Array:
    """Makes a global array from the shards of this process; a guard against implicit transfers lets this one pass."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, shard)


def put_steps(steps: Iterator[dict[str, Any]], mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Yields the loader's steps, after starting the transfer of their microbatches to the devices."""
    for step in steps:
        yield step | {"microbatches": [put_rows(rows, mesh) for rows in step["microbatches"]]}


def _mesh_axis(size: int, axis: str | None, mesh: Any) -> str | tuple[str, ...] | None:
    """The mesh axis, or axes, that split a dim; None if it is replicated."""
    rule = RULES[axis] if axis else None
    if rule is None:
        return None
    num_parts = math.prod(mesh.shape[a] for a in ((rule,) if isinstance(rule, str) else rule))
    return rule if size % num_parts == 0 else None
