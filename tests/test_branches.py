"""Branches of a run: they go on exactly, with equal samples and settings that follow the batch size."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.runs import arrays, assert_equal_runs, make_chats, read_metrics, run_train, setting, timeless, write_jsonl
from mice_jax import branch
from mice_jax.config import from_dict, to_dict
from mice_jax.numerics.blockwise import Quantized
from mice_jax.step import TrainState
from mice_jax.sweeps import branch_results, branches
from mice_jax.sweeps.study import Study
from mice_jax.training.start_state import enter_branch

AT, STEP, STEPS = 24, 6, 16  # samples and step of the branch, within the first of two epochs of eight steps


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    held = write_jsonl(folder / "held.jsonl", make_chats(6, seed=5))
    body = [
        "c.data.phases[0].num_epochs = 2",
        f"c.data.validation = [Source(path='{held}')]",
        "c.optim.batch_size, c.checkpoint.every_samples = 4, 24",
        "c.optim.schedule, c.optim.warmup_steps = 'cosine', 3",
        "c.train.ema_half_life = 16",
        "c.log.trackers = []",
    ]
    config = setting(folder, "\n".join(body), samples=32)
    assert run_train(config, folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def made(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[branches.Plan, Path]:
    """Branches with the run's own batch size and with twice as many samples a step, run to their end."""
    plan = branches.plan(trunk, AT, ["optim.batch_size=4,8"], seeds=[0])
    workdir = tmp_path_factory.mktemp("branches") / "out"
    branches.write(plan, workdir)
    study = Study(plan.sweep, workdir)
    for number in (0, 1):
        assert run_train(study.begin(number), study.run_folder(number)) == 0
    return plan, workdir


def test_unchanged_branch_equals_the_uninterrupted_run_bit_for_bit(
    trunk: Path, made: tuple[branches.Plan, Path]
) -> None:
    run = made[1] / "runs" / "0"
    assert_equal_runs(trunk, run, STEPS)
    assert any(k.startswith("average") for k in arrays(run, STEPS)), "also in the running average of the weights"
    first = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["step"]) == ("resumed", STEP)


def test_branch_of_another_batch_size_goes_on_with_equal_samples(trunk: Path, made: tuple[branches.Plan, Path]) -> None:
    plan, workdir = made
    ours, theirs = read_metrics(workdir / "runs" / "1"), read_metrics(trunk)
    assert timeless(ours[:STEP]) == timeless(theirs[:STEP]) and ours[STEP]["loss"] != theirs[STEP]["loss"]
    assert [r["samples"] for r in ours[STEP:]] == [32, 40, 48, 56, 64]
    assert [r["epoch"] for r in ours[STEP:]] == [0, 1, 1, 1, 1]
    # The rate is that of the run's own schedule after as many samples, times the square root of 2: a step of 8 samples
    # starts where a step of 4 does. Both are float32.
    rates = {r["samples"] - 4: r["learning_rate"] for r in theirs}
    wanted = [2**0.5 * rates[r["samples"] - 8] for r in ours[STEP:]]
    assert [r["learning_rate"] for r in ours[STEP:]] == pytest.approx(wanted, rel=1e-5)
    assert arrays(workdir / "runs" / "1", 11).keys() == arrays(trunk, STEPS).keys()

    found = branch_results.of_folder(workdir, plan.sweep)
    assert (found and found["batch_sizes"] == (4, 8)) or found["batch_sizes"] == [4, 8]
    assert found["excesses"]["eval/loss"][1]["mean"] == pytest.approx(
        ours[-1]["eval/loss"] - theirs[-1]["eval/loss"], rel=1e-12
    )
    # The last quarter of 40 samples: three steps of 4, which end after 54, and two of 8.
    of_each = [np.mean([r["loss"] for r in records if r["samples"] > 54]) for records in (theirs, ours)]
    assert found["excesses"]["training loss"][1]["mean"] == pytest.approx(of_each[1] - of_each[0], rel=1e-12)
    assert found["trunk"]["noise_scale_low"] == theirs[STEP - 1].get("noise_scale_low") and not found["low"]


def test_rates_and_memory_of_a_branch_follow_its_batch_size(trunk: Path) -> None:
    plan = branches.plan(
        trunk, AT, ["optim.batch_size=4,16;optim.rate_for_batch=none,sqrt"], scale="linear", samples=40
    )
    assert plan.sweep.seeds == [0, 1, 2] and plan.sweep.base.branch.samples == 64
    assert [steps for _, steps in plan.ends] == [10, 10, 3, 3]
    o = plan.sweep.base.optim
    assert (o.learning_rate, o.rate_batch_size, o.beta2) == (1e-2, 4, 0.95)
    assert 0.5 ** (4 / o.beta2_half_life) == 0.95, "exactly that of the run"
    assert from_dict(to_dict(plan.sweep.base)) == plan.sweep.base


