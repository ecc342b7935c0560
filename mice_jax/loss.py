"""Weighted next-token cross-entropy, as the two sums of which a step's loss is the ratio."""

import jax
import jax.numpy as jnp

# B rows, T slots, D d_model, V vocabulary rows


def cross_entropy_sums(
    hidden: jax.Array,
    output_weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The sum of weight * CE and the sum of weights, both float32 scalars.

    Logits exist for `chunk` slots of every row at a time, forward and backward, so memory does not grow with
    T * V. `hidden` is [B T D], `output_weight` [D V] of which the first `vocab_size` columns are real, `targets`
    and `loss_weights` [B T]; a slot of weight 0 adds nothing, whatever its target.
    """
    b, t, d = hidden.shape
    chunk = min(chunk, t)
    pad = -t % chunk
    if pad:
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets, loss_weights = (jnp.pad(x, ((0, 0), (0, pad))) for x in (targets, loss_weights))
    output_weight = output_weight.astype(hidden.dtype)

    @jax.checkpoint
    def add_chunk(loss_sum: jax.Array, chunked: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, target, weight = chunked
        logits = jnp.einsum("bcd,dv->bcv", h, output_weight, preferred_element_type=jnp.float32)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        if output_weight.shape[1] > vocab_size:
            logits = jnp.where(column < vocab_size, logits, jnp.finfo(jnp.float32).min)
        # Compared, not gathered: a gather along a split vocabulary would collect the logits on one device.
        at_target = jnp.sum(jnp.where(column == target[..., None], logits, 0.0), axis=-1)
        ce = jax.nn.logsumexp(logits, axis=-1) - at_target
        return loss_sum + jnp.sum(ce * weight), None

    def chunks(x: jax.Array) -> jax.Array:  # [B T ...] -> [T/chunk B chunk ...]
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    scanned = (chunks(hidden), chunks(targets), chunks(loss_weights))
    loss_sum, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), scanned)
    return loss_sum, jnp.sum(loss_weights)
