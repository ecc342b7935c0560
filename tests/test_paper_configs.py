"""Every experiment of the study: its config validates and plans its steps, its docstring has the published outcome."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from helpers.runs import REPOSITORY, make_chats, run_prepare, run_verb, write_init, write_jsonl
from mice_jax import sweep
from mice_jax.config import Config, ConfigError, flatten, to_dict
from mice_jax.model_source import resolve_source
from mice_jax.planning import cost
from mice_jax.report_page.read_runs import published_of

FOLDER = REPOSITORY / "configs" / "paper"
FILES = sorted(f for f in FOLDER.glob("*.py") if not f.stem.startswith("paper_"))
SAMPLES = 40  # of each of three sources


def variants(file: Path) -> list[str]:
    return runpy.run_path(str(file))["VARIANTS"]


@pytest.fixture(scope="module", autouse=True)
def neighbours():
    """A config imports its neighbours, as the commands let it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small data and models where the configs look for them, as their argument names them."""
    folder = tmp_path_factory.mktemp("paper")
    for i, name in enumerate(("phase00", "phase05", "phase10")):
        write_jsonl(folder / f"{name}.jsonl", make_chats(SAMPLES, seed=i))
    for model in ("granite-7b", "granite-3b", "llama-3.2-3b", "mistral-7b"):
        write_init(folder / model)
    return f"data={folder},models={folder}"


def test_there_is_a_file_for_each_factor() -> None:
    assert {f.stem for f in FILES} == {
        "recipes", "batch_size", "learning_rate", "warmup", "schedule", "stacked_phased", "difficulty", "cadence", "pod"
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_variant_is_valid_planned_and_distinct(
    file: Path, places: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICE_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "paper_stores"))
    get_config, seen = runpy.run_path(str(file))["get_config"], []
    for variant in variants(file):
        config: Config = get_config(f"{places},{variant}")
        config.validate()
        assert config not in seen
        seen.append(config)
        config.data.validation_fraction = 0.0
        one = cost.run_cost(config)
        # A batch is larger than an epoch of this little data: each step is an epoch, or a phase's.
        epochs = sum(p.num_epochs for p in config.data.phases)
        per_phase = 3 * SAMPLES / len(config.data.phases)
        assert one.steps == epochs
        assert one.samples == pytest.approx(epochs * per_phase, rel=0.05)  # 1 % more where some are replayed


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_docstring_has_published_numbers_cost_and_launch_line(file: Path) -> None:
    told = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert "Published" in told and "Cost: " in told and f"configs/paper/{file.name}" in told


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_docstring_names_the_topology_of_each_of_its_models(file: Path) -> None:
    told = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("Topology: ")[2].partition("\n")[0]
    get_config = runpy.run_path(str(file))["get_config"]
    configs = [get_config(variant) for variant in variants(file)]
    known = runpy.run_path(str(FOLDER / "paper_models.py"))
    pod, topologies = known["POD"], known["TOPOLOGIES"]
    meant = {known["POD_TOPOLOGY"] if c.mesh == pod else topologies[Path(c.model.init_from).name] for c in configs}
    assert set(re.findall(r"v\w+:[0-9x]+", told)) == meant


def test_a_shape_starts_a_fresh_model_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = runpy.run_path(str(FOLDER / "pod.py"))["get_config"](f"models=random:{FOLDER / 'shapes'}")
    assert resolve_source(config.model.init_from).spec.d_model == 4096


# Steps: an epoch of this little data is one, ten epochs a trial.
@pytest.mark.parametrize("name, trials", [("learning_rate", 8), ("batch_size", 3), ("warmup", 3), ("schedule", 2)])
def test_a_sweep_of_the_study_is_dry_run_with_its_trials(
    name: str, trials: int, places: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(sweep.main, [f"--config={FOLDER / name}.py:{places}", "--dry_run"]) == 0
    assert f"{trials} trials, {10 * trials} steps" in capsys.readouterr().out


def test_every_sweep_of_the_study_is_tested() -> None:
    has = {f.stem for f in FILES if "def get_sweep" in f.read_text()}
    assert has == {"learning_rate", "batch_size", "warmup", "schedule"}


def test_the_command_reads_a_config_that_imports_its_neighbour(places: str) -> None:
    assert run_prepare(Path(f"{FOLDER / 'recipes.py'}:recipe=tulu,{places}")) == 0


def test_an_unknown_option_gets_a_suggestion() -> None:
    get_config = runpy.run_path(str(FOLDER / "batch_size.py"))["get_config"]
    with pytest.raises(ConfigError, match="did you mean 'batch'"):
        get_config("bach=128")
    with pytest.raises(ConfigError, match="batch=64 of the config's argument is not one of 128, 3840, 7680"):
        get_config("batch=64")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_number_that_the_report_shows_is_in_the_docstring(file: Path) -> None:
    told, get_config = ast.get_docstring(ast.parse(file.read_text())) or "", runpy.run_path(str(file))["get_config"]
    numbers = {float(n) for n in re.findall(r"[0-9]+\.[0-9]+", told)}
    for variant in variants(file):
        config = get_config(variant)
        config.validate()
        assert {p.value for p in config.published} <= numbers, variant


def test_each_trial_is_shown_the_published_number_of_its_value() -> None:
    base = runpy.run_path(str(FOLDER / "batch_size.py"))["get_sweep"]().base
    told = {}
    for batch in (128, 3840, 64):
        base.optim.batch_size = batch
        told[batch] = published_of(flatten(to_dict(base)))
    assert told == {128: {"MMLU": 0.516, "MTBench": 6.406}, 3840: {"MMLU": 0.526, "MTBench": 6.768}, 64: {}}
