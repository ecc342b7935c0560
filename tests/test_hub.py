"""Models named as owner/name: what is fetched, which commit is used, and what each failure says."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.hub import Hub, Repo, serve
from helpers.runs import make_tokenizer, write_init
from mice_jax.config import Config
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.model_source import resolve_model, resolve_source
from mice_jax.storage.hub import check_upload, fetch, is_hub_id, upload
from mice_jax.training import build
from mice_jax.training.model_card import licence_of

pytestmark = pytest.mark.smoke

CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model with weights of no meaning, beside others that are not to be fetched."""
    folder = write_init(tmp_path_factory.mktemp("init"))
    read = {file.name: file.read_bytes() for file in folder.iterdir()}
    unread = ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.safetensors", "a.gguf")
    return read | {"README.md": CARD, "model.safetensors": b"weights"} | dict.fromkeys(unread, b"unread")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    """A stand-in with the model org/tiny, and an empty cache."""
    with serve(monkeypatch, tmp_path / "cache") as served:
        served.repos["org/tiny"] = Repo()
        served.repos["org/tiny"].push(files)
        yield served


def newest(hub: Hub) -> str:
    return list(hub.repos["org/tiny"].commits)[-1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/tiny", True),
        ("ibm-granite/granite-4.0-micro", True),
        ("org/tiny@v1.0", True),
        ("org/tiny@refs/pr/4", True),
        ("org/tiny@", False),
        ("tiny", False),
        ("./tiny", False),
        ("../tiny", False),
        ("org/tiny/", False),
        ("/org/tiny", False),
        ("runs/sft/checkpoints", False),
        ("gs://bucket/run", False),
        ("random:org/tiny", False),
        ("here/model", False),  # a path that exists
        ("here/link", False),  # a link to nothing is a path too
    ],
)
def test_name_of_the_hub_is_told_from_a_path(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) == expected


def test_only_files_that_are_read_are_fetched(hub: Hub) -> None:
    small = fetch("org/tiny", weights=False)
    assert sorted(p.name for p in small.folder.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    whole = fetch("org/tiny")
    assert whole == small and (whole.repo, whole.commit) == ("org/tiny", newest(hub))
    assert (whole.folder / "model.safetensors").read_bytes() == b"weights"
    assert len(hub.downloads) == len(set(hub.downloads)) == len(list(whole.folder.iterdir()))
    assert licence_of(whole.folder) == {"license": "apache-2.0"}


def test_model_in_the_cache_is_used_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = fetch("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.repos.clear()
    assert fetch("org/tiny") == online
    assert fetch(f"org/tiny@{online.commit}") == online


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/tinny",
            "org/tinny is no path on this machine. The Hub has no model of this name that can be read either.",
        ),
        ("org/ti--ny", "org/ti--ny is no path on this machine. The Hub has no model"),
        ("org/gated", "org/gated is gated on the Hub, and HF_TOKEN is not set. Ask for access"),
        ("org/tiny@v9", "org/tiny is on the Hub, but has no revision 'v9'. Give a branch"),
        ("org/pickle", "org/pickle has no *.safetensors at commit "),
    ],
)
def test_model_that_cannot_be_fetched_is_explained(hub: Hub, files: dict[str, bytes], name: str, message: str) -> None:
    hub.repos["org/gated"] = Repo(gated=True)
    hub.repos["org/gated"].push(files)
    hub.repos["org/pickle"] = Repo()
    hub.repos["org/pickle"].push({f: b for f, b in files.items() if f != "model.safetensors"})
    with pytest.raises(UserError) as e:
        resolve_model(name)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_offline_error_says_how_to_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("org/tiny", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_source("org/tiny", weights=False).architecture == "LlamaForCausalLM"
    for name, command in (
        ("org/tiny", "`hf download org/tiny --local-dir models/tiny`"),  # its weights are not in the cache
        ("org/other@v1", "`hf download org/other --revision v1 --local-dir models/other`"),
    ):
        with pytest.raises(UserError) as e:
            resolve_source(name)
        assert "Unset HF_HUB_OFFLINE" in str(e.value) and command in str(e.value) and "\n" not in str(e.value)


def test_hub_that_cannot_be_reached_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    wanted = r"As a model of the Hub, org/tiny could not be fetched \([^.]*\), and .*Check the network .*hf download"
    with pytest.raises(UserError, match=wanted):
        fetch("org/tiny")


def test_mistyped_path_that_looks_like_a_model_of_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "demo" / "hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^demo/hff is no path on this machine; did you mean demo/hf\? The Hub has"):
        fetch("demo/hff")


