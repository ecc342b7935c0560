"""One optimizer step: `accumulate` adds up microbatches, `apply` divides once and updates.

Both are jitted pure functions over plain pytrees with their inputs donated. A step has as many microbatches as
its samples need; only their few shapes are compiled. The loss, and the gradient, of a step is the sum over all
its tokens divided by the sum of their weights, and `apply` is the only place where that division is made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mice_jax.loss import cross_entropy_sums
from mice_jax.models.transformer import Compute, Decoder, Params
from mice_jax.sharding import BATCH_AXES, constrain, num_shards, param_shardings

LOGIT_TOKENS = 512  # tokens of one device whose logits exist at a time

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions, loss_weights: each [B T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # updates done, int32
    params: Params  # float32
    opt_state: optax.OptState


class Sums(NamedTuple):
    """What a step's microbatches add up to, float32."""

    grads: Params
    loss_sum: jax.Array
    weight_sum: jax.Array


class StepFunctions(NamedTuple):
    """The compiled functions of a run; `batch` is one microbatch."""

    init: Callable[[jax.Array], TrainState]  # from a key
    start: Callable[[Params], TrainState]  # from parameters, donated
    zero_sums: Callable[[], Sums]
    accumulate: Callable[[Params, Sums, Batch], Sums]
    apply: Callable[[TrainState, Sums], tuple[TrainState, Sums, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]  # loss_sum, weight_sum
    abstract_state: TrainState  # shapes with shardings, for restoring


def batch_loss(
    decoder: Decoder, params: Params, batch: Batch, compute: Compute, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """loss_sum and weight_sum of one microbatch."""
    model = decoder.bind(params)
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], compute)
    return cross_entropy_sums(
        hidden,
        constrain(model.output_weight(), "vocab", "hidden"),
        batch["targets"],
        batch["loss_weights"],
        vocab_size=decoder.spec.vocab_size,
        logit_scale=decoder.spec.logit_scale,
        softcap=decoder.spec.logit_softcap,
        chunk=chunk,
        batch_axes=BATCH_AXES,
    )


def make_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    compute: Compute,
) -> StepFunctions:
    """Jits the functions of a run for one mesh; parameters and moments lie as `sharding.RULES` says."""
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    abstract_opt = jax.eval_shape(optimizer.init, decoder.abstract)
    opt_shardings = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract_opt, shardings, transform_non_params=lambda _: whole
    )
    # Trees of shardings in the places of the arrays that they are for.
    state_shardings = TrainState(cast(Any, whole), shardings, opt_shardings)
    sums_shardings = Sums(shardings, cast(Any, whole), cast(Any, whole))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = batch["tokens"].shape[0] // num_shards(mesh)
        return batch_loss(decoder, params, batch, compute, chunk=max(1, LOGIT_TOKENS // rows))

    def start(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def zero_sums() -> Sums:
        zero = jnp.zeros((), jnp.float32)
        return Sums(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), decoder.abstract), zero, zero)

    def accumulate(params: Params, sums: Sums, batch: Batch) -> Sums:
        (loss_sum, weight_sum), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, sums, Sums(grads, loss_sum, weight_sum))

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
        state, metrics = apply_sums(state, sums, optimizer, schedule)
        return state, jax.tree.map(jnp.zeros_like, sums), metrics  # zeroed in place for the next step

    def in_mesh(f: Callable, **jit_args: Any) -> Callable:
        jitted = jax.jit(f, **jit_args)

        def call(*args: Any) -> Any:
            with jax.set_mesh(mesh):
                return jitted(*args)

        call.jitted = jitted  # type: ignore[attr-defined]  # for tests that count compilations
        return call

    abstract = jax.eval_shape(start, decoder.abstract)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, state_shardings)
    return StepFunctions(
        init=in_mesh(lambda key: start(decoder.init(key)), out_shardings=state_shardings),
        start=in_mesh(start, donate_argnums=0, out_shardings=state_shardings),
        zero_sums=in_mesh(zero_sums, out_shardings=sums_shardings),
        accumulate=in_mesh(accumulate, donate_argnums=1, out_shardings=sums_shardings),
        apply=in_mesh(apply, donate_argnums=(0, 1), out_shardings=(state_shardings, sums_shardings, whole)),
        evaluate=in_mesh(loss, out_shardings=(whole, whole)),
        abstract_state=abstract,
    )


def apply_sums(
    state: TrainState,
    sums: Sums,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The update from a step's sums, and what it measured.

    Where the loss or the gradient norm is not finite the state is returned as it was, and `finite` is false.
    """
    grads = jax.tree.map(lambda g: g / sums.weight_sum, sums.grads)
    loss = sums.loss_sum / sums.weight_sum
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    updated = TrainState(state.step + 1, params, opt_state)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(new_state.params),
        "update_norm": optax.tree.norm(updates),
        "learning_rate": schedule(state.step),
        "finite": finite,
    }
    return new_state, metrics
