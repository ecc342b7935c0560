"""One optimizer step: `accumulate` adds a microbatch to the sums of the step, `apply` updates the state with them.

Both are pure functions over plain pytrees, jitted with donated inputs. A step has as many microbatches as its samples
need. Microbatches have a few fixed shapes, and `accumulate` is compiled once for each. The loss of a step, like its
gradient, is a weighted sum over all tokens of the step, divided by the sum of the weights. Only `apply_sums` divides.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mice_jax.loss import SourceSums, cross_entropy_sums, tokens_per_chunk
from mice_jax.models.parameters import FLOAT32_PARAMS
from mice_jax.models.transformer import Compute, Decoder, Params
from mice_jax.numerics.basis import Basis
from mice_jax.numerics.blockwise import Quantized
from mice_jax.numerics.offload import (
    LAYERS,
    Part,
    can_be_on_host,
    dict_keys,
    init_on_host,
    on_host,
    take_mask,
    update_by_parts,
)
from mice_jax.numerics.stochastic_rounding import round_stochastically
from mice_jax.numerics.wide_gradient import WideGradient, variables_of, with_variables
from mice_jax.sharding import BATCH_AXES, LENGTH_AXIS, basis_sharding, gradient_sum, param_shardings, split_like

# One microbatch: tokens, targets, segment_ids, positions, loss_weights and sources, each [B T], B rows of T slots.
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an optimizer step changes."""

    step: jax.Array  # number of steps done, int32; a step whose update was skipped counts
    params: Params  # float32; or bfloat16, except FLOAT32_PARAMS such as the scales of norms
    opt_state: Any  # the optax state, whose moments may be in host memory; None in what `mice average` writes
    average: Params | None = None  # running average of params, float32; None if the run keeps none


class Sums(NamedTuple):
    """Sums over the microbatches of a step."""

    grads: Params  # gradient of loss_sum, in the run's accumulate_dtype
    loss_sum: jax.Array  # float32 scalar, like the next three
    weight_sum: jax.Array
    grad_sq_sum: jax.Array  # sum of the squared norms of the microbatches' gradients
    weight_sq_sum: jax.Array  # sum of the squares of the microbatches' weight_sum
    sources: SourceSums


class Jitted:
    """A jitted function that is traced, compiled and called under one mesh."""

    def __init__(self, function: Callable, mesh: Mesh, **jit_args: Any):
        self.jitted, self._mesh = jax.jit(function, **jit_args), mesh
        self._compiling: dict[Any, Future] = {}  # by the signature of the arguments

    def __call__(self, *args: Any) -> Any:
        """Calls the function under the mesh; waits first if another thread is compiling it for these shapes."""
        if self._compiling and (compiling := self._compiling.pop(_signature(args), None)):
            compiling.result()
        with jax.set_mesh(self._mesh):
            return self.jitted(*args)

    def compile_in(self, threads: Executor, *args: Any) -> None:
        """Starts `compile` in another thread; a call with arguments of the same shapes waits for it."""
        self._compiling[_signature(args)] = threads.submit(self.compile, *args)

    def forget_cancelled(self) -> None:
        """Forgets compilations that were cancelled before they began; a later call then compiles what it needs."""
        self._compiling = {signature: f for signature, f in self._compiling.items() if not f.cancelled()}

    def compile(self, *args: Any, options: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
        """Compiles for arguments of these shapes, without running; a later call reuses the program.

        JAX keeps the executable with the lowered function, which a call with the same shapes and shardings looks up.

        Args:
          *args: the arguments, as jax.ShapeDtypeStruct or numbers.
          options: extra options of the compiler. A later call does not reuse a program that was compiled with them.
        """
        with jax.set_mesh(self._mesh):
            return self.jitted.lower(*args).compile(dict(options) or None)


def _signature(args: tuple) -> tuple:
    """Returns the shapes and dtypes of all arrays; within a run, they determine the compiled program of a function."""
    return tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(args))


