"""The contract's defaults, field by field; every problem of a config told at once, by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from mice_jax.config import Config, ConfigError, Phase, Source, differences, field_names, to_dict

# As DESIGN.md sections 4 and 5 state them.
DEFAULTS = {
    "model.compute_dtype": "auto",
    "model.attention": "auto",
    "model.remat": "auto",
    "data.tokenizer": "",
    "data.chat_template": "",
    "data.max_length": 4096,
    "data.overlong": "drop",
    "data.validation_fraction": 0.0,
    "data.drop_remainder": False,
    "data.skip_bad": False,
    "optim.batch_size": 3840,
    "optim.learning_rate": 2e-5,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.warmup_ratio": 0.0,
    "optim.final_ratio": 0.0,
    "optim.decay_ratio": 0.1,
    "optim.max_steps": 0,
    "optim.grad_clip": 1.0,
    "optim.loss_reduction": "token",
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.tensor": 1,
    "train.rows_per_device": 0,
    "train.deterministic": False,
    "checkpoint.every_samples": 250_000,
    "log.every_steps": 1,
    "eval.every_samples": 0,
    "seed": 0,
}


def get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def put(config: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    setattr(get(config, ".".join(path)) if path else config, last, value)


def good() -> Config:
    """As the contract's example writes one."""
    c = Config()
    c.model.init_from = "path/to/hf_dir"
    sources = [Source(path="a.jsonl"), Source(path="b.parquet", weight=0.5)]
    c.data.phases = [Phase(name="stacked", num_epochs=1.0, sources=sources)]
    return c


def problem(config: Config) -> str:
    with pytest.raises(ConfigError) as raised:
        config.validate()
    return str(raised.value)


# ---------------------------------------------------------------------------------------- defaults
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_that_of_the_contract(name: str) -> None:
    value = get(Config(), name)
    assert (value, type(value)) == (DEFAULTS[name], type(DEFAULTS[name]))
    assert name in field_names()


def test_the_defaults_of_phases_and_sources_are_those_of_the_contract() -> None:
    phase, source = Phase(), Source()
    assert (phase.name, phase.num_epochs, phase.sources) == ("stacked", 1.0, [])
    assert (source.weight, source.format) == (1.0, "messages")
    assert (Config().data.phases, Config().data.validation, Config().eval.tasks) == ([], [], [])


def test_two_configs_share_no_list() -> None:
    a, b = Config(), Config()
    a.data.phases.append(Phase())
    a.mesh.data = 2
    assert (b.data.phases, b.mesh.data) == ([], 1)


def test_the_example_of_the_contract_is_valid() -> None:
    good().validate()


# ---------------------------------------------------------------------------------------- misspelt
@pytest.mark.parametrize(
    ("write", "nearest"),
    [
        (lambda c: setattr(c.optim, "learning_rte", 1.0), "learning_rate"),
        (lambda c: setattr(c.data, "max_len", 1), "max_length"),
        (lambda c: setattr(c, "optimizer", 1), "optim"),
        (lambda c: setattr(c.data.phases[0].sources[0], "wieght", 1), "weight"),
    ],
)
def test_a_misspelt_field_is_refused_where_it_is_written(write: Callable[[Config], None], nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        write(good())


def test_a_field_like_no_other_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="Log has no field 'zzz'; it has every_steps"):
        good().log.zzz = 1  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- ill-typed
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("optim.batch_size", "8", "int"),
        ("optim.batch_size", 8.0, "int"),
        ("optim.batch_size", True, "int"),
        ("optim.learning_rate", "1e-5", "float"),
        ("optim.learning_rate", None, "float"),
        ("data.skip_bad", 1, "bool"),
        ("data.overlong", 1, "str"),
        ("data.phases", "a.jsonl", "list"),
        ("eval.tasks", [1], "str"),
        ("optim", 3, "Optim"),
        ("data.phases", ["a.jsonl"], "Phase"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type_it_must_have(name: str, value: Any, kind: str) -> None:
    config = good()
    put(config, name, value)
    said = problem(config)
    assert name in said and kind in said
    assert repr(value) in said or repr(value[0]) in said


def test_a_whole_number_is_a_float() -> None:
    config = good()
    config.optim.learning_rate = 1
    config.data.phases[0].num_epochs = 2
    config.validate()


# ---------------------------------------------------------------------------------------- out of bounds
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.compute_dtype", "float16"),
        ("model.remat", "some"),
        ("model.init_from", ""),
        ("data.overlong", "cut"),
        ("data.max_length", 1),
        ("data.validation_fraction", 1.0),
        ("data.validation_fraction", -0.1),
        ("data.num_workers", -1),
        ("data.phases", []),
        ("optim.schedule", "cosin"),
        ("optim.batch_size", 0),
        ("optim.learning_rate", -1e-5),
        ("optim.learning_rate", math.inf),
        ("optim.loss_reduction", "mean"),
        ("optim.beta1", 1.0),
        ("optim.beta2", -0.5),
        ("optim.warmup_ratio", 1.5),
        ("optim.max_steps", -1),
        ("optim.grad_clip", -1.0),
        ("mesh.fsdp", 0),
        ("mesh.tensor", -2),
        ("train.rows_per_device", -1),
        ("checkpoint.every_samples", -1),
        ("log.every_steps", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_bounds_is_named_alone(name: str, value: Any) -> None:
    config = good()
    put(config, name, value)
    said = problem(config)
    assert said.startswith(f"in the config, {name}") and "problems" not in said
    if value not in ("", []):
        assert str(value) in said


def test_a_rate_that_is_no_number_is_refused() -> None:
    config = good()
    config.optim.learning_rate = math.nan
    assert "optim.learning_rate=nan" in problem(config)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda c: setattr(c.data.phases[0], "num_epochs", 0.0), ["data.phases[0].num_epochs=0.0"]),
        (lambda c: setattr(c.data.phases[0], "num_epochs", math.inf), ["data.phases[0].num_epochs=inf"]),
        (lambda c: setattr(c.data.phases[0], "sources", []), ["data.phases[0].sources"]),
        (lambda c: setattr(c.data.phases[0].sources[1], "weight", 0.0), ["data.phases[0].sources[1].weight=0.0"]),
        (lambda c: setattr(c.data.phases[0].sources[1], "path", ""), ["data.phases[0].sources[1].path"]),
        (lambda c: setattr(c.data.phases[0].sources[1], "half", "easy"), ["sources[1].half='easy'", "'short', 'long'"]),
        (lambda c: setattr(c.data.phases[0].sources[1], "max_samples", -1), ["sources[1].max_samples=-1"]),
        (lambda c: setattr(c.data.phases[0], "num_steps", -1), ["data.phases[0].num_steps=-1"]),
        (
            lambda c: c.data.phases.append(Phase("b", num_epochs=2.0, num_steps=3, sources=[Source("a")])),
            ["data.phases[1].num_epochs=2.0", "num_steps=3", "leave one"],
        ),
        (lambda c: setattr(c.data.phases[0], "replay", 0.1), ["data.phases[0].replay=0.1", "no phase before it"]),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay=-1.0)),
            ["data.phases[1].replay=-1.0"],
        ),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay=0.1, replay_from="b")),
            ["data.phases[1].replay_from='b'", "those are stacked"],
        ),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay_from="stacked")),
            ["data.phases[1].replay_from='stacked'", "without a replay"],
        ),
        (lambda c: setattr(c.data, "train_on", "first"), ["data.train_on='first'", "all, last"]),
        (lambda c: setattr(c.data, "prepare_workers", -1), ["data.prepare_workers=-1"]),
        (lambda c: c.data.phases.append(c.data.phases[0]), ["2 phases named 'stacked'"]),
        (lambda c: setattr(c.mesh, "data", -1), ["mesh.data", "mesh.fsdp"]),
    ],
)
def test_a_list_and_a_mesh_are_checked_by_field(write: Callable[[Config], None], names: list[str]) -> None:
    config = good()
    write(config)
    said = problem(config)
    assert all(name in said for name in names)


