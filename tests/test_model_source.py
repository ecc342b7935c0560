"""What a run can start from: another run, or one of its checkpoints, or a model of the Hub; and which paths raise."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.hub import Repo, serve
from helpers.runs import arrays, read_json, run_export, run_train, setting
from mice_jax.errors import UserError
from mice_jax.model_source import load_params, resolve_source
from mice_jax.models.transformer import make_decoder
from mice_jax.sharding import make_mesh, param_shardings

STILL = "--config.optim.learning_rate=0"


def params_of(place: Path) -> dict[str, np.ndarray]:
    source = resolve_source(str(place))
    decoder = make_decoder(source.spec)
    shardings = param_shardings(decoder.abstract, decoder.axes, make_mesh(1, -1, 1))
    leaves = jax.tree_util.tree_leaves_with_path(load_params(source, decoder, shardings))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, each saved."""
    folder = tmp_path_factory.mktemp("source")
    every = "--config.checkpoint.every_samples=8"
    assert run_train(setting(folder), folder / "run", "--config.optim.max_steps=2", every) == 0
    return folder / "run"


def test_run_starts_from_a_checkpoint_of_another_run(workdir: Path, tmp_path: Path) -> None:
    newest, earlier = params_of(workdir), params_of(workdir / "checkpoints" / "1")
    assert not equal(newest, earlier)  # otherwise the next line would show nothing
    flags = (f"--config.model.init_from={workdir}/checkpoints/1", "--config.optim.max_steps=1", STILL)
    assert run_train(workdir.parent / "run.py", tmp_path / "run", *flags) == 0
    assert equal(params_of(tmp_path / "run"), earlier)
    assert equal(newest, {k.removeprefix("params"): v for k, v in arrays(workdir, 2).items() if k.startswith("params")})


def test_run_starts_from_a_model_of_the_hub_and_keeps_its_commit(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_export(workdir, tmp_path / "hf") == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    flags = ("--config.model.init_from=org/tiny", "--config.optim.max_steps=1", STILL)
    with serve(monkeypatch, tmp_path / "cache") as hub:
        repo = hub.repos["org/tiny"] = Repo()
        commit = repo.push(files | {"README.md": b"---\nlicense: mit\n---\n"})
        assert run_train(workdir.parent / "run.py", tmp_path / "run", *flags) == 0
        assert repo.push(files) != commit  # what the name stands for now
        assert run_train(workdir.parent / "run.py", tmp_path / "run", *flags) == 0
    recorded = {"model.init_from": {"repo": "org/tiny", "commit": commit}}
    assert read_json(tmp_path / "run", "config.json")["resolved"]["hub"] == recorded
    assert equal(params_of(tmp_path / "run"), params_of(workdir))
    assert run_export(tmp_path / "run", tmp_path / "again") == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert 'base_model: "org/tiny"' in card and 'license: "mit"' in card and commit in card


def test_checkpoint_is_never_cut_or_padded_to_other_shapes(workdir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    file = run / "model" / "config.json"
    right = file.read_text()
    for key, old, new in (("intermediate_size", 48, 32), ("hidden_size", 16, 32)):
        file.write_text(right.replace(f'"{key}": {old}', f'"{key}": {new}'))
        with pytest.raises(UserError, match=rf"2 holds .* with the shape \[.*{old}.*\], .* shape \[.*{new}.*\]"):
            params_of(run)


def test_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist or is not a folder"):
        resolve_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        resolve_source(str(tmp_path))