class StepFunctions(NamedTuple):
    """The jitted functions of a run, and the shapes, dtypes and shardings of the state and the sums.

    The abstract trees have a jax.ShapeDtypeStruct with a sharding in place of each array.

    Attributes:
      init: (key) -> TrainState.
      from_params: (params) -> TrainState. It donates params.
      zero_sums: () -> Sums.
      accumulate: (params, sums, batch) -> Sums. It donates sums.
      apply: (state, sums, learning_rate, skip_norm_above=inf, average_weight=None) -> TrainState, zeroed Sums, metrics.
        It donates state and sums.
      evaluate: (params, batch) -> loss_sum, weight_sum, correct_sum (the weights of correctly predicted tokens), and if
        exact matches are counted also num_matches, num_samples.
      gradients: (params, batch) -> (loss_sum, (weight_sum, source_sums)), gradients. It is not jitted: `accumulate`
        calls it.
      abstract_state: the state.
      abstract_sums: the sums.
      abstract_base: the frozen parameters that adapters are added to; None if the model has no adapters.
      abstract_params: what `accumulate` and `evaluate` take: the parameters of the state, joined with the base.
    """

    init: Jitted
    from_params: Jitted
    zero_sums: Jitted
    accumulate: Jitted
    apply: Jitted
    evaluate: Jitted
    gradients: Callable
    abstract_state: TrainState
    abstract_sums: Sums
    abstract_base: Params | None
    abstract_params: Params


def batch_loss(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    compute: Compute,
    chunk_size: int | None = None,
    num_sources: int = 1,
) -> tuple[jax.Array, tuple[jax.Array, SourceSums]]:
    """Computes the loss of one microbatch as two sums, and sums of its predictions by source.

    Args:
      decoder: the model.
      params: its parameters.
      batch: one microbatch.
      compute: dtype, attention backend and rematerialisation.
      chunk_size: tokens per device whose logits are materialised at once; None picks it from the vocabulary size.
      num_sources: the number of sources; with 1, `batch["sources"]` is ignored.

    Returns:
      loss_sum, a float32 scalar, and auxiliary outputs: weight_sum, a float32 scalar, and the sums by source.
    """
    model = decoder.bind(params)
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], compute)
    output_weight = model.output_weight()
    # Where gradients are computed, a bfloat16 weight of the state comes as a pair: the weight, and zeros that receive
    # its gradient (numerics/wide_gradient.py).
    if isinstance(output_weight, WideGradient):
        output_weight = output_weight.astype(jnp.float32)
    # How the devices' gradients of the output weight are added.
    reduction = gradient_sum(output_weight.shape, ("vocab", "embed"), compute.reduce_dtype)
    with jax.named_scope("loss"):
        loss_sum, weight_sum, source_sums = cross_entropy_sums(
            hidden,
            output_weight,
            batch["targets"],
            batch["loss_weights"],
            batch["sources"] if num_sources > 1 else None,
            vocab_size=decoder.spec.vocab_size,
            logit_scale=decoder.spec.logit_scale,
            softcap=decoder.spec.logit_softcap,
            chunk_size=chunk_size or tokens_per_chunk(decoder.vocab_rows),
            num_sources=num_sources,
            batch_axes=BATCH_AXES,
            length_axes=(LENGTH_AXIS,),
            weight_spec=reduction.spec,
            add_weight_gradients=reduction.add,
            add_first=not decoder.spec.tie_embeddings,
        )
    return loss_sum, (weight_sum, source_sums)


