"""Weights held in bfloat16: stochastic rounding, its drift, float32 gradients, and runs that train with it."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from helpers.models import mesh_of, packed, random_params, sample_of, spec_of
from mice_jax.checkpoint import Checkpoints
from mice_jax.models.parameters import FLOAT32_PARAMS
from mice_jax.models.transformer import Compute, Decoder, make_decoder
from mice_jax.numerics.stochastic_rounding import round_stochastically
from mice_jax.numerics.wide_gradient import variables_of, with_variables
from mice_jax.optim import make_optimizer
from mice_jax.sharding import put_rows
from mice_jax.step import StepFunctions, TrainState, make_step, round_params

ADAM: dict[str, Any] = {"grad_clip": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
ULP = 2.0**-7  # of bfloat16 from 1 to 2
KEYS = 4096


# ---------------------------------------------------------------------------------------- rounding
@functools.cache
def rounded_means() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values whose distances to bfloat16 are known shares of its last bit, and the mean and extremes of roundings."""
    shares = np.array([0.0, 1 / 256, 0.1, 0.5, 0.9])
    values = np.concatenate([sign * scale * (1 + shares * ULP) for sign in (1, -1) for scale in (1.0, 2.0**-100)])
    keys = jax.random.split(jax.random.key(0), KEYS)
    one = jnp.asarray(values, jnp.float32)
    found = np.asarray(jax.jit(jax.vmap(lambda key: round_stochastically(one, key)))(keys), np.float64)
    return values.reshape(4, 5), found.mean(axis=0).reshape(4, 5), np.stack([found.min(0), found.max(0)])


def test_stochastic_rounding_has_the_value_as_its_mean_at_both_signs() -> None:
    values, means, (low, high) = rounded_means()
    scale = np.abs(values[:, :1])
    shares = (np.abs(values) / scale - 1) / ULP
    standard_errors = scale * ULP * np.sqrt(shares * (1 - shares) / KEYS)
    assert (np.abs(means - values) <= 4 * standard_errors + 1e-9 * scale).all()
    nearest = np.asarray(jnp.asarray(values, jnp.float32).astype(jnp.bfloat16), np.float64)
    assert (np.abs(nearest - values) > 4 * standard_errors)[:, 1:3].all(), "nearest rounding has another mean"
    np.testing.assert_array_equal(low.reshape(4, 5)[:, 0], values[:, 0])  # bfloat16 has it
    np.testing.assert_array_equal(high.reshape(4, 5)[:, 0], values[:, 0])
    assert (high - low <= np.repeat(scale[:, 0], 5) * ULP).all(), "one of the two nearest"


def test_stochastic_rounding_keeps_what_bfloat16_has_and_is_not_finite() -> None:
    kept = np.array([0.0, -0.0, 1.0, -3.5, np.inf, -np.inf, np.nan, 2.0**-126, 3.3895314e38], np.float32)
    for seed in range(3):
        found = jax.jit(round_stochastically)(jnp.asarray(kept), jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(found, np.float32), kept)
        np.testing.assert_array_equal(np.signbit(np.asarray(found, np.float32)[:6]), np.signbit(kept[:6]))


def test_small_updates_are_lost_by_nearest_rounding_and_kept_in_the_mean() -> None:
    """A thousand updates of a thousandth of the last bit add up to it."""
    update, start = ULP / 1000, jnp.ones(512, jnp.bfloat16)

    def after(rounded: Any) -> np.ndarray:
        def step(w: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return rounded(w.astype(jnp.float32) + update, i), None

        return np.asarray(jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(1000))[0])(start), np.float64)

    assert (after(lambda x, i: x.astype(jnp.bfloat16)) == 1).all(), "nearest rounding loses them all"
    moved = after(lambda x, i: round_stochastically(x, jax.random.fold_in(jax.random.key(1), i))) - 1
    # The number of bits that an entry moves has a Poisson distribution of mean and variance 1.
    assert abs(moved.mean() / ULP - 1) < 4 / 512**0.5


def test_random_bits_are_the_same_on_every_mesh_and_under_padding() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
    rounded = jax.jit(round_stochastically)
    alone = np.asarray(rounded(x, jax.random.key(5)), np.float32)
    split = jax.device_put(x, NamedSharding(mesh_of(1, 4, 2), PartitionSpec("tensor", "fsdp")))
    np.testing.assert_array_equal(np.asarray(rounded(split, jax.random.key(5)), np.float32), alone)
    padded = rounded(jnp.pad(x, ((0, 8), (0, 0))), jax.random.key(5))  # as a vocabulary is on some meshes
    np.testing.assert_array_equal(np.asarray(padded, np.float32)[:8], alone)
    assert (np.asarray(rounded(x, jax.random.key(6)), np.float32) != alone).mean() > 0.3


