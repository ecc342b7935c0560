"""Defaults of the config, and the errors of a config that cannot be run."""

import math
import runpy
from collections.abc import Callable
from typing import Any

import pytest

from helpers.runs import REPOSITORY
from mice_jax import config_checks
from mice_jax.config import (
    Config,
    ConfigError,
    Phase,
    Source,
    differences,
    field_names,
    fields_of_all_processes,
    flatten,
    to_dict,
)
from mice_jax.config_checks import resolved_rate
from mice_jax.data.sources import FORMATS
from mice_jax.models.attention import BACKENDS

pytestmark = pytest.mark.smoke

# The defaults that users' scripts rely on.
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
    """A valid config with one phase of two sources."""
    c = Config()
    c.model.init_from = "path/to/hf_dir"
    sources = [Source(path="a.jsonl"), Source(path="b.parquet", weight=0.5)]
    c.data.phases = [Phase(name="stacked", num_epochs=1.0, sources=sources)]
    return c


def error_of(config: Config) -> str:
    with pytest.raises(ConfigError) as raised:
        config.validate()
    return str(raised.value)


# ---------------------------------------------------------------------------------------- defaults
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_as_documented(name: str) -> None:
    value = get(Config(), name)
    assert (value, type(value)) == (DEFAULTS[name], type(DEFAULTS[name]))
    assert name in field_names()


def test_defaults_of_phases_and_sources_are_as_documented() -> None:
    phase, source = Phase(), Source()
    assert (phase.name, phase.num_epochs, phase.sources) == ("stacked", 1.0, [])
    assert (source.weight, source.format) == (1.0, "messages")
    assert (Config().data.phases, Config().data.validation, Config().eval.tasks) == ([], [], [])


def test_two_configs_share_no_list() -> None:
    a, b = Config(), Config()
    a.data.phases.append(Phase())
    a.mesh.data = 2
    assert (b.data.phases, b.mesh.data) == ([], 1)


def test_the_example_config_is_valid() -> None:
    good().validate()


# ---------------------------------------------------------------------------------------- unknown fields
@pytest.mark.parametrize(
    ("write", "nearest"),
    [
        (lambda c: setattr(c.optim, "learning_rte", 1.0), "learning_rate"),
        (lambda c: setattr(c.data, "max_len", 1), "max_length"),
        (lambda c: setattr(c, "optimizer", 1), "optim"),
        (lambda c: setattr(c.data.phases[0].sources[0], "wieght", 1), "weight"),
    ],
)
def test_assigning_a_misspelt_field_is_an_error(write: Callable[[Config], None], nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        write(good())


def test_the_error_of_an_unknown_field_lists_all_fields() -> None:
    with pytest.raises(ConfigError, match="Log has no field 'zzz'; it has every_steps"):
        good().log.zzz = 1  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- wrong types
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
def test_a_value_of_the_wrong_type_is_an_error(name: str, value: Any, kind: str) -> None:
    config = good()
    put(config, name, value)
    error = error_of(config)
    assert name in error and kind in error
    assert repr(value) in error or repr(value[0]) in error


def test_an_integer_is_accepted_for_a_float() -> None:
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
        ("optim.beta2_half_life", -1.0),
        ("optim.beta2_half_life", math.inf),
        ("optim.warmup_ratio", 1.5),
        ("optim.max_steps", -1),
        ("optim.grad_clip", -1.0),
        ("mesh.fsdp", 0),
        ("mesh.tensor", -2),
        ("train.rows_per_device", -1),
        ("train.pause_at_share", 1.5),
        ("eval.at_shares", [0.2, 0.0]),
        ("eval.exact_match", True),  # nothing is held out
        ("eval.answers", 3),  # nothing is held out
        ("checkpoint.every_samples", -1),
        ("log.every_steps", 0),
        ("log.profile_steps", "13:10"),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_bounds_is_the_only_problem_reported(name: str, value: Any) -> None:
    config = good()
    put(config, name, value)
    error = error_of(config)
    assert error.startswith(f"in the config, {name}") and "problems" not in error
    if value not in ("", []):
        assert str(value) in error


def test_a_nan_learning_rate_is_an_error() -> None:
    config = good()
    config.optim.learning_rate = math.nan
    assert "optim.learning_rate=nan" in error_of(config)


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
        (lambda c: setattr(c.data.phases[0], "replay", 0.1), ["data.phases[0].replay=0.1", "no earlier phase"]),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay=-1.0)),
            ["data.phases[1].replay=-1.0"],
        ),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay=0.1, replay_from="b")),
            ["data.phases[1].replay_from='b'", "these are stacked"],
        ),
        (
            lambda c: c.data.phases.append(Phase("b", sources=[Source("a")], replay_from="stacked")),
            ["data.phases[1].replay_from='stacked'", "needs a replay"],
        ),
        (lambda c: setattr(c.data, "train_on", "first"), ["data.train_on='first'", "all, last"]),
        (lambda c: setattr(c.data, "prepare_workers", -1), ["data.prepare_workers=-1"]),
        (lambda c: c.data.phases.append(c.data.phases[0]), ["2 phases named 'stacked'"]),
        (lambda c: setattr(c.mesh, "data", -1), ["mesh.data", "mesh.fsdp"]),
    ],
)
def test_phases_sources_and_mesh_are_checked_by_field(write: Callable[[Config], None], names: list[str]) -> None:
    config = good()
    write(config)
    error = error_of(config)
    assert all(name in error for name in names)


