"""Attention within segments: one function, a table of backends that compute it, and the choice between them.

A token attends causally within its own segment, and within the window if its layer has one. Padding (segment 0)
attends to nothing and gives zeros. Every backend in the table supports segment ids.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mice_jax.errors import UserError
from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.cudnn import MAX_ENTRIES, cudnn, softmax_bytes
from mice_jax.models.attention.pallas import pallas
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.splash import splash
from mice_jax.models.attention.split_rows import RowSplit, gather_row, move_to_balanced_order, move_to_row_order
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import BATCH_AXES, LENGTH_AXIS

# B rows, T slots, N query heads, K key heads, H head_dim

# Queries, keys, values, segment ids and scoring; where rows are split over devices also a RowSplit.
Kernel = Callable[..., jax.Array]
Version = tuple[int, ...]

MAX_ROW_BYTES = 2 * 2**30  # limit of a backend's `row_bytes`


@dataclasses.dataclass(frozen=True)
class AttentionRequirements:
    """The properties of a run that an attention backend must support; the devices need not be present."""

    spec: ModelSpec
    platform: str  # cpu, gpu or tpu
    compute_capability: str | None  # capability of an NVIDIA GPU, such as "9.0"; None for any other device
    dtype: str  # dtype of queries, keys and values
    max_length: int  # slots of the longest row
    deterministic: bool  # train.deterministic
    sequence: int = 1  # devices that share a row


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute attention, and its limits."""

    kernel: Kernel
    platform: str | None = None  # cpu, gpu or tpu; None for any
    min_capability: Version | None = None  # smallest capability of an NVIDIA GPU; None for any device
    below_capability: Version = (99, 0)  # the first capability that is not supported
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    supports_softcap: bool = True
    max_head_dim: float = math.inf
    # From this capability on, this limit replaces `max_head_dim`.
    max_head_dim_from: tuple[Version, float] = ((99, 0), math.inf)
    max_entries: float = math.inf  # largest number of entries of one device's queries
    # Given slots and heads, the bytes for one row in one layer in addition to those that all backends need.
    row_bytes: Callable[[int, int], int] = lambda slots, heads: 0
    saved_by_dots: bool = True  # whether remat "dots" saves the result; otherwise attention is computed twice
    deterministic: bool = True  # whether gradients are bit-equal from run to run
    splits_rows: bool = True  # whether the queries can be a part of a row

    def unsupported(self, run: AttentionRequirements) -> list[str]:
        """Lists what this backend does not support, each as a clause of an error message with the run's value."""
        problems = []
        version = _version(run.compute_capability)
        if self.platform not in (None, run.platform):
            problems.append(f"it runs on {self.platform}, and the devices are of platform {run.platform}")
        elif self.min_capability and not self.min_capability <= version < self.below_capability:
            wanted = f"{_dotted(self.min_capability)} or more"
            if version >= self.below_capability:
                wanted += f" and less than {_dotted(self.below_capability)}"
            found = run.compute_capability or "none"
            problems.append(f"it needs an NVIDIA GPU of compute capability {wanted}, and the devices have {found}")
        if run.dtype not in self.dtypes:
            computed = " or ".join(self.dtypes)
            problems.append(f"it computes in {computed}, and the run in {run.dtype} (model.compute_dtype)")
        softcap = run.spec.attention_softcap
        if softcap is not None and not self.supports_softcap:
            problems.append(f"it has no soft cap on scores, and the model has one of {softcap}")
        max_dims, where = self.max_head_dim, ""
        newer, newer_max_dims = self.max_head_dim_from
        if version >= newer:
            max_dims, where = newer_max_dims, f" on capability {run.compute_capability}"
        if run.spec.max_head_dim > max_dims:
            problems.append(
                f"its heads have at most {max_dims} dims{where}, and the model's have {run.spec.max_head_dim}"
            )
        size = self.row_bytes(run.max_length, run.spec.num_heads)
        if size > MAX_ROW_BYTES:
            problems.append(
                f"its softmax sums take {size / 2**30:.1f} GiB for a row of data.max_length={run.max_length} slots and "
                f"{run.spec.num_heads} heads, of which {MAX_ROW_BYTES / 2**30:.0f} GiB at most are allowed"
            )
        if run.sequence > 1 and not self.splits_rows:
            problems.append(f"it computes whole rows, and mesh.sequence={run.sequence} splits them over devices")
        if run.deterministic and not self.deterministic:
            problems.append("its gradients are not bit-equal from run to run, as train.deterministic=True requires")
        return problems