def test_two_ways_to_say_one_thing_are_refused() -> None:
    config = good()
    config.optim.warmup_steps, config.optim.warmup_ratio = 5, 0.1
    config.data.validation, config.data.validation_fraction = [Source(path="v.jsonl")], 0.1
    said = problem(config)
    for name in ("optim.warmup_steps=5", "optim.warmup_ratio=0.1", "data.validation_fraction=0.1"):
        assert name in said


def test_every_problem_is_told_at_once() -> None:
    config = good()
    wrong = {"optim.batch_size": 0, "optim.beta1": 2.0, "data.overlong": "cut", "model.init_from": "", "seed": -3}
    for name, value in wrong.items():
        put(config, name, value)
    config.data.phases[0].sources[0].weight = -1.0
    said = problem(config)
    assert "6 problems" in said and "(6)" in said and "(7)" not in said
    assert all(name in said for name in [*wrong, "data.phases[0].sources[0].weight=-1.0"])


# ---------------------------------------------------------------------------------------- dicts
def test_a_config_as_a_dict_holds_every_field_and_no_object() -> None:
    config = good()
    tree = to_dict(config)
    for name in (n for n in field_names() if "[]" not in n):
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        if name not in ("data.phases", "data.validation"):
            assert value == get(config, name)
    assert tree["data"]["phases"][0]["sources"][1] == {
        "path": "b.parquet",
        "weight": 0.5,
        "name": "",
        "format": "messages",
        "half": "",
        "max_samples": 0,
    }


def test_a_config_differs_in_nothing_from_itself() -> None:
    assert differences(to_dict(good()), to_dict(good())) == []


def test_differences_name_each_field_with_both_values() -> None:
    other = good()
    other.optim.learning_rate = 1e-3
    other.seed = 7
    other.data.phases[0].sources[1].weight = 2.0
    other.data.phases[0].sources.append(Source(path="c.jsonl"))
    said = differences(to_dict(good()), to_dict(other))
    assert "optim.learning_rate: 2e-05 -> 0.001" in said
    assert "seed: 0 -> 7" in said
    assert "data.phases.0.sources.1.weight: 0.5 -> 2.0" in said
    assert "data.phases.0.sources.2.path: 'absent' -> 'c.jsonl'" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mesh.fsdp", 4),
        ("checkpoint.every_samples", 1),
        ("checkpoint.keep_last", 2),
        ("log.every_steps", 10),
        ("eval.every_samples", 10),
        ("train.rows_per_device", 4),
        ("model.remat", "full"),
        ("data.num_workers", 2),
        ("data.cache_dir", "elsewhere"),
    ],
)
def test_fields_that_do_not_touch_the_training_may_differ(name: str, value: Any) -> None:
    other = good()
    put(other, name, value)
    assert differences(to_dict(good()), to_dict(other)) == []
    other.optim.eps = 1e-6  # and are no cover for one that does
    assert differences(to_dict(good()), to_dict(other)) == ["optim.eps: 1e-08 -> 1e-06"]


@pytest.mark.parametrize("name", ["train.deterministic", "model.compute_dtype", "data.max_length", "optim.batch_size"])
def test_fields_that_change_what_is_computed_may_not_differ(name: str) -> None:
    other = good()
    changed = {"train.deterministic": True, "model.compute_dtype": "bfloat16"}.get(name, 17)
    put(other, name, changed)
    assert len(differences(to_dict(good()), to_dict(other))) == 1
