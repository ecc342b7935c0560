"""Moments in host memory: the same weights part by part, with saves and resumes."""

import functools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.runs import REPOSITORY, arrays, read_json, read_metrics, run_train, setting, timeless
from mice_jax.config import Config, ConfigError
from mice_jax.errors import UserError
from mice_jax.loss import SourceSums
from mice_jax.model_source import resolve_source
from mice_jax.numerics import offload
from mice_jax.optim import make_optimizer
from mice_jax.planning import ahead_of_time
from mice_jax.planning.planner import RunPlan
from mice_jax.planning.settings import SAME_SPEED, FittingSetting, Setting, fitting_settings, ranked
from mice_jax.sharding import make_mesh
from mice_jax.step import Sums, TrainState, apply_sums
from mice_jax.training import build, memory_model
from mice_jax.training.memory_model import bytes_per_device, host_bytes_per_device

STEPS = 5
SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
# Three layers, one kind of which has a part that the others lack, and two parameters outside of layers.
SHAPES = {
    "embed": {"table": (20, 16)},
    "final_norm": {"scale": (16,)},
    "layers": {"q": (3, 2, 4, 16), "gate": (3, 8, 16), "scale": (3, 16), "mixer": (1, 5, 16)},
}
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "final_norm": {"scale": ("embed",)},
    "layers": {
        "q": ("layers", "heads", "head_dim", "embed"),
        "gate": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
        "mixer": ("layers", "channels", "embed"),
    },
}
# The second layer's gate is frozen, and the last norm.
MASK = {
    "embed": {"table": np.array(True)},
    "final_norm": {"scale": np.array(False)},
    "layers": {
        "q": np.array(True),
        "gate": np.array([True, False, True]).reshape(3, 1, 1),
        "scale": np.array(True),
        "mixer": np.array(True),
    },
}
Tree = dict[str, Any]


def drawn(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape)


