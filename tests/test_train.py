"""Whole runs through the `train` command: what they learn, leave behind, and how each of their ends looks."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.runs import (
    ENVIRONMENT,
    REPOSITORY,
    Record,
    chat,
    lines_of,
    make_chats,
    make_tokenizer,
    read_json,
    read_metrics,
    run_export,
    run_train,
    setting,
    start_train,
    timeless,
    write_jsonl,
)
from mice_jax import sharding as sharding_module
from mice_jax import train as train_module
from mice_jax.data.packing import Shape, microbatch_shapes
from mice_jax.runtime import cpu_devices
from mice_jax.runtime.cpu_devices import usable_cores
from mice_jax.step import Jitted
from mice_jax.training import build, held_out, start_state, writers
from mice_jax.training.record import SOURCE_METRICS, STEP_METRICS

SAMPLES, EPOCHS, BATCH = 36, 4, 8  # five steps an epoch, the last of four samples
KEYS = {"step", "phase", *STEP_METRICS, *(f"train/chats/{name}" for name in SOURCE_METRICS)}
HELD_OUT = make_chats(12, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    held = write_jsonl(folder / "held.jsonl", HELD_OUT)
    body = f"c.data.phases[0].num_epochs = {EPOCHS}\nc.data.validation = [Source(path='{held}')]"
    return setting(folder, body, samples=SAMPLES)


@pytest.fixture(scope="module")
def workdir(config: Path, folder: Path) -> Path:
    """A run that has been left alone."""
    assert run_train(config, folder / "run") == 0
    return folder / "run"


def counts(record: Record) -> tuple[int, int]:
    """Tokens of a chat, and those that are trained on: each answer's own and the one that ends its turn."""
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(record["messages"], return_dict=False)
    answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
    return len(ids), sum(len(tokenizer(a, add_special_tokens=False).input_ids) + 1 for a in answers)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    found = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns) for f in found}


# ---------------------------------------------------------------------------------------- what it learns
def epoch_losses(workdir: Path) -> list[float]:
    """The loss of each epoch, over all its tokens."""
    losses = []
    lines = [{"loss_tokens": 0}, *read_metrics(workdir)]
    for _, group in itertools.groupby(itertools.pairwise(lines), key=lambda pair: pair[1]["epoch"]):
        weighted = [(b["loss_tokens"] - a["loss_tokens"], b["loss"]) for a, b in group]
        losses.append(sum(w * x for w, x in weighted) / sum(w for w, _ in weighted))
    return losses


def test_the_loss_falls_on_repeated_data(workdir: Path, config: Path, tmp_path: Path) -> None:
    losses = epoch_losses(workdir)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(300), rel=0.2)  # a model that knows nothing, then learns a little
    assert losses[-1] < 0.8 * losses[0]
    # Without a learning rate it does not fall: each epoch is the same samples in other steps.
    flags = ["--config.optim.learning_rate=0", "--config.optim.max_steps=10"]
    assert run_train(config, tmp_path / "still", *flags) == 0
    first, second = epoch_losses(tmp_path / "still")
    assert first == pytest.approx(second, rel=1e-5)


def test_the_held_out_loss_is_that_of_the_exported_weights_in_torch(workdir: Path, tmp_path: Path) -> None:
    assert run_export(workdir, tmp_path / "hf", "--dtype=float32") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = make_tokenizer()
    sums, weights, whole = [], [], []
    for record in HELD_OUT:
        ids = torch.tensor([tokenizer.apply_chat_template(record["messages"], return_dict=False)])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        # The answer, its end, and last the newline that the template writes, which is not trained on.
        count = counts(record)[1]
        sums.append(float(losses[-count - 1 : -1].sum()))
        weights.append(count)
        whole.append(float(losses.mean()))
    last = read_metrics(workdir)[-1]
    expected = sum(sums) / sum(weights)
    assert last["eval/loss"] == pytest.approx(expected, rel=1e-5)  # float32 over some 40 tokens a sample
    assert last["eval/held/loss"] == last["eval/loss"]
    # Neither a mean of means nor the loss over all tokens is within that.
    assert np.mean([s / w for s, w in zip(sums, weights, strict=True)]) != pytest.approx(expected, rel=1e-3)
    assert np.mean(whole) != pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------- what it leaves
