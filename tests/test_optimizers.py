"""Every optimizer through the step's own update, against torch or the paper's formulas in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mice_jax.config_checks import UNREAD_BY_OPTIMIZER
from mice_jax.loss import SourceSums
from mice_jax.optim import make_optimizer, make_phase_schedule
from mice_jax.step import Sums, TrainState, apply_sums

RATE, STEPS = 1e-2, 3
NO_SOURCES = SourceSums(*[jnp.zeros(1)] * 4)
SETTINGS: dict[str, Any] = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
# Two layers of attention with 4 heads of 3 on a width of 160, an MLP, a norm; the embedding. Adafactor factors what has
# two dims of 128 and more.
SHAPES = {
    "embed": {"table": (150, 160)},
    "layers": {"q": (2, 4, 3, 160), "o": (2, 160, 4, 3), "gate": (2, 130, 160), "scale": (2, 160)},
}
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "q": ("layers", "heads", "head_dim", "embed"),
        "o": ("layers", "embed", "heads", "head_dim"),
        "gate": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
}
Tree = dict[str, Any]


def drawn(seed: int, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (scale * rng.normal(size=s)).astype(np.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


GRADS = [drawn(10 + i) for i in range(STEPS)]


def trained(name: str, steps: int = STEPS, mask: Tree | None = None, **settings: Any) -> tuple[Tree, Any]:
    """Parameters and optimizer state after `steps` steps; a step's sums are twice its gradient, with weight 2."""
    if mask is not None:
        return _states(name, mask, **settings)[steps - 1]
    return _cached_states(name, **settings)[steps - 1]