def make_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    compute: Compute,
    trained_mask: Any = None,
    accumulate_dtype: str = "float32",
    compiler_options: dict[str, str] | None = None,
    sources: Sequence[str] = (),
    keeps_average: bool = False,
    max_held_out_samples: int = 0,
    offloads_moments: bool = False,
    clip_norm: float = 0.0,
    rounding_seed: int | None = None,
) -> StepFunctions:
    """Jits the functions of a run for one mesh, with the shardings of `sharding.RULES`.

    Args:
      decoder: the model.
      optimizer: an optax transformation without the learning rate, from `optim.make_optimizer`.
      mesh: the devices.
      compute: dtype, attention backend and rematerialisation of forward and backward.
      trained_mask: bool arrays in a tree like the parameters, to which they broadcast, false where a parameter is
        frozen; None trains all.
      accumulate_dtype: the dtype in which gradients are summed over microbatches, and in which those of bfloat16
        weights leave a microbatch.
      compiler_options: XLA's options for the functions that run the model.
      sources: the names of the sources, in the order of `batch["sources"]`; none for no metrics by source.
      keeps_average: whether the state keeps a running average of the parameters.
      max_held_out_samples: the most samples that an evaluated microbatch may hold, for counting exact matches; 0 counts
        none.
      offloads_moments: whether moments are kept in host memory, and parameters updated in parts: each layer, and all
        other parameters together. `optimizer` sees the gradients of one part at a time, so it must not clip by the
        global norm; `clip_norm` does.
      clip_norm: the global norm to which gradients are clipped if moments are offloaded; 0 for no clipping.
      rounding_seed: None keeps weights in float32. A number keeps them in bfloat16, and is the seed of the stochastic
        rounding of each update.

    Returns:
      The jitted functions; nothing is compiled before the first call.
    """
    param_dtype = "float32" if rounding_seed is None else "bfloat16"
    abstract_state = make_abstract_state(decoder, optimizer, mesh, keeps_average, offloads_moments, param_dtype)
    abstract_base = make_abstract_base(decoder, mesh, compute.dtype)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    num_sources = max(len(sources), 1)
    by_source: Any = jax.ShapeDtypeStruct((num_sources,), jnp.float32, sharding=replicated)
    abstract_sums = Sums(
        jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, accumulate_dtype, sharding=p.sharding), abstract_state.params
        ),
        loss_sum=scalar,
        weight_sum=scalar,
        grad_sq_sum=scalar,
        weight_sq_sum=scalar,
        sources=SourceSums(*[by_source] * len(SourceSums._fields)),
    )
    state_shardings = jax.tree.map(lambda a: a.sharding, abstract_state)
    sums_shardings = jax.tree.map(lambda a: a.sharding, abstract_sums)

    def init(key: jax.Array) -> TrainState:
        return from_params(decoder.split(decoder.init(key))[0])

    def from_params(params: Params) -> TrainState:
        # The average is a copy, since `apply` donates it and the parameters, and no buffer can be donated twice.
        average = jax.tree.map(jnp.copy, in_float32(params)) if keeps_average else None
        params = jax.tree.map(lambda p, a: p.astype(a.dtype), params, abstract_state.params)
        opt_state = init_on_host(init_moments, params) if offloads_moments else init_moments(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average)

    def init_moments(params: Params) -> Any:
        return optimizer.init(in_float32(params))

    def zero_sums() -> Sums:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_sums)

    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        if not max_held_out_samples:
            loss_sum, (weight_sum, source_sums) = batch_loss(decoder, params, batch, compute)
            return loss_sum, weight_sum, source_sums.correct[0]
        # With each sample numbered as a source of its own, the sums by source are sums by sample.
        batch = batch | {"sources": sample_numbers(batch["segment_ids"])}
        loss_sum, (weight_sum, by_sample) = batch_loss(
            decoder, params, batch, compute, num_sources=max_held_out_samples
        )
        matches, samples = exact_matches(by_sample)
        return loss_sum, weight_sum, jnp.sum(by_sample.correct), matches, samples

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, SourceSums]]:
        return batch_loss(decoder, params, batch, compute, num_sources=num_sources)

    def gradients(params: Params, batch: Batch) -> tuple[tuple[jax.Array, tuple[jax.Array, SourceSums]], Params]:
        # With adapters, only they are differentiated; the base is held constant.
        trained, base = decoder.split(params)

        # Parameters in bfloat16 are differentiated through zeros that accompany them, so that their gradients are
        # computed in float32, and kept in the dtype of the sums (numerics/wide_gradient.py).
        def loss_of(variables: Params) -> tuple[jax.Array, tuple[jax.Array, SourceSums]]:
            return loss(decoder.join(with_variables(trained, variables), base), batch)

        return jax.value_and_grad(loss_of, has_aux=True)(variables_of(trained, accumulate_dtype))

    def accumulate(params: Params, sums: Sums, batch: Batch) -> Sums:
        (loss_sum, (weight_sum, source_sums)), grads = gradients(params, batch)
        # A mask may freeze single layers of a stacked array, so the sums hold the gradients of frozen parameters too.
        # `apply_sums` sets them to zero, once a step.
        grad_sq = optax.tree.norm(in_float32(_zero_frozen(grads, trained_mask)), squared=True)
        microbatch = Sums(grads, loss_sum, weight_sum, grad_sq, weight_sum**2, source_sums)
        return jax.tree.map(lambda total, x: (total + x).astype(total.dtype), sums, microbatch)

    def apply(
        state: TrainState,
        sums: Sums,
        learning_rate: float,
        skip_norm_above: float = math.inf,
        average_weight: float | None = None,
    ) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
        state, metrics = apply_sums(
            state,
            sums,
            optimizer,
            learning_rate,
            skip_norm_above,
            trained_mask,
            sources,
            average_weight,
            offloads_moments,
            clip_norm,
            rounding_seed,
        )
        # The next step starts from these zeros, which reuse the memory of the donated sums.
        return state, jax.tree.map(jnp.zeros_like, sums), metrics

    return StepFunctions(
        init=Jitted(init, mesh, out_shardings=state_shardings),
        from_params=Jitted(from_params, mesh, donate_argnums=0, out_shardings=state_shardings),
        zero_sums=Jitted(zero_sums, mesh, out_shardings=sums_shardings),
        accumulate=Jitted(
            accumulate, mesh, donate_argnums=1, out_shardings=sums_shardings, compiler_options=compiler_options
        ),
        apply=Jitted(
            apply,
            mesh,
            donate_argnums=(0, 1),
            keep_unused=True,  # sums that no metric reads are donated too
            out_shardings=(state_shardings, sums_shardings, replicated),
        ),
        evaluate=Jitted(evaluate, mesh, out_shardings=replicated, compiler_options=compiler_options),
        gradients=gradients,
        abstract_state=abstract_state,
        abstract_sums=abstract_sums,
        abstract_base=abstract_base,
        abstract_params=decoder.join(abstract_state.params, abstract_base),
    )


