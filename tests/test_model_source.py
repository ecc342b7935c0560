"""What a run can start from: another run, one of its checkpoints; and what is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.runs import run_train, setting
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


def test_a_run_starts_from_the_weights_of_another_run_or_of_one_of_its_checkpoints(tmp_path: Path) -> None:
    config = setting(tmp_path)
    first = tmp_path / "first"
    every = "--config.checkpoint.every_samples=8"
    assert run_train(config, first, "--config.optim.max_steps=2", every) == 0
    newest, earlier = params_of(first), params_of(first / "checkpoints" / "1")
    assert not equal(newest, earlier)  # else the rest would show nothing
    for name, place, wanted in (("a", first, newest), ("b", first / "checkpoints" / "1", earlier)):
        flags = (f"--config.model.init_from={place}", "--config.optim.max_steps=1", STILL)
        assert run_train(config, tmp_path / name, *flags) == 0
        assert equal(params_of(tmp_path / name), wanted)


def test_a_checkpoint_is_never_cut_or_padded_to_another_model_s_shapes(tmp_path: Path) -> None:
    config, run = setting(tmp_path), tmp_path / "run"
    assert run_train(config, run, "--config.optim.max_steps=1") == 0
    params_of(run)  # good so far
    file = run / "model" / "config.json"
    right = file.read_text()
    for key, old, new in (("intermediate_size", 48, 32), ("hidden_size", 16, 32)):
        file.write_text(right.replace(f'"{key}": {old}', f'"{key}": {new}'))
        with pytest.raises(UserError, match=rf"1 holds .* of shape \[.*{old}.*\], .* makes it \[.*{new}.*\]"):
            params_of(run)


def test_a_place_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        resolve_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        resolve_source(str(tmp_path))
