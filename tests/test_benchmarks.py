"""Benchmarks give the numbers that lm-evaluation-harness's own `hf` model gives on torch, request by request."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from helpers.models import llama
from helpers.runs import CHATML, make_tokenizer, run_verb
from helpers.tasks import (
    BARN,
    BOS,
    CHOICE,
    CLOSE,
    ROLLING,
    WRITTEN,
    assert_same,
    by_harness,
    by_us,
    gap,
    metrics,
    responses,
    write_model,
    write_tasks,
)
from mice_jax import evaluate
from mice_jax.cli import task_names
from mice_jax.errors import UserError, install_command
from mice_jax.evals import benchmarks, harness
from mice_jax.inference.generation_config import GenerationDefaults, read_generation_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=8)


# Other families are scored against torch in test_scoring, and answer as transformers in test_family_sampling.
@pytest.mark.slow
def test_every_request_and_metric_equals_the_harness_own_model(tasks: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", bos=True)
    names = (BARN, ROLLING, WRITTEN)
    ours = by_us(model, tasks, tmp_path / "scores.json", *names)
    theirs = by_harness(model, tasks, *names)
    assert_same(ours, theirs)
    assert len({r[0] for r in responses(ours, WRITTEN)}) > 1
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-2}))
    other = by_us(model, tasks, tmp_path / "other.json", CHOICE)
    assert gap(other, theirs, CHOICE) > 10 * CLOSE


@pytest.mark.slow
def test_too_long_requests_are_truncated_and_counted_as_in_harness(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", "llama-linear", max_position_embeddings=128)
    names = (CHOICE, ROLLING, WRITTEN)
    ours = by_us(model, tasks, tmp_path / "scores.json", *names, flags=("--limit=6",))
    said = capsys.readouterr().out
    assert_same(ours, by_harness(model, tasks, *names, limit=6))
    cut = ours["shortened"]
    assert cut[CHOICE]["requests"] > 4 and cut[WRITTEN]["requests"] > 1
    assert cut[ROLLING] == {"requests": 0, "tokens": 0}  # it is scored in windows, and loses nothing
    assert f"{cut[CHOICE]['requests']} requests of {CHOICE} were longer than the model's 128 positions" in said


REFUSING = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.mark.slow
def test_chat_template_system_and_fewshot_turns_equal_the_harness(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a template that writes the token with which the tokenizer begins each text, which must not be there twice."""
    model = write_model(tmp_path / "model", "llama", bos=True)
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + CHATML)
    names = (CHOICE, WRITTEN)
    flags = ("--apply_chat_template", "--system_instruction=Be a mouse.", "--num_fewshot=2", "--limit=6")
    ours = by_us(model, tasks, tmp_path / "scores.json", *names, flags=flags)
    chat = {"apply_chat_template": True, "system_instruction": "Be a mouse.", "num_fewshot": 2, "limit": 6}
    theirs = by_harness(model, tasks, *names, fewshot_as_multiturn=True, **chat)
    assert_same(ours, theirs)
    prompt = ours["samples"][CHOICE][0]["arguments"][0][0]
    assert prompt.startswith(f"{BOS}<|im_start|>system\nBe a mouse.") and prompt.count("<|im_start|>assistant") == 3
    # Twice, the token would show.
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ bos_token }}" + CHATML)
    other = by_us(model, tasks, tmp_path / "other.json", CHOICE, flags=(*flags, f"--chat_template={own}"))
    assert gap(other, theirs, CHOICE) > 10 * CLOSE

    # A template that takes no system message gets none.
    template.write_text(REFUSING)
    capsys.readouterr()
    bare = by_us(model, tasks, tmp_path / "bare.json", CHOICE, flags=flags)
    assert_same(bare, by_harness(model, tasks, CHOICE, fewshot_as_multiturn=True, **chat))
    asked = bare["samples"][CHOICE][0]["arguments"][0][0]
    assert "Be a mouse." not in asked and asked.startswith(f"{BOS}<|im_start|>user")
    assert bare["without_system"] == {CHOICE: 6}
    assert f"takes no system message: 6 prompts of {CHOICE} were rendered without theirs" in capsys.readouterr().out

    # What was scored is found by what the template says, wherever it lies.
    own.write_text(REFUSING)
    monkeypatch.setattr(benchmarks, "score", None)
    again = (*flags, f"--chat_template={own}")
    assert by_us(model, tasks, tmp_path / "again.json", CHOICE, flags=again)["results"] == bare["results"]
    own.write_text(REFUSING + " ")
    with pytest.raises(TypeError):
        by_us(model, tasks, tmp_path / "again.json", CHOICE, flags=again)


