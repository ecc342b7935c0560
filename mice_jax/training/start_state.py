"""Makes the state that a run, or one of its phases, starts with."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mice_jax.checkpoint import Checkpoints
from mice_jax.errors import UserError
from mice_jax.model_source import ModelSource, load_params, stored_adapters
from mice_jax.models.lora import with_magnitudes
from mice_jax.models.transformer import Decoder, Params
from mice_jax.numerics.blockwise import is_quantized, times
from mice_jax.numerics.offload import compute_on_device
from mice_jax.step import StepFunctions, TrainState
from mice_jax.training.osft import OsftState, new_bases
from mice_jax.training.phases import PhaseSpan
from mice_jax.training.progress import Progress


def restore_or_start(
    checkpoints: Checkpoints,
    source: ModelSource,
    decoder: Decoder,
    fns: StepFunctions,
    seed: int,
    log: Callable[[str], None],
) -> tuple[int, TrainState, Params | None, Progress]:
    """Restores the newest intact checkpoint of the run, or starts from what `model.init_from` names.

    Args:
      checkpoints: The run's checkpoints.
      source: The model to start from if there is no checkpoint.
      decoder: The model.
      fns: The run's step functions, with the shapes and shardings of its state.
      seed: The seed of random parameters.
      log: Called with a sentence about each damaged checkpoint.

    Returns:
      The number of steps done, the state after them, the frozen parameters that adapters are added to (None if all are
      trained), and the counters. Checkpoints hold no frozen parameters, which are loaded each time.

    Raises:
      UserError: All checkpoints are damaged.
    """
    restored = checkpoints.restore_newest(fns.abstract_state, log)
    if restored is not None:
        step, state, progress = restored
        return step, state, _load_base(source, decoder, fns, seed), Progress(**progress)
    shardings = jax.tree.map(lambda p: p.sharding, fns.abstract_state.params)
    if decoder.lora is None:
        return 0, fns.from_params(load_params(source, decoder, shardings, seed=seed)), None, Progress()
    adapters, base = stored_adapters(source, shardings), _load_base(source, decoder, fns, seed)
    if adapters is None:
        adapters = _new_adapters(decoder, base, shardings, seed)
    return 0, fns.from_params(adapters), base, Progress()


def _new_adapters(decoder: Decoder, base: Params | None, shardings: Params, seed: int) -> Params:
    """Draws adapters that do not change what the base computes."""

    def draw(key: jax.Array) -> Params:
        # XLA computes what is returned alone, and none of the weights: the magnitudes are not those of random ones.
        drawn = decoder.split(decoder.init(key))[0]
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros(x.shape) if path[-1].key == "magnitude" else x, drawn
        )

    adapters = jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    if decoder.lora is None or not decoder.lora.dora:
        return adapters
    return jax.jit(with_magnitudes, donate_argnums=0, out_shardings=shardings)(adapters, base)


def _load_base(source: ModelSource, decoder: Decoder, fns: StepFunctions, seed: int) -> Params | None:
    """Loads the frozen parameters that adapters are added to, in the dtype that they are held in."""
    if fns.abstract_base is None:
        return None
    shardings = jax.tree.map(lambda p: p.sharding, fns.abstract_base)
    dtypes = jax.tree.map(lambda p: p.dtype, fns.abstract_base)
    loaded = load_params(source.base, decoder.base, shardings, seed=seed)
    cast = jax.jit(
        lambda params: jax.tree.map(lambda p, dtype: p.astype(dtype), params, dtypes),
        donate_argnums=0,
        out_shardings=shardings,
    )
    return cast(loaded)


def enter_branch(state: TrainState, old_beta2: float, new_beta2: float) -> TrainState:
    """Returns the state with which a branch begins: that of the other run, its second moment kept without bias.

    After n steps, Adam divides the second moment by 1 - beta2^n. A moment that was summed with the other run's beta2
    must be divided by 1 - old_beta2^n, so it is scaled by the ratio of the two; the ratio is 1 after many steps, or
    without a change, when the state is returned as it is.

    Args:
      state: The state of the checkpoint, whose second moments may be deleted.
      old_beta2: The beta2 of the run that saved it.
      new_beta2: The beta2 of the branch.
    """
    if old_beta2 == new_beta2:
        return state

    def rescale(node: Any) -> Any:
        if not _is_adam(node):
            return node
        count = int(jax.device_get(node.count))
        factor = (1 - new_beta2**count) / (1 - old_beta2**count)

        def scaled(nu: Any) -> Any:
            return jax.tree.map(lambda moment: times(moment, factor), nu, is_leaf=is_quantized)

        return node._replace(nu=compute_on_device(scaled, node.nu))

    return dataclasses.replace(state, opt_state=jax.tree.map(rescale, state.opt_state, is_leaf=_is_adam))


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def enter_phase(
    spans: Sequence[PhaseSpan],
    index: int,
    state: TrainState,
    fns: StepFunctions,
    checkpoints: Checkpoints,
    log: Callable[[str], None],
) -> TrainState:
    """Returns the state with which a phase after the first begins. The step count, and so the schedule, continues.

    Args:
      spans: The phases of the run.
      index: The index of the phase that begins.
      state: The state at the end of the phase before, whose arrays may be deleted.
      fns: The run's step functions.
      checkpoints: The run's checkpoints.
      log: Called with a sentence about where the phase starts from.

    Raises:
      UserError: The phase starts from the best checkpoint, but none has a score, or it cannot be read.
    """
    phase, before = spans[index].phase, spans[index - 1]
    if phase.seed_from == "best":
        best = checkpoints.best_step(before.saved_steps)
        if best is None:  # The last step is saved with its metrics, but a metric may be null there.
            raise UserError(
                f"the phase {phase.name!r} starts from the best checkpoint of {before.phase.name!r}, but "
                "checkpoint.best_metric is null at each of them. Choose another metric, in another --workdir."
            )
        log(f"the phase {phase.name!r} starts from step {best}, the best of {before.phase.name!r}")
        if best != before.end:
            # Two states may not fit in memory.
            jax.tree.map(lambda x: x.delete(), (state.params, state.opt_state, state.average))
            best_state, _ = checkpoints.restore(best, fns.abstract_state)
            state = dataclasses.replace(best_state, step=state.step)
    if phase.optimizer == "reset":
        jax.tree.map(lambda x: x.delete(), state.opt_state)  # Two optimizer states may not fit in memory.
        fresh = fns.from_params(state.params)
        average = state.average
        if average is not None:
            jax.tree.map(lambda x: x.delete(), fresh.average)  # The average goes on.
        return TrainState(state.step, fresh.params, fresh.opt_state, average)
    return _with_own_subspaces(state, fns)


def _with_own_subspaces(state: TrainState, fns: StepFunctions) -> TrainState:
    """Returns the state with the frozen directions of its own weights, where a run freezes some; moments stay."""
    if not isinstance(state.opt_state, OsftState):
        return state
    abstract = fns.abstract_state.opt_state.bases
    jax.tree.map(lambda x: x.delete(), state.opt_state.bases)  # Two of these may not fit in memory.
    decompose = jax.jit(
        functools.partial(new_bases, abstract), out_shardings=jax.tree.map(lambda x: x.sharding, abstract)
    )
    return dataclasses.replace(state, opt_state=state.opt_state._replace(bases=decompose(state.params)))
