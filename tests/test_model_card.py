"""The model card of an export: its text for hand-made runs, and that it names no path of the machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mice_jax.training.model_card import licence_in, licence_of, model_card

pytestmark = pytest.mark.smoke

CONFIG: dict[str, Any] = {
    "model": {"init_from": "/home/alice/models/Tiny-1B"},
    "data": {
        "max_length": 4096,
        "train_on": "all",
        "phases": [
            {"name": "stacked", "num_epochs": 1.5, "num_steps": 0, "batch_size": 0, "learning_rate": 0.0},
            {"name": "once", "num_epochs": 1.0, "num_steps": 0, "batch_size": 0, "learning_rate": 0.0},
            {"name": "skills", "num_epochs": 1.0, "num_steps": 300, "batch_size": 64, "learning_rate": 1e-5},
        ],
    },
    "optim": {"batch_size": 3840, "learning_rate": 2e-5, "schedule": "cosine", "warmup_steps": 25, "frozen": []},
    "seed": 7,
    "resolved": {"compute_dtype": "bfloat16"},
    "provenance": {"config": "/home/alice/run.py"},
}
REPORT: dict[str, Any] = {
    "sources": {
        "chats": {
            "path": "/home/alice/data/chats.jsonl",
            "weight": 2.0,
            "kept": 1234,
            "tokens": 99999,
            "loss_tokens": 5,
        },
        "a|b": {"path": "hf:org/name:train", "weight": 1, "kept": 1, "tokens": 2, "loss_tokens": 1},
        "local": {"path": "hf:/home/alice/set:train", "weight": 1, "kept": 1, "tokens": 2, "loss_tokens": 1},
    },
    "validation": {"held": {"path": "gs://alice/held/", "weight": 1, "kept": 10, "tokens": 20, "loss_tokens": 5}},
    "steps": 1000,
    "warnings": ["/home/alice/data/chats.jsonl: odd"],
}
SUMMARY: dict[str, Any] = {
    "reason": "/home/alice stopped it",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "command": ["/home/alice/.venv/bin/python", "train.py"],
    "git_commit": "c0ffee",
}
METRICS: dict[str, Any] = {
    "step": 900, "samples": 5000, "tokens": 70000, "loss": 1.25, "grad_norm": 3.5, "train/chats/loss": 1.5,
    "train/chats/loss_tokens": 5, "eval/loss": 1.125, "step_time_s": 0.5, "mfu": None,
}  # fmt: skip


def card(**changes: Any) -> str:
    given = {"config": CONFIG, "report": REPORT, "summary": SUMMARY, "metrics": METRICS, "licence": {}} | changes
    return model_card("sft_hf", **given, step=900, dtype="bfloat16")


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def base(init_from: str) -> dict[str, Any]:
    return {"config": CONFIG | {"model": {"init_from": init_from}}}


def test_card_says_what_the_run_did() -> None:
    text = card(licence={"license": "apache-2.0"})
    for line in (
        "# sft_hf",
        "`Tiny-1B`. Its licence: apache-2.0.",
        "| chats | chats.jsonl | 2 | 1,234 | 99,999 | 5 |",
        r"| a\|b | hf:org/name:train | 1 | 1 | 2 | 1 |",
        "| local | set:train | 1 | 1 | 2 | 1 |",
        "| held | held | 10 | 20 |",
        "| batch size | 3,840 samples |",
        "| peak learning rate | 2e-05 |",
        "| schedule | cosine |",
        "| warm-up | 25 steps |",
        "| steps | 900 of 1,000 |",
        "| weights | bfloat16 |",
        "| stacked | 1.5 epochs | as above | as above |",
        "| once | 1 epoch | as above | as above |",
        "| skills | 300 steps | 64 | 1e-05 |",
        "After step 900 (5,000 samples, 70,000 tokens). `eval/` is measured on held-out samples, the loss in nats per "
        "token.",
        "| python | 3.11.7 |",
        "Trained by mice_jax at commit `c0ffee`.",
    ):
        assert line in text.splitlines(), line
    rows = text.split("## Metrics")[1].split("## Versions")[0].split("| --- | --- |\n")[1].split("\n\n")[0]
    assert rows == "| eval/loss | 1.125 |\n| loss | 1.25 |\n| train/chats/loss | 1.5 |"


def test_card_names_no_path_of_the_machine() -> None:
    for init_from in (CONFIG["model"]["init_from"], "random:/home/alice/init/config.json", "gs://alice/runs/sft"):
        text = card(**base(init_from))
        assert not [word for word in ("alice", "/home", ".venv", "gs://") if word in text], init_from


@pytest.mark.parametrize(
    ("init_from", "sentence"),
    [
        ("models/Tiny-1B/", "`Tiny-1B`. "),
        ("/runs/sft/checkpoints/1400", "`sft`, after its step 1,400. "),
        ("random:init/config.json", "None: all weights were drawn at random, for the architecture in `init`."),
        ("random:init", "None: all weights were drawn at random, for the architecture in `init`."),
    ],
)
def test_base_model_is_a_name_and_no_link(init_from: str, sentence: str) -> None:
    text = card(**base(init_from))
    assert "base_model" not in front_matter(text) and sentence in text


def test_base_model_of_the_hub_is_named_with_its_commit() -> None:
    hub = {
        "data.tokenizer": {"repo": "org/words", "commit": "a"},
        "model.init_from": {"repo": "org/tiny", "commit": "b"},
    }
    text = card(config=CONFIG | {"model": {"init_from": "org/tiny@v1"}, "resolved": {"hub": hub}})
    assert front_matter(text)["base_model"] == "org/tiny"
    assert "`org/tiny`, at commit `b`. " in text


def test_front_matter_has_the_licence_of_the_base() -> None:
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert front_matter(card()) == fields
    assert "Its licence is not known" in card()
    licence = {"license": "other", "license_name": "a: b", "license_link": "LICENSE"}
    assert front_matter(card(licence=licence)) == fields | licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Title", {"license": "apache-2.0"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: tiny\n---", {"license": "other", "license_name": "tiny"}),
        ("---\nlicense_name: tiny\n---\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# Title\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_licence_is_read_from_front_matter_alone(text: str, licence: dict[str, str], tmp_path: Path) -> None:
    assert licence_in(text) == licence
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_run_that_was_killed_has_a_card_too() -> None:
    text = card(config={}, report={}, summary={}, metrics={})
    assert "The run has no data_report.json." in text
    assert "None are recorded for step 900." in text
    assert "The run has no summary.json, so they are not recorded." in text
