"""Chats made from documentation: the same every time, valid, split without leaks, and with true answers."""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "bench" / "documentation_chats.py"
PHASES = ("instructions", "knowledge", "skills")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation_chats", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(out_dir: Path, hash_seed: str) -> str:
    """Runs it as a user does: pytest has replaced some of the functions that it documents."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, str(SCRIPT), str(out_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("chats")
    assert "knowledge" in run_script(out_dir, hash_seed="1")
    return out_dir


def conversations(made: Path, name: str) -> list[list[dict[str, str]]]:
    text = (made / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.removesuffix("\n").split("\n")]


def turns(chats: list[list[dict[str, str]]]) -> list[tuple[str, str]]:
    """The prompts with their answers, of every conversation."""
    spoken = [[m["content"] for m in chat if m["role"] != "system"] for chat in chats]
    return [pair for texts in spoken for pair in zip(texts[::2], texts[1::2], strict=True)]


@pytest.mark.slow
def test_same_seed_gives_the_same_files_in_another_process(made: Path, tmp_path: Path) -> None:
    run_script(tmp_path, hash_seed="2")
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) >= 9
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_another_seed_gives_other_samples(made: Path, tmp_path: Path) -> None:
    counts = load_script().make_data(tmp_path, seed=1)
    for phase in PHASES:
        assert counts[f"{phase}.jsonl"] == len(conversations(tmp_path, phase))
        assert conversations(tmp_path, phase) != conversations(made, phase)


def test_phases_keep_the_proportion_of_the_study(made: Path) -> None:
    counts = [len(conversations(made, phase)) for phase in PHASES]
    assert 6_000 <= sum(counts) <= 9_000
    for count, share in zip(counts, (308, 231, 286), strict=True):
        assert count / sum(counts) == pytest.approx(share / 825, rel=0.05)


def test_every_line_is_a_conversation_that_ends_with_an_answer(made: Path) -> None:
    for phase in PHASES:
        for chat in conversations(made, phase) + conversations(made, f"{phase}.heldout"):
            roles = [message["role"] for message in chat]
            spoken = roles[1:] if roles[0] == "system" else roles
            assert spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken
            assert all(message["content"].strip() for message in chat)
        roles = [[m["role"] for m in chat] for chat in conversations(made, phase)]
        assert any("system" in r for r in roles) and any(r.count("user") > 1 for r in roles)


def test_no_held_out_prompt_occurs_in_training(made: Path) -> None:
    trained = {prompt for phase in PHASES for prompt, _ in turns(conversations(made, phase))}
    for phase in PHASES:
        heldout = [prompt for prompt, _ in turns(conversations(made, f"{phase}.heldout"))]
        assert len(heldout) == len(set(heldout)) >= 100
        assert not trained.intersection(heldout)


def test_lengths_are_very_unequal_and_fit_the_model(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "init")
    texts = {phase: conversations(made, phase) for phase in PHASES}

    def lengths_of(chats: list[list[dict[str, str]]]) -> list[int]:
        return [len(ids) for ids in tokenizer.apply_chat_template(chats, return_dict=False)]

    lengths = {phase: lengths_of(chats[::4]) for phase, chats in texts.items()}
    knowledge = sorted(lengths["knowledge"])
    assert knowledge[len(knowledge) * 95 // 100] > 5 * statistics.median(knowledge)
    together = [n for phase in PHASES for n in lengths[phase]]
    assert 60 <= statistics.mean(together) <= 120
    # A token has at least one character of the JSON, so that no other text has more than 1000.
    long = [chat for chats in texts.values() for chat in chats if len(json.dumps(chat)) > 1000]
    assert max(lengths_of(long)) <= 1000


def recomputed(prompt: str) -> str:
    """The answer to a skill's prompt, worked out from its words."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    letters = re.findall(r"\b[a-z]\b", prompt)
    match prompt.split():
        case ["What", "is", _, "+" | "-" | "*" as sign, _]:
            left, right = numbers
            return str({"+": left + right, "-": left - right, "*": left * right}[sign])
        case ["Is", _, "greater", *_]:
            return "yes" if numbers[0] - numbers[1] > 0 else "no"
        case ["Is", _, "odd", *_]:
            return ("even", "odd")[numbers[0] % 2]
        case ["What", "is", "the", "largest" | "smallest" as which, *_]:
            return str(sorted(numbers)[-1 if which == "largest" else 0])
        case ["What", "comes", "next:", *_]:
            return str(2 * numbers[-1] - numbers[-2])
        case ["What", "is", "the", "last", "digit", *_]:
            return str(numbers[0])[-1]
        case ["Write", "the", "letter", letter, *_]:
            return " ".join([letter] * numbers[0])
        case ["How", "many", "letters", *_]:
            return str(len(letters))
        case ["What", "is", "the", "first" | "last" as which, "letter", *_]:
            return letters[0 if which == "first" else -1]
    raise ValueError(f"no check for the prompt {prompt!r}")


def test_every_answer_to_a_skill_is_true(made: Path) -> None:
    asked = turns(conversations(made, "skills") + conversations(made, "skills.heldout"))
    assert [(prompt, recomputed(prompt)) for prompt, _ in asked] == asked


def test_tokenizer_round_trips_any_text_and_splits_numbers(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "init")
    for text in (
        "naïve café — 数独 🐭\n\ttabs",
        "def f(x):\n    return x  # 2024",
        " two  spaces ",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("1989") == ["1", "9", "8", "9"]


def test_chat_template_ends_an_answer_with_eos_and_opens_the_next(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "init")
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert text.endswith("<|im_start|>assistant\n4<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text == prompt + "4<|im_end|>\n"
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[-2] == tokenizer.eos_token_id


def test_config_fits_the_tokenizer(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "init")
    config = json.loads((made / "init" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(tokenizer) == 2048
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == getattr(tokenizer, name)
