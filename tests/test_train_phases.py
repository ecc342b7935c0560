"""Runs of several phases: what each starts from, its rates and batches, and what is kept and saved on the way."""

import dataclasses
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import mesh_of, spec_of
from helpers.runs import (
    Record,
    arrays,
    assert_equal_runs,
    make_chats,
    read_json,
    read_metrics,
    run_train,
    write_config,
    write_init,
    write_jsonl,
)
from mice_jax import train as train_module
from mice_jax.checkpoint import Checkpoints
from mice_jax.config import Config
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.step import StepFunctions
from mice_jax.training import build
from mice_jax.training.noise_scale import NoiseScale
from mice_jax.training.progress import Progress
from mice_jax.training.record import SOURCE_METRICS, STEP_METRICS
from mice_jax.training.writers import JsonlWriter

SAME = {"rel": 1e-5}  # the same arithmetic on rows dealt in another order


def two_phases(folder: Path, second: str, body: str = "", drop: bool = True, first: str = "") -> Path:
    """A config of two phases of 5 and 8 steps, each with held-out data; `first` and `second` are fields of theirs."""
    folder.mkdir(exist_ok=True)
    files = {n: write_jsonl(folder / f"{n}.jsonl", make_chats(c, seed=i)) for i, (n, c) in enumerate(COUNTS.items())}
    lines = [
        f"c.data.drop_remainder = {drop}",
        f"one = Phase(name='knowledge', sources=[Source(path='{files['know']}')],",
        f"            validation=[Source(path='{files['held_know']}')]{first})",
        f"two = Phase(name='skills', sources=[Source(path='{files['skill']}')],",
        f"            validation=[Source(path='{files['held_skill']}')]{second})",
        "c.data.phases = [one, two]",
        "c.optim.schedule, c.optim.warmup_steps = 'linear', 2",
        *body.splitlines(),
    ]
    return write_config(folder / "run.py", files["know"], write_init(folder / "init"), "\n".join(lines))


COUNTS = {"know": 40, "skill": 32, "held_know": 5, "held_skill": 7}
RESTART = ", optimizer='reset', schedule='restart', batch_size=4, learning_rate=5e-3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module")
def restarted(folder: Path) -> Path:
    """A run whose second phase takes nothing but the weights from its first."""
    config = two_phases(folder / "restarted", RESTART, "c.checkpoint.every_samples = 8")
    assert run_train(config, folder / "restarted" / "run") == 0
    return folder / "restarted" / "run"


SEEDED = RESTART + ", seed_from='best'"
RISING = "c.checkpoint.every_samples = 8\nc.checkpoint.best_metric = 'eval/phase/knowledge/loss'"
WORST = f"{RISING}\nc.checkpoint.best_mode = 'max'\nc.checkpoint.keep_last = 1"


@pytest.fixture(scope="module")
def seeded(folder: Path) -> Path:
    """A run whose second phase starts from the state of its first with the highest loss."""
    config = two_phases(folder / "seeded", SEEDED, WORST)
    assert run_train(config, folder / "seeded" / "run") == 0
    return folder / "seeded" / "run"


@pytest.fixture(scope="module")
def saved_by_the_minute(folder: Path) -> Path:
    """A run whose second phase has another rate and takes all else from its first; it saves at every moment."""
    body = "c.checkpoint.every_samples, c.checkpoint.every_minutes = 0, 1e-9"
    config = two_phases(folder / "on", ", learning_rate=5e-3", body)
    assert run_train(config, folder / "on" / "run") == 0
    return folder / "on" / "run"


def alone(folder: Path, start: Path, second: str = RESTART) -> list[Record]:
    """The second phase as a run of its own from a checkpoint: its first phase has no whole step, and so none."""
    config = two_phases(folder, second, f"c.model.init_from = '{start}'", first=", batch_size=1000")
    assert run_train(config, folder / "run") == 0
    return read_metrics(folder / "run")


def numbers(lines: list[Record], *names: str) -> list[Any]:
    return [tuple(line[n] for n in names) for line in lines]


