"""The report: its content, what damaged files leave of it, and that a browser draws it."""

import csv
import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.runs import run_verb, write_jsonl
from mice_jax import report
from mice_jax.config import Config, Phase, Published, Source, to_dict
from mice_jax.report_page import content, downsample, equal_views, frontier, page, read_runs
from mice_jax.training.stop_rules import ColumnarRecords

HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>\'&amp;'


# ---------------------------------------------------------------------------------------- runs without training
def make_config(rate: float = 1e-2, batch: int = 8, seed: int = 0, source: str = "chats") -> Config:
    c = Config()
    c.model.init_from = "models/mouse"
    c.optim.learning_rate, c.optim.batch_size, c.seed = rate, batch, seed
    c.data.phases = [Phase(sources=[Source(path="chats.jsonl", name=source)])]
    return c


def write_run(
    folder: Path, config: Config, steps: int = 60, status: str = "completed", reason: str = "", phase: str = "one"
) -> float:
    """Writes the folder of a run that never ran; returns its last held-out loss. A higher rate learns faster."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([config.seed, steps, int(1e6 * config.optim.learning_rate)])
    batch, lines, held = config.optim.batch_size, [], math.nan
    for step in range(1, steps + 1):
        loss = 2.0 + 3.0 * math.exp(-8 * config.optim.learning_rate * step * batch / 8) + 0.05 * rng.normal()
        norm = 1.0 + abs(rng.normal())
        line = {"step": step, "phase": phase, "epoch": 0, "samples": batch * step, "tokens": 90 * step, "loss": loss}
        line |= {"grad_norm": norm, "grad_sq_corrected": norm**2 - 1 if step % 2 else None, "noise_scale": 30.0}
        line |= {"learning_rate": config.optim.learning_rate, "update_norm": 0.1, "param_norm": 9.0, "mfu": None}
        line |= {"slot_efficiency": 0.9, "tokens_per_s": 1e4 + step, "step_time_s": 0.5}
        if step % 20 == 0 or step == steps:
            held = loss + 0.1
            line |= {"eval/loss": held, "eval/chats/loss": held}
        lines.append(line)
    write_jsonl(folder / "metrics.jsonl", lines)
    whole = to_dict(config) | {"resolved": {"attention": "plain"}, "provenance": {"config_file": "run.py"}}
    (folder / "config.json").write_text(json.dumps(whole))
    summary = {"status": status, "reason": reason, "step": steps, "last_metrics": lines[-1], "command": ["mice", "x"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    entry = {"read": 50, "kept": 48, "dropped": {"no trained token": 2}, "set_aside": {}, "truncated": 0}
    entry |= {"duplicates": 1, "tokens": 1000, "loss_tokens": 400, "length_percentiles": {"50": 20, "100": 90}}
    phases = [{"name": phase, "epochs": [{"steps": 60, "samples": 60 * batch, "by_source": {}}]}]
    (folder / "data_report.json").write_text(
        json.dumps({"sources": {config.data.phases[0].sources[0].name: entry}, "phases": phases, "steps": 60})
    )
    for step in (20, 40):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return held


RATE, BATCH = "optim.learning_rate", "optim.batch_size"


def write_sweep(folder: Path, hostile: str = "") -> Path:
    """Writes a grid of 3 rates by 2 batch sizes with 2 seeds, of which one trial is stopped and one waits."""
    grid = [(r, b, s) for r in (1e-3, 3e-3, 1e-2) for b in (4, 8) for s in (0, 1)]
    rows = []
    for number, (rate, batch, seed) in enumerate(grid):
        row = {"number": number, RATE: rate, BATCH: batch, "seed": seed, "status": "completed", "reason": ""}
        if number == 11:
            rows.append(row | {"status": "waiting", "metric": ""})
            continue
        stopped = number == 0
        reason = f"worse than its siblings {hostile}" if stopped else ""
        status = "stopped" if stopped else "completed"
        config = make_config(rate, batch, seed, hostile or "chats")
        held = write_run(folder / "runs" / str(number), config, 15 if stopped else 60, status, reason, hostile or "one")
        rows.append(row | {"status": status, "metric": "" if stopped else held, "reason": reason})
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["number", RATE, BATCH, "seed", "status", "metric", "reason"])
        writer.writeheader()
        writer.writerows(rows)
    about = {"axes": "{}", "metric": "'eval/loss'", "mode": "'min'", "stop": "'median'"}
    (folder / "sweep.json").write_text(json.dumps({"base": {}, "sweep": about, "study": "x"}))
    return folder


def content_of(file: Path) -> dict[str, Any]:
    """The content that a page was given to draw."""
    [block] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    return json.loads(block)


def page_of(tmp_path: Path, *folders: Path) -> dict[str, Any]:
    page.write(folders, tmp_path / "page.html")
    return content_of(tmp_path / "page.html")


# ---------------------------------------------------------------------------------------- downsampling
def test_downsampled_curve_keeps_its_ends_and_every_extreme() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    values[[777, 4001]], values[1234] = (50.0, -60.0), math.nan
    kept = downsample.extremes(values, 200)
    assert len(kept) <= 200 and list(kept) == sorted(set(kept)) and {0, 777, 4001, 4999} <= set(kept)
    for part in np.array_split(np.arange(5000), 50):  # each fiftieth keeps its own extremes, up to one stretch
        inside = values[kept[(kept >= part[0]) & (kept <= part[-1])]]
        assert inside.max() >= np.sort(values[part])[-60] and not np.isnan(inside).any()
    assert not {777, 4001} <= set(range(0, 5000, 25)), "every 25th step would lose both"
    assert list(downsample.extremes(np.array([1.0, math.nan, 2.0]), 9)) == [0, 2]


def test_mean_curve_averages_stretches_of_equal_length() -> None:
    values = np.array([1.0, 3.0, math.nan, 5.0, 7.0, 9.0, math.nan, math.nan])
    assert downsample.means(values, 4) == pytest.approx([2.0, 5.0, 8.0, math.nan], nan_ok=True)
    assert downsample.means(values, 99) == pytest.approx(values, nan_ok=True)
    assert len(downsample.means(np.zeros(0), 4)) == 0


# ---------------------------------------------------------------------------------------- content
def test_sweep_page_agrees_with_results_csv(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    assert run_verb(report.main, [f"--workdir={folder}"]) == 0
    data = content_of(folder / "report.html")
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert data["fields"] == {RATE: "learning_rate", BATCH: "batch_size"} and data["stop"] == "median"
    assert [r["name"] for r in data["runs"]] == [r["number"] for r in rows]
    for run, row in zip(data["runs"], rows, strict=True):
        assert run["status"] == row["status"] and run["reason"] == row["reason"]
        assert run["fields"] == {RATE: float(row[RATE]), BATCH: int(row[BATCH])} and run["seed"] == int(row["seed"])
        assert run["metric"] == (pytest.approx(float(row["metric"]), rel=1e-4) if row["metric"] else None)
    [best] = [r["name"] for r in data["runs"] if r["best"]]
    assert best == min((r for r in rows if r["metric"]), key=lambda r: float(r["metric"]))["number"]
    assert len({r["group"] for r in data["runs"]}) == 6, "seeds are one group"
    ended = sum((60, 15)[r == 0] * data["runs"][r]["fields"][BATCH] for r in range(11))
    planned = sum(60 * data["runs"][r]["fields"][BATCH] for r in range(11))
    assert data["saved"] == pytest.approx(1 - ended / planned)
    evidence = data["evidence"]
    assert evidence["left_out"] == 2 and set(evidence["groups"]) == {"all", "batch 4", "batch 8"}
    assert evidence["groups"]["all"]["runs"] == 10
    assert evidence["groups"]["all"]["rules"]["MedianRule"]["10%"]["runs"] == 10
    assert -1 <= evidence["groups"]["all"]["signals"]["loss"]["50%"]["low"] <= 1
    assert {d["name"] for d in data["config"]["differing"]} >= {BATCH, RATE, "seed"}


def test_page_of_two_runs_lists_differing_fields_and_shared_ones_once(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-3), ("b", 1e-2)):
        write_run(tmp_path / name, make_config(rate))
    data = page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    assert data["fields"] == {RATE: "learning_rate"} and [r["name"] for r in data["runs"]] == ["a", "b"]
    assert data["config"]["differing"] == [{"name": RATE, "values": [1e-3, 1e-2]}]
    assert BATCH in {f["name"] for f in data["config"]["fields"]} and [r["best"] for r in data["runs"]] == [False, True]
    assert data["evidence"] is None, "two runs are too few to measure signals"


def test_runs_with_equal_names_are_named_by_their_folders(tmp_path: Path) -> None:
    for name in ("x/run", "y/run"):
        write_run(tmp_path / name, make_config())
    assert [r["name"] for r in page_of(tmp_path, tmp_path / "x/run", tmp_path / "y/run")["runs"]] == ["x/run", "y/run"]


def test_page_shows_checkpoint_scores_and_published_numbers(tmp_path: Path) -> None:
    config = make_config(batch=128)
    config.published = [
        Published("MMLU", 0.516, f"{BATCH}=128"), Published("MMLU", 0.526, f"{BATCH}=3840"), Published("ARC", 0.7)
    ]  # fmt: skip
    write_run(tmp_path / "run", config)
    scores = [(20, 0.3, 9.0), (40, 0.5, 7.0), (60, 0.4, 8.0)]
    lines = [{"step": s, "samples": 128 * s, "mmlu/acc": a, "wiki/word_perplexity": p} for s, a, p in scores]
    write_jsonl(tmp_path / "run" / "eval_scores.jsonl", lines)
    data = page_of(tmp_path, tmp_path / "run")
    assert data["runs"][0]["published"] == {"MMLU": 0.516, "ARC": 0.7}
    assert data["runs"][0]["evaluations"]["mmlu/acc"] == [[20, 40, 60], [2560, 5120, 7680], [0.3, 0.5, 0.4]]
    assert "wiki/word_perplexity" in data["lower"] and "mmlu/acc" not in data["lower"]


def test_frontier_is_what_is_learned_and_the_share_that_is_kept(tmp_path: Path) -> None:
    config = make_config()
    write_run(tmp_path / "a", config)
    places = [(0, 0, 0.1, 0.8, 0.5), (5, 40, 0.3, 0.6, 0.6), (9, 72, 0.5, 0.4, 0.7)]

    def evaluations(exact: str, *omitted: int) -> list[dict[str, Any]]:
        return [
            {"step": step, "samples": samples, "eval/loss": 1.0, f"eval/new/{exact}": new, f"eval/old/{exact}": old}
            | {"eval/new/token_accuracy": accuracy, "eval/old/token_accuracy": accuracy, f"eval/phase/one/{exact}": 0.9}
            | {"eval/new/loss": 1.0, "eval/old/loss": 1.0, f"eval/gsm8k/{exact}": 0.0, "eval/average/loss": 1.0}
            | {f"eval/average/{exact}": 0.0}
            for i, (step, samples, new, old, accuracy) in enumerate(places)
            if i not in omitted
        ]

    def frontier_of(lines: list[dict[str, Any]], retain: list[str]) -> Any:
        config.eval.retain = retain
        (tmp_path / "a" / "config.json").write_text(json.dumps(to_dict(config)))
        write_jsonl(tmp_path / "a" / "metrics.jsonl", lines)
        return frontier.of_run(read_runs.read_run(tmp_path / "a"))

    found = frontier_of(evaluations("exact_match"), ["old"])
    assert (found.metric, found.samples, found.learned) == ("exact_match", [0, 40, 72], [0.1, 0.3, 0.5])
    assert found.kept == pytest.approx([1, 0.6 / 0.8, 0.5])
    assert content.of_runs([tmp_path / "a"])["runs"][0]["frontier"]["kept"] == pytest.approx([1, 0.75, 0.5])
    assert frontier_of(evaluations("other"), ["old"]).kept == pytest.approx([1, 1.2, 1.4]), "by token accuracy"
    assert frontier_of(evaluations("exact_match"), []) is None
    assert frontier_of(evaluations("exact_match", 0), ["old"]) is None, "nothing was measured before the first step"


def test_runs_are_compared_by_equal_samples_updates_and_flops() -> None:
    """By hand: b has half of the updates of a, and each of its updates takes three times the FLOPs."""

    def run(name: str, batch: int, flops: float, values: list[float], status: str = "completed") -> Any:
        steps = [0, 2, 4] if name == "a" else [0, 1, 2]
        curve = read_runs.Curve(steps, [batch * s for s in steps], values)
        records = ColumnarRecords({"flops": np.full(steps[-1], flops)})
        return SimpleNamespace(name=name, status=status, evaluations={"eval/loss": curve}, records=records)

    a, b = run("a", 8, 1.0, [3.0, 2.0, 1.0]), run("b", 16, 3.0, [3.0, 2.5, 2.0])
    found = equal_views.of_runs([a, b, run("c", 8, 1.0, [3.0, 0.0, 0.0], "stopped")], "eval/loss", "min")
    assert found and found.runs == ["a", "b"]
    assert found.budget == {"samples": 32, "steps": 2, "flops": 4} and found.target == 1.5
    assert found.at_budget == {"samples": [1.0, 2.0], "steps": [2.0, 2.0], "flops": [1.0, pytest.approx(2.5 - 1 / 6)]}
    assert found.to_target == {"samples": [24, None], "steps": [3, None], "flops": [3, None]}
    a.evaluations["eval/loss"], b.records = (
        read_runs.Curve([0, 2, 4], [0, 16, 32], [0.0, 0.5, 0.9]),
        ColumnarRecords({}),
    )
    b.evaluations["eval/loss"] = read_runs.Curve([0, 1, 2], [0, 16, 32], [0.0, 0.8, 0.7])
    more = equal_views.of_runs([a, b], "eval/loss", "max")
    assert more and list(more.budget) == ["samples", "steps"] and more.target == pytest.approx(0.8)
    assert more.to_target["samples"] == [pytest.approx(28.0), 16]
    assert equal_views.of_runs([a], "eval/loss", "min") is None


def test_lower_is_better_as_the_run_records_or_its_name_suggests(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_config())
    run = read_runs.read_run(tmp_path / "run")
    lower = ("eval/loss", "eval/phase/a/loss", "wiki/word_perplexity,none", "pile/bits_per_byte")
    assert all(map(run.lower_is_better, lower))
    assert not any(map(run.lower_is_better, ("mmlu/acc", "loss_task/acc_norm,none", "gsm8k/exact_match", "t/errors")))
    (tmp_path / "run" / "eval_directions.json").write_text('{"t/errors": "min", "pile/bits_per_byte": "max"}')
    run = read_runs.read_run(tmp_path / "run")
    assert run.lower_is_better("t/errors") and run.lower_is_better("eval/t/errors")
    assert not run.lower_is_better("pile/bits_per_byte") and run.lower_is_better("eval/loss")


# ---------------------------------------------------------------------------------------- warnings
def test_answers_are_shown_as_they_were_first_and_last(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_config())
    asked = {"source": "chats", "prompt": "Two and two?", "expected": "4"}
    given = [(0, "a"), (20, "3"), (40, "4"), (20, "5"), (40, HOSTILE)]  # the run was resumed after step 0
    write_jsonl(tmp_path / "run" / "answers.jsonl", [asked | {"step": s, "answer": a} for s, a in given])
    with (tmp_path / "run" / "answers.jsonl").open("a") as file:
        file.write('{"step": 60, "answer": "no prompt"}\n{"step": 60, "sour')
    data = page_of(tmp_path, tmp_path / "run")
    assert data["answers"] == [asked | {"first": {"step": 0, "text": "a"}, "last": {"step": 40, "text": HOSTILE}}]
    assert "answers.jsonl: 1 damaged line left out" in str(data["problems"])
    write_run(tmp_path / "other", make_config())
    assert page_of(tmp_path, tmp_path / "other")["answers"] == []


def test_warnings_of_runs_are_listed_with_the_runs_that_had_them(tmp_path: Path) -> None:
    given = {"a": ["of both", "of one"], "b": ["of both"], "c": []}
    for name, warnings in given.items():
        write_run(tmp_path / name, make_config())
        file = tmp_path / name / "data_report.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"warnings": warnings}))
    alone = page_of(tmp_path, tmp_path / "a")["warnings"]
    assert alone == [{"text": "of both", "runs": ""}, {"text": "of one", "runs": ""}]
    together = page_of(tmp_path, *(tmp_path / name for name in given))["warnings"]
    assert together == [{"text": "of both", "runs": "a, b"}, {"text": "of one", "runs": "a"}]
    assert page_of(tmp_path, tmp_path / "c")["warnings"] == []


# ---------------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize(
    "middle", [b'{"step": 7, "sam', b"\0\0\0\0", b'["no record"]', b'{"loss": 1.0}', b'{"step": "x"}']
)
def test_damaged_line_is_left_out_and_reported(middle: bytes, tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_config())
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[6] = middle
    file.write_bytes(b"\n".join(lines))
    data = page_of(tmp_path, tmp_path / "run")
    assert data["runs"][0]["grid"][0] == [s for s in range(1, 61) if s != 7]
    assert any("left out" in p["text"] for p in data["problems"])


def test_run_killed_in_the_middle_of_a_line_is_shown_up_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", make_config())
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "config.json").write_text('{"model": {')
    (tmp_path / "run" / "eval_scores.jsonl").write_text('{"step": 20, "samples": 160, "a/acc": 0.5}\n{"step": 40, "sam')
    assert run_verb(report.main, [f"--workdir={tmp_path / 'run'}"]) == 0
    data = content_of(tmp_path / "run" / "report.html")
    assert data["runs"][0]["grid"][0] == list(range(1, 60)) and data["runs"][0]["status"] == "unknown"
    assert data["runs"][0]["evaluations"]["a/acc"][2] == [0.5]
    problems = " ".join(p["text"] for p in data["problems"])
    for words in (
        "metrics.jsonl: 1 damaged line",
        "config.json is damaged",
        "no summary.json",
        "eval_scores.jsonl: 1 damaged line",
    ):
        assert words in problems
    assert "no summary.json" in capsys.readouterr().out


def test_run_without_steps_and_sweep_without_trials_have_pages(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(make_config())))
    assert "no line in metrics.jsonl" in page_of(tmp_path, tmp_path / "run")["problems"][0]["text"]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    data = page_of(tmp_path, tmp_path / "sweep")
    assert data["runs"] == [] and "no trial has ended" in data["problems"][0]["text"]


def test_evaluation_before_the_first_step_starts_its_curve_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_config())
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text('{"step": 0, "samples": 0, "eval/loss": 5.5}\n' + file.read_text())
    data = page_of(tmp_path, tmp_path / "run")
    [run] = data["runs"]
    assert data["problems"] == [] and run["grid"][0] == list(range(1, 61))
    assert [values[0] for values in run["evaluations"]["eval/loss"]] == [0, 0, 5.5]
    assert run["evaluations"]["eval/chats/loss"][0][0] == 20


def test_repeated_steps_are_shown_once_and_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_config())
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text() + file.read_text())
    data = page_of(tmp_path, tmp_path / "run")
    assert data["runs"][0]["grid"][0] == list(range(1, 61)) and "repeated" in data["problems"][0]["text"]


# ---------------------------------------------------------------------------------------- the file
def test_text_of_runs_is_never_html_and_nothing_is_fetched(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", HOSTILE)
    page.write([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    assert html.count("</script>") == html.count("<script") - _own_of_plotly() and "<img src=x" not in html
    assert HOSTILE in content_of(folder / "report.html")["runs"][0]["reason"], "and yet it is there"
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:)', html)
    assert "default-src 'none'" in html and html.count("plotly.js v") == 1


def _own_of_plotly() -> int:
    """Returns how often Plotly's own code holds `<script` without an end tag."""
    from plotly.offline import get_plotlyjs

    code = get_plotlyjs()
    return code.count("<script") - code.count("</script>")


