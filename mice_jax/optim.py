"""Learning-rate schedules and the optax chain."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


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
    """The learning rate at step s, counted from 0, over `horizon` steps.

    Linear warm-up gives learning_rate * (s+1) / warmup_steps while s < warmup_steps. After it, with x going from
    0 to 1 over what is left: `constant`; `linear` and `cosine` fall to final_ratio; `wsd` is constant until the
    last `decay_ratio` of the horizon and then falls linearly.
    """
    warmup = warmup_steps or math.ceil(warmup_ratio * horizon)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        s = jnp.asarray(step, jnp.float32)
        x = jnp.clip((s - warmup) / max(1, horizon - warmup), 0.0, 1.0)
        if kind == "constant":
            factor = jnp.ones_like(x)
        elif kind == "linear":
            factor = 1 - x * (1 - final_ratio)
        elif kind == "cosine":
            factor = final_ratio + (1 - final_ratio) * (1 + jnp.cos(jnp.pi * x)) / 2
        else:
            assert kind == "wsd", kind
            falling = (s - horizon * (1 - decay_ratio)) / max(1e-9, horizon * decay_ratio)
            factor = 1 - jnp.clip(falling, 0.0, 1.0) * (1 - final_ratio)
        return learning_rate * jnp.where(s < warmup, (s + 1) / max(1, warmup), factor)

    return schedule


def make_optimizer(
    schedule: Schedule, *, grad_clip: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW, bias-corrected, moments in float32, after clipping by global norm (0 = off).

    Weight decay is not applied to vectors (norms and biases).
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2, eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(weight_decay, mask=_is_matrix) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def _is_matrix(params: optax.Params) -> optax.Params:
    """Norm scales and biases are called so; a stacked one has two dims, so the shape does not tell."""

    def decays(path: tuple, _: jax.Array) -> bool:
        name = path[-1].key
        return name != "scale" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(decays, params)