# ---------------------------------------------------------------------------------------- the second moment
def test_second_moment_of_a_branch_stays_unbiased() -> None:
    """Against the weighted mean of squares that Adam's second moment is after its correction."""
    grads = np.array([3.0, 1.0, 0.5, 2.0, 0.25])
    adam = optax.scale_by_adam(0.9, 0.95)
    params = {"w": jnp.zeros(1)}
    opt_state = adam.init(params)
    for g in grads:
        _, opt_state = adam.update({"w": jnp.array([g], jnp.float32)}, opt_state)
    state = TrainState(jnp.asarray(5), params, (optax.EmptyState(), opt_state), None)
    assert enter_branch(state, 0.95, 0.95) is state

    def corrected(beta2: float, nu: float) -> float:
        return nu / (1 - beta2**5)

    before = float(opt_state.nu["w"][0])
    weights = 0.95 ** np.arange(5)[::-1]
    assert corrected(0.95, before) == pytest.approx(float(weights @ grads**2 / weights.sum()), rel=1e-5)
    after = float(enter_branch(state, 0.95, 0.6).opt_state[1].nu["w"][0])
    assert corrected(0.6, after) == pytest.approx(float(weights @ grads**2 / weights.sum()), rel=1e-5)
    quantized = Quantized(jnp.full((1, 16), 255, jnp.uint8), jnp.full((1, 1), before))
    stored = opt_state._replace(nu={"w": quantized})
    scaled = enter_branch(dataclasses.replace(state, opt_state=stored), 0.95, 0.6).opt_state.nu["w"]
    assert set(np.asarray(scaled.codes).flat) == {255}, "each stands for a share of the scale"
    assert float(scaled.scales[0, 0]) == pytest.approx(after, rel=1e-6)
    assert corrected(0.6, before / 0.95 * 0.95) < 0.5 * corrected(0.6, after), "the moment as it was would be too small"


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--at=25"], r"no checkpoint after 25 samples. Its checkpoints are at 24 \(step 6\), 48 \(step 12\), 64"),
        (["--at=64"], "nothing is left to branch"),
        (["--axes=optim.batch_size=4,6", "--for=4"], "unequal horizons: .* steps of 6 samples end at 30"),
        (["--axes=optim.batch_size=4,8", "--for=80"], "unequal horizons: .* end after 104 samples"),
        (["--axes=model.init_from=x"], "'model.init_from' is not a setting that a branch can change"),
        (["--axes=optim.batch_size=four"], "must be a value of type int"),
        (["--axes=optim.batch_size"], "must name a field once, with its values"),
        (["--seeds=a"], "--seeds=a must be whole numbers"),
        (["--tolerance=0"], "--tolerance=0.0 must be a number above 0"),
        (["--from=nowhere"], "is not the folder of a run on this disk"),
    ],
)  # fmt: skip
def test_bad_input_is_one_paragraph_and_exit_code_2(flags: list[str], words: str, trunk: Path, capsys) -> None:
    given = {f"--from={trunk}", f"--at={AT}", "--axes=optim.batch_size=4,8"}
    kept = [f for f in given if f.partition("=")[0] not in {g.partition("=")[0] for g in flags}]
    assert branch.main([*kept, *flags, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error), error


def test_branch_of_a_run_whose_data_is_gone_or_changed_is_named(trunk: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "trunk"
    shutil.copytree(trunk, moved)
    config = json.loads((moved / "config.json").read_text())
    config["data"]["phases"][0]["sources"][0]["path"] = "gone.jsonl"
    (moved / "config.json").write_text(json.dumps(config))
    flags = [f"--from={moved}", f"--at={AT}", "--axes=optim.batch_size=4,8", f"--workdir={tmp_path / 'out'}"]
    assert branch.main(flags) == 2
    assert "its data is gone" in capsys.readouterr().err and not (tmp_path / "out").exists()
    config["data"]["phases"][0]["sources"][0]["path"] = str(
        write_jsonl(tmp_path / "other.jsonl", make_chats(32, seed=9))
    )
    (moved / "config.json").write_text(json.dumps(config))
    plan = branches.plan(moved, AT, ["optim.batch_size=4,8"], seeds=[0])
    branches.write(plan, tmp_path / "changed")
    changed = Study(plan.sweep, tmp_path / "changed").begin(0)
    assert run_train(changed, changed.parent) == 2
    assert "the data is not that of the run that this one branches off from" in capsys.readouterr().err


def test_folder_of_other_branches_is_not_overwritten(made: tuple[branches.Plan, Path], trunk: Path, tmp_path) -> None:
    other = branches.plan(trunk, 48, ["optim.batch_size=4,8"], seeds=[0])
    with pytest.raises(Exception, match="holds other branches"):
        branches.write(other, made[1])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="is not empty and holds no branches"):
        branches.write(other, tmp_path)