def test_metrics_have_a_line_a_step_with_exactly_the_contract_s_keys(workdir: Path) -> None:
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(line.keys() == KEYS for line in lines[:-1])
    evaluated = {"loss", "macro_loss", "held/loss", "token_accuracy", "held/token_accuracy"}
    assert lines[-1].keys() == KEYS | {f"eval/{name}" for name in evaluated}
    assert {line["phase"] for line in lines} == {"stacked"}
    assert [line["epoch"] for line in lines] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2] * 20)
    for line in lines:
        assert 0 < line["slot_efficiency"] <= 1 and line["num_microbatches"] >= 1
        assert min(line[k] for k in ("loss", "grad_norm", "param_norm", "update_norm", "step_time_s")) > 0
        of_source = [line[f"train/chats/{name}"] for name in SOURCE_METRICS]  # of the only source, chats.jsonl
        assert of_source == pytest.approx([line[name] for name in SOURCE_METRICS], rel=1e-6)


def test_counts_are_cumulative_and_those_made_by_hand(workdir: Path) -> None:
    lines = read_metrics(workdir)
    sizes = [8, 8, 8, 8, 4] * EPOCHS
    assert [line["samples"] for line in lines] == list(itertools.accumulate(sizes))
    by_hand = [counts(record) for record in make_chats(SAMPLES)]
    tokens, loss_tokens = (sum(column) for column in zip(*by_hand, strict=True))
    ends = lines[4::5]
    assert [line["tokens"] for line in ends] == [tokens * (e + 1) for e in range(EPOCHS)]
    assert [line["loss_tokens"] for line in ends] == [loss_tokens * (e + 1) for e in range(EPOCHS)]


def test_the_summary_says_how_it_ended(workdir: Path) -> None:
    summary = read_json(workdir, "summary.json")
    assert (summary["status"], summary["reason"], summary["step"]) == ("completed", "", 20)
    assert summary["samples"] == SAMPLES * EPOCHS
    assert summary["last_metrics"] == read_metrics(workdir)[-1]
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["command"]


def test_the_data_report_counts_by_source(workdir: Path) -> None:
    report = read_json(workdir, "data_report.json")
    tokens, loss_tokens = (sum(column) for column in zip(*map(counts, make_chats(SAMPLES)), strict=True))
    source = report["sources"]["chats"]
    assert {k: source[k] for k in ("read", "kept", "dropped", "truncated", "tokens", "loss_tokens")} == {
        "read": SAMPLES,
        "kept": SAMPLES,
        "dropped": {},
        "truncated": 0,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
    }
    assert report["validation"]["held"]["kept"] == len(HELD_OUT)
    assert report["steps"] == 20 and 0 < report["packing_efficiency_of_first_steps"] <= 1


