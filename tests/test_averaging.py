"""The running average of the weights, the mean of the last checkpoints, and which of them is exported."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.runs import (
    arrays,
    make_chats,
    read_all_metrics,
    read_metrics,
    run_export,
    run_train,
    run_verb,
    setting,
    timeless,
    write_jsonl,
)
from mice_jax import average
from mice_jax.model_source import resolve_source
from mice_jax.models.transformer import make_decoder
from mice_jax.optim import make_optimizer
from mice_jax.sharding import make_mesh
from mice_jax.step import make_abstract_state
from mice_jax.training.averaging import newest_weight
from mice_jax.training.memory_model import MemoryInputs, bytes_per_device, estimate_memory

SAMPLES, STEPS, BATCH, HALF_LIFE = 36, 5, 8, 12.0  # the last step has 4 samples
SAMPLES_OF_STEPS = (8, 8, 8, 8, 4)
# Each step rounds twice, and each weight of the mean once: five steps stay below ten half-ulps of the largest weight.
ROUNDING = 10 * 2.0**-24
IN_NOISE = {"grad_sq_corrected", "noise_scale"}  # differences of nearly equal numbers
HF_EMBEDDING, EMBEDDING = "model.embed_tokens.weight", "['embed']['table']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averaging")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    held = write_jsonl(folder / "held.jsonl", make_chats(6, seed=5))
    body = f"c.data.validation = [Source(path='{held}')]\nc.eval.every_samples = 8\nc.checkpoint.every_samples = 8"
    return setting(folder, f"{body}\nc.train.ema_half_life = {HALF_LIFE}", samples=SAMPLES)


@pytest.fixture(scope="module")
def run(config: Path, folder: Path) -> Path:
    assert run_train(config, folder / "run") == 0
    return folder / "run"


def leaves(workdir: Path, step: int, item: str = "params") -> dict[str, np.ndarray]:
    """The parameters after a step, or their average, in float64."""
    found = arrays(workdir, step)
    return {k.removeprefix(item): v.astype(np.float64) for k, v in found.items() if k.startswith(item)}


def furthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference of two sets of parameters, in units of the largest weight of each."""
    assert a.keys() == b.keys() and len(a) > 10
    return max(float(np.max(np.abs(a[k] - b[k])) / np.max(np.abs(a[k]))) for k in a)


def mean(of: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    return {k: sum(w * x[k] for w, x in zip(weights, of, strict=True)) / sum(weights) for k in of[0]}


# ---------------------------------------------------------------------------------------- the running average
def test_running_average_is_the_weighted_mean_of_all_steps(run: Path) -> None:
    """By its definition: each sample counts half as much as one that is a half-life of samples newer."""
    params = [leaves(run, step) for step in range(1, STEPS + 1)]
    for last in (1, 2, STEPS):
        since = [sum(SAMPLES_OF_STEPS[k:last]) for k in range(last + 1)]
        weights = [2 ** (-since[k + 1] / HALF_LIFE) - 2 ** (-since[k] / HALF_LIFE) for k in range(last)]
        found = leaves(run, last, "average")
        assert furthest(mean(params[:last], weights), found) < ROUNDING
        if last > 1:  # negative controls: an unweighted mean, the newest weights, and weights in steps, not samples
            in_steps = [2 ** (-BATCH * (last - 1 - k) / HALF_LIFE) for k in range(last)]
            for wrong in ([1.0] * last, [0.0] * (last - 1) + [1.0], *([in_steps] if last == STEPS else [])):
                assert furthest(mean(params[:last], wrong), found) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("half_life", "samples", "total", "weight"),
    [
        (0.0, 8, 8, None),
        (8.0, 8, 8, 1.0),  # the weights before the first step do not count
        (8.0, 8, 16, 2 / 3),
        (8.0, 8, 8_000_000, 0.5),
        (1e12, 8, 80, 0.1),  # a half-life beyond the run gives the plain mean
    ],
)
def test_newest_weight_follows_the_half_life(half_life: float, samples: int, total: int, weight: float | None) -> None:
    assert newest_weight(half_life, samples, total) == (weight if weight is None else pytest.approx(weight, rel=1e-9))


def test_average_changes_no_weight_and_no_other_metric(config: Path, run: Path, tmp_path: Path) -> None:
    off = tmp_path / "off"
    assert run_train(config, off, "--config.train.ema_half_life=0") == 0
    assert not (off / "checkpoints" / str(STEPS) / "average").exists()
    of_average = [k for k in read_metrics(run)[-1] if k.startswith("eval/average/")]
    assert {"eval/average/loss", "eval/average/held/token_accuracy", "eval/average/macro_loss"} <= {*of_average}
    on, alone = (
        [{k: v for k, v in r.items() if k not in of_average} for r in timeless(read_all_metrics(w))] for w in (run, off)
    )
    assert [r.keys() for r in on] == [r.keys() for r in alone] and {"loss", "eval/loss"} <= alone[-1].keys()
    # That the average is no part of the update is tested bit for bit in test_optimizers.py. Here the compiler may round
    # a product and a sum once in one of the two programs and twice in the other.
    for name in sorted({k for r in alone for k, v in r.items() if isinstance(v, float)} - IN_NOISE):
        np.testing.assert_allclose(*([r.get(name) or 0 for r in w] for w in (on, alone)), rtol=1e-5, err_msg=name)
    assert furthest(leaves(run, STEPS), leaves(off, STEPS)) < 1e-5
    assert furthest(leaves(run, STEPS), leaves(run, STEPS, "average")) > 1e-3, "the negative control"


