"""Tasks of lm-evaluation-harness over synthetic data, models that answer them, and the harness's own `hf` model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from helpers.families import torch_model
from helpers.runs import WORDS, make_tokenizer, run_verb, write_jsonl
from mice_jax import evaluate

EOS = "<|im_end|>"
BOS = "<|endoftext|>"
# The tolerance is for sums of up to some hundred log-probabilities of float32 logits, which are large here.
CLOSE = 1e-3
CHOICE, ROLLING, WRITTEN = "barn_choice", "barn_rolling", "barn_written"
FRAGILE = "barn_fragile"
BARN = "barn"  # a group of CHOICE and a variant with an example before each question

# Every question begins with the same instruction, as in many benchmarks.
YAML = {
    CHOICE: """
task: {name}
{data}
output_type: multiple_choice
description: "Answer the questions about mice.\\n\\n"
doc_to_text: "{{{{context}}}} {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
""",
    ROLLING: """
task: {name}
{data}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    WRITTEN: """
task: {name}
{data}
output_type: generate_until
doc_to_text: "{{{{context}}}} {{{{question}}}}\\nA:"
doc_to_target: "{{{{written}}}}"
generation_kwargs:
  until: ["e", "\\n"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
filter_list:
  - name: none
    filter:
      - function: take_first
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "(\\\\w+)"
      - function: take_first
""",
}


def write_tasks(folder: Path, documents: int = 12, longest: int = 90) -> Path:
    """Writes a folder for --include_path with three tasks over one file, and the group."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    folder.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for i in range(documents):
        options = [words(1, 3), f"{words(1, 2)}, {i}", "", "  two spaces first"]
        options[2] = options[0].split(" ")[0] + "s and more"  # starts with the same characters as another option
        record = {"context": words(5, longest), "question": f"{words(2, 6)}?", "choices": options, "answer": i % 4}
        records.append(record | {"text": words(20, 200), "written": rng.choice(WORDS)})
    records[0]["question"] += "  "  # the harness moves such spaces to the options
    records[1]["text"] = "ü " * 9 + "\U0001f42d"
    data = write_jsonl(folder / "data.jsonl", records)
    for name, yaml in YAML.items():
        (folder / f"{name}.yaml").write_text(yaml.format(name=name, data=_source(data)))
    half = YAML[CHOICE].format(name="barn_half", data=_source(data)) + "num_fewshot: 1\n"
    (folder / "barn_half.yaml").write_text(half)
    group = f"group: {BARN}\ntask: [{CHOICE}, barn_half]\n"
    group += "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (folder / "barn.yaml").write_text(group)
    return folder


def write_fragile(tasks: Path) -> Path:
    """Adds the task FRAGILE, whose code raises while a file exists; returns the path of that file, which does not."""
    switch = tasks / "broken"
    (tasks / "fragile.py").write_text(f"""import os


def judge(doc, results):
    if os.path.exists({str(switch)!r}):
        raise KeyError("a column of " + doc["written"])
    return {{"acc": float(results[0][0] > results[1][0])}}
""")
    text = YAML[CHOICE].format(name=FRAGILE, data=_source(tasks / "data.jsonl")).partition("  - metric: acc_norm")[0]
    (tasks / f"{FRAGILE}.yaml").write_text(text + "process_results: !function fragile.judge\n")
    return switch


def _source(data: Path) -> str:
    """Returns the keys by which a task finds its documents, in a local file with the cache next to it."""
    lines = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {data}, few: {data}}}, cache_dir: {data.parent / 'arrow'}}}",
        "test_split: test",
        "fewshot_split: few",
    ]
    return "\n".join(lines)


def write_model(folder: Path, case: str, *, bos: bool = False, **changes: Any) -> Path:
    """Writes a tiny model of a family and its tokenizer, which may begin each text with a bos token."""
    tokenizer = make_tokenizer()
    if bos:
        tokenizer.bos_token = BOS
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch_model(case, folder, vocab_size=300, pad_token_id=tokenizer.pad_token_id, **ends, **changes)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------- comparisons
def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Returns the model's response to each request of a task."""
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [response for s in samples for response in s["resps"]]


def writes(results: dict[str, Any], task: str) -> bool:
    """Whether a task generates text."""
    return (
        isinstance(responses(results, task)[0][0], str) and results["configs"][task]["output_type"] == "generate_until"
    )


def gap(a: dict[str, Any], b: dict[str, Any], task: str) -> float:
    """Returns the largest difference of two log-likelihoods."""
    numbers = [[float(r[0][0] if isinstance(r[0], list | tuple) else r[0]) for r in responses(x, task)] for x in (a, b)]
    assert len(numbers[0]) == len(numbers[1]) > 5
    return max(abs(x - y) for x, y in zip(*numbers, strict=True))


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics of each task without standard errors."""
    return {t: {k: v for k, v in m.items() if "stderr" not in k} for t, m in results["results"].items()}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Asserts that two results agree in each request, each metric, and the correctness of each document."""
    for task in theirs["samples"]:
        if writes(theirs, task):
            assert responses(ours, task) == responses(theirs, task)
        else:
            assert gap(ours, theirs, task) < CLOSE, task
    found, wanted = metrics(ours), metrics(theirs)
    assert found.keys() == wanted.keys()
    for task, values in wanted.items():
        assert found[task].keys() == values.keys()
        for name, value in values.items():
            assert found[task][name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name
    for task, samples in theirs["samples"].items():
        for key in ("acc", "acc_norm", "exact_match"):
            rights = [[s[key] for s in x if key in s] for x in (samples, ours["samples"][task])]
            assert rights[0] == pytest.approx(rights[1], rel=1e-4), (task, key)  # truthfulqa_mc2 has fractions


# ---------------------------------------------------------------------------------------- evaluations
def by_harness(
    model: Path, tasks: Path | TaskManager, *names: str, batch_size: int = 4, **settings: Any
) -> dict[str, Any]:
    """Evaluates a folder with the harness's own model, on torch."""
    from lm_eval.models.huggingface import HFLM  # imported here because it imports torch

    lm = HFLM(str(model), device="cpu", dtype="float32", batch_size=batch_size)
    manager = tasks if isinstance(tasks, TaskManager) else TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"log_samples": True, "bootstrap_iters": 0, "fewshot_as_multiturn": False} | settings
    found = simple_evaluate(model=lm, tasks=list(names), task_manager=manager, **settings)
    assert found is not None
    return found


def by_us(model: Path, tasks: Path | None, output: Path, *names: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Evaluates a folder with `mice evaluate`; returns the results that it writes."""
    where = [f"--model={model}", f"--include_path={tasks or ''}", f"--output={output}"]
    assert run_verb(evaluate.main, [*where, f"--tasks={','.join(names)}", "--log_samples", *flags]) == 0
    return json.loads(output.read_text())