@pytest.mark.slow
def test_repeated_draws_differ_and_are_reproducible(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tasks / f"{WRITTEN}.yaml").read_text().replace(WRITTEN, "drawn")
    (tmp_path / "drawn.yaml").write_text(
        text.replace("  max_gen_toks", "  do_sample: true\n  temperature: 1.0\n  max_gen_toks") + "repeats: 2\n"
    )
    model = write_model(tmp_path / "model", "llama-linear")
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"repetition_penalty": 1.2}))
    found = []
    for call in ("first", "second"):
        monkeypatch.setenv("MICE_JAX_CACHE", str(tmp_path / call))
        ours = by_us(model, tmp_path, tmp_path / "scores.json", "drawn", flags=("--limit=6",))
        found.append(responses(ours, "drawn"))
    assert found[0] == found[1]
    assert ours["not_followed"] == {"drawn": ["repetition_penalty=1.2"]}
    warning = "warning: the model's generation_config.json has repetition_penalty=1.2, which is not supported"
    assert warning in capsys.readouterr().out
    assert all(len(pair) == 2 for pair in found[0]) and sum(a != b for a, b in found[0]) > 3
    theirs = by_harness(model, tmp_path, "drawn", limit=6)  # its draws are others, its form is the same
    assert [len(pair) for pair in responses(theirs, "drawn")] == [2] * 12 == [len(pair) for pair in found[0]]
    assert metrics(theirs)["drawn"].keys() == metrics(ours)["drawn"].keys()