def sample_numbers(segment_ids: jax.Array) -> jax.Array:
    """Numbers the samples of a microbatch from 0 on.

    Args:
      segment_ids: [B T] int32, 0 for padding and 1, 2, ... for the samples of a row.

    Returns:
      The number of each slot's sample, [B T] int32. A slot of padding, which has no loss weight, gets the number of the
      last sample of the rows before its own, or -1.
    """
    samples_in_row = segment_ids.max(axis=1)
    return jnp.cumsum(samples_in_row)[:, None] - samples_in_row[:, None] + segment_ids - 1


def exact_matches(by_sample: SourceSums) -> tuple[jax.Array, jax.Array]:
    """Counts the samples in which every trained token is the model's most probable one.

    Greedy decoding would write exactly the trained tokens of such a sample: each of them is the most probable one after
    the tokens before it, and these are the same in decoding.

    Args:
      by_sample: the sums over the slots of each sample.

    Returns:
      The number of such samples, and of all samples with a trained token; float32 scalars.
    """
    is_sample = by_sample.weight > 0
    # `weight` sums the weights of all tokens, `correct` those of the tokens that are predicted correctly.
    matches = is_sample & (by_sample.correct >= by_sample.weight)
    return jnp.sum(matches, dtype=jnp.float32), jnp.sum(is_sample, dtype=jnp.float32)


