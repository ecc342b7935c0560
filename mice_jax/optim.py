"""Learning-rate schedules, and optimizers that give the direction of an update.

A schedule is computed by the host, and its rate is an argument of the update that multiplies the direction. So the rate
depends on the run's count of steps only, and runs with other schedules use the same compiled program.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mice_jax.numerics import blockwise

Schedule = Callable[[float], float]  # of the number of steps done
Axes = tuple[str | None, ...]  # the logical axes of a parameter, outputs first

# Muon's updates are scaled to this root mean square, which is about that of Adam, so that one learning rate serves both
# (Liu et al., arXiv 2502.16982).
MUON_RMS = 0.2


# ---------------------------------------------------------------------------------------- schedules
def make_schedule(
    kind: str,
    learning_rate: float,
    horizon: int,
    *,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    final_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> Schedule:
    """Makes the learning rate as a function of the step s, counted from 0.

    While s < w = warmup_steps, the rate is learning_rate * (s + 1) / w. Afterwards it is learning_rate times a factor,
    with x = (s - w) / (horizon - w) and f = final_ratio: `constant` 1, `linear` 1 - x * (1 - f),
    `cosine` f + (1 - f) * (1 + cos(pi x)) / 2; `wsd` is 1 until the last `decay_ratio` of the horizon, then falls
    linearly to f.

    Args:
      kind: constant, linear, cosine or wsd.
      learning_rate: the peak.
      horizon: the number of steps over which the rate falls; later steps have the final rate.
      warmup_steps: the number of steps of warm-up.
      warmup_ratio: the share of the horizon that is warm-up, rounded up to whole steps, if `warmup_steps` is 0.
      final_ratio: the final rate as a share of the peak.
      decay_ratio: the share of the horizon in which `wsd` falls.

    Returns:
      The rate as a function of the step.
    """
    # The subtraction keeps rounding errors from adding a step: 0.07 * 100 is 7.000000000000001.
    warmup = warmup_steps or math.ceil(warmup_ratio * horizon - 1e-9)

    def schedule(s: float) -> float:
        if s < warmup:
            return learning_rate * (s + 1) / warmup
        x = min((s - warmup) / max(1, horizon - warmup), 1.0)
        if kind == "constant":
            factor = 1.0
        elif kind == "linear":
            factor = 1 - x * (1 - final_ratio)
        elif kind == "cosine":
            factor = final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * x)) / 2
        else:
            assert kind == "wsd", kind
            decayed = (s - horizon * (1 - decay_ratio)) / max(1e-9, horizon * decay_ratio)
            factor = 1 - min(max(decayed, 0.0), 1.0) * (1 - final_ratio)
        return learning_rate * factor

    return schedule


def make_phase_schedule(phases: Iterable[tuple[int, float, bool]], horizon: int, kind: str, **shape: float) -> Schedule:
    """Makes the learning rate of a run with several phases.

    From each restart of the schedule to the next, or to the horizon, the rate has the shape of `make_schedule`, times
    the learning rate of the phase.

    Args:
      phases: for each phase its first step, its learning rate, and whether the schedule restarts there.
      horizon: the number of steps of the run.
      kind: as in `make_schedule`.
      **shape: other arguments of `make_schedule`.
    """
    firsts, rates, restarts = zip(*phases, strict=True)
    assert firsts[0] == 0
    starts = [0, *(first for first, restart in zip(firsts[1:], restarts[1:], strict=True) if restart)]
    ends = [*starts[1:], max(horizon, starts[-1] + 1)]
    shapes = [
        make_schedule(kind, 1.0, end - start, **cast(Any, shape)) for start, end in zip(starts, ends, strict=True)
    ]

    def schedule(step: float) -> float:
        part = bisect.bisect_right(starts, step) - 1
        return rates[bisect.bisect_right(firsts, step) - 1] * shapes[part](step - starts[part])

    return schedule


# ---------------------------------------------------------------------------------------- optimizers
def make_optimizer(
    *,
    name: str = "adamw",
    grad_clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    moments_dtype: str = "float32",
    axes: Any = None,
    trained: Any = None,
) -> optax.GradientTransformation:
    """Makes the transformation of gradients into a direction, to be multiplied by minus the learning rate.

    It clips gradients by their global norm, applies the optimizer `name`, and adds decoupled weight decay, except to
    norms and biases. Moments are computed in float32.

    Args:
      name: adamw, adafactor, muon, lion or sgd.
      grad_clip: the largest global norm; 0 for no clipping.
      beta1: the decay of the first moment, or the momentum of sgd.
      beta2: the decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: the coefficient of the decay.
      moments_dtype: the dtype in which moments are stored between steps; int8 quantises those of matrices.
      axes: the tree of the parameters' logical axes, by which muon finds matrices.
      trained: a tree like the parameters', of bool arrays; a leaf without a true entry has no moments.

    Returns:
      An optax transformation.
    """
    scale = {
        "adamw": lambda: optax.scale_by_adam(beta1, beta2, eps),
        "adafactor": lambda: _adafactor(),
        "muon": lambda: _muon(axes, beta1, beta2, eps),
        "lion": lambda: optax.scale_by_lion(beta1, beta2),
        "sgd": lambda: optax.trace(beta1) if beta1 else optax.identity(),
    }[name]()
    direction = optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        _with_moments_in(moments_dtype, scale),
        optax.add_decayed_weights(weight_decay, mask=_decays) if weight_decay else optax.identity(),
    )
    if trained is None:
        return direction
    return optax.masked(direction, jax.tree.map(lambda t: bool(np.any(t)), trained))


def _is_vector(path: tuple) -> bool:
    """Whether a parameter is a scale, a rate or a bias: over layers these have two dims, so the name decides."""
    name = path[-1].key
    return name in ("scale", "magnitude", "rate_log", "skip") or name.endswith("bias")


def _decays(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)


def _with_moments_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation `inner`, with its moments stored in `dtype` between steps."""
    if dtype == "float32":
        return inner
    if dtype == "int8":
        return _stored_as(inner, _quantized, _dequantized)

    def cast_state(state: Any, to: Any) -> Any:
        return optax.tree_map_params(inner, lambda leaf: leaf.astype(to), state)

    return _stored_as(inner, lambda state: cast_state(state, dtype), lambda state: cast_state(state, jnp.float32))