def test_the_config_is_kept_with_what_was_chosen(workdir: Path) -> None:
    kept = read_json(workdir, "config.json")
    assert kept["optim"]["batch_size"] == BATCH and kept["optim"]["beta2"] == 0.95
    assert kept["data"]["phases"][0]["num_epochs"] == EPOCHS
    assert kept["resolved"]["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert kept["resolved"]["compute_dtype"] == "float32"


def test_the_end_is_always_saved(workdir: Path) -> None:
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["20"]
    assert list(workdir.glob("tensorboard/events*"))
    assert not list(workdir.glob(".*partial"))


def test_a_complete_run_run_again_changes_nothing(workdir: Path, config: Path) -> None:
    def stable(folder: Path) -> dict[str, tuple[int, int]]:
        return {k: v for k, v in files(folder).items() if k.startswith("checkpoints")}

    before = stable(workdir), (workdir / "metrics.jsonl").read_bytes(), read_json(workdir, "summary.json")
    assert run_train(config, workdir) == 0
    after = read_json(workdir, "summary.json")
    assert (stable(workdir), (workdir / "metrics.jsonl").read_bytes()) == before[:2]
    for key in ("status", "reason", "step", "samples", "last_metrics"):
        assert after[key] == before[2][key]


def test_saves_and_evaluations_follow_the_first_step_past_each_multiple(
    workdir: Path, config: Path, tmp_path: Path
) -> None:
    every = ["--config.checkpoint.every_samples=20", "--config.eval.every_samples=30", "--config.optim.max_steps=10"]
    assert run_train(config, tmp_path / "run", *every) == 0
    lines = read_metrics(tmp_path / "run")
    # Samples after each step: 8 16 24 32 36 | 44 52 60 68 72.
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [3, 6, 8, 10]
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8, 10]
    assert read_json(tmp_path / "run", "summary.json")["status"] == "completed"
    # They change no step, and neither does a second run.
    trained = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in timeless(lines)]
    assert trained == timeless(read_metrics(workdir)[:10])


def test_a_run_can_start_from_another_run(workdir: Path, config: Path, tmp_path: Path) -> None:
    flags = [f"--config.model.init_from={workdir}", "--config.optim.max_steps=1", "--config.optim.learning_rate=0"]
    assert run_train(config, tmp_path / "next", *flags) == 0
    (line,) = read_metrics(tmp_path / "next")
    assert line["eval/loss"] == pytest.approx(read_metrics(workdir)[-1]["eval/loss"], rel=1e-6)


def test_start_up_output_names_dropped_held_out_data_and_escapes_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_jsonl(tmp_path / "held [bold].jsonl", [*HELD_OUT, chat("long", "mice " * 200)])
    config = setting(tmp_path, f"c.data.validation = [Source(path={str(held)!r})]")
    assert run_train(config, tmp_path / "run", "--config.optim.max_steps=1") == 0
    said = capsys.readouterr().out
    assert "held [bold], held out: 1 of its" in said and "samples is dropped" in said