def test_page_of_two_hundred_runs_stays_below_ten_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of more than some hundred steps are downsampled, so 600 steps make the page as large as 5,000 do."""
    write_run(tmp_path / "run", make_config(), steps=600, status="stopped")
    run = read_runs.read_run(tmp_path / "run")
    monkeypatch.setattr(read_runs, "read_run", lambda folder, name: dataclasses.replace(run, name=name))
    page.write([tmp_path / str(i) for i in range(200)], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 10e6
    data = content_of(tmp_path / "page.html")
    assert len(data["runs"]) == 200
    first = data["runs"][0]
    assert 100 <= len(first["means"]["loss"]) < 600 and len(first["stepwise"]["loss"][0]) <= 600


@pytest.mark.slow
def test_page_of_twenty_long_runs_takes_less_than_four_seconds(tmp_path: Path) -> None:
    for i in range(20):
        write_run(tmp_path / str(i), make_config(1e-3 * (1 + i % 7), (4, 8)[i % 2], i), steps=5000)
    began = time.process_time()
    data = content.of_runs([tmp_path / str(i) for i in range(20)])
    page.render(data)
    # 20 s for 200 runs on an idle core, twice that where others keep it busy.
    assert time.process_time() - began < 4
    assert data["evidence"]["groups"]["all"]["runs"] == 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=nowhere"], "the folder nowhere does not exist"),
        ([], "--workdir is missing"),
        (["--workdir={tmp}"], "is neither the folder of a run"),
        (["--workdir={tmp}/sweep,{tmp}/run"], "is a sweep. Give it alone"),
        (["--workdir={tmp}/run", "--output={tmp}"], "is a folder; give a file, F.html"),
        (["--workdir={tmp}/run", "--output={tmp}/no/x.html"], "there is no folder"),
    ],
)
def test_wrong_folder_or_output_is_an_error_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", make_config())
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert run_verb(report.main, [a.format(tmp=tmp_path) for a in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed


# ---------------------------------------------------------------------------------------- in a browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MARKS = """plot => ['.scatterlayer path.js-line', '.scatterlayer path.point', '.scatterlayer path.js-fill',
                    '.heatmaplayer image']
  .flatMap(kind => [...plot.querySelectorAll(kind)])
  .filter(mark => (mark.getAttribute('d') || mark.href?.baseVal || '').length > 4).length"""

# The number of plots whose tool bar covers a part of where their data are drawn.
COVERED = """() => [...document.querySelectorAll('figure:not([hidden]) .plot')].filter(plot => {
  const bar = plot.querySelector('.modebar').getBoundingClientRect();
  return [...plot.querySelectorAll('.nsewdrag')].map(n => n.getBoundingClientRect())
    .some(area => bar.bottom > area.top && bar.top < area.bottom && bar.right > area.left && bar.left < area.right);
}).length"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # CI runs as root, where Chromium needs --no-sandbox; it only opens files that these tests wrote.
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