def apply_sums(
    state: TrainState,
    sums: Sums,
    optimizer: optax.GradientTransformation,
    learning_rate: jax.typing.ArrayLike,
    skip_norm_above: jax.typing.ArrayLike = jnp.inf,
    trained_mask: Any = None,
    sources: Sequence[str] = (),
    average_weight: jax.typing.ArrayLike | None = None,
    offloads_moments: bool = False,
    clip_norm: float = 0.0,
    rounding_seed: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update from the sums of a step.

    If the loss or the gradient norm is not finite, the whole state stays unchanged and the metric `finite` is false. If
    both are finite but the norm is above `skip_norm_above`, the step is counted and the metric `skipped` is true, but
    parameters and optimizer state stay unchanged. The running average is then updated with the unchanged parameters.

    Args:
      state: the state before the step.
      sums: the sums over all microbatches of the step.
      optimizer: an optax transformation without the learning rate.
      learning_rate: the learning rate of the step.
      skip_norm_above: a step whose gradient norm, before clipping, is above this makes no update.
      trained_mask: as in `make_step`. Where it is false, parameters do not change, and their gradients do not count in
        the norm.
      sources: the names of the sources; their metrics are NaN in a step that has no trained token of them.
      average_weight: the weight of the new parameters in the running average, where the state keeps one.
      offloads_moments: as in `make_step`.
      clip_norm: as in `make_step`.
      rounding_seed: as in `make_step`.

    Returns:
      The state after the step, and the metrics of the step as scalars.
    """

    # The gradient is divided by the sum of the weights in this function, and the loss below it. If all weights are 0
    # (the step has no trained token), both are NaN, and the step is not finite.
    def mean(grad_sums: Params, mask: Any) -> Params:
        return _zero_frozen(jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight_sum, grad_sums), mask)

    grads = mean(sums.grads, trained_mask)
    loss = sums.loss_sum / sums.weight_sum

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skipped = finite & (grad_norm > skip_norm_above)

    learning_rate = jnp.asarray(learning_rate, jnp.float32)
    makes_update = finite & ~skipped
    step = jnp.where(finite, state.step + 1, state.step)
    current = state.params, state.opt_state

    def update(current: Any, grads: Params, mask: Any, first_layer: Any = 0) -> tuple[Any, jax.Array]:
        to_param_dtype = functools.partial(round_params, seed=rounding_seed, step=state.step, first_layer=first_layer)
        return _update(current, grads, optimizer, learning_rate, makes_update, mask, to_param_dtype)

    if not offloads_moments:
        (params, opt_state), update_sq = update(current, grads, trained_mask)
    else:
        # `grads` is used for the norm only. The mean gradient of each part is computed again from its sums, so that the
        # mean gradient of the whole model need not stay in memory.
        def update_part(part: Part, layer: Any, current: Any, grad_sums: Params) -> tuple[Any, jax.Array]:
            mask = take_mask(part, layer, trained_mask)
            return update(current, _clipped(mean(grad_sums, mask), grad_norm, clip_norm), mask, layer)

        (params, opt_state), update_sq = update_by_parts(update_part, state.params, current, sums.grads)

    average = None
    if state.average is not None:
        assert average_weight is not None, "the state has a running average, so average_weight must be given"
        weight = jnp.where(finite, average_weight, 0.0)
        average = jax.tree.map(lambda old, new: old + weight * (new - old), state.average, in_float32(params))
    metrics = {
        "loss": loss,
        "token_accuracy": jnp.sum(sums.sources.correct) / sums.weight_sum,
        "entropy": jnp.sum(sums.sources.entropy) / sums.weight_sum,
        "grad_norm": grad_norm,
        "grad_sq_corrected": corrected_grad_sq(grad_norm, sums),
        "param_norm": optax.tree.norm(in_float32(params)),
        "update_norm": jnp.where(skipped, 0.0, jnp.sqrt(update_sq)),
        "learning_rate": learning_rate,
        "finite": finite,
        "skipped": skipped,
    }
    for i, name in enumerate(sources):
        metrics[f"train/{name}/loss"] = sums.sources.loss[i] / sums.sources.weight[i]
        metrics[f"train/{name}/token_accuracy"] = sums.sources.correct[i] / sums.sources.weight[i]
    return TrainState(step, params, opt_state, average), metrics


def _update(
    current: tuple[Params, Any],
    grads: Params,
    optimizer: optax.GradientTransformation,
    learning_rate: jax.Array,
    makes_update: jax.Array,
    mask: Any,
    to_param_dtype: Callable[[Params, Params], Params],
) -> tuple[tuple[Params, Any], jax.Array]:
    """Updates parameters and optimizer state, or leaves both as they are where `makes_update` is false.

    Args:
      current: the parameters and the state of the optimizer.
      grads: the mean gradient of the step.
      optimizer: the optimizer.
      learning_rate: float32 scalar.
      makes_update: bool scalar.
      mask: the `trained_mask` of these parameters.
      to_param_dtype: given old and new parameters, returns the new ones in the dtypes of the old.

    Returns:
      The new parameters and state, and the squared norm of the update, whether it is made or not.
    """
    params, opt_state = current
    wide = in_float32(params)
    directions, new_opt_state = optimizer.update(grads, opt_state, wide)
    updates = _zero_frozen(jax.tree.map(lambda d: -learning_rate * d, directions), mask)
    new_params = to_param_dtype(params, cast(Params, optax.apply_updates(wide, updates)))
    # A selection, and not a product with 0: NaNs of an update that is not made must not reach the state.
    chosen = jax.tree.map(
        lambda new, old: jnp.where(makes_update, new, old), (new_params, new_opt_state), (params, opt_state)
    )
    return chosen, optax.tree.norm(updates, squared=True)


def _clipped(grads: Params, norm: jax.Array, max_norm: float) -> Params:
    """Clips a part of the gradients as `optax.clip_by_global_norm` would clip all of them; `norm` is that of all."""
    if not max_norm:
        return grads
    return jax.tree.map(lambda g: jnp.where(norm < max_norm, g, (g / norm) * max_norm), grads)


# The smallest denominator 1 - r for which `corrected_grad_sq` returns an estimate. Below it, one microbatch has almost
# all of the weight, and the estimate would be rounding error.
MIN_CROSS_SHARE = 1e-3


def corrected_grad_sq(grad_norm: jax.Array, sums: Sums) -> jax.Array:
    """Estimates the squared norm of the true gradient G without bias, for the gradient noise scale.

    The noise scale is that of McCandlish et al. (2018). The squared norm of the step's own gradient g is too large: its
    expectation is |G|^2 plus the variance of g. Let microbatch i have the gradient sum s_i and the weight w_i, where
    s_i has the mean w_i G, any variance, and is independent of the others. Then s_i . s_j has the mean w_i w_j |G|^2
    for i != j. Summed over all such pairs, with W = sum w_i and g = sum s_i / W,

      |G|^2 ~ (|sum s_i|^2 - sum |s_i|^2) / (W^2 - sum w_i^2) = (|g|^2 - q) / (1 - r)

    where q = sum |s_i|^2 / W^2 and r = sum w_i^2 / W^2. Microbatches may have unequal weights, or none. Rows are packed
    by best fit and assigned to microbatches at random, which leaves a small bias if gradients depend on the length of
    their sample (docs/sweeps.md).

    Args:
      grad_norm: |g|, float32 scalar.
      sums: the sums over the microbatches of the step.

    Returns:
      The estimate, a float32 scalar: negative if noise dominates, and NaN if one microbatch has almost all the weight.
    """
    q = sums.grad_sq_sum / sums.weight_sum**2
    r = sums.weight_sq_sum / sums.weight_sum**2
    one_microbatch = 1 - r < MIN_CROSS_SHARE
    return jnp.where(one_microbatch, jnp.nan, (grad_norm**2 - q) / jnp.where(one_microbatch, 1.0, 1 - r))


def make_abstract_state(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    keeps_average: bool = False,
    offloads_moments: bool = False,
    param_dtype: str = "float32",
) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state, without allocating arrays.

    Args:
      decoder: the model.
      optimizer: the optimizer, whose state is included.
      mesh: the devices, which need not be present.
      keeps_average: whether the state keeps a running average of the parameters, float32 and sharded like them.
      offloads_moments: whether moments are in host memory.
      param_dtype: the dtype of the weights, except `FLOAT32_PARAMS` such as the scales of norms, which stay float32.

    Returns:
      A TrainState of jax.ShapeDtypeStruct. The parameters and their average are sharded by `sharding.RULES`, the state
      of the optimizer as `_opt_state_shardings` says. With LoRA, the parameters are the adapters alone.
    """
    params, axes = decoder.split(decoder.abstract)[0], decoder.split(decoder.axes)[0]
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    held = jax.tree_util.tree_map_with_path(lambda path, p: _with_dtype(param_dtype, path, p), params)
    state = TrainState(step, held, opt_state, params if keeps_average else None)
    params_shardings = param_shardings(params, axes, mesh)
    opt_state_shardings = _opt_state_shardings(opt_state, params, params_shardings, replicated, offloads_moments)
    average_shardings = params_shardings if keeps_average else None
    shardings = TrainState(replicated, params_shardings, opt_state_shardings, average_shardings)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def make_abstract_base(decoder: Decoder, mesh: Mesh | AbstractMesh, dtype: Any) -> Params | None:
    """Returns the shapes, dtypes and shardings of the frozen parameters that adapters are added to.

    They are held in the compute dtype. Every matrix product would cast them to it anyway, so results do not change.
    The scales of norms, and the other `FLOAT32_PARAMS`, stay float32.

    Args:
      decoder: the model.
      mesh: the devices, which need not be present.
      dtype: the compute dtype.

    Returns:
      A tree of jax.ShapeDtypeStruct; None if the model has no adapters.
    """
    if decoder.lora is None:
        return None
    base = decoder.base

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, sharding: _with_dtype(dtype, path, leaf, sharding),
        base.abstract,
        param_shardings(base.abstract, base.axes, mesh),
    )


