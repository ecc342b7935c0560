"""The demo's data: the same every time, split without leaks, with true answers; and how the demo scores answers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

pytestmark = pytest.mark.smoke

FOLDER = Path(__file__).parents[1] / "demo"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports a module of the demo, whose own imports find its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> ModuleType:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return load("make_data", monkeypatch)


@pytest.fixture(scope="module")
def phases(data: ModuleType) -> dict:
    return data.make_pairs()


def recomputed(prompt: str) -> str:
    """The answer to a format or a skill, worked out from its words."""
    asked, _, rest = prompt.partition(": ")
    items = re.findall(r"\w+", rest or prompt)
    numbers = sorted(int(n) for n in re.findall(r"\d+", prompt))
    match asked.split()[:3]:
        case ["Make", *_]:
            return "- " + "\n- ".join(items)
        case ["Number", *_]:
            return "".join(f"{i + 1}. {items[i]}\n" for i in range(len(items))).strip()
        case ["Write", "one", *_]:
            return rest.replace(", ", "\n")
        case ["Write", "as", "a"]:
            return '["' + rest.replace(", ", '", "') + '"]'
        case ["Write", "in", "upper"]:
            return rest.upper()
        case ["Join", *_]:
            return rest.replace(", ", "-")
        case ["What", "is", "the"]:
            return str(numbers[0] if "smallest" in prompt else numbers[-1])
        case ["How", "many", *_]:
            return str(len(numbers))
        case ["Reverse", *_]:
            return ", ".join(reversed(items))
        case ["Which", "word", "is"]:
            return items[0 if asked.endswith("first") else 2]
    raise ValueError(f"no check for the prompt {prompt!r}")


@pytest.mark.parametrize("phase", ["formats", "skills"])
def test_demo_answers_of_formats_and_skills_are_true(phases: dict, phase: str) -> None:
    pairs = phases[phase].trained + phases[phase].held_out
    assert [(p.prompt, recomputed(p.prompt)) for p in pairs] == pairs


def test_demo_trains_on_no_question_that_it_asks(data: ModuleType, phases: dict) -> None:
    for phase in data.PHASES:
        asked = [p.prompt for p in phases[phase].held_out]
        assert len(asked) == len(set(asked)) >= 100
        assert not set(asked) & {p.prompt for p in phases[phase].trained}


def test_demo_trains_each_fact_in_the_other_wordings(phases: dict) -> None:
    trained = phases["facts"].trained
    assert len(trained) == 5 * len(phases["facts"].held_out)
    for i, asked in enumerate(phases["facts"].held_out):
        same_fact = trained[5 * i : 5 * i + 5]
        name = re.search(r"`(.*)`", asked.prompt)
        assert name and all(f"`{name[1]}`" in p.prompt and p.answer == asked.answer for p in same_fact)


def test_demo_facts_are_those_of_the_documentation(data: ModuleType) -> None:
    entries = data.read_documentation()
    assert 50 <= len(entries) <= data.NUM_ENTRIES
    for e in entries:
        value = getattr(importlib.import_module(e.module), e.name)
        assert " ".join(value.__doc__.split()).startswith(e.summary)
    assert ("json", "dumps", "obj") in [(e.module, e.name, e.first_argument) for e in entries]


def test_demo_seed_alone_decides_the_data(data: ModuleType, phases: dict) -> None:
    assert data.make_pairs() == phases
    assert data.make_pairs(seed=1)["skills"] != phases["skills"]


def test_demo_tokenizer_shows_digits_and_round_trips(data: ModuleType, phases: dict, tmp_path: Path) -> None:
    texts = [text for split in phases.values() for pair in split.trained for text in pair]
    data.train_tokenizer(iter(texts)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("1989") == ["1", "9", "8", "9"]
    for text in (*texts[::500], "naïve — 数独 🐭\n\ttabs  and spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = data.chat(data.Pair("What is 2?", "even"))["messages"]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{prompt}even{tokenizer.eos_token}"
    config = data.model_config(tokenizer)
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id


def test_demo_counts_only_exact_answers(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("demo", monkeypatch)
    asked = [data.Pair("a", "yes"), data.Pair("b", "yes"), data.Pair("c", "no")]
    assert demo.exact_match(asked, ["yes", "yes.", "no"]) == {"right": 2, "of": 3}
    with pytest.raises(ValueError):
        demo.exact_match(asked, ["yes"])


def test_demo_result_has_scores_and_shown_answers(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo:
        """Answers every question with 2."""

        def generate(self, prompts: list[str], **options: int) -> list[str]:
            return ["2"] * len(prompts)

    demo = load("demo", monkeypatch)
    phases = {p: data.Split([], [data.Pair(f"{p}?", "2"), data.Pair("more?", "3")]) for p in data.PHASES}
    scores, answers = demo.ask(Echo(), phases)
    result = demo.result(scores, answers)
    assert json.loads(json.dumps(result)) == result
    assert result["exact"] == {p: {"right": 1, "of": 2} for p in ("formats", "facts", "skills")}
    assert result["answers"][0] == {"prompt": "formats?", "answer": "2", "expected": "2"}
    assert result["hf"].endswith("demo/hf") and result["cpu_s"] > 0
    assert "1 of 2" in demo.table(scores, scores)


@pytest.mark.parametrize(("silence_s", "prints"), [(0.05, True), (60.0, False)])
def test_demo_heartbeat_prints_only_in_a_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, silence_s: float, prints: bool
) -> None:
    heartbeat = load("heartbeat", monkeypatch)
    monkeypatch.setattr(heartbeat, "SILENCE_S", silence_s)
    monkeypatch.setattr(heartbeat, "CHECK_EVERY_S", 0.01)
    with heartbeat.Heartbeat():
        print("begun")
        time.sleep(0.3)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "begun" and all("still at work" in line for line in out[1:])
    assert bool(out[1:]) == prints


def test_make_demo_installs_what_its_report_needs() -> None:
    # This test itself may run under make, whose flags would add lines of their own to the printed commands.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    commands = subprocess.run(
        ["make", "-nB", "demo"], cwd=FOLDER.parent, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    install = next(i for i, command in enumerate(commands) if command.endswith("-e '.[lab]'"))
    assert ".venv/bin/python demo/demo.py" in commands[install:]
