"""Schedules against values computed by hand; which parameters decay, and how gradients are clipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.models import spec_of
from mice_jax.config import Config, Phase
from mice_jax.models.transformer import make_decoder
from mice_jax.optim import make_optimizer, make_schedule
from mice_jax.training import build
from mice_jax.training.phases import PhaseSpan

RATE = 2e-5
ROUNDING = 1e-10 * RATE  # A schedule is float64; the values by hand have 14 digits.


# ---------------------------------------------------------------------------------------- schedules
# The factor at steps 0, w-1, w, half-way from w to H, H-1 and H, for w = 4 and H = 24 (so x = 0, .5, 19/20, 1) and
# a final ratio of 0.2, worked out from the contract's formulas: 1-x*0.8, 0.2+0.8*(1+cos(pi x))/2, and for wsd with
# a decay ratio of 0.25 the last six steps, of which H-1 is 5/6 through and H at the end.
WARM = {
    "constant": (0.25, 1.0, 1.0, 1.0, 1.0, 1.0),
    "linear": (0.25, 1.0, 1.0, 0.6, 0.24, 0.2),
    "cosine": (0.25, 1.0, 1.0, 0.6, 0.20492466375239, 0.2),
    "wsd": (0.25, 1.0, 1.0, 1.0, 1 / 3, 0.2),
}
WARM_STEPS = (0, 3, 4, 14, 23, 24)


def factor(kind: str, step: int, horizon: int, **more: float) -> float:
    return make_schedule(kind, RATE, horizon, **more)(step) / RATE


@pytest.mark.parametrize("how", [{"warmup_steps": 4}, {"warmup_ratio": 4 / 24}])
@pytest.mark.parametrize("kind", WARM)
def test_a_schedule_with_warm_up_has_the_values_computed_by_hand(kind: str, how: dict[str, float]) -> None:
    schedule = make_schedule(kind, RATE, 24, final_ratio=0.2, decay_ratio=0.25, **how)
    for step, expected in zip(WARM_STEPS, WARM[kind], strict=True):
        assert abs(schedule(step) - RATE * expected) < ROUNDING, step
        if 0 < step < 24:  # one step off is another value, but for where it is flat
            assert abs(schedule(step - 1) - RATE * expected) > 10 * ROUNDING or factor_is_flat(kind, step)


def factor_is_flat(kind: str, step: int) -> bool:
    return step == 4 or (step == 14 and kind in ("constant", "wsd")) or kind == "constant"


def test_cosine_equals_the_standard_library() -> None:
    for step in range(24):
        x = max(0, step - 4) / 20
        warm = (step + 1) / 4 if step < 4 else 1
        expected = warm * (0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2)
        assert abs(factor("cosine", step, 24, warmup_steps=4, final_ratio=0.2) - expected) < 1e-6


def test_a_schedule_without_warm_up_starts_at_its_rate_and_ends_at_0() -> None:
    for kind in ("constant", "linear", "cosine", "wsd"):
        assert abs(factor(kind, 0, 10) - 1) < 1e-6
        assert abs(factor(kind, 10, 10) - (kind == "constant")) < 1e-6
    assert abs(factor("linear", 9, 10) - 0.1) < 1e-6
    # The last tenth of 10 steps is one step: it starts to fall at step 9, and is at its end at 10.
    assert abs(factor("wsd", 9, 10) - 1) < 1e-6
    assert abs(factor("wsd", 19, 20) - 0.5) < 1e-6


def test_a_schedule_keeps_its_final_value_past_its_horizon() -> None:
    for kind in ("linear", "cosine", "wsd"):
        assert abs(factor(kind, 100, 10, final_ratio=0.3) - 0.3) < 1e-6


def test_a_warm_up_ratio_is_rounded_up_to_whole_steps() -> None:
    assert abs(factor("constant", 0, 10, warmup_ratio=0.25) - 1 / 3) < 1e-6
    assert abs(factor("constant", 2, 10, warmup_ratio=0.25) - 1) < 1e-6


@pytest.mark.parametrize("kind", WARM)
def test_degenerate_horizons_give_finite_rates(kind: str) -> None:
    for horizon, warmup in [(1, 0), (1, 1), (3, 3), (3, 10)]:
        rates = [factor(kind, s, horizon, warmup_steps=warmup, decay_ratio=0.0) for s in range(horizon + 1)]
        assert all(0 <= r <= 1 + 1e-6 for r in rates), (horizon, warmup, rates)
    assert factor(kind, 0, 1) == pytest.approx(1)


# ---------------------------------------------------------------------------------------- the optimizer
ADAM = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
NAMES = ("scale", "q_bias", "o_bias", "gate_bias", "q", "gate", "table", "weight")
# Stacked norms and biases have two dims, as matrices have: the shape does not tell them apart.
PARAMS = {"layers": {name: jnp.full((2, 3), 2.0) for name in NAMES}}


def first_update(gradient: float, **changes: float) -> dict[str, jax.Array]:
    optimizer = make_optimizer(**(ADAM | changes))
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return {name: -0.1 * u for name, u in updates["layers"].items()}


def test_weight_decay_acts_on_matrices_only() -> None:
    updates = first_update(0.0, weight_decay=0.5)
    for name, update in updates.items():
        decays = name in ("q", "gate", "table", "weight")
        assert np.abs(np.asarray(update) - (-0.1 * 0.5 * 2.0 if decays else 0.0)).max() < 1e-7, name
    assert not any(np.asarray(u).any() for u in first_update(0.0).values())  # off


def test_the_first_update_is_the_rate_times_the_sign_bias_corrected() -> None:
    # m = 0.1 g and v = 0.05 g^2, corrected by 1-0.9 and 1-0.95: g / (|g| + eps).
    for gradient in (3.0, -1e-4):
        for update in first_update(gradient).values():
            assert np.abs(np.asarray(update) + 0.1 * np.sign(gradient)).max() < 1e-4
    halved = first_update(1e-8)["q"]  # as large as eps
    assert np.abs(np.asarray(halved) + 0.05).max() < 1e-4


@pytest.mark.parametrize(
    ("batch_size", "half_life", "steps"),
    [(128, 128.0, 1), (64, 128.0, 2), (10, 30.0, 3), (256, 64.0, 1)],
)
def test_a_gradient_s_weight_halves_every_half_life(batch_size: int, half_life: float, steps: int) -> None:
    """Of the config's own optimizer: a gradient of 2, then none for some steps, is left as its power of a half."""
    config = Config()
    config.optim.batch_size, config.optim.beta2_half_life, config.optim.grad_clip = batch_size, half_life, 0.0
    optimizer, _ = build.optimizer(build.OptimizerSettings.of(config), make_decoder(spec_of()), "LlamaForCausalLM")
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[1]
    first = state[1].nu["layers"]["q"]
    for _ in range(steps):
        state = optimizer.update(jax.tree.map(jnp.zeros_like, grads), state, PARAMS)[1]
    halvings = steps * batch_size / half_life
    assert np.asarray(first) == pytest.approx(4.0 * (1 - 0.5 ** (batch_size / half_life)), rel=1e-6)
    assert np.asarray(state[1].nu["layers"]["q"]) == pytest.approx(np.asarray(first) * 0.5**halvings, rel=1e-6)
    assert np.asarray(first) != pytest.approx(4.0 * (1 - 0.95), rel=1e-2), "beta2 itself is not read"