def _states(name: str, mask: Tree | None, **settings: Any) -> list[tuple[Tree, Any]]:
    """Parameters and optimizer state after each step."""
    optimizer = make_optimizer(name=name, axes=AXES, trained=mask, **(SETTINGS | settings))
    params = jax.tree.map(jnp.asarray, drawn(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    states = []
    for grads in GRADS:
        sums = Sums(jax.tree.map(lambda g: 2 * jnp.asarray(g), grads), *[jnp.float32(2.0)] * 4, NO_SOURCES)
        state, _ = apply_sums(state, sums, optimizer, RATE, trained_mask=mask)  # quicker than compiling
        states.append((jax.tree.map(np.asarray, state.params), state.opt_state))
    return states


@functools.cache
def _cached_states(name: str, **settings: Any) -> list[tuple[Tree, Any]]:
    return _states(name, None, **settings)


def differs(a: Tree, b: Tree) -> float:
    """The largest difference between two sets of parameters, in updates of RATE."""
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) / RATE


def by_torch(cls: Any, **settings: Any) -> Tree:
    leaves, tree = jax.tree.flatten(drawn(0))
    params = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves]
    optimizer = cls(params, lr=RATE, **settings)
    for grads in GRADS:
        for p, g in zip(params, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return jax.tree.unflatten(tree, [p.detach().numpy() for p in params])


def test_adamw_and_sgd_equal_torch() -> None:
    ours, _ = trained("adamw")
    theirs = by_torch(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    assert differs(ours, theirs) < 1e-4
    assert differs(ours, by_torch(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)) > 1e-2
    ours, _ = trained("sgd")
    assert differs(ours, by_torch(torch.optim.SGD, momentum=0.9)) < 1e-4
    assert differs(ours, by_torch(torch.optim.SGD, momentum=0.8)) > 1e-2
    plain, _ = trained("sgd", beta1=0.0)
    assert differs(plain, by_torch(torch.optim.SGD)) < 1e-4


def by_hand(leaf: Any) -> Tree:
    """`leaf(params, gradients)` of one parameter in float64, for each."""
    leaves, tree = jax.tree.flatten(drawn(0))
    grads = zip(*(jax.tree.leaves(g) for g in GRADS), strict=True)
    done = [leaf(p.astype(np.float64), [x.astype(np.float64) for x in g]) for p, g in zip(leaves, grads, strict=True)]
    return jax.tree.unflatten(tree, done)


@pytest.mark.parametrize(("beta2", "same"), [(0.95, True), (0.5, False)])
def test_lion_equals_the_formulas_of_its_paper(beta2: float, same: bool) -> None:
    def lion(p: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        m = np.zeros_like(p)
        for g in grads:
            p = p - RATE * np.sign(0.9 * m + 0.1 * g)
            m = beta2 * m + (1 - beta2) * g
        return p

    ours, _ = trained("lion")
    assert (differs(ours, by_hand(lion)) < 1e-3) == same


def test_adafactor_equals_its_paper_layer_by_layer() -> None:
    """Algorithm 4 with a decay of 1 - t^-0.8, on each layer by itself; stacked norms and few heads are not factored."""

    exponent = -0.8

    def one(p: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        dims = np.argsort(p.shape)[-2:] if p.ndim > 1 else []
        factored = len(dims) == 2 and min(p.shape[d] for d in dims) >= 128
        rows = columns = whole = 0.0
        for t, g in enumerate(grads, 1):
            beta = 1 - t**exponent
            square = g * g + 1e-30
            if factored:
                rows = beta * rows + (1 - beta) * square.mean(axis=1)
                columns = beta * columns + (1 - beta) * square.mean(axis=0)
                u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
            else:
                whole = beta * whole + (1 - beta) * square
                u = g / np.sqrt(whole)
            u = u / max(1.0, np.sqrt((u * u).mean()))
            p = p - RATE * max(1e-3, np.sqrt((p * p).mean())) * u
        return p

    def stacked(p: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
        if p.shape == SHAPES["embed"]["table"]:
            return one(p, grads)
        return np.stack([one(p[i], [g[i] for g in grads]) for i in range(2)])

    ours, state = trained("adafactor")
    assert differs(ours, by_hand(stacked)) < 1e-3
    exponent = -0.7
    assert differs(ours, by_hand(stacked)) > 1e-2
    held = sum(x.size for x in jax.tree.leaves(state))
    whole = sum(x.size for x in jax.tree.leaves(drawn(0)))
    assert held < whole / 3  # what it is for


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_fields_that_are_warned_of_as_unread_have_no_effect(name: str) -> None:
    """A field that is not a number spoils an update or the moments if it is read."""
    weights = {"w": jnp.ones((4, 6))}
    for field in ("beta1", "beta2", "eps"):
        settings = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 0.0} | {field: np.nan}
        optimizer = make_optimizer(name=name, **settings)
        made = jax.jit(lambda w, o=optimizer: o.update(w, o.init(w), w))(weights)  # the update and the state
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(made))
        assert finite == (field in UNREAD_BY_OPTIMIZER.get(name, ())), field


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan's quintic, five times, of a matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_muon_orthogonalises_each_layer_s_matrix_with_its_heads_flattened() -> None:
    ours, _ = trained("muon", steps=1)  # the first step: the momentum is the gradient, times a number
    adam, _ = trained("adamw", steps=1)
    before = drawn(0)
    for name, shape in (("q", (12, 160)), ("o", (160, 12)), ("gate", (130, 160))):
        update = (before["layers"][name] - ours["layers"][name]) / RATE
        for layer in range(2):
            g = GRADS[0]["layers"][name][layer].astype(np.float64).reshape(shape)
            wanted = 0.2 * np.sqrt(max(shape)) * newton_schulz(g)
            found = update[layer].reshape(shape)
            assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max(), name
            assert 0.1 < np.sqrt((found**2).mean()) < 0.3  # about that of Adam's updates
    heads = np.stack([newton_schulz(h.astype(np.float64)) for h in GRADS[0]["layers"]["q"][0]])
    assert np.abs(heads.reshape(12, 160) * 0.2 * np.sqrt(160) - update_of(before, ours)).max() > 0.1  # not head by head
    for path in (("layers", "scale"), ("embed", "table")):
        np.testing.assert_array_equal(ours[path[0]][path[1]], adam[path[0]][path[1]])


def update_of(before: Tree, after: Tree) -> np.ndarray:
    return ((before["layers"]["q"][0] - after["layers"]["q"][0]) / RATE).reshape(12, 160)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd"])
def test_weight_decay_is_decoupled_and_leaves_norms_alone(name: str) -> None:
    plain, _ = trained(name, steps=1)
    decayed, _ = trained(name, steps=1, weight_decay=0.5)
    before = drawn(0)
    for part, leaves in before.items():
        for key, value in leaves.items():
            wanted = plain[part][key] - (0 if key == "scale" else RATE * 0.5 * value)
            np.testing.assert_allclose(decayed[part][key], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd"])
def test_bfloat16_moments_are_stored_so_and_change_little(name: str) -> None:
    whole, state = trained(name)
    half, half_state = trained(name, moments_dtype="bfloat16")
    sizes = [sum(x.nbytes for x in jax.tree.leaves(s) if x.size > 10) for s in (state, half_state)]
    assert sizes[1] == sizes[0] / 2
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(half_state) if x.size > 10)
    # A moment's rounding is 2^-9 of it; lion takes signs, which flip where a moment is about nothing.
    typical = [np.abs(a - b).mean() / RATE for a, b in zip(*(jax.tree.leaves(t) for t in (whole, half)), strict=True)]
    assert 0 < max(typical) < (0.05 if name != "muon" else 0.1)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd"])
def test_frozen_parameters_stay_bit_equal_and_have_no_moments(name: str) -> None:
    mask = jax.tree.map(lambda s: np.array(True), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    mask["embed"]["table"] = np.array(False)
    mask["layers"]["q"] = np.array([False, True]).reshape(2, 1, 1, 1)
    after, state = trained(name, mask=mask, weight_decay=0.1)
    _, all_of_it = trained(name, weight_decay=0.1)
    before = drawn(0)
    np.testing.assert_array_equal(after["embed"]["table"], before["embed"]["table"])
    np.testing.assert_array_equal(after["layers"]["q"][0], before["layers"]["q"][0])
    for moved in (after["layers"]["q"][1] - before["layers"]["q"][1], after["layers"]["o"] - before["layers"]["o"]):
        assert (moved != 0).mean() > 0.99
    held, whole = (sum(x.size for x in jax.tree.leaves(s)) for s in (state, all_of_it))
    assert held < whole


def test_grad_norm_is_that_of_the_trained_parameters() -> None:
    mask = jax.tree.map(lambda s: np.array(False), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    mask["layers"]["scale"] = np.array(True)
    optimizer = make_optimizer(name="adamw", trained=mask, **SETTINGS)
    params = jax.tree.map(jnp.asarray, drawn(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    sums = Sums(jax.tree.map(jnp.asarray, GRADS[0]), *[jnp.float32(1.0)] * 4, NO_SOURCES)
    _, metrics = apply_sums(state, sums, optimizer, RATE, trained_mask=mask)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(GRADS[0]["layers"]["scale"]), rel=1e-6)


def test_average_changes_no_bit_of_an_update() -> None:
    """Operation by operation, since the compiler may round otherwise where it computes more in one loop."""
    optimizer = make_optimizer(name="adamw", **SETTINGS)
    params = jax.tree.map(jnp.asarray, drawn(0))
    sums = Sums(jax.tree.map(jnp.asarray, GRADS[0]), *[jnp.float32(1.0)] * 4, NO_SOURCES)
    (with_average, on), (alone, off) = (
        apply_sums(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average), sums, optimizer, RATE,
                   average_weight=0.25)
        for average in (params, None)
    )  # fmt: skip
    for a, b in ((with_average.params, alone.params), (with_average.opt_state, alone.opt_state), (on, off)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    quarter = jax.tree.map(lambda old, new: old + 0.25 * (new - old), params, alone.params)
    jax.tree.map(np.testing.assert_array_equal, with_average.average, quarter)


def test_a_step_above_the_norm_limit_counts_but_updates_nothing() -> None:
    optimizer = make_optimizer(name="adamw", **SETTINGS)
    params = jax.tree.map(jnp.asarray, drawn(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    sums = Sums(jax.tree.map(jnp.asarray, GRADS[0]), *[jnp.float32(1.0)] * 4, NO_SOURCES)
    norm = float(optax.tree.norm(GRADS[0]))
    for limit, skipped in ((norm * 0.999, True), (norm * 1.001, False)):
        after, metrics = apply_sums(state, sums, optimizer, RATE, limit)
        assert bool(metrics["skipped"]) == skipped and int(after.step) == 1
        assert (float(metrics["update_norm"]) == 0) == skipped
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True)]
        assert sum(same) == len(same) - 1 if skipped else not all(same)


# ---------------------------------------------------------------------------------------- schedules over phases
def rates(schedule: Any, steps: list[int]) -> list[float]:
    return [schedule(s) for s in steps]


def test_a_restarted_schedule_runs_over_its_own_phase() -> None:
    shape = {"kind": "linear", "warmup_steps": 2}
    # Steps 0-9 at 1e-3, then 10-29 at 4e-3: over 30 with a rate that jumps; or twice, over 10 and over 20.
    continued = make_phase_schedule([(0, 1e-3, False), (10, 4e-3, False)], 30, **shape)
    assert rates(continued, [0, 1, 2, 9, 10, 29]) == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 1e-3 * (1 - 7 / 28), 4e-3 * (1 - 8 / 28), 4e-3 * (1 - 27 / 28)], rel=1e-5
    )
    restarted = make_phase_schedule([(0, 1e-3, False), (10, 4e-3, True)], 30, **shape)
    assert rates(restarted, [0, 2, 9, 10, 11, 12, 29]) == pytest.approx(
        [0.5e-3, 1e-3, 1e-3 * (1 - 7 / 8), 2e-3, 4e-3, 4e-3, 4e-3 * (1 - 17 / 18)], rel=1e-5
    )


@pytest.mark.parametrize(
    ("recipe", "rate", "shape", "steps", "wanted"),
    [
        ("LAB, 3,840 samples a step, warm-up", 2e-5, {"kind": "constant", "warmup_steps": 25}, [0, 12, 24, 25, 999],
         [8e-7, 1.04e-5, 2e-5, 2e-5, 2e-5]),
        ("LAB, 7,680 samples a step, none", 2e-5, {"kind": "constant"}, [0, 12, 999], [2e-5] * 3),
        ("TULU, 128 samples a step", 2e-5, {"kind": "linear", "warmup_ratio": 0.03}, [0, 29, 30, 515, 999],
         [2e-5 / 30, 2e-5, 2e-5, 1e-5, 2e-5 / 970]),
        ("TULU++, 128 samples a step", 3e-5, {"kind": "constant"}, [0, 500, 999], [3e-5] * 3),
    ],
)  # fmt: skip
def test_the_paper_s_recipes_have_its_learning_rates(
    recipe: str, rate: float, shape: dict[str, Any], steps: list[int], wanted: list[float]
) -> None:
    """Over a run of 1,000 steps."""
    found = rates(make_phase_schedule([(0, rate, False)], 1000, **shape), steps)
    assert found == pytest.approx(wanted, rel=1e-5), recipe
    assert rates(make_phase_schedule([(0, rate * 1.01, False)], 1000, **shape), steps) != pytest.approx(
        wanted, rel=1e-5
    )
