"""The study at mouse scale: its sweeps on the demo's own data, and the documents of its base model."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mice_jax import sweep
from mice_jax.config import Config
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import build_dataset
from mice_jax.data.mixture import Mixture
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.lab.study import combinations, config_of
from runs import REPOSITORY, run_verb

FOLDER = REPOSITORY / "configs" / "sweeps"
FILES = sorted(f for f in FOLDER.glob("mouse_*.py") if f.stem != "mouse_base")
sys.path.append(str(REPOSITORY / "demo"))

import mouse_study  # noqa: E402
from make_data import MAX_CHARS, read_documentation  # noqa: E402


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the sweeps start from, but for the base's weights, which no plan reads."""
    folder = tmp_path_factory.mktemp("mouse")
    mouse_study.prepare(folder / "data")
    shutil.copytree(folder / "data" / "init", folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICE_JAX_CACHE", str(folder / "stores"))
        yield folder


def test_the_three_sweeps_are_those_that_the_command_runs() -> None:
    assert {f.stem for f in FILES} == {f"mouse_{name}" for name in mouse_study.SWEEPS}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_sweep_s_arms_see_equal_samples_in_a_hundred_updates_or_more_with_three_seeds(
    file: Path, study: Path
) -> None:
    made = sweep.load_sweep(f"{file}:{study}")
    assert len(made.seeds) >= 3 and made.stop is None and made.base.stop.steps == 0
    assert (made.metric, made.mode) == ("eval/loss", "min") and made.base.data.validation
    mixtures = [mixture_of(config_of(made, p)) for p in combinations(made) if p["seed"] == made.seeds[0]]
    assert min(map(len, mixtures)) >= 100
    seen = [np.bincount(np.concatenate([m.step(i).samples for i in range(len(m))])) for m in mixtures]
    assert all(np.array_equal(counts, seen[0]) and set(counts) <= {0, 2} for counts in seen), "each sample twice"
    larger = config_of(made, combinations(made)[0])
    larger.optim.batch_size = 192
    assert len(mixture_of(larger)) < 100, "a batch that is too large for the data is noticed"


def mixture_of(config: Config) -> Mixture:
    """The steps that a run of the config takes."""
    tokenizer = load_tokenizer(config.model.init_from, config.data.chat_template)
    data = build_dataset(config.data, ChatEncoder(tokenizer))
    return Mixture(data.phases, batch_size=config.optim.batch_size, seed=config.seed)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_sweep_is_dry_run(file: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = len(combinations(sweep.load_sweep(f"{file}:{study}")))
    assert run_verb(sweep.main, [f"--config={file}:{study}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"{trials} trials, " in said and trials >= 12


def test_documents_hold_nothing_that_the_held_out_knowledge_asks_about(study: Path) -> None:
    whole = "\n".join(json.loads(s)["text"] for s in (study / "data" / "documents.jsonl").read_text().splitlines())

    def shown(name: str) -> list[str]:
        """The answers that are an entry's documentation as it stands."""
        samples = (study / "data" / name).read_text().splitlines()
        asked = [json.loads(s)["messages"][-2:] for s in samples]
        return [answer["content"] for prompt, answer in asked if prompt["content"].startswith("Show the doc")]

    held_out, trained = shown("knowledge.heldout.jsonl"), shown("knowledge.jsonl")
    assert held_out and not any(answer in whole for answer in held_out)
    assert sum(answer in whole for answer in trained) > 0.5 * len(trained), "the same look finds what is there"


def test_a_text_is_cut_into_pieces_without_loss() -> None:
    longest = max((e.doc for e in read_documentation()), key=len)
    assert len(longest) > 5 * MAX_CHARS
    cut = list(mouse_study.pieces(longest))
    assert max(map(len, cut)) <= MAX_CHARS and "".join("".join(cut).split()) == "".join(longest.split())