# ---------------------------------------------------------------------------------------- boundaries
def test_phases_have_own_batch_size_and_schedule_and_add_up_samples(restarted: Path) -> None:
    lines = read_metrics(restarted)
    assert numbers(lines, "step", "phase") == [(i + 1, "knowledge" if i < 5 else "skills") for i in range(13)]
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, *range(44, 73, 4)]
    # Linear with two steps of warm-up, over 5 steps at 1e-2 and then over 8 at 5e-3.
    first = [0.5, 1, 1, 2 / 3, 1 / 3]
    second = [0.5, 1, 1, *(1 - x / 6 for x in range(1, 6))]
    wanted = [1e-2 * f for f in first] + [5e-3 * f for f in second]
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted, rel=1e-5)


def test_phase_that_resets_everything_equals_a_run_from_earlier_weights(
    restarted: Path, seeded: Path, tmp_path: Path
) -> None:
    lines = alone(tmp_path / "alone", restarted / "checkpoints" / "5")
    there = read_metrics(restarted)[5:]
    assert len(lines) == len(there) == 8
    for name in ("loss", "grad_norm", "learning_rate", "update_norm", "eval/loss"):
        values = [[line[name] for line in ls if name in line] for ls in (lines, there)]
        assert len(values[0]) in (1, 8) and values[0] == pytest.approx(values[1], **SAME), name
    # And from other weights it is another run.
    other = read_metrics(seeded)[5:]
    assert [line["loss"] for line in other] != pytest.approx([line["loss"] for line in there], rel=1e-3)


def test_resumed_run_compiles_nothing_where_a_phase_resets_the_optimizer(
    restarted: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(restarted, tmp_path / "run"))
    for checkpoint in (run / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) > 4:
            shutil.rmtree(checkpoint)
    # As in a process of its own, whose step functions no other run has compiled.
    monkeypatch.setattr(build, "shared_step_functions", build.own_step_functions)
    happened: list[str] = []
    load_steps = train_module.load_steps
    monkeypatch.setattr(train_module, "load_steps", lambda *a: happened.append("load_steps") or load_steps(*a))

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        # What later steps need is compiled beside the first ones, in another thread.
        if event.endswith("backend_compile_duration") and threading.current_thread() is threading.main_thread():
            happened.append("compiled")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run_train(folder / "restarted" / "run.py", run) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    began = happened.index("load_steps")
    assert happened[:began].count("compiled") >= 2  # so that compiling would have been seen
    assert happened[began:] == ["load_steps"]
    assert_equal_runs(restarted, run, 13)


def test_moments_that_are_carried_on_make_another_update_than_none(restarted: Path, tmp_path: Path) -> None:
    config = two_phases(tmp_path / "carried", RESTART.replace("reset", "carry"))
    assert run_train(config, tmp_path / "carried" / "run") == 0
    carried, reset = (read_metrics(run)[5] for run in (tmp_path / "carried" / "run", restarted))
    assert carried["loss"] == reset["loss"]  # the same weights at the boundary
    assert carried["update_norm"] != pytest.approx(reset["update_norm"], rel=1e-2)


def test_a_schedule_that_goes_on_does_not_start_over(saved_by_the_minute: Path) -> None:
    # One horizon of 9 steps, two of warm-up; the second phase's rate is half the first's.
    factors = [0.5, 1, *(1 - x / 7 for x in range(7))]
    wanted = [(1e-2 if i < 5 else 5e-3) * f for i, f in enumerate(factors)]
    lines = read_metrics(saved_by_the_minute)
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted, rel=1e-5)


def test_a_phase_starts_from_the_best_checkpoint_of_the_one_before(
    restarted: Path, seeded: Path, tmp_path: Path
) -> None:
    lines = read_metrics(seeded)
    scores = [line["eval/phase/knowledge/loss"] for line in lines[:5]]  # at every save, since it is what selects
    assert scores == sorted(scores, reverse=True)  # training helps: the lowest is the last, the highest the first
    wanted = alone(tmp_path / "alone", seeded / "checkpoints" / "1")
    assert [line["loss"] for line in lines[5:]] == pytest.approx([line["loss"] for line in wanted], **SAME)
    from_the_last = read_metrics(restarted)[5]["loss"]
    assert lines[5]["loss"] != pytest.approx(from_the_last, rel=1e-4)