# The backends are in the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {
    # Splash is the fastest backend on a TPU for any run.
    "splash": Backend(splash, platform="tpu"),
    # These are NVIDIA's kernels for Hopper and data-centre Blackwell. On consumer Blackwell (12.0) old versions of
    # cuDNN cannot train packed rows. On neither Blackwell does the backward pass support heads as wide as on Hopper.
    # An XLA flag makes its gradients bit-equal from run to run, but packed rows can then take memory with the square
    # of all slots together.
    "cudnn": Backend(
        cudnn,
        platform="gpu",
        min_capability=(9, 0),
        below_capability=(12, 0),
        dtypes=("bfloat16",),
        supports_softcap=False,
        max_head_dim=256,
        max_head_dim_from=((10, 0), 128),
        max_entries=MAX_ENTRIES,
        row_bytes=softmax_bytes,
        saved_by_dots=False,
        deterministic=False,
        splits_rows=False,  # its kernels have no mask for queries that start later than their keys
    ),
    # Pallas is for older GPUs and for runs that cuDNN does not support.
    "pallas": Backend(pallas, platform="gpu", min_capability=(8, 0), max_head_dim=256),
    # Memory is linear in T; key blocks outside a query block's segments and window are skipped.
    "blockwise": Backend(blockwise),
    # The reference makes a [T, T] mask per row; it is for short rows and for tests.
    "reference": Backend(reference, saved_by_dots=False),
}


def choose_backend(name: str, run: AttentionRequirements) -> str:
    """Chooses the attention backend of a run.

    Args:
      name: the value of `model.attention`: a key of `BACKENDS`, or "auto" for the first that supports the run.
      run: what the run needs.

    Returns:
      A key of `BACKENDS`.

    Raises:
      UserError: if the named backend is unknown or does not support the run; the message names the alternatives.
    """
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UserError(f"model.attention={name!r} is not an attention backend. Set it to auto or one of {known}.")
    able = [other for other, backend in BACKENDS.items() if not backend.unsupported(run)]
    if name == "auto":
        return able[0]
    problems = BACKENDS[name].unsupported(run)
    if problems:
        raise UserError(
            f"model.attention={name!r} does not support this run: {'; '.join(problems)}. Set it to one of "
            f"{', '.join(able)}, or to auto, which takes {able[0]}."
        )
    return name


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scoring: Scoring,
    *,
    backend: str,
    row_parts: int = 0,
) -> jax.Array:
    """Computes attention of packed rows.

    Under a mesh, each device works on its own rows and heads. Where rows are split over devices, each works on some of
    the queries, and gathers the keys and values of whole rows. If the tensor axis does not divide the key heads, they
    are repeated to the query heads that they serve; if it does not divide the query heads, heads of zeros are added.

    Args:
      q: [B T N H].
      k: [B T K H], where K divides N.
      v: [B T K H].
      segment_ids: [B T] int32, 0 for padding.
      scoring: scale, window and soft cap.
      backend: a key of `BACKENDS`.
      row_parts: the number of parts of a row that each device of the sequence axis has; 0 if it has whole rows. With
        two, all arrays are in balanced order. With one, they are in the order of the row, a device has an even number
        of slots, and queries are moved so that the work is balanced.

    Returns:
      [B T N H] in the dtype of `q`, zero at padding.
    """
    kernel = BACKENDS[backend].kernel
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids, scoring)
    num_heads, tensor = q.shape[2], mesh.shape["tensor"]
    if k.shape[2] % tensor:
        k, v = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (k, v))
    if num_heads % tensor:  # k and v have num_heads heads at this point
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -num_heads % tensor), (0, 0))) for x in (q, k, v))
    length = LENGTH_AXIS if row_parts else None
    heads, rows = PartitionSpec(BATCH_AXES, length, "tensor", None), PartitionSpec(BATCH_AXES, length)

    def on_one_device(q: jax.Array, k: Any, v: Any, segment_ids: Any) -> jax.Array:
        if not row_parts:
            return kernel(q, k, v, segment_ids, scoring)
        k, v, segment_ids = (gather_row(x, row_parts) for x in (k, v, segment_ids))
        split = RowSplit(mesh.shape[LENGTH_AXIS], jax.lax.axis_index(LENGTH_AXIS))
        if row_parts == 2:
            return kernel(q, k, v, segment_ids, scoring, split)
        return move_to_row_order(kernel(move_to_balanced_order(q), k, v, segment_ids, scoring, split))

    local = jax.shard_map(
        on_one_device,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )
    return local(q, k, v, segment_ids)[:, :, :num_heads]


def _version(capability: str | None) -> Version:
    """Parses a capability, "9.0" -> (9, 0); returns () for a device that is not an NVIDIA GPU."""
    parts = (capability or "").split(".")
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else ()


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
