"""Benchmarks in training and of a run's checkpoints: the same numbers from memory, checkpoint and export."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.utils import handle_non_serializable

from helpers.forked import ForkedCommand, fork_train
from helpers.runs import (
    arrays,
    place_flags,
    read_json,
    read_metrics,
    run_export,
    run_train,
    run_verb,
    setting,
)
from helpers.tasks import CHOICE, FRAGILE, WRITTEN, by_us, write_fragile, write_tasks
from mice_jax import evaluate
from mice_jax.evals import benchmarks

# Sums of float32 log-probabilities over one mesh, or none.
CLOSE = 1e-4


def body(tasks: Path, *names: str) -> str:
    return f"""
c.eval.tasks = {list(names)}
c.eval.include_path = "{tasks}"
c.eval.every_samples = 16
c.checkpoint.every_samples = 16
c.checkpoint.best_metric = "eval/{CHOICE}/brier_score"
c.checkpoint.keep_best = 1
c.checkpoint.keep_last = 9
"""


def scores_of(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix) and "/" in k}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=8, longest=30)


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory, tasks: Path) -> Path:
    """A run of five steps whose benchmarks are scored after steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert run_train(setting(folder, body(tasks, CHOICE, WRITTEN)), folder / "run") == 0
    return folder / "run"