@pytest.mark.slow
def test_run_stopped_at_a_phase_boundary_resumes_like_an_unstopped_run(
    seeded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = two_phases(tmp_path / "parts", SEEDED, WORST)
    write = JsonlWriter.write

    def write_and_stop(self: JsonlWriter, record: Record) -> None:
        write(self, record)
        if record["step"] in (4, 5, 6):  # before the boundary, at it, and after the next phase's first step
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(JsonlWriter, "write", write_and_stop)
    assert [run_train(parts, tmp_path / "parts" / "run") for _ in range(4)] == [75, 75, 75, 0]
    assert_equal_runs(tmp_path / "parts" / "run", seeded, 13)
    assert steps_kept(seeded) == [1, 13]  # the newest, and what seeded the second phase


def test_best_metric_that_no_record_will_have_is_an_error_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_phases(tmp_path / "run", SEEDED, "c.checkpoint.best_metric = 'eval/phase/knowlege/loss'")
    assert run_train(config, tmp_path / "run" / "run") == 2
    err = capsys.readouterr().err
    assert "checkpoint.best_metric" in err and "'eval/phase/knowledge/loss'" in err


@pytest.mark.slow
def test_checkpoints_are_chosen_by_any_number_of_metrics_jsonl(tmp_path: Path) -> None:
    body = "c.checkpoint.every_samples = 8\nc.checkpoint.keep_best = 1\nc.checkpoint.best_metric = 'learning_rate'"
    config = two_phases(tmp_path / "run", "", f"{body}\nc.train.skip_spikes = 100.0\nc.checkpoint.best_mode = 'max'")
    assert run_train(config, tmp_path / "run" / "run") == 0
    lines = read_metrics(tmp_path / "run" / "run")
    scores = {line["step"]: line["learning_rate"] for line in lines}
    best = max(scores, key=scores.__getitem__)  # of equal ones the earlier
    assert steps_kept(tmp_path / "run" / "run") == sorted({best, len(lines)}) and 1 < best < len(lines)


def test_every_number_of_a_line_can_be_chosen_by(restarted: Path) -> None:
    found = {k for line in read_metrics(restarted) for k, v in line.items() if not isinstance(v, str)}
    of_steps = {k for k in found if not k.startswith("eval/")} - {"step"}
    by_source = {f"train/{source}/{name}" for source in ("know", "skill") for name in SOURCE_METRICS}
    assert of_steps == {*STEP_METRICS, *by_source}


def test_phase_seed_from_best_without_any_scored_checkpoint_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "noise_scale", lambda self: NoiseScale())
    body = RISING.replace("eval/phase/knowledge/loss", "noise_scale")
    config = two_phases(tmp_path / "run", SEEDED, body, first=", batch_size=40")  # one step
    assert run_train(config, tmp_path / "run" / "run") == 2
    assert "checkpoint.best_metric is null at each of them" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- held-out loss
def test_held_out_loss_by_source_and_phase_adds_up_to_the_whole(restarted: Path) -> None:
    last = read_metrics(restarted)[-1]
    names = [k for k in last if k.startswith("eval/") and k.endswith("loss")]
    assert names == [
        "eval/loss",
        "eval/macro_loss",
        "eval/held_know/loss",
        "eval/held_skill/loss",
        "eval/phase/knowledge/loss",
        "eval/phase/skills/loss",
    ]
    assert last["eval/phase/knowledge/loss"] == last["eval/held_know/loss"]
    tokens = {n: s["loss_tokens"] for n, s in read_json(restarted, "data_report.json")["validation"].items()}
    whole = sum(last[f"eval/{n}/loss"] * count for n, count in tokens.items()) / sum(tokens.values())
    assert last["eval/loss"] == pytest.approx(whole, rel=1e-6)
    mean = (last["eval/held_know/loss"] + last["eval/held_skill/loss"]) / 2
    assert last["eval/loss"] != pytest.approx(mean, rel=1e-4)  # by tokens, not by sources
    assert last["eval/macro_loss"] == pytest.approx(mean, rel=1e-12)


