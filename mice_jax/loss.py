"""Weighted next-token cross-entropy, as a sum of losses and a sum of weights; the step divides one by the other.

The logits of only one chunk of tokens exist at a time, and tokens without a loss weight never have logits. The
gradient of a chunk is computed in the forward pass, while its logits exist, so that the backward pass neither
recomputes nor stores logits: it scales gradients that are already summed. What else is known of the predictions, by
source, is summed from the same logits and has no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# B rows, T slots, S = B * T slots of all rows, D d_model, V vocabulary rows (padding included), C tokens of a chunk,
# N sources

MAX_CHUNK_TOKENS = 512  # tokens of one device whose logits exist at a time
MAX_CHUNK_BYTES = (
    300 * 2**20
)  # size of these logits in float32; lowers the tokens for more than 150,000 vocabulary rows


class SourceSums(NamedTuple):
    """Sums over the slots of each source, each slot times its loss weight; float32 [N]."""

    loss: jax.Array  # of the cross-entropies
    weight: jax.Array  # of the weights alone
    correct: jax.Array  # of 1 where the largest logit is the target's (of equal ones the first), 0 elsewhere
    entropy: jax.Array  # of the entropies of the predicted distributions, in nats


# Returns loss_sum (float32 scalar), source sums (float32 [4 N], the fields of SourceSums one after the other), and the
# gradients with respect to hidden states and weight.
SumFunction = Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]


def tokens_per_chunk(vocab_rows: int) -> int:
    """The number of tokens of one device whose logits exist at a time: a multiple of 128 where that fits."""
    fitting = MAX_CHUNK_BYTES // (4 * vocab_rows)
    whole_tiles = fitting // 128 * 128
    return min(MAX_CHUNK_TOKENS, whole_tiles or max(fitting, 1))


def cross_entropy_sums(
    hidden: jax.Array,
    output_weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    sources: jax.Array | None = None,
    *,
    vocab_size: int,
    chunk_size: int,
    logit_scale: float,
    softcap: float | None,
    num_sources: int = 1,
    batch_axes: tuple[str, ...] = (),
    length_axes: tuple[str, ...] = (),
    weight_spec: PartitionSpec | None = None,
    add_weight_gradients: Callable[[jax.Array], jax.Array] | None = None,
    add_first: bool = False,
) -> tuple[jax.Array, jax.Array, SourceSums]:
    """Computes the sum of weight * cross-entropy over all slots, the sum of the weights, and sums by source.

    Logits are hidden @ output_weight.T * logit_scale in float32; with a soft cap they become
    softcap * tanh(logits / softcap). A slot of weight 0 adds nothing, for any target. Only the first sum is
    differentiable, with respect to `hidden` and `output_weight`.

    Args:
      hidden: [B T D], the last hidden states, in the dtype of computation.
      output_weight: [V D], of which the first `vocab_size` rows are real and the rest is padding; cast to the dtype of
        `hidden`, but its gradient is computed in float32.
      targets: [B T] int32, the token that each slot predicts.
      loss_weights: [B T] float32, 0 for a slot without loss.
      sources: [B T] int32, the source of each slot, from 0 on; None if there is one source.
      vocab_size: the size of the real vocabulary.
      chunk_size: the number of tokens of one device whose logits exist at a time.
      logit_scale: a factor on the logits.
      softcap: the bound of the logits; None for no bound.
      num_sources: the number of sources.
      batch_axes: the mesh axes over which rows are split. Each device sums over its own slots, and the devices' sums
        are added once at the end, not once per chunk.
      length_axes: the mesh axes over which the slots of each row are split.
      weight_spec: which of these axes split the dims of the gradient with respect to `output_weight`; None for none.
      add_weight_gradients: called on every device, adds the devices' gradients with respect to `output_weight`, float32
        [V D], and returns the device's part by `weight_spec`. None adds them without splitting.
      add_first: whether they are added before the gradient of `hidden` is used. Otherwise XLA adds them after the
        backward pass of all layers, and each device keeps its own [V D] until then. Where the embedding table is the
        output weight, XLA adds both gradients of it on each device, and then over the devices once.

    Returns:
      loss_sum and weight_sum, float32 scalars, and the sums by source.
    """
    over_chunks = functools.partial(
        _sum_over_chunks,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        logit_scale=logit_scale,
        softcap=softcap,
        num_sources=num_sources,
    )
    over_devices = functools.partial(
        _sum_over_devices,
        batch_axes=batch_axes,
        length_axes=length_axes,
        weight_spec=weight_spec,
        add_weight_gradients=add_weight_gradients,
        add_first=add_first,
    )
    sum_losses = over_devices(functools.partial(over_chunks, with_gradient=False), with_gradient=False)
    sum_losses_and_gradients = over_devices(functools.partial(over_chunks, with_gradient=True), with_gradient=True)

    slot_arrays = [targets, loss_weights] if sources is None else [targets, loss_weights, sources]

    @jax.custom_vjp
    def sums_of(hidden: jax.Array, weight: jax.Array, *of_slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sum_losses(hidden, weight.astype(hidden.dtype), *of_slots)[:2]

    def forward(
        hidden: jax.Array, weight: jax.Array, *of_slots: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        *sums, d_hidden, d_weight = sum_losses_and_gradients(hidden, weight.astype(hidden.dtype), *of_slots)
        return (sums[0], sums[1]), (d_hidden, d_weight.astype(weight.dtype))

    def backward(
        gradients: tuple[jax.Array, jax.Array], d_sums: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, *tuple[None, ...]]:
        d_hidden, d_weight = gradients
        d_loss_sum, _ = d_sums
        return (
            d_hidden * d_loss_sum.astype(d_hidden.dtype),
            d_weight * d_loss_sum.astype(d_weight.dtype),
            *(None for _ in slot_arrays),
        )

    sums_of.defvjp(forward, backward)
    sums: Any = sums_of(hidden, output_weight, *slot_arrays)
    loss_sum, source_sums = sums
    return loss_sum, jnp.sum(loss_weights), SourceSums(*source_sums.reshape(len(SourceSums._fields), num_sources))


def _sum_over_devices(
    sum_own_rows: SumFunction,
    *,
    batch_axes: tuple[str, ...],
    length_axes: tuple[str, ...],
    weight_spec: PartitionSpec | None,
    add_weight_gradients: Callable[[jax.Array], jax.Array] | None,
    add_first: bool,
    with_gradient: bool,
) -> SumFunction:
    """Runs `sum_own_rows` on each device's slots, then adds its sums over the mesh axes that split slots."""
    mesh = jax.sharding.get_abstract_mesh()
    # An axis of size 1 needs no sum, and XLA raises for one if another axis splits the columns.
    batch_axes, length_axes = (
        () if mesh.empty else tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in (batch_axes, length_axes)
    )
    all_axes = (*batch_axes, *length_axes)
    if not all_axes:
        return sum_own_rows
    slots, replicated = PartitionSpec(batch_axes or None, length_axes or None), PartitionSpec()
    add = functools.partial(jax.lax.psum, axis_name=all_axes)
    add_gradients = add_weight_gradients or add

    def on_one_device(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        loss_sum, source_sums, d_hidden, d_weight = sum_own_rows(*arrays)
        all_sums = add(jnp.concatenate([loss_sum[None], source_sums]))  # one sum over devices costs less than two
        if not with_gradient:
            return all_sums[0], all_sums[1:], d_hidden, d_weight
        d_weight = add_gradients(d_weight)
        if add_first:
            d_hidden, d_weight = jax.lax.optimization_barrier((d_hidden, d_weight))
        return all_sums[0], all_sums[1:], d_hidden, d_weight

    def over_devices(hidden: jax.Array, weight: jax.Array, *of_slots: jax.Array) -> Any:
        return jax.shard_map(
            on_one_device,
            in_specs=(slots, replicated, *(slots for _ in of_slots)),
            out_specs=(
                replicated,
                replicated,
                slots if with_gradient else replicated,
                weight_spec if weight_spec and with_gradient else replicated,
            ),
            axis_names=set(all_axes),
            check_vma=False,
        )(hidden, weight, *of_slots)

    return over_devices


def _sum_over_chunks(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    sources: jax.Array | None = None,
    *,
    vocab_size: int,
    chunk_size: int,
    logit_scale: float,
    softcap: float | None,
    num_sources: int,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes loss_sum, the sums by source and the gradients, chunk by chunk, on the rows of one device.

    Tokens with a weight come first in the order of chunks, and the loop ends after the last of them. Its number of
    rounds may differ between devices. It is the same on devices that communicate in a round, which are those between
    which a tensor axis splits the vocabulary: they have the same tokens. A common number for all devices would need
    a maximum over the mesh. On CPU devices that could deadlock: it depends on the weights only, so some devices waited
    for it while others were still in a layer, until no thread was left.

    Args:
      hidden: [B T D].
      weight: [V D], in the dtype of `hidden`.
      targets: [B T] int32.
      loss_weights: [B T] float32.
      sources: [B T] int32, or None if there is one source.
      vocab_size: as in `cross_entropy_sums`.
      chunk_size: as in `cross_entropy_sums`.
      logit_scale: as in `cross_entropy_sums`.
      softcap: as in `cross_entropy_sums`.
      num_sources: as in `cross_entropy_sums`.
      with_gradient: whether gradients are computed; without them, both are empty arrays.

    Returns:
      loss_sum (float32 scalar), the sums by source (float32 [4 N], see SumFunction), the gradient of loss_sum with
      respect to hidden [B T D] in the dtype of `hidden`, and that with respect to weight [V D] in float32.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # [S D]
    targets, loss_weights = targets.reshape(-1), loss_weights.reshape(-1)  # [S]
    sources = None if sources is None else sources.reshape(-1)
    num_slots, chunk_size = len(rows), min(chunk_size, len(rows))
    # A stable sort puts the slots with a weight first and keeps their order.
    order = jnp.argsort(loss_weights == 0, stable=True).astype(jnp.int32)
    num_chunks = -(-jnp.count_nonzero(loss_weights).astype(jnp.int32) // chunk_size)
    padded_order = jnp.pad(order, (0, -num_slots % chunk_size))

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss_sum, source_sums, d_rows, d_weight = sums
        slots = jax.lax.dynamic_slice_in_dim(padded_order, i * chunk_size, chunk_size)
        # The last chunk may be filled up with slots that an earlier chunk has counted.
        is_real = i * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32) < num_slots
        token_weights = jnp.where(is_real, loss_weights[slots], 0.0)
        h = rows[slots]
        products = jnp.dot(h, weight.T, preferred_element_type=jnp.float32)
        logits, d_logits_d_products = _logits(products, logit_scale, softcap)
        losses, d_logits, correct, entropies = _cross_entropy(logits, targets[slots], vocab_size)
        loss_sum += jnp.sum(losses * token_weights)
        of_tokens = token_weights * jnp.stack([losses, jnp.ones_like(losses), correct, entropies])  # [4 C]
        source_sums += _sum_by_source(of_tokens, None if sources is None else sources[slots], num_sources)
        if not with_gradient:
            return loss_sum, source_sums, d_rows, d_weight
        d_products = (d_logits * d_logits_d_products * token_weights[:, None]).astype(h.dtype)
        d_weight += jnp.dot(d_products.T, h, preferred_element_type=jnp.float32)
        d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, jnp.dot(d_products, weight), i * chunk_size, 0)
        return loss_sum, source_sums, d_rows, d_weight

    d_rows = jnp.zeros((len(padded_order), rows.shape[1]) if with_gradient else (0,), rows.dtype)
    d_weight = jnp.zeros(weight.shape if with_gradient else (0,), jnp.float32)
    source_zeros = jnp.zeros(len(SourceSums._fields) * num_sources, jnp.float32)
    zeros = (jnp.zeros((), jnp.float32), source_zeros, d_rows, d_weight)
    loss_sum, source_sums, d_rows, d_weight = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
    if not with_gradient:
        return loss_sum, source_sums, d_rows, d_weight
    # The gradients are in the order of chunks: bring them back into the order of slots.
    return loss_sum, source_sums, d_rows[jnp.argsort(order)].reshape(hidden.shape), d_weight


def _sum_by_source(of_tokens: jax.Array, sources: jax.Array | None, num_sources: int) -> jax.Array:
    """Sums values of tokens, float32 [4 C], over the tokens of each source [C], and returns float32 [4 N] flat.

    A mask gives the same bits each time; a scatter's sums on a GPU would depend on the order of its additions.
    """
    if sources is None:
        return of_tokens.sum(axis=-1)
    is_of_source = sources == jnp.arange(num_sources, dtype=jnp.int32)[:, None]  # [N C]
    return jnp.where(is_of_source, of_tokens[:, None], 0.0).sum(axis=-1).reshape(-1)


def _logits(products: jax.Array, logit_scale: float, softcap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """Products of hidden states and weight [C V] -> logits [C V], and their derivatives by the products."""
    logits = products * logit_scale
    if softcap is None:
        return logits, logit_scale
    bounded = jnp.tanh(logits / softcap)
    return softcap * bounded, logit_scale * (1 - jnp.square(bounded))


def _cross_entropy(
    logits: jax.Array, targets: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the cross-entropies of a chunk of tokens.

    Args:
      logits: float32 [C V].
      targets: int32 [C].
      vocab_size: as in `cross_entropy_sums`.

    Returns:
      The cross-entropies [C] and their derivatives by the logits [C V]; 1 where the prediction is the target and 0
      elsewhere [C]; the entropies of the predicted distributions [C]; all float32.
    """
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if logits.shape[1] > vocab_size:
        logits = jnp.where(column < vocab_size, logits, jnp.finfo(jnp.float32).min)
    # A gather along a vocabulary that is split over devices would collect all logits on one device; this mask does not.
    is_target = column == targets[:, None]
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    losses = (jnp.log(total) + largest)[:, 0] - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    d_logits = exponentials / total - is_target.astype(jnp.float32)
    # The first of the largest logits, as argmax, which XLA would compute on all columns of a split vocabulary.
    predicted = jnp.min(jnp.where(logits == largest, column, logits.shape[1]), axis=-1)
    mean_below_largest = jnp.sum(exponentials * (logits - largest), axis=-1) / total[:, 0]
    entropies = jnp.log(total)[:, 0] - mean_below_largest
    return losses, d_logits, (predicted == targets).astype(jnp.float32), entropies