# ---------------------------------------------------------------------------------------- steps
STEPS, SLOTS = 200, 24


@functools.cache
def decoder() -> Decoder:
    return make_decoder(spec_of(num_layers=1), 1)


@functools.cache
def functions(sizes: tuple[int, int, int], seed: int | None, sums: str = "float32") -> StepFunctions:
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    return make_step(
        decoder(), make_optimizer(**ADAM), mesh_of(*sizes), compute, accumulate_dtype=sums, keeps_average=True,
        rounding_seed=seed,
    )  # fmt: skip


@functools.cache
def rows() -> Any:
    rng = np.random.default_rng(1)
    return packed([[sample_of(n, slice(1, n), rng)] for n in (24, 20, 24, 17, 22, 24, 9, 24)], SLOTS)


def trained(sizes: tuple[int, int, int], seed: int | None, steps: int) -> TrainState:
    fns = functions(sizes, seed)
    shardings = jax.tree.map(lambda a: a.sharding, fns.abstract_state.params)
    state, sums = fns.from_params(jax.device_put(random_params(decoder()), shardings)), fns.zero_sums()
    batch = put_rows(rows(), mesh_of(*sizes))
    for _ in range(steps):
        sums = fns.accumulate(state.params, sums, batch)
        state, sums, metrics = fns.apply(state, sums, 1e-3, np.inf, 0.5)
        assert metrics["finite"]
    return jax.device_get(state)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_200_steps_of_bfloat16_weights_end_close_to_float32() -> None:
    """Each step rounds each weight by at most its last bit; roundings of different steps are independent.

    The last bit of a weight w is at most 2^-7 |w|, and the standard deviation of a rounding at most half of it. After n
    steps they have moved the weights by less than 2^-8 |w| n^(1/2) in norm. The mean square is a third of that at the
    most, which leaves room for what training makes of the differences: its gradients are others then.
    """
    start, wide, narrow = random_params(decoder()), trained((1, 1, 1), None, STEPS), trained((1, 1, 1), 7, STEPS)
    for (path, leaf), average in zip(
        jax.tree_util.tree_leaves_with_path(narrow.params), jax.tree.leaves(narrow.average), strict=True
    ):
        is_float32 = path[-1].key in FLOAT32_PARAMS
        assert leaf.dtype == (jnp.float32 if is_float32 else jnp.bfloat16) and average.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(narrow.opt_state) if x.ndim} == {np.dtype("float32")}
    bound = 2.0**-8 * STEPS**0.5 * np.linalg.norm(flat(wide.params))
    moved = np.linalg.norm(flat(wide.params) - flat(start))
    drift = np.linalg.norm(flat(narrow.params) - flat(wide.params))
    assert 0.1 * bound < drift < bound < 0.2 * moved


@pytest.mark.slow
def test_bfloat16_weights_are_the_same_on_one_and_on_eight_devices() -> None:
    """Sums in another order move a weight to the other one of its two nearest values now and then.

    Norms are float32, and small: two updates of 1e-3 or less differ by a few units in the last place of 1.
    """
    one, eight = (trained(sizes, 7, 2) for sizes in ((1, 1, 1), (2, 2, 2)))
    vocab = one.params["head"]["weight"].shape[0]
    eight.params["head"]["weight"] = eight.params["head"]["weight"][:vocab]
    eight.params["embed"]["table"] = eight.params["embed"]["table"][:vocab]
    pairs = [*zip(*(jax.tree.leaves(s.params) for s in (one, eight)), strict=True)]
    narrow, wide = ([(a, b) for a, b in pairs if a.dtype == dtype] for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow and min(np.mean(a == b) for a, b in narrow) > 0.97
    for a, b in wide:
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * 2.0**-23)


def test_each_seed_step_and_parameter_has_random_bits_of_its_own() -> None:
    old = {name: jnp.ones(512, jnp.bfloat16) for name in ("a", "b")} | {"scale": jnp.ones(512)}
    new = jax.tree.map(lambda p: p.astype(jnp.float32) + ULP / 2, old)
    rounded = jax.jit(lambda seed, step: round_params(old, new, seed, step))
    found = [rounded(*at) for at in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(x["scale"].dtype == jnp.float32 and (x["scale"] == 1 + ULP / 2).all() for x in found)
    for name in ("a", "b"):
        np.testing.assert_array_equal(found[0][name], found[3][name])
    bits = [x[name] for x in found[:3] for name in ("a", "b")]
    for i, a in enumerate(bits):
        assert a.dtype == jnp.bfloat16
        assert all(0.3 < np.mean(a != b) < 0.7 for b in bits[:i])  # half of them agree by chance


def narrow_params() -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if path[-1].key in FLOAT32_PARAMS else p.astype(jnp.bfloat16), random_params(decoder())
    )