def test_held_out_loss_of_the_average_is_that_of_a_run_from_it(config: Path, run: Path, tmp_path: Path) -> None:
    start, *_ = read_all_metrics(run)
    assert start["eval/average/loss"] == start["eval/loss"], "before the first step"
    last = read_metrics(run)[-1]
    assert abs(last["eval/average/loss"] - last["eval/loss"]) > 1e-4
    flags = [f"--config.model.init_from={run}/checkpoints/{STEPS}/average", "--config.train.ema_half_life=0"]
    assert run_train(config, tmp_path / "next", *flags, "--config.optim.max_steps=1") == 0
    assert read_all_metrics(tmp_path / "next")[0]["eval/loss"] == last["eval/average/loss"]


def test_held_out_source_named_average_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    named = config.with_name("named.py")
    named.write_text(config.read_text().replace("held.jsonl'", "held.jsonl', name='average'"))
    assert run_train(named, tmp_path / "run") == 2
    assert "a held-out source is named 'average'" in capsys.readouterr().err


def test_memory_model_counts_the_average_like_the_parameters(run: Path) -> None:
    decoder, mesh = make_decoder(resolve_source(str(run)).spec, 2), make_mesh(1, 4, 2)
    optimizer = make_optimizer(grad_clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    f32 = jnp.dtype("float32")

    def estimate(averages: bool):
        state = make_abstract_state(decoder, optimizer, mesh, averages)
        return estimate_memory(MemoryInputs(decoder, state, mesh, f32, "reference", f32, f32, 128), 1, "full")

    kept, none = estimate(True), estimate(False)
    assert none.average == 0 and kept.average == kept.params == none.params
    assert kept.resident - none.resident == kept.total - none.total == kept.params
    state = make_abstract_state(decoder, optimizer, mesh, keeps_average=True)
    assert bytes_per_device(make_abstract_state(decoder, optimizer, make_mesh(8, 1, 1), True).average) / kept.params > 6
    assert state.average["layers"]["mlp"]["up"].sharding == state.params["layers"]["mlp"]["up"].sharding


# ---------------------------------------------------------------------------------------- the mean of checkpoints
def test_mice_average_writes_the_mean_of_the_last_checkpoints(run: Path, tmp_path: Path, capsys) -> None:
    work = tmp_path / "run"
    shutil.copytree(run, work)
    arguments = [f"--workdir={work}", "--last=3"]
    assert run_verb(average.main, arguments) == 0
    made = work / "averages" / "5_last_3"
    assert f"averaged the weights after steps 3, 4, 5 to {made}" in capsys.readouterr().out
    assert not (made / "checkpoints" / "5" / "opt_state").exists(), "it has weights alone"
    expected = mean([leaves(work, step) for step in (3, 4, 5)], [1.0] * 3)[EMBEDDING][:300]
    assert run_export(made, tmp_path / "hf") == 0
    table = load_file(tmp_path / "hf" / "model.safetensors")[HF_EMBEDDING]
    assert np.max(np.abs(table - expected)) < ROUNDING * np.max(np.abs(expected))
    four = mean([leaves(work, step) for step in (2, 3, 4, 5)], [1.0] * 4)[EMBEDDING][:300]
    assert np.max(np.abs(table - four)) > 100 * ROUNDING * np.max(np.abs(expected)), "the negative control"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| averaged | the mean of the weights after steps 3, 4, 5 |" in card
    assert "weights: the mean of the weights after steps 3, 4, 5" in capsys.readouterr().out

    assert run_verb(average.main, arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_mice_average_refuses_more_checkpoints_than_there_are(run: Path, tmp_path: Path, capsys) -> None:
    assert run_verb(average.main, [f"--workdir={run}", "--last=6", f"--output={tmp_path / 'a'}"]) == 2
    said = capsys.readouterr().err
    assert "--last=6: " in said and "has 5 complete checkpoints: 1, 2, 3, 4, 5. Give a smaller number" in said
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------- exports
def test_export_takes_the_average_where_it_is_asked_for(run: Path, tmp_path: Path, capsys) -> None:
    assert run_export(run, tmp_path / "weights") == 0
    assert f"weights: those after step {STEPS}" in capsys.readouterr().out
    assert run_export(run, tmp_path / "average", "--average") == 0
    said = f"the running average after step {STEPS}, with a half-life of {HALF_LIFE:g} samples"
    assert f"weights: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "average" / "README.md").read_text()
    for item, name in (("params", "weights"), ("average", "average")):
        table = load_file(tmp_path / name / "model.safetensors")[HF_EMBEDDING]
        assert np.array_equal(table, leaves(run, STEPS, item)[EMBEDDING][:300])
