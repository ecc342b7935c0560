"""Warnings of a run that may not do what its user expects."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from helpers.models import spec_of
from mice_jax.config import Config
from mice_jax.model_source import ModelSource
from mice_jax.models.transformer import make_decoder
from mice_jax.training import build
from mice_jax.training.summary import _num_params, _optimizer_warnings, _unread_warnings

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("optimizer", "kind", "before", "said"),
    [
        ("muon", "hf", None, "probably pretrained with Adam"),
        ("muon", "run", {"optim": {"name": "adamw"}}, "another run trained with adamw"),
        ("muon", "run", {}, "another run trained with adamw"),  # of a version that had no other optimizer
        ("muon", "run", {"optim": {"name": "muon"}}, None),
        ("muon", "random", None, None),
        ("adamw", "hf", None, None),
    ],
)
def test_muon_on_weights_of_another_optimizer_is_warned_of_once(
    tmp_path: Path, optimizer: str, kind: str, before: dict[str, Any] | None, said: str | None
) -> None:
    (tmp_path / "model").mkdir()
    if before is not None:
        (tmp_path / "config.json").write_text(json.dumps(before))
    config = Config()
    config.optim.name = optimizer
    source: Any = SimpleNamespace(kind=kind, folder=tmp_path / "model")
    assert {"kind", "folder"} <= {f.name for f in dataclasses.fields(ModelSource)}
    warnings = list(_optimizer_warnings(config, source))
    assert len(warnings) == (said is not None)
    assert all(said in w and "2605.10468" in w for w in warnings)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"name": "sgd"}, []),  # nothing is set besides
        ({"eps": 1e-6, "beta1": 0.8, "beta2": 0.99}, []),
        ({"name": "sgd", "beta1": 0.0, "beta2": 0.99}, ["optim.beta2=0.99 has no effect with optim.name='sgd'"]),
        ({"name": "lion", "eps": 1e-6}, ["optim.eps=1e-06 has no effect with optim.name='lion'"]),
        ({"name": "adafactor", "beta1": 0.8}, ["optim.beta1=0.8 has no effect with optim.name='adafactor'"]),
        ({"decay_ratio": 0.2}, ["optim.decay_ratio=0.2 has no effect with optim.schedule='constant'"]),
        ({"schedule": "wsd", "decay_ratio": 0.2, "final_ratio": 0.1}, []),
    ],
)
def test_fields_that_the_optimizer_or_schedule_does_not_read_are_named(fields: dict[str, Any], said: list[str]) -> None:
    assert list(_unread_warnings(dataclasses.replace(Config().optim, **fields))) == said


@pytest.mark.parametrize(("tied", "vocabulary", "padding"), [(True, 90, 38), (False, 90, 2 * 38), (False, 128, 0)])
def test_parameters_that_pad_the_vocabulary_are_counted_apart(tied: bool, vocabulary: int, padding: int) -> None:
    """A vocabulary is padded to 128 rows; an embedding and an output weight have one row of d_model for each."""
    spec = spec_of(vocab_size=vocabulary, tie_embeddings=tied)
    decoder = make_decoder(spec)
    model: Any = SimpleNamespace(decoder=decoder)
    model.num_params, model.num_padding = (
        getattr(build.Model, name).fget(model) for name in ("num_params", "num_padding")
    )
    assert model.num_padding == padding * spec.d_model
    rows = (1 if tied else 2) * vocabulary * spec.d_model
    others = sum(leaf.size for leaf in jax.tree.leaves((decoder.abstract["layers"], decoder.abstract["final_norm"])))
    said = _num_params(model)
    assert said.startswith(f"{rows + others:,} parameters") and ("pad the vocabulary" in said) == bool(padding)


def test_length_beyond_what_the_model_was_made_for_is_warned_of() -> None:
    config, source = Config(), SimpleNamespace(spec=spec_of(max_positions=128))
    config.data.max_length = 129
    [said] = build.length_warnings(config, source)
    assert "data.max_length=129" in said and "max_position_embeddings=128" in said
    config.data.max_length = 128
    assert not build.length_warnings(config, source)
