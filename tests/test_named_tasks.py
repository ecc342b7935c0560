"""Tasks as the harness itself defines them, one of each kind that the documented names hold, over made-up rows.

Their YAML files and their code are the harness's; only the Hub is not asked: rows with the data sets' own columns stand
in for it. So what a named task needs of us is tried, with no network.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import nltk
import pytest
from lm_eval.tasks import TaskManager
from safetensors.numpy import load_file, save_file

from helpers.runs import make_tokenizer
from helpers.tasks import assert_same, by_harness, by_us, responses, write_model
from mice_jax.evals import benchmarks
from mice_jax.evals.benchmarks import Settings
from mice_jax.inference.generation_config import GenerationDefaults

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FOUR = ["the cold barn", "a red barn", "mice", "no elephants at all"]
NAMES = (
    "leaderboard_gpqa", "mmlu_anatomy", "arc_challenge", "gsm8k", "truthfulqa_mc2", "leaderboard_mmlu_pro",
    "leaderboard_musr", "leaderboard_math_algebra_hard", "leaderboard_ifeval", "leaderboard_bbh_boolean_expressions",
)  # fmt: skip


def rows_of(path: str, i: int) -> dict[str, Any]:
    """Row i of a data set of the Hub, in its columns."""
    question = f"Where do {i + 2} mice learn to compete?"
    targets = {"choices": FOUR[: 3 + i % 2], "labels": [1, 0, 1, 0][: 3 + i % 2]}
    return {
        "cais/mmlu": {"question": f" {question} ", "subject": "anatomy", "choices": FOUR, "answer": i % 4},
        "allenai/ai2_arc": {
            "id": f"Mercury_{i}",
            "question": question,
            "choices": {"text": FOUR[: 4 - i % 2], "label": ["A", "B", "C", "D"][: 4 - i % 2]},
            "answerKey": "ABC"[i % 3],
        },
        "openai/gsm8k": {"question": question, "answer": f"They are {i} and <<{i}+2={i + 2}>>2.\n#### {i + 2}"},
        "truthfulqa/truthful_qa": {
            "question": question,
            "mc1_targets": {"choices": FOUR, "labels": [1, 0, 0, 0]},
            "mc2_targets": targets,
        },
        "TIGER-Lab/MMLU-Pro": {
            "question_id": i,
            "question": question,
            "options": FOUR + FOUR[: i % 3],
            "answer": "ABCD"[i % 4],
            "answer_index": i % 4,
            "cot_content": "",
            "category": "biology",
            "src": "made up",
        },
        "Idavidrein/gpqa": {
            "Question": question,
            "Correct Answer": f"{FOUR[0]} [1]",
            **{f"Incorrect Answer {n}": f"{FOUR[n]}\n" for n in (1, 2, 3)},
        },
        "TAUR-Lab/MuSR": {
            "narrative": "The mice were seen in the barn. " * (i + 1),
            "question": question,
            "choices": str(FOUR[:3]),
            "answer_index": i % 3,
            "answer_choice": FOUR[i % 3],
        },
        "DigitalLearningGmbH/MATH-lighteval": {
            "problem": f"What is $1 + {i}$?",
            "level": f"Level {5 - i % 2}",
            "type": "Algebra",
            "solution": f"It is $\\boxed{{{i + 1}}}$.",
        },
        "wis-k/instruction-following-eval": {
            "key": i,
            "prompt": f"{question} Answer in at least 2 sentences, without commas.",
            "instruction_id_list": ["length_constraints:number_sentences", "punctuation:no_comma"],
            "kwargs": [{"num_sentences": 2, "relation": "at least"}, {"num_sentences": None, "relation": None}],
        },
        "SaylorTwift/bbh": {"input": "not ( True ) and ( True ) is", "target": ["False", "True"][i % 2]},
    }[path]


SPLITS = {
    "cais/mmlu": ("dev", "validation", "test"),
    "allenai/ai2_arc": ("train", "validation", "test"),
    "TAUR-Lab/MuSR": ("murder_mysteries", "object_placements", "team_allocation"),
    "Idavidrein/gpqa": ("train",),
    "wis-k/instruction-following-eval": ("train",),
}

SIZES = {"dev": 6, "train": 6, "validation": 6}  # of those that examples are taken from


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """The harness's own tasks in the folders of NAMES: to read the files of all takes half a minute."""
    folder = Path(lm_eval.tasks.__file__).parent
    places = [str(folder / name) for name in ("arc", "gsm8k", "leaderboard", "mmlu", "truthfulqa")]
    return TaskManager(include_path=places, include_defaults=False)


@pytest.fixture
def hub(manager: TaskManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub's data sets, and nltk's data, made up."""

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> datasets.DatasetDict:
        folder = tmp_path / "hub" / path / (name or "default")
        if not folder.exists():
            splits = SPLITS.get(path, ("train", "validation", "test"))
            whole = {s: datasets.Dataset.from_list([rows_of(path, i) for i in range(SIZES.get(s, 3))]) for s in splits}
            datasets.DatasetDict(whole).save_to_disk(folder)
        return datasets.DatasetDict.load_from_disk(folder)  # from disk, where what is made of it is kept too

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(benchmarks, "_manager", lambda names, include_path: manager)
    english = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


def test_every_kind_of_named_task_is_scored_as_by_the_harness_s_own_model(
    hub: None, manager: TaskManager, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", "llama-linear", max_position_embeddings=4096)
    # It ends its answers soon: those of MATH and IFEval may have more than a thousand tokens.
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][make_tokenizer().eos_token_id] *= 3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ours = by_us(model, None, tmp_path / "scores.json", *NAMES)
    theirs = by_harness(model, manager, *NAMES)
    written = [a for task in ("gsm8k", "leaderboard_ifeval") for a in responses(theirs, task)]
    assert all(len(a[0]) < 300 for a in written) and any(len(set(a[0])) > 3 for a in written), written
    assert len(theirs["samples"]) == len(NAMES) + 4 and all(theirs["samples"].values())
    assert_same(ours, theirs)


def test_what_a_task_shuffles_as_it_loads_is_the_same_on_each_machine(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads that other tests have left, which wait for a lost store, draw from the one that all share.
    own = random.Random()
    for name in ("seed", "shuffle"):
        monkeypatch.setattr(random, name, getattr(own, name))

    def loaded() -> list[Any]:
        asked = ["leaderboard_gpqa"]
        (found,) = benchmarks.load_benchmarks(asked, "", Settings(), make_tokenizer(), GenerationDefaults(), 4096)
        return [found.fingerprint, [list(task.eval_docs) for task in found.tasks.values()]]

    first = loaded()
    shutil.rmtree(tmp_path / "hub")  # as on another machine, which has not shuffled them yet
    assert loaded() == first
    assert any(doc["answer"] != "(D)" for docs in first[1] for doc in docs)  # they are shuffled