def test_only_the_token_of_the_environment_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch("org/tiny", weights=False)
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    fetch("org/tiny")
    assert hub.tokens == {None, "Bearer hf_given"}


def test_two_processes_of_a_host_fetch_each_file_once(hub: Hub) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("org/tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3
    assert len(hub.downloads) == len(set(hub.downloads))


def test_resumed_run_takes_the_commits_that_it_began_with(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    config = Config()
    config.model.init_from = "org/tiny"
    config.data.tokenizer = "org/words"
    hub.repos["org/words"] = Repo()
    tokenizer = {f: b for f, b in files.items() if "token" in f or f in ("config.json", "chat_template.jinja")}
    words = hub.repos["org/words"].push(tokenizer)
    began, commit = build.inputs(config), newest(hub)
    assert began.hosted == {
        "model.init_from": {"repo": "org/tiny", "commit": commit},
        "data.tokenizer": {"repo": "org/words", "commit": words},
    }
    assert not any(f.startswith("org/words/") and f.endswith((".safetensors", ".bin")) for f in hub.downloads)
    shape = json.loads(files["config.json"]) | {"num_hidden_layers": 3}
    moved = hub.repos["org/tiny"].push(files | {"config.json": json.dumps(shape).encode()})
    hub.repos["org/words"].push(tokenizer | {"README.md": b"new"})
    resumed = build.inputs(config, began.hosted)
    assert resumed.hosted == began.hosted and resumed.source.spec.num_layers == 2
    fresh = build.inputs(config)
    assert fresh.hosted["model.init_from"]["commit"] == moved != commit and fresh.source.spec.num_layers == 3
    assert fresh.hosted["data.tokenizer"]["commit"] != words


def test_tokenizer_of_the_hub_is_that_of_its_folder(hub: Hub) -> None:
    assert load_tokenizer("org/tiny").get_vocab() == make_tokenizer().get_vocab()
    assert not [f for f in hub.downloads if f.endswith((".safetensors", ".bin", ".py"))]


# ---------------------------------------------------------------------------------------- uploads
def test_upload_has_every_file_and_is_private(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = {"README.md": CARD, "config.json": b"{}", "model.safetensors": bytes(range(256))}
    (tmp_path / "export").mkdir()
    for name, content in files.items():
        (tmp_path / "export" / name).write_bytes(content)
    assert upload(tmp_path / "export", "org/mine").endswith("/org/mine/commit/1")
    assert hub.uploads == {"org/mine": (True, files)}
    assert hub.tokens == {"Bearer hf_secret"}


def test_refused_upload_keeps_the_folder(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"could not be uploaded to others/mine: .*403.*hf upload others/mine"
    ) as caught:
        upload(tmp_path, "others/mine")
    assert "hf_secret" not in str(caught.value) and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "token", "offline", "message"),
    [
        ("mine", "t", False, "must be owner/name"),
        ("org/mine@main", "t", False, "must be owner/name"),
        ("org/mine", "t", True, "HF_HUB_OFFLINE is set"),
        ("org/mine", "", False, "HF_TOKEN"),
    ],
)
def test_upload_that_cannot_work_is_refused_at_once(
    name: str, token: str, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=message):
        check_upload(name)
