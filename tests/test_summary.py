"""Warnings of a run that may not do what its user expects."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mice_jax.config import Config
from mice_jax.model_source import ModelSource
from mice_jax.training.summary import _optimizer_warnings, _unread_warnings

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