# ---------------------------------------------------------------------------------------- what is saved and kept
def steps_kept(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def test_checkpoints_are_saved_by_the_minute_and_all_kept(saved_by_the_minute: Path) -> None:
    assert steps_kept(saved_by_the_minute) == list(range(1, 10))


# ---------------------------------------------------------------------------------------- spikes
def test_a_spike_is_skipped_counted_and_leaves_no_trace_but_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_phases(tmp_path / "run", "")
    monkeypatch.setattr(Progress, "spike_threshold", lambda self, factor: 0.0 if self.samples == 16 else float("inf"))
    assert run_train(config, tmp_path / "run" / "run", "--config.train.skip_spikes=5") == 0
    lines = read_metrics(tmp_path / "run" / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, *[1] * 7]
    assert lines[2]["update_norm"] == 0 and lines[2]["param_norm"] == lines[1]["param_norm"]
    assert lines[2]["samples"] == 24 and lines[2]["grad_norm"] > 0
    assert all(line["update_norm"] > 0 for line in lines if line["step"] != 3)
    assert "step 3 makes no update: its gradient norm" in capsys.readouterr().out


def test_without_the_setting_no_step_is_skipped_and_no_line_speaks_of_it(restarted: Path) -> None:
    assert not any("skipped_steps" in line for line in read_metrics(restarted))
    assert Progress().spike_threshold(0.0) == float("inf")


# ---------------------------------------------------------------------------------------- optimizers
FROZEN = ["model.embed_tokens.*", "model.layers.0.*"]


@pytest.mark.slow
def test_muon_trains_on_a_mesh_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With int8 moments and bfloat16 weights, embeddings and one of two layers frozen, and a phase that resets."""
    body = "c.optim.name = 'muon'\nc.optim.learning_rate = 1e-3\nc.optim.weight_decay = 0.1"
    body += "\nc.optim.moments_dtype, c.model.param_dtype = 'int8', 'bfloat16'"
    body += "\nc.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 2, 2"
    body += f"\nc.optim.frozen = {FROZEN}\nc.checkpoint.every_samples = 8"
    config = two_phases(tmp_path / "muon", ", optimizer='reset'", body)
    runs = [tmp_path / name for name in ("whole", "resumed")]
    assert run_train(config, runs[0]) == 0
    shutil.copytree(runs[0], runs[1])
    for step in range(2, 10):
        shutil.rmtree(runs[1] / "checkpoints" / str(step))
    assert run_train(config, runs[1]) == 0
    assert_equal_runs(*runs, 9)
    first, last = arrays(runs[0], 1), arrays(runs[0], 9)
    for key in (k for k in first if k.startswith("params")):
        moved = first[key] != last[key]
        if "embed" in key:
            assert not moved.any()
        elif "layers" in key:
            assert not moved[0].any() and moved[1].any(), key
        else:
            assert moved.any(), key
    assert {str(x.dtype) for k, x in last.items() if k.startswith("params")} == {"bfloat16", "float32"}
    assert {"int8", "uint8"} <= {str(x.dtype) for k, x in last.items() if k.startswith("opt_state")}


def test_runs_of_other_optimizers_and_schedules_share_what_runs_the_model() -> None:
    decoder, mesh = make_decoder(spec_of()), mesh_of(1, 1, 1)
    compute = Compute(jnp.dtype("float32"), "reference", "none")

    def made(**changes: Any) -> StepFunctions:
        config = Config()
        for name, value in changes.items():
            setattr(config.optim, name, value)
        return build.step_functions(config, decoder, "LlamaForCausalLM", mesh, compute)

    one, other = made(), made(name="muon", grad_clip=0.5, weight_decay=0.3, beta2=0.5)
    assert (other.accumulate, other.evaluate, other.zero_sums) == (one.accumulate, one.evaluate, one.zero_sums)
    assert other.apply != one.apply and other.from_params != one.from_params
    assert made(learning_rate=0.5, schedule="cosine", warmup_steps=3) is one
    for changed in ({"frozen": FROZEN}, {"accumulate_dtype": "bfloat16"}):
        assert made(**changed).accumulate != one.accumulate


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "bfloat16") for name in ("adamw", "adafactor", "muon", "lion", "sgd")), ("adamw", "int8")],
)
def test_state_of_each_optimizer_on_a_mesh_is_restored_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """With the embeddings and the first of two layers frozen; nothing is compiled."""
    config = Config()
    config.optim.name, config.optim.moments_dtype, config.optim.frozen = name, dtype, FROZEN
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    fns = build.step_functions(config, make_decoder(spec_of(), 2), "LlamaForCausalLM", mesh_of(2, 2, 2), compute)
    rng = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((100 * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(drawn, fns.abstract_state)
    state = dataclasses.replace(state, step=jax.device_put(np.int32(1), state.step.sharding))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"samples": 8})
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, fns.abstract_state)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    moments = {str(x.dtype) for x in jax.tree.leaves(state.opt_state) if x.size > 10}
    assert moments == ({"bfloat16"} if dtype == "bfloat16" else {"int8", "uint8", "float32"})
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (found.dtype, found.sharding) == (wanted.dtype, wanted.sharding)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