def _with_dtype(
    dtype: Any, path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None = None
) -> jax.ShapeDtypeStruct:
    """Returns a parameter's ShapeDtypeStruct in `dtype`, or in its own if it is one of `FLOAT32_PARAMS`."""
    held_dtype: Any = leaf.dtype if path[-1].key in FLOAT32_PARAMS else dtype
    return jax.ShapeDtypeStruct(leaf.shape, held_dtype, sharding=sharding)


def in_float32(params: Params) -> Params:
    """Returns parameters cast to float32."""
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def round_params(
    old: Params, new: Params, seed: int | None, step: jax.typing.ArrayLike, first_layer: jax.typing.ArrayLike = 0
) -> Params:
    """Rounds updated parameters to the dtypes in which they are held, stochastically to bfloat16.

    Args:
      old: the parameters before the update.
      new: those after it, float32.
      seed: the seed of the random bits, which differ between parameters, layers and steps; None if all parameters are
        float32.
      step: the number of steps done.
      first_layer: the index of the first layer that the arrays stacked over layers hold.

    Returns:
      The new parameters in the dtypes of the old ones.
    """
    if seed is None:
        return new
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    # The random bits of a parameter depend on its position in the tree.
    indices = jax.tree.unflatten(jax.tree.structure(new), range(len(jax.tree.leaves(new))))

    def rounded(path: tuple, index: int, old: jax.Array, new: jax.Array) -> jax.Array:
        if old.dtype == jnp.float32 or not new.size:  # a part of an update has empty arrays for the other parts
            return new.astype(old.dtype)
        key = jax.random.fold_in(of_step, index)
        if path[0].key != LAYERS:
            return round_stochastically(new, key)
        # Each layer has a key of its own, so that its random bits are the same whether layers are updated one by one or
        # together.
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first_layer + jnp.arange(len(new)))
        return jax.vmap(round_stochastically)(new, keys)

    return jax.tree_util.tree_map_with_path(rounded, indices, old, new)


