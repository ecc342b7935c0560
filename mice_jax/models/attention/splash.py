"""Attention on TPUs: JAX's splash kernels, which skip blocks that causality or the window masks completely.

The kernels' list of blocks is made when they are compiled, so segments are masked inside the remaining blocks. The
cost therefore grows with the length of the row, not with the lengths of its samples.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.attention.segments import SAVED_NAME, pad_to_multiple, zero_padding
from mice_jax.models.attention.split_rows import WHOLE_ROW, RowSplit, cut_parts, pad_parts, query_segments
from mice_jax.packing_limits import balanced_parts

LANES = 128  # the kernels need a multiple of this many slots
BLOCK = 512  # slots of a query or key block, if they divide the row

# B rows, T query slots, S key slots, N query heads, K key heads, H head_dim


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scoring: Scoring,
    split: RowSplit = WHOLE_ROW,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention as `attention.attend` describes it, on one device.

    Args:
      q: [B T N H].
      k: [B S K H].
      v: [B S K H].
      segment_ids: [B S] int32.
      scoring: scale, window and soft cap.
      split: the parts of the row that the queries are.
      interpret: runs the kernels' code on any device, slowly.

    Returns:
      [B T N H].
    """
    t, n = q.shape[1:3]
    q = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)  # the kernels do not scale
    own = query_segments(split, t, segment_ids)
    (q,), (k, v) = zero_padding(own, q), zero_padding(segment_ids, k, v)
    q, own_padded = pad_parts(LANES, split, q, own)
    k, v, segments = pad_to_multiple(LANES, k, v, segment_ids)
    slots = _slots_of_devices(t, q.shape[1], split)
    kernel = _kernel(slots, k.shape[1], n, scoring, split, interpret)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(kernel)(*heads_first, jax_splash.SegmentIds(own_padded, segments))  # [B N T H]
    return zero_padding(own, cut_parts(t, split, out.transpose(0, 2, 1, 3)))[0]


def _slots_of_devices(queries: int, padded: int, split: RowSplit) -> np.ndarray:
    """Returns the slots of the row at which the padded queries of all devices are, one device after another."""
    part, padded_part = queries // split.parts, padded // split.parts
    order = balanced_parts(split.devices) if split.parts == 2 else [0]
    return np.concatenate([part * place + np.arange(padded_part, dtype=np.int32) for place in order])


def _kernel(
    slots: np.ndarray, keys: int, heads: int, scoring: Scoring, split: RowSplit, interpret: bool
) -> Callable[..., Any]:
    """Makes the kernel of a device for one row.

    Args:
      slots: the slots of the row at which the queries of all devices that share it are.
      keys: the number of keys, S.
      heads: the number of query heads, N.
      scoring: window and soft cap.
      split: which of the queries the device has.
      interpret: as in `splash`.

    Returns:
      A function of queries [N T H], keys and values [K S H], and segments [T] and [S], which returns [N T H].
    """
    if scoring.window is None:
        mask: Any = jax_splash.CausalMask((len(slots), keys))
    else:
        behind, ahead = scoring.window - 1, 0
        mask = jax_splash.LocalMask((len(slots), keys), (behind, ahead), 0)
    mask.q_sequence = slots.astype(np.int32)
    q_block, k_block = math.gcd(len(slots) // split.devices, BLOCK), math.gcd(keys, BLOCK)
    sizes: dict[str, Any] = {f"block_{of}": q_block for of in ("q", "q_dkv", "q_dq")}
    sizes |= {f"block_{of}": k_block for of in ("kv", "kv_dkv", "kv_dq")}
    of_devices = jax_splash.make_splash_mha(
        jax_splash.MultiHeadMask([mask] * heads),
        block_sizes=jax_splash.BlockSizes(**sizes),
        attn_logits_soft_cap=scoring.softcap,
        head_shards=1,
        q_seq_shards=split.devices,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
    return of_devices if split.devices == 1 else _of_device(of_devices, split)


def _of_device(kernel: Any, split: RowSplit) -> Any:
    """Returns the kernel of one device, from that of all devices that share a row."""

    def own(x: jax.Array | None, dim: int) -> jax.Array | None:
        if x is None:
            return None
        size = x.shape[dim] // split.devices
        return lax.dynamic_slice_in_dim(x, split.device * size, size, dim)

    def own_info(info: Any) -> Any:
        blocks = {name: own(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**blocks, q_sequence=own(info.q_sequence, 0))

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*map(own_info, infos), **kernel.kwargs)