def test_fields_that_exclude_each_other_are_an_error() -> None:
    config = good()
    config.optim.warmup_steps, config.optim.warmup_ratio = 5, 0.1
    config.data.validation, config.data.validation_fraction = [Source(path="v.jsonl")], 0.1
    error = error_of(config)
    for name in ("optim.warmup_steps=5", "optim.warmup_ratio=0.1", "data.validation_fraction=0.1"):
        assert name in error


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda c: setattr(c.optim, "beta2", 0.99), "optim.beta2=0.99 are both set"),
        (lambda c: setattr(c.optim, "name", "sgd"), "optim.name='sgd' has no beta2"),
        (lambda c: setattr(c.data.phases[0], "batch_size", 64), "data.phases[0].batch_size=64 differs from"),
        (lambda c: setattr(c.optim, "beta2_half_life", 1e12), "at optim.batch_size=3840: 1 in float32"),
        (lambda c: setattr(c.data.phases[0], "batch_size", 3840), ""),
    ],
)
def test_half_life_of_beta2_excludes_what_it_cannot_decide(write: Callable[[Config], None], words: str) -> None:
    config = good()
    config.optim.beta2_half_life = 1730.0
    write(config)
    assert words in error_of(config) if words else config.validate() is None


def test_bfloat16_weights_and_adapters_exclude_each_other() -> None:
    config = good()
    config.model.param_dtype = "bfloat16"
    config.validate()
    config.model.lora.rank = 4
    assert "nothing reads model.param_dtype='bfloat16': leave it at float32" in error_of(config)


@pytest.mark.parametrize(
    "name, beta1, dtype, words",
    [
        ("sgd", 0.0, "bfloat16", "optim.name='sgd' and optim.beta1=0, which keep no moments, so nothing reads it"),
        ("sgd", 0.0, "int8", "optim.name='sgd' and optim.beta1=0"),
        ("sgd", 0.0, "float32", ""),
        ("sgd", 0.9, "int8", ""),
        ("adafactor", 0.9, "int8", "optim.name='adafactor' keeps statistics of rows and columns"),
        ("adafactor", 0.9, "bfloat16", ""),  # its statistics are stored so
    ],
)
def test_small_moments_need_an_optimizer_that_has_moments(name: str, beta1: float, dtype: str, words: str) -> None:
    config = good()
    config.optim.name, config.optim.beta1, config.optim.moments_dtype = name, beta1, dtype
    if not words:
        config.validate()
        return
    error = error_of(config)
    assert f"optim.moments_dtype={dtype!r}" in error and words in error


@pytest.mark.parametrize(
    "rule, rate_batch_size, wanted",
    [("none", 0, 2e-5), ("sqrt", 960, 4e-5), ("linear", 960, 8e-5), ("sqrt", 3840, 2e-5), ("linear", 15360, 5e-6)],
)
def test_rate_follows_the_batch_size_by_its_rule(rule: str, rate_batch_size: int, wanted: float) -> None:
    """The batch size of a config is 3,840 by default, and its rate 2e-5."""
    config = good()
    config.optim.rate_for_batch, config.optim.rate_batch_size = rule, rate_batch_size
    config.validate()
    assert resolved_rate(flatten(to_dict(config))) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "rule, rate_batch_size, words",
    [("none", 64, "is read by optim.rate_for_batch alone"), ("sqrt", 0, "set optim.rate_batch_size")],
)
def test_rate_rule_without_its_batch_size_is_named(rule: str, rate_batch_size: int, words: str) -> None:
    config = good()
    config.optim.rate_for_batch, config.optim.rate_batch_size = rule, rate_batch_size
    assert words in error_of(config)