def _opt_state_shardings(
    opt_state: Any, params: Params, shardings: Params, replicated: NamedSharding, offloads_moments: bool
) -> Any:
    """Returns the shardings of an optimizer's state.

    An array with the name and shape of a parameter is sharded like the parameter. The scales of a quantised moment have
    one entry for each block along the last dim. Each of their dims is sharded like that of the parameter, if the mesh
    axes divide it. `sharding.basis_sharding` shards the two factors of an OSFT basis (training/osft.py). Other
    arrays, such as counts and Adafactor's row and column statistics, are replicated.

    Args:
      opt_state: the optimizer's state, with jax.ShapeDtypeStruct as leaves.
      params: the parameters, with jax.ShapeDtypeStruct as leaves.
      shardings: the sharding of each parameter.
      replicated: the sharding of all other arrays.
      offloads_moments: whether the arrays that can be in host memory are there.
    """
    by_name = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        by_name[dict_keys(path)] = leaf.shape, sharding

    def sharding_of(path: tuple, leaf: Any) -> Any:
        shape, sharding = by_name.get(dict_keys(path), (None, replicated))
        if isinstance(leaf, Basis):
            return basis_sharding(leaf, sharding)
        if isinstance(leaf, Quantized):
            return Quantized(sharding, NamedSharding(sharding.mesh, split_like(leaf.scales.shape, sharding)))
        return sharding if leaf.shape == shape else replicated

    on_devices = jax.tree_util.tree_map_with_path(
        sharding_of, opt_state, is_leaf=lambda x: isinstance(x, Quantized | Basis)
    )
    if not offloads_moments:
        return on_devices
    return jax.tree_util.tree_map_with_path(
        lambda path, x, sharding: on_host(sharding) if can_be_on_host(path, x) else sharding, opt_state, on_devices
    )


def _zero_frozen(tree: Params, mask: Any) -> Params:
    """Returns the tree with zeros where the mask is false."""
    if mask is None:
        return tree
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0.0), mask, tree)
