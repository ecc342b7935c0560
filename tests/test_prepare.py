"""`mice prepare`: builds the stores that a run then finds, and shows what will be trained on."""

import json
import re
from pathlib import Path

import pytest

from helpers.runs import chat, make_chats, run_prepare, run_train, setting, write_jsonl


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return setting(tmp_path / "run", samples=16)


def stores(config: Path) -> dict[str, int]:
    return {f.parent.name: f.stat().st_mtime_ns for f in (config.parent / "stores").glob("*/tokens.arrow")}


def row(out: str, source: str) -> list[str]:
    """A source's row of the table, as read by eye."""
    (line,) = [line for line in out.splitlines() if source in line and "│" in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_run_finds_the_store_that_was_prepared(config: Path, tmp_path: Path) -> None:
    assert stores(config) == {}
    assert run_prepare(config) == 0
    built = stores(config)
    assert len(built) == 1
    assert run_prepare(config) == 0
    assert run_train(config, tmp_path / "work", "--config.optim.max_steps=1") == 0
    assert stores(config) == built


def test_table_counts_each_source(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    held = write_jsonl(tmp_path / "held.jsonl", make_chats(5, seed=3))
    mute = {"messages": [{"role": "user", "content": "who?"}]}
    long = chat("who?", "elephants " * 60)
    write_jsonl(config.parent / "chats.jsonl", [*make_chats(16), mute, long, long])
    config.write_text(
        config.read_text().replace("return c", f"c.data.validation = [Source(path='{held}')]\n    return c")
    )
    assert run_prepare(config, "--config.data.max_length=200") == 0
    out, err = capsys.readouterr()
    assert err == ""
    cells = row(out, "chats ")
    assert cells[:3] == ["chats", "19", "16"]
    assert "2 longer than max_length" in cells[3] and "1 no trained token" in cells[3]
    assert row(out, "held (held out)")[1:4] == ["5", "5", "0"]


def test_samples_are_shown_with_their_trained_tokens_marked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prepare(config, "--inspect=3") == 0
    out, err = capsys.readouterr()
    assert err == "" and len(re.findall(r"stacked: sample \d+, \d+ tokens, \d+ trained on", out)) == 3
    shown = re.findall(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n⟦(.*)<\|im_end\|>⟧", out)
    asked = {tuple(m["content"] for m in record["messages"]) for record in make_chats(16)}
    assert len(shown) == 3 and set(shown) <= asked


def test_samples_shown_are_those_of_each_phases_first_step(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    late = write_jsonl(tmp_path / "late.jsonl", [chat("late?", f"yes {i}") for i in range(4)])
    phase = f"c.data.phases.append(Phase(name='late', sources=[Source(path='{late}')]))"
    config.write_text(config.read_text().replace("return c", f"{phase}\n    return c"))
    assert run_prepare(config, "--inspect=2") == 0
    out = capsys.readouterr().out
    first, second = out.split("late: sample", 1)
    assert first.count("stacked: sample") == 2 and "⟦yes" not in first
    assert second.count("⟦yes") == 2


def test_no_sample_is_shown_without_inspect(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prepare(config) == 0
    assert "⟦" not in capsys.readouterr().out


def test_report_is_shown_and_written_as_in_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_prepare(config, "--report", f"--output={tmp_path / 'report.json'}") == 0
    out = capsys.readouterr().out
    assert (
        "duplicates" in out
        and "longest: chats: " in out
        and re.search(r"2 steps; in the first 2, \d+\.\d% of", out)
        and "packed for 1 shard of 1 row (" in out
    )
    assert row(out, "stacked") == ["stacked", "1", "2", "16", "16 chats"]
    assert run_train(config, tmp_path / "work") == 0
    # A run knows its devices (here eight) by itself, so that alone may differ.
    written, kept = (json.loads(p.read_text()) for p in (tmp_path / "report.json", tmp_path / "work/data_report.json"))
    # So may the warnings of what eight devices do not divide.
    assert written.pop("warnings") == [w for w in kept.pop("warnings") if "mesh" not in w]
    for report in (written, kept):
        assert 0 < report.pop("packing_efficiency_of_first_steps") <= 1
        assert 0 < report.pop("packing_efficiency_by_source")["chats"] <= 1
    assert [report.pop("packed_for")["shards"] for report in (written, kept)] == [1, 8]
    assert written == kept and kept["phases"][0]["epochs"] == [{"steps": 2, "samples": 16, "by_source": {"chats": 16}}]


def test_data_warnings_are_shown_and_kept(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prepare(config) == 0 and "warning: " not in capsys.readouterr().out
    odd = {"messages": [{"role": "assistant", "content": "<|im_end|> there"}]}
    write_jsonl(config.parent / "chats.jsonl", [*make_chats(16), odd, odd])
    assert run_prepare(config, f"--output={tmp_path / 'report.json'}", "--config.optim.batch_size=100") == 0
    out = capsys.readouterr().out
    kept = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert [line.removeprefix("warning: ") for line in out.splitlines() if line.startswith("warning: ")] == kept
    assert any("a batch is larger than an epoch" in w for w in kept)
    assert "warning: chats: exact copies of other samples in it: 1," in out
    assert re.search(r"warning: chats: 2 samples \(the first is .*chats\.jsonl line 17\) hold a special token", out)
    assert "chats.jsonl line 17) start with the assistant" in out


def test_flags_that_cannot_work_are_errors_before_anything_is_read(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prepare(config, f"--output={tmp_path}/nowhere/report.json") == 2
    assert run_prepare(config, "--ids") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "there is no folder" in first and "--inspect=N" in second and stores(config) == {}


def test_batch_larger_than_every_epoch_is_an_error_as_in_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config.data.drop_remainder=true", "--config.optim.batch_size=17"]
    assert run_prepare(config, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no step to take (phase 'stacked': 16 ") and "batch_size=17" in said
    assert run_train(config, tmp_path / "work", *flags) == 2 and capsys.readouterr().err == said
    assert run_prepare(config, *flags[:1]) == 0


def test_default_batch_size_larger_than_an_epoch_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("c.optim.batch_size = 8\n", "pass\n"))
    assert run_prepare(config) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: optim.batch_size is not set") and "--config.optim.batch_size=32" in said
    # Set by the user, the same size is warned of.
    assert run_prepare(config, "--config.optim.batch_size=3840") == 0
    assert "a batch is larger than an epoch" in capsys.readouterr().out
