"""Orthogonal subspace fine-tuning: the leading directions of matrices do not move, on any mesh, and after a resume."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.models import gap, mesh_of, spec_of
from helpers.runs import arrays, assert_equal_runs, run_train, setting
from mice_jax.config import Config, ConfigError, locate
from mice_jax.models.transformer import make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import param_shardings
from mice_jax.step import _opt_state_shardings, make_abstract_state
from mice_jax.training import osft
from mice_jax.training.memory_model import bytes_per_device

RATE, STEPS, RATIO = 0.02, 4, 0.5
# Two layers of attention with 4 heads of 3 on a width of 16, and an MLP of 24; a norm, and the embedding.
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "q": ("layers", "heads", "head_dim", "embed"),
        "o": ("layers", "embed", "heads", "head_dim"),
        "up": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
}
SHAPES = {
    "embed": {"table": (40, 16)},
    "layers": {"q": (2, 4, 3, 16), "o": (2, 16, 4, 3), "up": (2, 24, 16), "scale": (2, 16)},
}
OUTPUTS = {"q": 2, "o": 1, "up": 1}  # numbers of dims
Tree = dict[str, Any]


def drawn(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def optimizer(name: str = "adamw", clip: float = 1.0) -> optax.GradientTransformation:
    return make_optimizer(name=name, grad_clip=clip, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, axes=AXES)


def steps_of(made: optax.GradientTransformation, mesh: Any = None) -> tuple[Tree, Any]:
    """Parameters and optimizer state after STEPS steps with drawn gradients, on a mesh or on one device."""
    params, init = jax.tree.map(jnp.asarray, drawn(0)), made.init
    if mesh is not None:
        abstract, shardings = jax.eval_shape(made.init, params), param_shardings(params, AXES, mesh)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(params, shardings)
        init = jax.jit(made.init, out_shardings=_opt_state_shardings(abstract, params, shardings, replicated, False))
    state = init(params)

    @jax.jit
    def step(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        directions, state = made.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - RATE * d, params, directions), state

    for i in range(STEPS):
        grads = jax.tree.map(lambda p, g: jax.device_put(g, p.sharding), params, drawn(10 + i))
        params, state = step(params, state, grads)
    return jax.device_get(params), jax.device_get(state)


def matrices(tree: Tree) -> dict[tuple[str, int], np.ndarray]:
    """The matrices of the layers in float64."""
    found = {}
    for name, outputs in OUTPUTS.items():
        for layer, x in enumerate(tree["layers"][name]):
            found[name, layer] = np.asarray(x, np.float64).reshape(int(np.prod(x.shape[:outputs])), -1)
    return found


def moved(before: Tree, after: Tree, ratio: float = RATIO) -> tuple[float, float]:
    """How far the frozen directions have moved, and how far the weights; both are the largest entry of any matrix."""
    frozen, whole = [0.0], []
    for key, w in matrices(before).items():
        change = matrices(after)[key] - w
        u, _, vt = np.linalg.svd(w)
        rank = round(ratio * min(w.shape))
        frozen += [np.abs(u[:, :rank].T @ change).max(), np.abs(change @ vt[:rank].T).max()]
        whole.append(np.abs(change).max())
    return max(frozen), min(whole)


# Each step rounds weights of up to 4 by 2.4e-7 at most, and a direction of length 1 by 1e-7 times a few units: 4 steps
# and sums of 24 such roundings with entries of a unit vector stay below 4 * (24 ** 0.5) * 2.4e-7.
STILL = 5e-6


def frozen_optimizer(name: str = "adamw", ratio: float = RATIO) -> optax.GradientTransformation:
    return osft.freeze_subspaces(optimizer(name), ratio, AXES)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_directions_do_not_move_while_the_rest_is_trained(name: str) -> None:
    after, _ = steps_of(frozen_optimizer(name))
    frozen, whole = moved(drawn(0), after)
    assert frozen < STILL < 1e-3 < whole
    for path in (("embed", "table"), ("layers", "scale")):
        assert np.abs(after[path[0]][path[1]] - drawn(0)[path[0]][path[1]]).max() > 1e-3, "no matrix of the layers"


def test_gradients_projected_alone_move_the_frozen_directions() -> None:
    """The negative control: Adam divides entry by entry, which leads out of any subspace."""
    whole, inner = frozen_optimizer(), optimizer()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        directions, moments = inner.update(osft.project(updates, state.bases), state.inner, params)
        return directions, osft.OsftState(state.bases, moments)

    after, _ = steps_of(optax.GradientTransformation(whole.init, update))
    assert moved(drawn(0), after)[0] > 1000 * STILL


def test_steps_equal_the_formula_in_float64() -> None:
    """AdamW of projected gradients, and the projection of its direction, with NumPy's decomposition."""
    made = osft.freeze_subspaces(optimizer(clip=0.0), RATIO, AXES)
    after, found = matrices(steps_of(made)[0]), matrices(drawn(0))
    for key, w in found.items():
        u, _, vt = np.linalg.svd(w)
        rank = round(RATIO * min(w.shape))
        left, right = np.eye(len(w)) - u[:, :rank] @ u[:, :rank].T, np.eye(w.shape[1]) - vt[:rank].T @ vt[:rank]
        mu = nu = 0.0
        for i in range(STEPS):
            g = left @ matrices(drawn(10 + i))[key] @ right
            mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
            adam = mu / (1 - 0.9 ** (i + 1)) / (np.sqrt(nu / (1 - 0.95 ** (i + 1))) + 1e-8)
            w = w - RATE * left @ (adam + 0.1 * w) @ right
        # A gradient near zero is all rounding, of which Adam's first step makes 1: 2e-5 of weights of 4 was seen.
        assert np.abs(after[key] - w).max() < 1e-4
        assert np.abs(w - found[key]).max() > 0.02