# ---------------------------------------------------------------------------------------- compilation
@pytest.mark.slow
def test_training_of_all_shapes_compiles_nothing_after_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    make_step = build.make_step
    monkeypatch.setattr(build, "make_step", lambda *a, **k: made.append(make_step(*a, **k)) or made[0])
    monkeypatch.setattr(build, "shared_step_functions", build.own_step_functions)
    accumulated: dict[str, set[Shape]] = {"compile": set(), "__call__": set()}

    def note(name: str) -> None:
        f = getattr(Jitted, name)

        def noted(self: Jitted, *args: Any) -> Any:
            if made and self is made[0].accumulate:
                rows, slots = args[2]["tokens"].shape
                accumulated[name].add(Shape(rows // jax.device_count(), slots))
            return f(self, *args)

        monkeypatch.setattr(Jitted, name, noted)

    note("compile")
    note("__call__")
    happened: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            happened.append("compiled" if threading.current_thread() is threading.main_thread() else "beside")

    def say(module: Any, name: str) -> None:
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: happened.append(name) or f(*a, **k))

    say(train_module, "load_steps")
    say(held_out, "evaluate")
    held = write_jsonl(tmp_path / "held.jsonl", HELD_OUT)
    body = f"c.data.max_length = 512\nc.train.rows_per_device = 2\nc.data.validation = [Source(path='{held}')]"
    # Chats are of some 38 tokens and a largest microbatch has 8,192 slots: steps of 250 take one and a small one, the
    # last of an epoch, of 130, two small ones.
    config = setting(tmp_path, body + "\nc.optim.batch_size = 250\nc.data.phases[0].num_epochs = 3.0", samples=380)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run_train(config, tmp_path / "run", "--config.eval.every_samples=600") == 0
        began = happened.index("load_steps")
        assert happened[:began].count("compiled") > 5  # so that compiling would have been seen
        assert [e for e in happened[began:] if e != "beside"] == ["load_steps", "evaluate", "evaluate"]
        assert happened.count("beside") == 2  # the shapes that only the last step of an epoch has
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    (fns,) = made
    shapes = set(microbatch_shapes(512, 2))
    assert accumulated == {"compile": shapes, "__call__": shapes}
    assert fns.accumulate.jitted._cache_size() == len(shapes) == 4
    assert 1 <= fns.evaluate.jitted._cache_size() <= 6
    assert fns.apply.jitted._cache_size() == fns.zero_sums.jitted._cache_size() == 1
    assert read_metrics(tmp_path / "run")[-1]["epoch"] == 2


def test_next_batch_is_sent_to_devices_before_metrics_are_awaited(
    workdir: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    put_rows, device_get = sharding_module.put_rows, jax.device_get
    monkeypatch.setattr(sharding_module, "put_rows", lambda *a: happened.append("put") or put_rows(*a))

    def get(x: Any) -> Any:
        happened.append("await")
        return device_get(x)

    monkeypatch.setattr(jax, "device_get", get)
    assert run_train(config, tmp_path / "run", "--config.optim.max_steps=3", "--config.seed=1") == 0
    assert read_metrics(tmp_path / "run")[0]["loss"] != read_metrics(workdir)[0]["loss"], "another seed, another run"
    steps = [line["num_microbatches"] for line in read_metrics(tmp_path / "run")]
    order = "".join(x[0] for x in happened).lstrip("a")  # without the held-out loss before the first step
    assert order.startswith("p" * (steps[0] + steps[1]) + "a" + "p" * steps[2] + "a")


@pytest.mark.slow
def test_cpu_is_split_by_default_and_another_number_resumes(workdir: Path, config: Path, tmp_path: Path) -> None:
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "mice_jax.train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.train.pause_at_share=0.2"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    count = min(usable_cores(), cpu_devices.MOST, BATCH)
    assert done.returncode == 75 and cpu_devices.describe(count) in " ".join(done.stdout.split()), done
    assert read_json(tmp_path / "run", "config.json")["resolved"]["mesh"] == {"data": 1, "fsdp": count, "tensor": 1}
    assert run_train(config, tmp_path / "run") == 0  # on eight devices
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(workdir)
    assert [r["samples"] for r in ours] == [r["samples"] for r in theirs]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-6)


def test_an_implicit_transfer_within_a_step_fails(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that stay on the host would be sent by the compiled function, while the devices wait.
    monkeypatch.setattr(sharding_module, "put_rows", lambda rows, mesh: dict(rows))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run_train(config, tmp_path / "run")


# ---------------------------------------------------------------------------------------- ends
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config.optim.learning_rate=1e30", "--config.checkpoint.every_samples=8"]
    run = tmp_path / "run"
    for _ in range(2):  # the second time from the checkpoint
        assert run_train(config, run, *flags) == 3
        err = capsys.readouterr().err
        said = err[err.index("stopped: ") :]
        assert said.count("\n") == 1 and "step 2 is not finite" in said and str(run / "checkpoints" / "1") in said
        summary = read_json(run, "summary.json")
        assert (summary["status"], summary["step"], summary["samples"]) == ("stopped", 1, 8)
        assert f"stopped: {summary['reason']}\n" == said
        assert [line["step"] for line in read_metrics(run)] == [1]
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["1"]


def test_a_first_step_that_is_not_finite_leaves_the_weights_as_they_were(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = start_state.load_params

    def broken(*args: Any, **keys: Any) -> Any:
        params = load(*args, **keys)
        down = params["layers"]["mlp"]["down"]
        params["layers"]["mlp"]["down"] = jax.device_put(down.at[1, 0].set(np.nan), down.sharding)
        return params

    monkeypatch.setattr(start_state, "load_params", broken)
    assert run_train(config, tmp_path / "run", "--debug_nans") == 3
    said = capsys.readouterr().err
    assert "step 1 is not finite" in said and "layers.mlp.down of layer 1." in said
    summary = read_json(tmp_path / "run", "summary.json")
    assert (summary["status"], summary["samples"], summary["last_metrics"]) == ("stopped", 0, {})
    assert read_metrics(tmp_path / "run") == []


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A workdir that another live process has."""
    code = "import sys, time; from pathlib import Path; from mice_jax.storage.workdir import Workdir\n"
    code += "run = Workdir(Path(sys.argv[1])); run.lock(); print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path / "held")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield tmp_path / "held"
        process.kill()


def test_a_workdir_that_another_live_process_writes_is_refused(
    config: Path, held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(held)
    assert run_train(config, held) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --workdir={held} is being written by another live process (process ")
    assert err.count("\n") == 1 and files(held) == before


def test_a_refused_run_gives_back_its_signals_and_its_lock(config: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    for steps, code in ((1, 0), (2, 2), (1, 0)):  # a complete run is not lengthened
        assert run_train(config, tmp_path / "run", f"--config.optim.max_steps={steps}") == code
        assert [signal.getsignal(n) for n in numbers] == before


def test_a_run_that_is_asked_to_leave_saves_and_goes_on_as_if_it_had_not(
    workdir: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, write = tmp_path / "run", writers.JsonlWriter.write

    def ask(self: writers.JsonlWriter, record: Record) -> None:
        write(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(writers.JsonlWriter, "write", ask)
        assert run_train(config, run) == 75
    err = capsys.readouterr().err
    assert "interrupted: SIGINT after step 7" in err
    summary = read_json(run, "summary.json")
    assert (summary["status"], summary["step"]) == ("preempted", 7) and "SIGINT" in summary["reason"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["7"]
    assert run_train(config, run) == 0
    assert timeless(read_metrics(run)) == timeless(read_metrics(workdir))
    assert read_json(run, "summary.json")["status"] == "completed"


def test_signal_before_the_first_step_ends_the_run_with_exit_code_75(config: Path, tmp_path: Path) -> None:
    process = start_train(config, tmp_path / "run")
    try:
        while not (tmp_path / "run" / "lock").exists():  # data, model and compiling are still to come
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)  # as Slurm does
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and "preempted: SIGUSR1 before the first step" in said.splitlines()[-1], said
    assert "Traceback" not in said and not lines_of(tmp_path / "run")


LEAVING = """
import os, signal, sys, threading, time
import orbax.checkpoint as ocp
from mice_jax import train
from mice_jax.training import writers
write = writers.JsonlWriter.write
def ask(self, record):
    write(self, record)
    if record["step"] == 7:
        threading.Thread(target=time.sleep, args=[600]).start()  # as the one that writes
        ocp.CheckpointManager.wait_until_finished = lambda self: time.sleep(600)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]).start()
writers.JsonlWriter.write = ask
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_second_sigint_exits_at_once_and_leaves_the_last_checkpoint_whole(
    workdir: Path, config: Path, tmp_path: Path
) -> None:
    """The save that goes on as the first comes never ends."""
    run, every = tmp_path / "run", "--config.checkpoint.every_samples=16"
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", LEAVING, f"--config={config}", f"--workdir={run}", every]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 and done.stderr.splitlines()[-1].startswith("stopped at once, without saving"), done
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert steps and steps[-1] < 7  # nothing was saved for it
    assert len(read_metrics(run)) == 7
    assert run_train(config, run, every) == 0
    assert timeless(read_metrics(run)) == timeless(read_metrics(workdir))


def test_a_failure_of_our_own_keeps_its_traceback_and_is_in_the_summary(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: writers.JsonlWriter, record: Record) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writers.JsonlWriter, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        run_train(config, tmp_path / "run")
    summary = read_json(tmp_path / "run", "summary.json")
    assert summary["status"] == "failed" and "no space left" in summary["reason"]
    json.dumps(summary)
