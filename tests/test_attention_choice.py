"""The choice of the attention backend of a run, and the errors where the named one does not support the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.models import spec_of
from helpers.runs import read_json, run_train, setting
from mice_jax.errors import UserError
from mice_jax.models.attention import BACKENDS, AttentionRequirements, choose_backend

CPU = {"platform": "cpu", "compute_capability": None, "dtype": "float32"}
TPU = {"platform": "tpu", "compute_capability": None, "dtype": "bfloat16"}
A100, H100, B200 = ({"platform": "gpu", "compute_capability": c, "dtype": "bfloat16"} for c in ("8.0", "9.0", "10.0"))
AMD = {"platform": "gpu", "compute_capability": "gfx90a", "dtype": "bfloat16"}
GEMMA_2 = {"windows": (None, 4096), "attention_softcap": 50.0, "head_dim": 256}


def choice(name: str, device: dict[str, Any], max_length: int = 4096, deterministic: bool = False, **model: Any) -> str:
    run = AttentionRequirements(spec_of(**model), **device, max_length=max_length, deterministic=deterministic)
    return choose_backend(name, run)


@pytest.mark.parametrize(
    ("device", "run", "chosen"),
    [
        (CPU, {}, "blockwise"),
        (CPU, GEMMA_2, "blockwise"),
        (TPU, {}, "splash"),
        (TPU, GEMMA_2, "splash"),
        (TPU, {"head_dim": 80, "max_length": 1000}, "splash"),
        (H100, {}, "cudnn"),
        (B200, {}, "cudnn"),  # 10.0: a version, no decimal number
        (B200, {"head_dim": 256}, "pallas"),
        (B200 | {"compute_capability": "12.0"}, {}, "pallas"),
        (H100, {"windows": (None, 512), "head_dim": 256}, "cudnn"),
        (H100, GEMMA_2, "pallas"),
        (H100, {"deterministic": True}, "pallas"),
        (H100 | {"dtype": "float32"}, {}, "pallas"),
        (H100, {"max_length": 2**20, "num_heads": 32, "head_dim": 128}, "pallas"),
        (H100, {"max_length": 2**14, "num_heads": 32, "head_dim": 128}, "cudnn"),  # 4 x 2^10 samples x 2^5 x 2^14 bytes
        (H100, {"max_length": 2**14 + 1024, "num_heads": 32, "head_dim": 128}, "pallas"),
        (A100, {}, "pallas"),
        (A100, GEMMA_2, "pallas"),
        (A100 | {"compute_capability": "7.5"}, {}, "blockwise"),
        (AMD, {}, "blockwise"),
        (CPU | {"platform": "METAL"}, {}, "blockwise"),
    ],
)
def test_auto_takes_the_first_backend_that_supports_the_run(device: dict, run: dict, chosen: str) -> None:
    assert choice("auto", device, **run) == chosen
    assert choice(chosen, device, **run) == chosen
    assert choice("reference", device, **run) == "reference"


@pytest.mark.parametrize(
    ("name", "device", "run", "said"),
    [
        ("splash", CPU, {}, "runs on tpu, and the devices are of platform cpu"),
        ("cudnn", CPU | {"dtype": "bfloat16"}, {}, "runs on gpu, and the devices are of platform cpu"),
        ("pallas", TPU, {}, "runs on gpu, and the devices are of platform tpu"),
        ("cudnn", A100, {}, "compute capability 9.0 or more, and the devices have 8.0"),
        ("pallas", AMD, {}, "compute capability 8.0 or more, and the devices have gfx90a"),
        ("cudnn", H100 | {"dtype": "float32"}, {}, "computes in bfloat16, and the run in float32"),
        ("cudnn", H100, GEMMA_2, "no soft cap on scores, and the model has one of 50.0"),
        ("cudnn", B200 | {"compute_capability": "12.0"}, {}, "9.0 or more and less than 12.0, and the devices have 12"),
        ("cudnn", H100, {"head_dim": 264}, "at most 256 dims, and the model's have 264"),
        ("cudnn", B200, {"head_dim": 136}, "at most 128 dims on capability 10.0, and the model's have 136"),
        ("cudnn", H100, {"max_length": 2**15, "num_heads": 32, "head_dim": 128}, "sums take 8.0 GiB for a row"),
        ("pallas", H100, {"head_dim": 512}, "at most 256 dims, and the model's have 512"),
        ("cudnn", H100, {"deterministic": True}, "train.deterministic=True"),
    ],
)
def test_an_unsupported_backend_is_an_error_that_names_the_alternatives(
    name: str, device: dict, run: dict, said: str
) -> None:
    with pytest.raises(UserError) as error:
        choice(name, device, **run)
    message, auto = str(error.value), choice("auto", device, **run)
    assert message.startswith(f"model.attention={name!r} does not support this run: it")
    assert said in message and message.endswith(f", or to auto, which takes {auto}.")
    able = message.split("Set it to one of ")[1].split(", or to auto")[0].split(", ")
    assert able[0] == auto and name not in able and "reference" in able


def test_all_problems_of_a_backend_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"platform cpu; .*float32.*; .*soft cap"):
        choice("cudnn", CPU, **GEMMA_2)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(UserError, match=f"model.attention='flash'.*auto or one of {', '.join(BACKENDS)}"):
        choice("flash", CPU)


def test_auto_reuses_the_recorded_backend_on_the_same_devices(tmp_path: Path) -> None:
    config, workdir = setting(tmp_path, samples=8), tmp_path / "run"
    assert run_train(config, workdir, "--config.model.attention=reference") == 0

    def again() -> str:
        assert run_train(config, workdir) == 0
        return read_json(workdir, "config.json")["resolved"]["attention"]

    assert again() == "reference"
    recorded = read_json(workdir, "config.json")
    recorded["resolved"] |= {"device": "TPU v5e"}
    (workdir / "config.json").write_text(json.dumps(recorded))
    assert again() == "blockwise"