class OpenPage:
    """An open page, with the errors it logged and the addresses it requested."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light"):
        self.complaints: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.tab.on("request", lambda r: self.complaints.append(r.url) if r.url.startswith("http") else None)
        self.tab.goto(file.resolve().as_uri())
        self.drawn = "0"
        self.await_drawn()

    def await_drawn(self) -> None:
        """Waits until all plots are drawn again."""
        self.tab.wait_for_selector(
            f"html[data-drawn]:not([data-drawn='{self.drawn}'])", state="attached", timeout=120e3
        )
        self.drawn = self.tab.get_attribute("html", "data-drawn")

    def column(self, number: int) -> list[str]:
        """Returns the visible cells of a column of the table; columns count from 1."""
        return self.tab.eval_on_selector_all(
            f"#table tbody tr:not([hidden]) td:nth-child({number})", "cells => cells.map(c => c.textContent)"
        )

    def traces(self, figure: int = 0) -> int:
        return self.tab.evaluate(f"document.querySelectorAll('#charts .plot')[{figure}].data.length")

    def assert_drawn_without_errors(self) -> None:
        plots = self.tab.query_selector_all("figure:not([hidden]) .plot")
        assert plots and all(p.evaluate(MARKS) > 0 for p in plots)
        assert self.complaints == []


@pytest.mark.slow
@pytest.mark.chromium
def test_browser_draws_sorts_and_filters_the_page_of_a_sweep(browser: Any, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", HOSTILE)
    page.write([folder], folder / "report.html")
    shown = OpenPage(browser, folder / "report.html")
    shown.assert_drawn_without_errors()
    assert shown.tab.evaluate(COVERED) == 0
    plain = "document.querySelector('#parallel-charts .plot').layout.annotations.filter(a => !a.bgcolor).length"
    assert shown.tab.evaluate(plain) == 0, "no line crosses a label"
    heads = shown.tab.eval_on_selector_all("#table th", "heads => heads.map(h => h.textContent)")
    assert heads[:6] == ["trial", "learning_rate", "batch_size", "seed", "status", "steps"]
    metric = heads.index("eval/loss") + 1
    assert shown.column(1) == [str(i) for i in range(12)]

    # Sorting, ascending and then descending: rows without a value stay last.
    head = f"#table th:nth-child({metric})"
    shown.tab.click(f"{head} button")
    values = [float(v.rstrip("★")) for v in shown.column(metric) if v]
    assert len(values) == 10 and values == sorted(values) and shown.column(metric)[-2:] == ["", ""]
    assert shown.tab.get_attribute(head, "aria-sort") == "ascending"
    shown.tab.click(f"{head} button")
    assert [float(v.rstrip("★")) for v in shown.column(metric) if v] == values[::-1]
    assert shown.column(metric)[-2:] == ["", ""]

    # The filter applies to the table and the plots.
    shown.tab.uncheck("#bands")
    shown.await_drawn()
    assert shown.traces() == 11
    shown.tab.fill("#filter", "learning_rate>=3e-3 batch_size=8")
    shown.await_drawn()
    assert set(shown.column(1)) == {"6", "7", "10", "11"}
    assert shown.traces() == 3 and "4 of 12 shown" in shown.tab.text_content("#shown")
    shown.tab.fill("#filter", "")
    shown.await_drawn()
    shown.tab.click("#statuses button:has-text('completed')")
    shown.await_drawn()
    assert set(shown.column(1)) == {"0", "11"} and shown.traces() == 1

    # Other views of the same curves.
    shown.tab.click("#statuses button:has-text('completed')")
    shown.await_drawn()
    for choose in ("step", "time"):
        shown.tab.select_option("#x", choose)
        shown.await_drawn()
    shown.tab.select_option("#colour", "status")
    shown.await_drawn()
    shown.tab.click("#table tbody tr:nth-child(2)")
    shown.await_drawn()
    shown.assert_drawn_without_errors()
    assert shown.tab.evaluate("window.hacked") is None and shown.tab.query_selector("img") is None
    shot = shown.tab.screenshot(path=tmp_path / "sweep.png", full_page=True)
    assert len(shot) > 50_000
    shown.tab.close()


@pytest.mark.slow
@pytest.mark.chromium
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_browser_draws_the_page_of_a_run_on_phone_and_desktop(
    browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    write_run(tmp_path / "run", make_config(), steps=3000, status="stopped", reason="diverged", phase=HOSTILE)
    scores = [(20, 0.3), (40, None), (60, 0.5), (80, 0.4)]
    lines = [{"step": s, "samples": 100 * s, "mmlu/acc": a} for s, a in scores]
    write_jsonl(tmp_path / "run" / "eval_scores.jsonl", lines)
    asked = {"source": "chats", "prompt": f"A line\n{'long ' * 99}", "expected": "4"}
    given = [asked | {"step": step, "answer": answer} for step, answer in ((0, HOSTILE), (40, "4"))]
    write_jsonl(tmp_path / "run" / "answers.jsonl", given)
    page.write([tmp_path / "run"], tmp_path / "run.html")
    shown = OpenPage(browser, tmp_path / "run.html", width, scheme)
    assert "1 of 1 are as in the data, 0 at first" in shown.tab.text_content("#answers")
    shown.assert_drawn_without_errors()
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    lightness = shown.tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (lightness < 80) == (scheme == "dark")
    text = shown.tab.text_content("main")
    assert "mmlu/acc0.40.5602,000 to 6,000" in shown.tab.text_content("#best")  # last, best, its step, its samples
    assert "diverged" in shown.tab.text_content("body") and HOSTILE in text and "checkpoint" in text
    assert shown.tab.evaluate("window.hacked") is None
    shown.tab.close()


@pytest.mark.slow
@pytest.mark.chromium
def test_browser_checks_fail_on_an_empty_plot_and_a_broken_script(browser: Any, tmp_path: Path) -> None:
    """Negative control of the checks above: a curve without points, a script that fails, a text that runs as code."""
    write_run(tmp_path / "run", make_config())
    page.write([tmp_path / "run"], tmp_path / "run.html")
    shown = OpenPage(browser, tmp_path / "run.html")
    shown.tab.evaluate("Plotly.restyle(document.querySelector('.plot'), 'y', [[null]])")
    assert shown.tab.query_selector(".plot").evaluate(MARKS) == 0
    assert shown.tab.evaluate(COVERED) == 0
    shown.tab.evaluate("Plotly.relayout(document.querySelectorAll('.plot')[1], 'margin.t', 5)")
    assert shown.tab.evaluate(COVERED) == 1
    whole = (tmp_path / "run.html").read_text()
    (tmp_path / "bad.html").write_text(
        whole.replace("\nmake();", 'document.body.innerHTML += `<img src=x onerror="window.hacked=1">`;', 1)
        .replace("default-src 'none'", "default-src *")
        .replace("script-src 'unsafe-inline'", "script-src * 'unsafe-inline'")
    )
    tab = browser.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto((tmp_path / "bad.html").resolve().as_uri())
    tab.wait_for_timeout(500)
    assert errors or tab.evaluate("window.hacked") == 1
    tab.close()
    shown.tab.close()