# ---------------------------------------------------------------------------------------- bad input
@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without its weights: what is refused is refused before they are looked for."""
    folder = write_model(tmp_path_factory.mktemp("hollow"), "llama-linear")
    (folder / "model.safetensors").unlink()
    return folder


def said(capsys: pytest.CaptureFixture[str], model: Path, tasks: Path, *flags: str) -> str:
    """The error of a command that is refused."""
    where = [f"--model={model}", f"--include_path={tasks}", f"--output={model / 'scores.json'}"]
    assert run_verb(evaluate.main, [*where, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    return error[error.index("error:") :]


def test_unknown_task_is_an_error_with_the_nearest_names(
    hollow: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The index of the harness's own tasks takes half a minute to read.
    own_tasks_only = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: own_tasks_only(include_path=options["include_path"])
    )
    assert "--tasks=mmlu,gsm8k" in said(capsys, hollow, tasks)
    assert "names a benchmark twice" in said(capsys, hollow, tasks, "--tasks=barn,barn")
    (tasks / "broken.yaml").write_text("task: [")
    near = said(capsys, hollow, tasks, "--tasks=barn_choices")
    (tasks / "broken.yaml").unlink()
    assert "there is no task 'barn_choices'; the nearest are barn_choice" in near
    assert "these files define no task or cannot be read" in near and "broken.yaml" in near


def test_wrong_flags_are_an_error_before_weights_are_read(
    hollow: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str) -> str:
        return said(capsys, hollow, tasks, f"--tasks={CHOICE}", *flags)

    assert "limit=1.5 must be a number of documents" in refused("--limit=1.5")
    assert "num_fewshot=-1 must be at least 0" in refused("--num_fewshot=-1")
    assert "fewshot_as_multiturn needs apply_chat_template" in refused("--fewshot_as_multiturn")
    assert "--batch_size=0 must be at least 1" in refused("--batch_size=0")
    assert "compute_dtype=half is not one of" in refused("--compute_dtype=half")
    assert "there is no folder" in refused(f"--output={tmp_path}/none/scores.json")
    assert "is a folder; give a file" in refused(f"--output={tmp_path}")
    assert "--all_checkpoints is for a run's workdir" in refused("--all_checkpoints")
    assert "include_path=nowhere is not a folder" in refused("--include_path=nowhere")
    (hollow / "chat_template.jinja").unlink()
    assert "the tokenizer has no chat template. Give one" in refused("--apply_chat_template")


def test_unloadable_task_says_why_and_what_to_install(
    hollow: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tasks / f"{CHOICE}.yaml").read_text().replace(CHOICE, "needy")
    for module, mend in (("no_such_thing", "'no_such_thing'"), ("jieba", "'lm-eval[longbench]'")):
        folder = tmp_path / module
        folder.mkdir()
        (folder / f"{module}_helper.py").write_text(f"import {module}\n\n\ndef answer(doc):\n    return 0\n")
        changed = text.replace('doc_to_target: "{{answer}}"', f"doc_to_target: !function {module}_helper.answer")
        (folder / "needy.yaml").write_text(changed)
        assert f"needs the package {module}: pip install {mend}" in said(capsys, hollow, folder, "--tasks=needy")
    (folder / "needy.yaml").write_text(text.replace(str(tasks / "data.jsonl"), "nowhere.jsonl"))
    missing = said(capsys, hollow, folder, "--tasks=needy")
    assert f"the task 'needy' of {folder / 'needy.yaml'} cannot be loaded" in missing and "nowhere.jsonl" in missing
    assert "Paths in data_files are relative to" in missing
    for right, wrong, why in (
        ("metric: acc\n", "metric: acuracy\n", "its metric 'acuracy' is not known; did you mean 'acc'?"),
        (
            "{{question}}",
            "{{qestion}}",
            "'qestion' is undefined in one of its templates. A template can use the columns",
        ),
    ):
        assert right in text
        (folder / "needy.yaml").write_text(text.replace(right, wrong, 1))
        assert why in said(capsys, hollow, folder, "--tasks=needy")
    (folder / "needy.yaml").write_text("task: needy\nmetric_list: [\n  - metric: acc\n")
    with pytest.raises(UserError, match=r"needy\.yaml line 3 is no valid YAML: "):
        task_names.check_names(["needy"], str(folder), needs_harness=False)
    (folder / "needy.yaml").write_text("task: needy   # as --tasks names it\n")
    with pytest.raises(UserError, match=r"there is no task 'neady'; the nearest are needy"):
        task_names.check_names(["neady"], str(folder), needs_harness=False)

    # A package of the very name goes before one that begins with it (onnxruntime-genai).
    packages = {name: benchmarks._package_of(name) for name in ("onnxruntime", "antlr4", "optimum")}
    assert packages == {
        "onnxruntime": "lm-eval[onnxruntime]", "antlr4": "lm-eval[math]", "optimum": "lm-eval[optimum]"
    }  # fmt: skip


def test_missing_or_old_harness_is_an_error_with_the_install_command(
    hollow: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert install_command("eval") in said(capsys, hollow, tasks, f"--tasks={CHOICE}")
    monkeypatch.setattr(task_names, "version", lambda name: "0.4.9.1")
    error = said(capsys, hollow, tasks, f"--tasks={CHOICE}")
    assert f"need lm-eval 0.4.13 or newer, and 0.4.9.1 is installed: {install_command('eval')}" in error


def test_task_asked_in_two_ways_is_an_error_with_both(
    hollow: Path, tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (tasks / f"{CHOICE}.yaml").read_text().replace(CHOICE, "mmlu_a")
    (tmp_path / "mmlu_a.yaml").write_text(text)
    (tmp_path / "mmlu.yaml").write_text("group: mmlu\ntask: [mmlu_a]\n")
    error = said(capsys, hollow, tmp_path, "--tasks=mmlu,mmlu_a")
    assert "the tasks mmlu and mmlu_a both contain mmlu_a, but with different settings: 5 and 0 examples" in error
    error = said(capsys, hollow, tmp_path, "--tasks=mmlu,mmlu_a", "--num_fewshot=2")
    assert "model.safetensors" in error or "no weights" in error  # alike, so it comes as far as the weights


def test_missing_nltk_data_is_an_error_if_a_task_needs_it(
    hollow: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    text = (tasks / f"{CHOICE}.yaml").read_text().partition("  - metric: acc_norm")[0]
    (tmp_path / "counting.py").write_text("def judge(doc, results):  # punkt_tab\n    return {'acc': 1.0}\n")
    (tmp_path / "counting.yaml").write_text(
        text.replace(CHOICE, "counting") + "process_results: !function counting.judge\n"
    )
    assert "which is not installed" in (error := said(capsys, hollow, tmp_path, "--tasks=counting"))
    assert "the task 'counting' counts" in error and "python -m nltk.downloader punkt_tab" in error


def test_mmlu_has_five_examples_by_default(tasks: Path, tmp_path: Path) -> None:
    for name, own in (("mmlu_a", ""), ("mmlu_b", "num_fewshot: 0\n"), ("mmlu_c", "num_fewshot: 3\n")):
        text = (tasks / f"{CHOICE}.yaml").read_text().replace(f"task: {CHOICE}", f"task: {name}")
        (tmp_path / f"{name}.yaml").write_text(text + own)
    for group in ("mmlu", "others"):
        (tmp_path / f"{group}.yaml").write_text(f"group: {group}\ntask: [mmlu_a, mmlu_b, mmlu_c]\n")

    def shots(group: str, asked: int | None) -> list[int]:
        settings = benchmarks.Settings(num_fewshot=asked)
        tokenizer, generation = make_tokenizer(), GenerationDefaults()
        (found,) = benchmarks.load_benchmarks([group], str(tmp_path), settings, tokenizer, generation, 512)
        return [t.get_config("num_fewshot") for t in found.tasks.values()]

    assert shots("mmlu", None) == [5, 0, 3]
    assert shots("others", None) == [0, 0, 3]
    assert shots("mmlu", 2) == [2, 0, 2]


def test_infinite_scores_are_none_and_stderr_is_not_a_score() -> None:
    values = {"alias": "t", "sample_len": 3, "word_perplexity,none": float("inf"), "acc,none": 0.5}
    found = benchmarks.scores({"results": {"t": values | {"acc_stderr,none": 0.1, "acc,first": 1}}})
    assert found == {"t/word_perplexity": None, "t/acc": 0.5, "t/acc,first": 1.0}


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1, which is not supported"),
        ({"do_sample": True}, "without a temperature above 0"),
    ],
)
def test_unsupported_generation_kwargs_raise(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        harness.parse_generation_kwargs({"until": ["x"], **kwargs}, GenerationDefaults(), 512)
    sampling, until = harness.parse_generation_kwargs(
        {"until": "x", "do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}, GenerationDefaults(), 512
    )
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, until) == (0.5, 0.9, 256, ["x"])
    greedy = {"until": [], "do_sample": False, "temperature": 0.5}
    assert harness.parse_generation_kwargs(greedy, GenerationDefaults(), 512)[0].temperature == 0


@pytest.mark.parametrize(
    "said", [{}, {"top_k": 7}, {"top_p": 0.8, "temperature": 3.0}, {"top_k": 0, "do_sample": True, "top_p": 0.5}]
)
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"top_p": 0.6}, {"do_sample": False}])
def test_draw_settings_equal_those_of_the_harness_own_model(
    said: dict[str, Any], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    asked = {"until": [], "do_sample": True, "temperature": 0.7} | kwargs
    ours, _ = harness.parse_generation_kwargs(asked, read_generation_config(tmp_path, {}), 512)
    # What transformers makes of the same file and of the call that the harness's model makes.
    model = llama()
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    call = {k: v for k, v in asked.items() if k != "until" and (k != "temperature" or asked["do_sample"])}
    theirs, _ = model._prepare_generation_config(None, **call)
    assert ours.temperature == (theirs.temperature if theirs.do_sample else 0)
    if theirs.do_sample:
        assert (ours.top_k, ours.top_p) == (theirs.top_k, theirs.top_p)