def test_no_frozen_direction_is_plain_fine_tuning_bit_for_bit() -> None:
    plain, (none, state) = steps_of(optimizer())[0], steps_of(frozen_optimizer(ratio=0.03))
    assert not jax.tree.leaves(state.bases)  # 0.03 of 16 directions is none
    jax.tree.map(np.testing.assert_array_equal, plain, none)
    assert gap(plain, steps_of(frozen_optimizer())[0]) > 1e-3


def test_bases_are_split_over_a_mesh_and_steps_equal_one_device() -> None:
    mesh = mesh_of(2, 2, 2)
    made = frozen_optimizer()
    params = jax.tree.map(jnp.asarray, drawn(0))
    shardings, whole = param_shardings(params, AXES, mesh), jax.eval_shape(made.init, params)
    split = _opt_state_shardings(whole, params, shardings, None, offloads_moments=False)
    parts = {n: tuple(side.spec for side in split.bases["layers"][n]) for n in OUTPUTS}
    spec = jax.sharding.PartitionSpec
    assert parts == {
        "q": (spec(None, "tensor", None, "fsdp"), spec(None, "fsdp", "tensor")),
        "o": (spec(None, "fsdp", "tensor"), spec(None, "tensor", None, "fsdp")),
        "up": (spec(None, "tensor", "fsdp"), spec(None, "fsdp", "tensor")),
    }
    after, _ = steps_of(made, mesh)
    # Adam turns roundings of gradients near zero into steps, as above.
    assert gap(after, steps_of(made)[0]) < 1e-4
    assert moved(drawn(0), after)[0] < STILL


def test_ranks_of_large_matrices_are_multiples_that_meshes_divide() -> None:
    ranks = [osft.frozen_rank(ratio, 4096, 1024) for ratio in (0.0, 0.3, 0.5, 0.9999)]
    assert ranks == [0, 320, 512, 1023]
    assert [osft.frozen_rank(r, 12, 16) for r in (0.0, 0.04, 0.05, 0.5, 0.99)] == [0, 0, 1, 6, 11]


def test_memory_of_bases_is_counted_and_frozen_parameters_have_none() -> None:
    decoder, mesh = make_decoder(spec_of()), mesh_of(1, 1, 1)  # two layers with a width of 32
    made = make_optimizer(grad_clip=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)

    def count(trained: Any) -> int:
        whole = osft.freeze_subspaces(made, 0.5, decoder.axes, trained)
        states = (make_abstract_state(decoder, optimizer, mesh) for optimizer in (whole, made))
        whole_bytes, plain_bytes = (bytes_per_device(state.opt_state) for state in states)
        return (whole_bytes - plain_bytes) // (4 * 2)

    # Of 48 x 32 are queries, output, gate, up and down; of 24 x 32 keys and values.
    assert count(None) == 5 * 16 * (48 + 32) + 2 * 12 * (24 + 32)
    trained = jax.tree_util.tree_map_with_path(lambda path, x: np.array(path[-1].key != "down"), decoder.abstract)
    assert count(trained) == 4 * 16 * (48 + 32) + 2 * 12 * (24 + 32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim.osft_rank_ratio": 1.0}, "optim.osft_rank_ratio=1.0 must be at least 0 and less than 1"),
        ({"optim.osft_rank_ratio": -0.1}, "optim.osft_rank_ratio=-0.1 must be at least 0 and less than 1"),
        ({"optim.osft_rank_ratio": 0.5, "model.lora.rank": 4}, "optim.osft_rank_ratio=0.5 and model.lora.rank=4 are"),
    ],
)
def test_wrong_share_and_adapters_are_reported(fields: dict[str, Any], said: str) -> None:
    config = Config()
    for name, value in fields.items():
        section, last = locate(config, name)
        setattr(section, last, value)
    with pytest.raises(ConfigError) as raised:
        config.validate()
    assert said in str(raised.value)


# ---------------------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("osft")
    body = f"""c.optim.osft_rank_ratio = {RATIO}
c.checkpoint.every_samples = 8
c.data.phases = [Phase(name='one', num_steps=2, sources=c.data.phases[0].sources),
                 Phase(name='two', num_steps=2, sources=c.data.phases[0].sources)]"""
    return setting(folder, body, samples=24)


def layers_of(workdir: Path, step: int) -> Tree:
    """The matrices of the layers of a checkpoint, in the names of this file."""
    found = {k.replace("params['layers']", ""): v for k, v in arrays(workdir, step).items() if k.startswith("params")}
    paths = {"q": "['attention']['q']", "o": "['attention']['o']", "up": "['mlp']['up']"}
    return {"layers": {name: found[path] for name, path in paths.items()}}


@pytest.mark.slow
def test_each_phase_freezes_its_own_directions_and_resumes_bit_equal(config: Path, tmp_path: Path) -> None:
    assert run_train(config, tmp_path / "run") == 0
    for share in (0.5, 0.75):  # at the border, and in a phase
        pause = f"--config.train.pause_at_share={share}"
        assert run_train(config, tmp_path / "resumed", pause) == 75
    assert run_train(config, tmp_path / "resumed") == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "resumed", 4)
    border, end = layers_of(tmp_path / "run", 2), layers_of(tmp_path / "run", 4)
    frozen, whole = moved(border, end)
    assert frozen < STILL < 1e-3 < whole
    middle = layers_of(tmp_path / "run", 3)
    assert moved(middle, end)[0] > 100 * STILL, "the negative control: the directions of other weights have moved"
