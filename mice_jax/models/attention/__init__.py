"""Attention within segments: one contract, a table of backends, and the choice between them.

A token attends causally within its own segment, and within the window that the model may have; padding (segment 0)
attends to nothing and gives zeros. A backend that cannot honour segment ids has no place in the table.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mice_jax.errors import UserError
from mice_jax.models.attention.blockwise import blockwise
from mice_jax.models.attention.cudnn import MOST_ENTRIES, cudnn, softmax_bytes
from mice_jax.models.attention.pallas import pallas
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.splash import splash
from mice_jax.models.spec import ModelSpec
from mice_jax.sharding import BATCH_AXES

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Scoring], jax.Array]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute attention, and what it can honour besides segments, windows and shared key heads."""

    kernel: Kernel
    platform: str | None = None  # cpu | gpu | tpu; None: any
    capability: tuple[int, int] | None = None  # the least of an NVIDIA GPU; None: any device
    below: tuple[int, int] = (99, 0)  # a capability that is too much
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    softcaps: bool = True
    head_dim: float = math.inf  # at most,
    head_dim_from: tuple[tuple[int, int], float] = ((99, 0), math.inf)  # and from a capability on
    entries: float = math.inf  # of a device's queries, at most
    row_bytes: Callable[[int, int], int] = lambda slots, heads: 0  # that a layer takes beside what all take
    keeps: bool = True  # its result, under remat=dots; else that is computed twice
    deterministic: bool = True  # under train.deterministic


MOST_ROW_BYTES = 2 * 2**30  # of `row_bytes`: more would crowd out the run

# In the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {
    # On a TPU the best, whatever the run.
    "splash": Backend(splash, platform="tpu"),
    # Its maker's kernels, for Hopper and the Blackwell of data centres; on the consumers' (12.0) old versions of cuDNN
    # train no packed rows, and on neither Blackwell does its backward pass take wide heads, as on Hopper. Under XLA's
    # flag for it the gradients would be bit-equal from run to run, but for packed rows that can take memory with the
    # square of all slots together.
    "cudnn": Backend(
        cudnn,
        platform="gpu",
        capability=(9, 0),
        below=(12, 0),
        dtypes=("bfloat16",),
        softcaps=False,
        head_dim=256,
        head_dim_from=((10, 0), 128),
        entries=MOST_ENTRIES,
        row_bytes=softmax_bytes,
        keeps=False,
        deterministic=False,
    ),
    # What cuDNN cannot, and older GPUs.
    "pallas": Backend(pallas, platform="gpu", capability=(8, 0), head_dim=256),
    # Memory linear in T; skips the key blocks outside a query block's segments and window.
    "blockwise": Backend(blockwise),
    # One [T, T] mask a row: for short rows, and what the others are tested against.
    "reference": Backend(reference, keeps=False),
}


def choose_backend(
    name: str,
    spec: ModelSpec,
    *,
    platform: str,
    compute_capability: str | None,
    dtype: str,
    max_length: int,
    deterministic: bool,
) -> str:
    """The backend of `model.attention`: the first that can honour the run for "auto", else the one that is named.

    Args:
      platform: cpu, gpu or tpu: of the devices that the run is for, which need not be here.
      compute_capability: "9.0", as an NVIDIA GPU has it; None for any other device.
      dtype: that queries, keys and values are computed in.
      max_length: slots of the longest row.
      deterministic: train.deterministic.

    Raises UserError where the named one cannot honour the run, with what it lacks and what can.
    """

    def lacks(backend: Backend) -> list[str]:
        return _lacks(backend, spec, platform, compute_capability, dtype, max_length, deterministic)

    able = [other for other, backend in BACKENDS.items() if not lacks(backend)]
    if name == "auto":
        return able[0]
    if name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is no attention backend: take auto or one of {', '.join(BACKENDS)}.")
    if missing := lacks(BACKENDS[name]):
        raise UserError(
            f"model.attention={name!r} cannot honour this run: {'; '.join(missing)}. What can: {', '.join(able)}; auto "
            f"takes {able[0]}."
        )
    return name


def _lacks(
    backend: Backend,
    spec: ModelSpec,
    platform: str,
    compute_capability: str | None,
    dtype: str,
    max_length: int,
    deterministic: bool,
) -> list[str]:
    """What of a run a backend cannot honour, each with the run's value."""
    lacks, version = [], _version(compute_capability)
    if backend.platform not in (None, platform):
        lacks.append(f"it runs on {backend.platform}, and the devices are of platform {platform}")
    elif backend.capability and not backend.capability <= version < backend.below:
        least, most = (".".join(map(str, x)) for x in (backend.capability, backend.below))
        wanted = f"{least} or more" + (f" and less than {most}" if version >= backend.below else "")
        there = compute_capability or "none"
        lacks.append(f"it needs an NVIDIA GPU of compute capability {wanted}, and the devices have {there}")
    if dtype not in backend.dtypes:
        lacks.append(f"it computes in {' or '.join(backend.dtypes)}, and the run in {dtype} (model.compute_dtype)")
    if spec.attention_softcap is not None and not backend.softcaps:
        lacks.append(f"it has no soft cap on scores, and the model has one of {spec.attention_softcap}")
    newer, dims = backend.head_dim_from
    if spec.head_dim > (dims := dims if version >= newer else backend.head_dim):
        there = f" on capability {compute_capability}" if version >= newer else ""
        lacks.append(f"its heads have at most {dims} dims{there}, and the model's have {spec.head_dim}")
    if (size := backend.row_bytes(max_length, spec.num_heads)) > MOST_ROW_BYTES:
        lacks.append(
            f"its softmax sums take {size / 2**30:.1f} GiB for a row of data.max_length={max_length} slots and "
            f"{spec.num_heads} heads, of which {MOST_ROW_BYTES / 2**30:.0f} GiB at most are allowed"
        )
    if deterministic and not backend.deterministic:
        lacks.append("its gradients are not bit-equal from run to run, which train.deterministic=True asks for")
    return lacks


def _version(capability: str | None) -> tuple[int, ...]:
    """A capability "9.0" -> (9, 0); () for what is no NVIDIA GPU."""
    parts = (capability or "").split(".")
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else ()


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, scoring: Scoring, *, backend: str
) -> jax.Array:
    """[B T N H] queries over [B T K H] keys and values, segments [B T] -> [B T N H] in q's dtype.

    Under a mesh each device works on its own rows and heads. K heads that the tensor axis does not divide are
    repeated to the query heads they serve; query heads that it does not divide are joined by heads of zeros.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return BACKENDS[backend].kernel(q, k, v, segment_ids, scoring)
    n, tensor = q.shape[2], mesh.shape["tensor"]
    if k.shape[2] % tensor:
        k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    if n % tensor:  # then k and v have been repeated to n heads
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -n % tensor), (0, 0))) for x in (q, k, v))
    heads, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
    local = jax.shard_map(
        lambda q, k, v, s: BACKENDS[backend].kernel(q, k, v, s, scoring),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )
    return local(q, k, v, segment_ids)[:, :, :n]