def test_phase_of_its_own_batch_size_gets_a_rate_of_its_own() -> None:
    config = Config()
    config.optim.batch_size, config.optim.rate_for_batch, config.optim.rate_batch_size = 64, "sqrt", 16
    phases = [Phase(name="a"), Phase(name="b", batch_size=4), Phase(name="c", learning_rate=3e-5, batch_size=144)]
    spans = [PhaseSpan(phase, first, first + 1) for first, phase in enumerate(phases)]
    schedule = build.schedule(config, spans, horizon=3)
    assert [schedule(s) for s in range(3)] == pytest.approx([4e-5, 1e-5, 9e-5], rel=1e-12)


def moments(gradient: float, grad_clip: float) -> optax.Updates:
    optimizer = make_optimizer(**(ADAM | {"grad_clip": grad_clip}))
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), PARAMS)
    state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[1]
    return state[1].mu["layers"]["q"]


def test_gradients_are_clipped_by_global_norm_unless_it_is_0() -> None:
    # 8 leaves of 6 entries of 2: a norm of 2 * sqrt(48). The first moment is a tenth of the clipped gradient.
    norm = 2 * math.sqrt(48)
    tolerance = 1e-6
    assert np.abs(np.asarray(moments(2.0, 1.0)) - 0.1 * 2 / norm).max() < tolerance
    assert np.abs(np.asarray(moments(2.0, 5.0)) - 0.1 * 2 * 5 / norm).max() < tolerance
    assert np.abs(np.asarray(moments(2.0, 0.0)) - 0.1 * 2).max() < tolerance
    assert np.abs(np.asarray(moments(2.0, 1.01 * norm)) - 0.1 * 2).max() < tolerance  # below it nothing is clipped
    assert np.abs(np.asarray(moments(2.0, 0.99 * norm)) - 0.1 * 2).max() > 10 * tolerance
