"""What error messages quote."""

import re
import tomllib
from pathlib import Path

import pytest

from mice_jax import errors

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[1]


def test_install_command_names_the_checkout_or_says_that_one_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [pins] = re.findall(r"-c '(.*?)' -e ", errors.install_command("lab"))
    assert Path(pins).is_file() and errors.install_command("lab") == f"pip install -c '{pins}' -e '{ROOT}[lab]'"
    monkeypatch.setattr(errors, "CHECKOUT", tmp_path)
    assert errors.install_command("lab") == "pip install -e '.[lab]' in a checkout of mice_jax"


def test_every_extra_that_a_message_names_is_one_of_pyproject() -> None:
    named = {
        extra
        for file in (ROOT / "mice_jax").rglob("*.py")
        for extra in re.findall(r"install_command\(['\"](\w+)['\"]\)", file.read_text())
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"eval", "lab", "cuda"} <= named <= {*extras}
    files = [*(ROOT / "mice_jax").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert not [file for file in files if "pip install 'mice_jax[" in file.read_text()]  # no package index has it


@pytest.mark.parametrize(
    ("path", "end"), [("data/chat.jsonl", "; did you mean data/chats.jsonl?"), ("data/x", "."), ("no/chats.jsonl", ".")]
)
def test_nearest_path_is_a_name_in_the_same_folder(
    path: str, end: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert errors.nearest_path(path, ".") == end