def test_gradients_of_bfloat16_weights_are_those_of_float32_copies() -> None:
    narrow = narrow_params()
    copies = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    batch = put_rows(rows(), mesh_of(1, 1, 1))
    fns = functions((1, 1, 1), 7)
    found, wanted = (jax.device_get(fns.accumulate(p, fns.zero_sums(), batch)) for p in (narrow, copies))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)  # they compute the same, in float32
    grads = np.concatenate([x.ravel() for x in jax.tree.leaves(found.grads)])
    grads = grads[grads != 0]  # that of a token that does not occur is 0
    assert np.mean(grads != grads.astype(jnp.bfloat16).astype(np.float32)) > 0.98, "they are not rounded to bfloat16"


def test_gradients_are_rounded_once_where_they_are_summed_in_bfloat16() -> None:
    """So they take two bytes each before they are added, as the sums do."""
    params, batch = narrow_params(), put_rows(rows(), mesh_of(1, 1, 1))
    wide, narrow = (functions((1, 1, 1), 7, sums) for sums in ("float32", "bfloat16"))
    _, gradients = jax.eval_shape(narrow.gradients, params, batch)
    assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda p: p.dtype, params)
    exact, rounded = (jax.device_get(fns.accumulate(params, fns.zero_sums(), batch)) for fns in (wide, narrow))
    # The two programs may differ in the last bit of a float32 gradient, which moves one in thousands to the other side.
    found, wanted = flat(rounded.grads), flat(jax.tree.map(lambda g: g.astype(jnp.bfloat16), exact.grads))
    assert np.mean(found != wanted) < 1e-3
    np.testing.assert_allclose(found, flat(exact.grads), rtol=2**-8)
    # Rounding changes a square by 2^-8 of it at the most. A sum of bfloat16 squares would lose far more.
    np.testing.assert_allclose(rounded.grad_sq_sum, exact.grad_sq_sum, rtol=2**-8)
    assert rounded.loss_sum == exact.loss_sum


def test_saved_bfloat16_weights_are_read_in_float32_by_other_commands(tmp_path: Path) -> None:
    """All of them read weights by `model_source._restore`, which asks for float32."""
    fns = functions((1, 1, 1), 7)
    state = fns.from_params(random_params(decoder()))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainState(jnp.int32(3), state.params, None), {"samples": 8})
    checkpoints.wait()
    wanted = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), fns.abstract_state.params
    )
    found = checkpoints.restore_params(3, wanted)
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state.params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


def test_bits_of_a_layer_do_not_depend_on_which_layers_are_rounded() -> None:
    """As moments in host memory are updated layer by layer."""
    old = {"layers": {"q": jnp.ones((3, 64), jnp.bfloat16)}, "embed": {"table": jnp.ones((2, 64), jnp.bfloat16)}}
    new = jax.tree.map(lambda p: p.astype(jnp.float32) + ULP / 2, old)
    whole = jax.jit(round_params, static_argnums=2)(old, new, 5, 1)
    for layer in range(3):
        one = [
            {"layers": {"q": t["layers"]["q"][layer : layer + 1]}, "embed": {"table": t["embed"]["table"][:0]}}
            for t in (old, new)
        ]
        part = jax.jit(round_params, static_argnums=2)(*one, 5, 1, layer)
        np.testing.assert_array_equal(part["layers"]["q"][0], whole["layers"]["q"][layer])
    rows = np.asarray(whole["layers"]["q"], np.float32)
    assert (rows[0] != rows[1]).any() and (rows[1] != rows[2]).any()


def test_weight_used_as_an_array_gives_its_gradient_to_the_zeros() -> None:
    params = {"weight": jnp.full((4,), 1.5, jnp.bfloat16), "scale": jnp.full((4,), 2.0)}

    def loss(variables: Any) -> jax.Array:
        used = with_variables(params, variables)
        return jnp.sum(used["weight"][1:3].astype(jnp.float32) * used["scale"][1:3]) / 3

    grads = jax.grad(loss)(variables_of(params, jnp.float32))
    np.testing.assert_allclose(grads["weight"], np.array([0, 2, 2, 0]) / 3, rtol=1e-7)
    np.testing.assert_allclose(grads["scale"], np.array([0, 1.5, 1.5, 0]) / 3, rtol=1e-7)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}