@pytest.mark.slow
def test_scores_in_training_equal_those_of_checkpoints_and_export(
    evaluated_run: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = evaluated_run
    lines = {r["step"]: scores_of(r, "eval/") for r in read_metrics(run)}
    assert [step for step, found in lines.items() if found] == [2, 4, 5]
    names = {f"{CHOICE}/acc", f"{CHOICE}/acc_norm", f"{CHOICE}/brier_score"}
    assert lines[5].keys() == names | {f"{WRITTEN}/exact_match", f"{WRITTEN}/exact_match,first-word"}
    assert len({found[f"{CHOICE}/brier_score"] for found in lines.values() if found}) == 3

    assert run_export(run, tmp_path / "hf") == 0
    exported = by_us(tmp_path / "hf", tasks, tmp_path / "hf.json", CHOICE, WRITTEN)
    assert benchmarks.scores(exported) == pytest.approx(lines[5], abs=CLOSE)

    capsys.readouterr()
    curve = by_us(run, tasks, tmp_path / "run.json", CHOICE, WRITTEN, flags=("--all_checkpoints",))
    said = capsys.readouterr().out
    left = [json.loads(line) for line in (run / "eval_scores.jsonl").read_text().splitlines()]
    assert [(x["step"], x["samples"]) for x in left] == [(2, 16), (4, 32), (5, 40)] and curve["checkpoints"] == left
    for line in left:
        assert scores_of(line) == pytest.approx(lines[line["step"]], abs=CLOSE)
    assert benchmarks.scores(curve) == scores_of(left[-1])
    brier = f"{CHOICE}/brier_score"
    best = min(left, key=lambda x: x[brier])
    before = max((x["samples"] for x in left if x["step"] < best["step"]), default=0)
    word = f"best {best[brier]:.4f} at step {best['step']}, reached after {before} to {best['samples']} samples"
    assert word in said

    # A checkpoint may have no score of MT-Bench, if its judge gave none.
    files = {name: (run / name).read_text() for name in ("eval_scores.jsonl", "eval_directions.json")}
    assert json.loads(files["eval_directions.json"]) == {
        f"{CHOICE}/acc": "max", f"{CHOICE}/acc_norm": "max", f"{CHOICE}/brier_score": "min",
        f"{WRITTEN}/exact_match": "max", f"{WRITTEN}/exact_match,first-word": "max",
    }  # fmt: skip
    judged = {
        step: {
            "results": {"mt_bench": {"score,none": score}},
            "higher_is_better": {"mt_bench": {"score": True}},
        }
        for step, score in {2: None, 4: None, 5: 7.5}.items()
    }
    said, _ = evaluate._curve(run, judged)
    assert said == [
        "mt_bench/score: best 7.5000 at step 5, reached after 0 to 40 samples (between these two checkpoints)"
    ]
    said, _ = evaluate._curve(run, judged | {2: judged[5], 5: judged[4]})
    assert "at step 2, reached after 0 to 16 samples" in said[0]
    for name, text in files.items():
        (run / name).write_text(text)

    # Results are cached by weights, settings and documents.
    monkeypatch.setattr(benchmarks, "score", None)
    assert by_us(run, tasks, tmp_path / "again.json", CHOICE, WRITTEN, flags=("--all_checkpoints",)) == curve
    with pytest.raises(TypeError):
        by_us(run, tasks, tmp_path / "fewer.json", CHOICE, flags=("--limit=3",))
    data = tasks / "data.jsonl"
    documents = data.read_text()
    data.write_text(documents.replace("mice", "cats"))
    with pytest.raises(TypeError):
        by_us(run, tasks, tmp_path / "other.json", CHOICE, WRITTEN)
    data.write_text(documents)


def test_results_are_written_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": np.float32(0.5), "b": np.bool_(True), "c": {3}, "d": [np.int64(7)], "e": Path("x")}
    wanted = json.loads(json.dumps(values, default=handle_non_serializable))
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert json.loads(evaluate._text(values)) == wanted == {"a": 0.5, "b": True, "c": [3], "d": [7], "e": "x"}


def test_best_metric_must_be_one_of_the_tasks(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = body(tasks, CHOICE).replace("brier_score", "brier")
    assert run_train(setting(tmp_path / "a", wrong), tmp_path / "run") == 2
    assert f"did you mean 'eval/{CHOICE}/brier_score'?" in capsys.readouterr().err


@pytest.mark.slow
def test_failing_task_ends_a_run_with_its_step_saved(
    evaluated_run: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switch = write_fragile(tasks)
    how = f"""
c.eval.tasks = ["{CHOICE}", "{FRAGILE}"]
c.eval.include_path = "{tasks}"
c.eval.every_samples = 16
"""
    config, run = setting(tmp_path, how), tmp_path / "run"
    switch.touch()
    assert run_train(config, run) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    assert f"the task '{FRAGILE}' cannot be scored: its own code raises KeyError, 'a column of" in error
    assert f"saved in {run / 'checkpoints' / '2'}, without" in error
    assert read_json(run, "summary.json") | {"status": "failed", "step": 2} == read_json(run, "summary.json")
    found = scores_of(read_metrics(run)[-1], "eval/")
    assert f"{CHOICE}/acc" in found and f"{FRAGILE}/acc" not in found  # the results before the failure are written
    assert (run / "checkpoints" / "2").is_dir()

    switch.unlink()
    assert run_train(config, run) == 0
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert f"{FRAGILE}/acc" in scores_of(read_metrics(run)[-1], "eval/")
    # The resumed run equals one that never failed; benchmarks do not change what is trained.
    left, right = arrays(run, 5), arrays(evaluated_run, 5)
    assert all(left[name].tobytes() == right[name].tobytes() for name in right)

    switch.touch()
    assert run_verb(evaluate.main, [f"--model={run}", f"--include_path={tasks}", f"--tasks={FRAGILE}",
                                    f"--output={tmp_path / 'x.json'}"]) == 2  # fmt: skip
    assert f"the task '{FRAGILE}' cannot be scored" in capsys.readouterr().err
    switch.unlink()


def test_unsupported_task_settings_are_an_error_before_a_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks", documents=4)
    file, text = tasks / f"{WRITTEN}.yaml", (tasks / f"{WRITTEN}.yaml").read_text()
    for i, (wish, words) in enumerate(
        [
            ("max_gen_toks: 2048", "asks for answers of max_gen_toks=2048 tokens, which leave no room"),
            ("num_beams: 3", "num_beams=3, which is not supported"),
        ]
    ):
        file.write_text(text.replace("max_gen_toks: 24", wish))
        assert run_train(setting(tmp_path / str(i), body(tasks, CHOICE, WRITTEN)), tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert f"the task '{WRITTEN}': it" in error and words in error
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


CHAT = """
c.eval.num_fewshot, c.eval.limit, c.eval.apply_chat_template, c.eval.system_instruction = 2, 5, True, "Be a mouse."
c.mesh = Mesh(data=2, fsdp=2, tensor=2)
one, two = c.data.phases[0], Phase(name="second", seed_from="best", sources=c.data.phases[0].sources)
c.data.phases = [one, two]
c.checkpoint.every_samples, c.checkpoint.keep_last = 24, 1
c.checkpoint.best_mode = "max"  # of a score that training lowers, so that the best is neither the last nor a saved one
"""


@pytest.mark.slow
def test_best_checkpoint_by_a_task_is_kept_and_starts_the_next_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a mesh with a tensor axis, with examples and a system message in a chat template."""
    tasks, run, metric = write_tasks(tmp_path / "tasks", documents=8, longest=30), tmp_path / "run", "brier_score"
    assert run_train(setting(tmp_path, body(tasks, CHOICE) + CHAT), run) == 0
    said = capsys.readouterr().out
    found = {r["step"]: r.get(f"eval/{CHOICE}/{metric}") for r in read_metrics(run)}
    saved = [3, 5, 6, 9, 10]  # at 24, 48 and 72 samples, at the end of the first phase, and at the end
    assert [step for step, value in found.items() if value is not None] == [2, 3, 4, 5, 6, 8, 9, 10]
    known = {step: value for step, value in found.items() if value is not None}
    seed, best = (max(steps, key=lambda s: known[s]) for steps in ([3, 5], saved))
    assert f"the phase 'second' starts from step {seed}, the best of 'stacked'" in said
    assert len(set(known.values())) == len(known) and max(known, key=lambda s: known[s]) == 2 and seed == 3
    assert {int(p.name) for p in (run / "checkpoints").iterdir()} == {seed, best, 10} != set(saved)

    flags = ("--num_fewshot=2", "--limit=5", "--apply_chat_template", "--system_instruction=Be a mouse.")
    for step in {seed, best, 10}:
        assert run_export(run, tmp_path / f"hf{step}", f"--step={step}") == 0
        exported = by_us(tmp_path / f"hf{step}", tasks, tmp_path / "hf.json", CHOICE, flags=flags)
        assert benchmarks.scores(exported)[f"{CHOICE}/{metric}"] == pytest.approx(found[step], abs=CLOSE)
    bare = by_us(tmp_path / "hf10", tasks, tmp_path / "bare.json", CHOICE, flags=flags[:2])
    assert benchmarks.scores(bare)[f"{CHOICE}/{metric}"] != pytest.approx(found[10], abs=10 * CLOSE)


@pytest.mark.slow
def test_two_processes_score_what_one_process_scores(tmp_path: Path) -> None:
    tasks, model, names = write_tasks(tmp_path / "tasks", documents=8, longest=30), tmp_path / "run", (CHOICE, WRITTEN)
    config = setting(tmp_path, body(tasks, *names), samples=16)
    training = [fork_train(config, model, *place, devices=2) for place in place_flags(2)]
    told = [process.communicate(timeout=500)[0] for process in training]
    assert [process.returncode for process in training] == [0, 0], told
    alone = by_us(model, tasks, tmp_path / "alone.json", *names)
    line = scores_of(read_metrics(model)[-1], "eval/")
    assert benchmarks.scores(alone) == pytest.approx(line, abs=CLOSE) and len(line) == 5
    flags = [f"--model={model}", f"--include_path={tasks}", f"--tasks={CHOICE}", "--log_samples"]
    environment = os.environ | {"MICE_JAX_CACHE": str(tmp_path / "another")}  # else nothing would be scored again
    output = f"--output={tmp_path / 'both.json'}"
    both = [ForkedCommand("evaluate", [*flags, output, *place], 2, environment) for place in place_flags(2)]
    said = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "results in" in said[0] and "results in" not in said[1]
    together = read_json(tmp_path, "both.json")
    expected = {name: score for name, score in benchmarks.scores(alone).items() if name.startswith(f"{CHOICE}/")}
    assert benchmarks.scores(together) == pytest.approx(expected, rel=CLOSE)
    documents = [[sample["doc_id"] for sample in found["samples"][CHOICE]] for found in (alone, together)]
    assert documents[0] == documents[1]