def test_all_problems_are_reported_at_once() -> None:
    config = good()
    wrong = {"optim.batch_size": 0, "optim.beta1": 2.0, "data.overlong": "cut", "model.init_from": "", "seed": -3}
    for name, value in wrong.items():
        put(config, name, value)
    config.data.phases[0].sources[0].weight = -1.0
    error = error_of(config)
    assert "6 problems" in error and "(6)" in error and "(7)" not in error
    assert all(name in error for name in [*wrong, "data.phases[0].sources[0].weight=-1.0"])


# ---------------------------------------------------------------------------------------- dicts
def test_to_dict_has_every_field_as_plain_values() -> None:
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


def test_a_config_has_no_difference_from_itself() -> None:
    assert differences(to_dict(good()), to_dict(good())) == []


def test_differences_name_each_field_with_both_values() -> None:
    other = good()
    other.optim.learning_rate = 1e-3
    other.seed = 7
    other.data.phases[0].sources[1].weight = 2.0
    other.data.phases[0].sources.append(Source(path="c.jsonl"))
    error = differences(to_dict(good()), to_dict(other))
    assert "optim.learning_rate: 2e-05 -> 0.001" in error
    assert "seed: 0 -> 7" in error
    assert "data.phases.0.sources.1.weight: 0.5 -> 2.0" in error
    assert "data.phases.0.sources.2.path: 'absent' -> 'c.jsonl'" in error


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
def test_fields_outside_data_and_numerics_may_differ(name: str, value: Any) -> None:
    other = good()
    put(other, name, value)
    assert differences(to_dict(good()), to_dict(other)) == []
    other.optim.eps = 1e-6  # and are no cover for one that does
    assert differences(to_dict(good()), to_dict(other)) == ["optim.eps: 1e-08 -> 1e-06"]


@pytest.mark.parametrize("name", ["train.deterministic", "model.compute_dtype", "data.max_length", "optim.batch_size"])
def test_fields_of_data_and_numerics_may_not_differ(name: str) -> None:
    other = good()
    changed = {"train.deterministic": True, "model.compute_dtype": "bfloat16"}.get(name, 17)
    put(other, name, changed)
    assert len(differences(to_dict(good()), to_dict(other))) == 1


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("data.cache_dir", "elsewhere", True),
        ("data.num_workers", 2, True),
        ("data.prepare_workers", 2, True),
        ("mesh.fsdp", 4, False),  # these may change on resume
        ("checkpoint.every_samples", 1, False),
        ("eval.every_samples", 10, False),
        ("optim.batch_size", 17, False),
    ],
)
def test_processes_may_differ_in_fields_of_their_host_only(name: str, value: Any, same: bool) -> None:
    other = good()
    put(other, name, value)
    assert (fields_of_all_processes(other) == fields_of_all_processes(good())) == same


# ---------------------------------------------------------------------------------------- documentation
def load_reference() -> Any:
    return runpy.run_path(str(REPOSITORY / "docs" / "make_config_reference.py"))


def test_config_reference_is_up_to_date() -> None:
    reference = load_reference()
    source = (REPOSITORY / "mice_jax" / "config.py").read_text()
    assert reference["render"](source) == reference["OUTPUT"].read_text(), "run python docs/make_config_reference.py"


def test_every_field_is_documented_in_one_sentence() -> None:
    lines = load_reference()["OUTPUT"].read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    documented = {row[0].removeprefix("| ").strip("`").replace("[i]", "[]").replace("[j]", "[]") for row in rows}
    validation = ("data.validation[].", "data.phases[].validation[].")  # more lists of sources
    assert {name for name in field_names() if not name.startswith(validation)} <= documented
    for row in rows:
        sentence = row[2].removesuffix(" |")
        assert sentence[0].isupper() and sentence.endswith(".") and ". " not in sentence, row


def test_the_choices_of_the_config_are_what_the_code_has() -> None:
    """The config is checked without the imports of attention and of data."""
    assert config_checks.CHOICES["model.attention"] == ("auto", *BACKENDS)
    assert set(config_checks.FORMATS) == set(FORMATS)