def _stored_as(
    inner: optax.GradientTransformation, store: Callable[[Any], Any], load: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The transformation `inner`, whose state is `store(state)` between steps, of which `load` is the inverse."""

    def init(params: optax.Params) -> Any:
        return store(inner.init(params))

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[optax.Updates, Any]:
        updates, state = inner.update(updates, load(state), params)
        return updates, store(state)

    return optax.GradientTransformation(init, update)


def _quantized(state: Any) -> Any:
    """Quantises the moments of matrices in an optimizer's state; those of vectors are few, and stay as they are."""

    def store(path: tuple, leaf: jax.Array) -> Any:
        is_moment = isinstance(path[-1], jax.tree_util.DictKey) and not _is_vector(path)
        if not is_moment or not blockwise.block_size(leaf.shape[-1]):
            return leaf
        squares = any(getattr(key, "name", "") == "nu" for key in path)
        return blockwise.quantize(leaf, signed=not squares)

    return jax.tree_util.tree_map_with_path(store, state)


def _dequantized(state: Any) -> Any:
    def load(leaf: Any) -> Any:
        return blockwise.dequantize(leaf) if blockwise.is_quantized(leaf) else leaf

    return jax.tree.map(load, state, is_leaf=blockwise.is_quantized)


# ---- Adafactor --------------------------------------------------------------------------------------------------
def _adafactor() -> optax.GradientTransformation:
    """Algorithm 4 of Shazeer and Stern, arXiv 1804.04235, without momentum, for each layer separately."""

    def rms(path: tuple, x: jax.Array) -> jax.Array:
        dims = range(1 if path[0].key == "layers" else 0, x.ndim)
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(dims), keepdims=True))

    def clip(path: tuple, update: jax.Array) -> jax.Array:
        return update / jnp.maximum(1.0, rms(path, update))

    def relative(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        return update * jnp.maximum(1e-3, rms(path, param))

    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates)),
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(relative, updates, params)),
    )


# ---- Muon -------------------------------------------------------------------------------------------------------
def _muon(axes: Any, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Muon for the matrices of each layer separately; Adam for embeddings, norms, biases and whatever is no matrix."""
    flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda a: isinstance(a, tuple))
    found = {path: matrix_dims(names) for path, names in flat if names[0] == "layers" and not _is_vector(path)}
    matrices = {path: dims for path, dims in found.items() if dims is not None}

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path in matrices else "adam", params)

    def dims(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: matrices[path], params)

    def scale_to_adam(path: tuple, update: jax.Array) -> jax.Array:
        ins, outs = (math.prod(update.shape[i] for i in cast(Sequence, group)) for group in matrices[path])
        return update * (MUON_RMS * math.sqrt(max(ins, outs)))

    muon = optax.chain(
        scale_by_muon(beta=beta1, weight_dimension_numbers=dims),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale_to_adam, updates)),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(beta1, beta2, eps)}, labels)


def matrix_dims(names: Axes) -> MuonDimensionNumbers | None:
    """The input and output dims of a stacked matrix, or None; head_dim belongs to the same group as its heads."""
    groups: list[list[int]] = []
    for i, name in enumerate(names[1:], 1):
        if name == "head_dim":
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) != 2:
        return None
    return MuonDimensionNumbers(reduction_axis=tuple(groups[1]), output_axis=tuple(groups[0]))
