"""Weighted next-token cross-entropy, as the two sums of which a step's loss is the ratio.

Logits exist for a chunk of tokens at a time, and only for tokens that have a loss weight. Their gradient is taken
while they are there, so the backward pass neither recomputes nor keeps them: it scales what the forward pass has
already summed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LOGIT_TOKENS = 512  # of one device whose logits exist at a time, at most,
LOGIT_BYTES = 300 * 2**20  # and what these may take: of more than 150,000 entries of a vocabulary fewer tokens do

# B rows, T slots, D d_model, V vocabulary rows, S = B * T slots of all rows, X tokens of a chunk


def logit_tokens(vocab_rows: int) -> int:
    """How many tokens of one device have their logits at a time, by the vocabulary: a multiple of 128, if it can be."""
    fit = LOGIT_BYTES // (4 * vocab_rows)
    return min(LOGIT_TOKENS, fit // 128 * 128 or max(fit, 1))


def cross_entropy_sums(
    hidden: jax.Array,
    output_weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    logit_scale: float,
    softcap: float | None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The sum of weight * CE and the sum of weights, both float32 scalars.

    `hidden` is [B T D], `output_weight` [V D] of which the first `vocab_size` rows are real, `targets` and
    `loss_weights` [B T]; a slot of weight 0 adds nothing, whatever its target. Logits are, in float32,
    hidden @ output_weight.T * logit_scale, and with a soft cap softcap * tanh(logits / softcap); those of `chunk`
    tokens exist at a time. `batch_axes` are the mesh axes that split the rows: each device sums over its own, and the
    sums meet once, not once a chunk. Differentiable in `hidden` and `output_weight`.
    """
    weight = output_weight.astype(hidden.dtype)

    def scan(with_gradient: bool) -> Callable[..., Any]:
        static = {"vocab_size": vocab_size, "chunk": chunk, "logit_scale": logit_scale, "softcap": softcap}
        return _on_rows(functools.partial(_over_chunks, **static, with_gradient=with_gradient), batch_axes)

    @jax.custom_vjp
    def loss_sum_of(*arrays: jax.Array) -> jax.Array:
        return scan(with_gradient=False)(*arrays)[0]

    def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss_sum, d_hidden, d_weight = scan(with_gradient=True)(*arrays)
        return loss_sum, (d_hidden, d_weight)

    def backward(
        gradients: tuple[jax.Array, jax.Array], d_loss_sum: jax.Array
    ) -> tuple[jax.Array, jax.Array, None, None]:
        d_hidden, d_weight = gradients
        return d_hidden * d_loss_sum.astype(d_hidden.dtype), (d_weight * d_loss_sum).astype(weight.dtype), None, None

    loss_sum_of.defvjp(forward, backward)
    loss_sum: Any = loss_sum_of(hidden, weight, targets, loss_weights)
    return loss_sum, jnp.sum(loss_weights)


def _on_rows(scan: Callable[..., Any], batch_axes: tuple[str, ...]) -> Callable[..., Any]:
    """What `scan` sums over each device's own rows, added up over `batch_axes` at the end."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of one device are left out: XLA refuses a sum over one where another axis splits the columns.
    batch_axes = () if mesh.empty else tuple(axis for axis in batch_axes if mesh.shape[axis] > 1)
    if not batch_axes:
        return scan

    def local(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        loss_sum, d_hidden, d_weight = scan(*arrays)
        return jax.lax.psum(loss_sum, batch_axes), d_hidden, jax.lax.psum(d_weight, batch_axes)

    rows, whole = PartitionSpec(batch_axes), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(rows, whole, rows, rows),
        out_specs=(whole, rows, whole),
        axis_names=set(batch_axes),
        check_vma=False,
    )


def _over_chunks(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    logit_scale: float,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """loss_sum, and its gradients by hidden [B T D] and by weight [V D] float32 (empty without gradient).

    Tokens with a weight are taken first, and the loop ends after them. Devices that meet in a round, because a tensor
    axis splits the vocabulary between them, hold the same tokens and so make as many rounds. To make as many in all
    others too would take a maximum over the mesh, which depends on nothing but the weights: on CPU devices that waited
    for it early, while others were in a layer, all threads were taken and none went on.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # [S D]
    targets, loss_weights = targets.reshape(-1), loss_weights.reshape(-1)
    slots, chunk = len(rows), min(chunk, len(rows))
    order = jnp.argsort(loss_weights == 0, stable=True).astype(jnp.int32)
    rounds = -(-jnp.count_nonzero(loss_weights).astype(jnp.int32) // chunk)
    padded = jnp.pad(order, (0, -slots % chunk))

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss_sum, d_rows, d_weight = sums
        at = jax.lax.dynamic_slice_in_dim(padded, i * chunk, chunk)
        in_order = i * chunk + jnp.arange(chunk, dtype=jnp.int32) < slots  # what pads the last chunk counts once
        token_weight = jnp.where(in_order, loss_weights[at], 0.0)
        h = rows[at]
        products = jnp.dot(h, weight.T, preferred_element_type=jnp.float32)
        logits, slopes = _logits(products, logit_scale, softcap)
        loss, d_logits = _chunk_loss(logits, targets[at], vocab_size)
        loss_sum += jnp.sum(loss * token_weight)
        if not with_gradient:
            return loss_sum, d_rows, d_weight
        d_products = (d_logits * slopes * token_weight[:, None]).astype(h.dtype)
        d_weight += jnp.dot(d_products.T, h, preferred_element_type=jnp.float32)
        d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, jnp.dot(d_products, weight), i * chunk, 0)
        return loss_sum, d_rows, d_weight

    d_rows = jnp.zeros((len(padded), rows.shape[1]) if with_gradient else (0,), rows.dtype)
    d_weight = jnp.zeros(weight.shape if with_gradient else (0,), jnp.float32)
    loss_sum, d_rows, d_weight = jax.lax.fori_loop(0, rounds, add_chunk, (jnp.zeros((), jnp.float32), d_rows, d_weight))
    if not with_gradient:
        return loss_sum, d_rows, d_weight
    return loss_sum, d_rows[jnp.argsort(order)].reshape(hidden.shape), d_weight


def _logits(products: jax.Array, logit_scale: float, softcap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """Products [X V] of hidden states and weight -> logits [X V], and their derivatives by the products."""
    logits = products * logit_scale
    if softcap is None:
        return logits, logit_scale
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, logit_scale * (1 - jnp.square(bent))


def _chunk_loss(logits: jax.Array, target: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Logits [X V] and targets [X] -> CE [X], and its derivatives by the logits [X V]."""
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if logits.shape[1] > vocab_size:
        logits = jnp.where(column < vocab_size, logits, jnp.finfo(jnp.float32).min)
    # Compared, not gathered: a gather along a split vocabulary would collect the logits on one device.
    at_target = column == target[:, None]
    top = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    ce = (jnp.log(total) + top)[:, 0] - jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    return ce, powers / total - at_target.astype(jnp.float32)