def updated(
    name: str,
    mask: Tree | None = None,
    dtype: str = "float32",
    *,
    clip: float = 0.0,
    offloads: bool = False,
    clip_of_parts: float = 0.0,
    grads: list[Tree],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update by each gradient, with the metrics of the last."""
    optimizer = make_optimizer(name=name, axes=AXES, trained=mask, grad_clip=clip, moments_dtype=dtype, **SETTINGS)
    state, metrics = TrainState(jnp.zeros((), jnp.int32), drawn(0), jax.jit(optimizer.init)(drawn(0))), {}
    settings = {"optimizer": optimizer, "learning_rate": 1e-2, "trained_mask": mask}
    update = jax.jit(functools.partial(apply_sums, **settings, offloads_moments=offloads, clip_norm=clip_of_parts))
    for g in grads:
        state, metrics = update(state, Sums(g, *[jnp.float32(2.0)] * 4, SourceSums(*[jnp.zeros(1)] * 4)))
    return state, metrics


def same(a: Any, b: Any) -> bool:
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def rounding(a: Any, b: Any) -> float:
    """The largest difference between two trees of weights, in units of the last place of numbers below 4."""
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return max(float(np.abs(np.asarray(x, np.float64) - y).max()) for x, y in leaves) / 2.0**-22


# ---------------------------------------------------------------------------------------- the update
@pytest.mark.parametrize(
    ("name", "mask", "dtype"),
    [("adamw", None, "float32"), ("adamw", MASK, "int8"), ("muon", None, "float32")],
    ids=["adamw", "adamw-frozen-int8", "muon"],
)
def test_update_by_parts_equals_that_of_all_at_once(name: str, mask: Tree | None, dtype: str) -> None:
    grads = [drawn(1), drawn(2)]
    whole, metrics = updated(name, mask, dtype, clip=CLIP, grads=grads)
    parts, of_parts = updated(name, mask, dtype, offloads=True, clip_of_parts=CLIP, grads=grads)
    assert rounding(whole.params, parts.params) <= len(grads) and int(parts.step) == len(grads)
    for a, b in zip(*(jax.tree.leaves(state.opt_state) for state in (whole, parts)), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-6, atol=dtype == "int8"
        )
    for key, value in metrics.items():
        np.testing.assert_allclose(value, of_parts[key], rtol=1e-6, err_msg=key)
    assert float(metrics["grad_norm"]) > CLIP, "gradients are clipped"
    if name == "adamw" and mask is None:
        each_clipped_alone, _ = updated(name, mask, clip=CLIP, offloads=True, grads=grads)
        nus = [state.opt_state[1].nu["embed"]["table"] for state in (whole, parts, each_clipped_alone)]
        assert np.allclose(nus[0], nus[1], rtol=1e-6, atol=0), "parts are clipped by the norm of all"
        assert not np.allclose(nus[0], nus[2], rtol=0.1, atol=0)


def test_update_by_parts_of_a_step_that_is_not_finite_changes_nothing() -> None:
    before, _ = updated("adamw", offloads=True, clip_of_parts=CLIP, grads=[drawn(1)])
    broken = drawn(2)
    broken["layers"]["gate"] = broken["layers"]["gate"].at[1, 0, 0].set(jnp.nan)
    after, metrics = updated("adamw", offloads=True, clip_of_parts=CLIP, grads=[drawn(1), broken])
    assert not metrics["finite"] and same(before, after)


def test_moments_of_8_bits_are_on_the_host_only_in_stacks() -> None:
    """libtpu does not compile the transfer of a whole array of 8 bits an entry."""
    optimizer = make_optimizer(name="adamw", axes=AXES, grad_clip=0.0, moments_dtype="int8", **SETTINGS)
    state = jax.eval_shape(optimizer.init, drawn(0))
    kept = {True: set(), False: set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        kept[offload.can_be_on_host(path, leaf)].add((offload.dict_keys(path)[:1], leaf.dtype.itemsize))
    assert kept[True] >= {(("layers",), 1), (("layers",), 4), (("embed",), 4)}
    assert kept[False] == {((), 4), (("embed",), 1), (("layers",), 1)}, "counts, codes of the table and of one layer"


def test_moments_on_host_are_made_and_scaled_there() -> None:
    mesh = make_mesh(1, 2, 1, jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P())
    optimizer = make_optimizer(name="adamw", axes=AXES, grad_clip=0.0, **SETTINGS)
    params = jax.device_put(drawn(0), sharding)
    plain = optimizer.init(params)
    shardings = jax.tree.map(lambda x: offload.on_host(sharding) if x.ndim else sharding, plain)
    with jax.set_mesh(mesh):
        made = jax.jit(lambda p: offload.init_on_host(optimizer.init, p), out_shardings=shardings)(params)
    assert same(made, plain)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert host_bytes_per_device(made) == 2 * 4 * size and bytes_per_device(made) == 4, "a count stays on the device"
    assert host_bytes_per_device(params) == 0 and bytes_per_device(params) == 4 * size
    doubled = offload.compute_on_device(lambda nu: jax.tree.map(lambda x: 2 * x + 1, nu), made[1].nu)
    assert all(offload.is_on_host(x) and np.all(np.asarray(x) == 1) for x in jax.tree.leaves(doubled))


# ---------------------------------------------------------------------------------------- runs
@pytest.mark.slow
def test_a_run_with_offloaded_moments_equals_the_run_without(tmp_path: Path) -> None:
    config = setting(
        tmp_path, f"c.train.ema_half_life = 12.0\nc.optim.max_steps = {STEPS}\nc.checkpoint.every_samples = 24"
    )
    on, pause = "--config.optim.offload_moments=True", "--config.train.pause_at_share=0.5"
    assert run_train(config, tmp_path / "plain") == 0
    assert run_train(config, tmp_path / "offloaded", on, pause) == 75
    assert run_train(config, tmp_path / "offloaded", on) == 0
    plain, offloaded = (arrays(tmp_path / name, STEPS) for name in ("plain", "offloaded"))
    assert plain.keys() == offloaded.keys() and any(".mu" in key or "'mu'" in key for key in plain)
    weights = [{k: x for k, x in run.items() if k.startswith(("params", "average"))} for run in (plain, offloaded)]
    assert rounding(*weights) <= STEPS  # An update may round otherwise in the last place, and changes later gradients.
    start = arrays(tmp_path / "plain", 3)
    assert rounding({k: start[k] for k in weights[0]}, weights[0]) > 1e4, "two steps change more"
    for a, b in zip(*(timeless(read_metrics(tmp_path / name)) for name in ("plain", "offloaded")), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "update_norm", "param_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-6), key
        assert all(a[key] == b[key] for key in ("samples", "tokens", "learning_rate"))
    assert read_json(tmp_path / "offloaded", "summary.json")["status"] == "completed"


# ---------------------------------------------------------------------------------------- plans
LLAMA_3B = REPOSITORY / "configs" / "paper" / "shapes" / "llama-3.2-3b" / "config.json"
MOMENTS_3B = 2 * 4 * 3_212_749_824


def plan_of(topology: str, **changes: Any) -> RunPlan:
    """The plan of the 3B model with rows of 4,096 slots; in `changes`, "__" stands for a dot."""
    config = Config()
    config.model.init_from = f"random:{LLAMA_3B}"
    Setting(tuple((name.replace("__", "."), value) for name, value in changes.items())).apply(config)
    source = resolve_source(config.model.init_from)
    target = ahead_of_time.find_topology(topology)
    return RunPlan(config, source.spec, source.architecture, target, samples=64, mean_length=2048, deadline=0)


def test_offloaded_moments_are_counted_on_the_host_and_moved_twice() -> None:
    plain, offloaded = plan_of("h100:1"), plan_of("h100:1", optim__offload_moments=True)
    needed = [memory_model.estimate_host_memory(p.memory_inputs(p.layout.sizes), 1, "full") for p in (plain, offloaded)]
    assert needed[0] == 0 and MOMENTS_3B <= needed[1] < 1.001 * MOMENTS_3B
    layout = plain.layout
    before, after = plain.estimate(layout), offloaded.estimate(layout)
    assert before.total - after.total == needed[1]
    times = [p.step_time_of(layout) for p in (plain, offloaded)]
    by_hand = 2 * needed[1] / (0.7 * 64e9)
    assert times[0].host_s == 0 and times[1].host_s == pytest.approx(by_hand)
    assert times[1].seconds - times[0].seconds == pytest.approx(by_hand)


def test_offloaded_activations_are_the_inputs_of_all_layers() -> None:
    run = plan_of("h100:1")
    inputs = run.memory_inputs(run.layout.sizes)
    full, offloaded = (memory_model.estimate_memory(inputs, 2, remat).activations for remat in ("full", "offload"))
    by_hand = 2 * 4096 * 28 * 3072 * 2  # rows, slots, layers, width, bytes
    assert full == by_hand == memory_model.estimate_host_memory(inputs, 2, "offload")
    assert offloaded == pytest.approx(full * 2 / 28, rel=0.005), "those of two layers are on the device"


def test_host_memory_that_does_not_suffice_is_an_error() -> None:
    run = plan_of("h100:1", optim__offload_moments=True)
    inputs = run.memory_inputs(run.layout.sizes)
    memory_model.check_host_memory(inputs, 1, "full", 8, 9 * MOMENTS_3B)
    with pytest.raises(UserError, match=r"191\.5 GiB in the memory of a host, for 8 devices.*150\.0 GiB"):
        memory_model.check_host_memory(inputs, 1, "full", 8, 150 * 2**30)


def test_settings_about_as_fast_are_ranked_by_what_they_cost() -> None:
    times = {"c": (1.0, "x; y"), "b": (1.04, "x"), "e": (1.06, "x"), "a": (1.049, ""), "d": (1.11, "")}
    found = [FittingSetting(name, cost, 0, 0, time, 1.0) for name, (time, cost) in times.items()]
    assert "".join(setting.flags for setting in ranked(found)) == "abcde"
    assert ranked([]) == []


def test_settings_that_fit_are_ranked_with_their_cost() -> None:
    found = fitting_settings(plan_of("h100:1"), shown=100)
    times = [setting.step_time_s for setting in found]
    assert found == ranked(found) and times[0] < SAME_SPEED * min(times) < max(times) < SAME_SPEED * times[-1]
    usable = 0.9 * ahead_of_time.find_topology("h100:1").chip.memory
    assert all(setting.bytes_per_device <= usable for setting in found)
    by_flags = {setting.flags.partition(" --config.model.remat")[0]: setting for setting in found}
    offloaded = by_flags["--config.optim.offload_moments=True"]
    assert offloaded.host_bytes_per_device >= MOMENTS_3B and "link to the host" in offloaded.cost
    assert not any(s.flags.startswith("--config.model.remat") for s in found), "it does not fit as it is"
    assert fitting_settings(plan_of("rtx4090:1"))[0].cost == "only adapters are trained"


# ---------------------------------------------------------------------------------------- bad input
def test_devices_without_host_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [types.SimpleNamespace(kind=kind) for kind in ("device", "unpinned_host")]
    device = types.SimpleNamespace(device_kind="Made-up 1", addressable_memories=lambda: kinds)
    with pytest.raises(UserError, match=r"optim\.offload_moments=True.*'pinned_host'.*Made-up 1.*'device'"):
        offload.check_host_memory_kind([device], "optim.offload_moments=True")
    offload.check_host_memory_kind(jax.devices()[:1], "")
    config = Config()
    config.optim.offload_moments = True
    monkeypatch.setattr(offload, "HOST_KIND", "absent_host")
    with pytest.raises(UserError, match=r"optim\.offload_moments=True.*'absent_host'"):  # before any data is read
        build.run_mesh(config)


@pytest.mark.parametrize(("name", "beta1"), [("adafactor", 0.9), ("sgd", 0.0)])
def test_optimizers_without_large_moments_are_not_offloaded(name: str, beta1: float) -> None:
    c = Config()
    c.optim.offload_moments, c.optim.name, c.optim.beta1 = True, name, beta1
    with pytest.raises(ConfigError, match=r"optim\.offload_moments=True with optim\.name"):
        c.validate()
