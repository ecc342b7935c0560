"""The documentation names files and modules that exist, and the tutorial shows the config to copy."""

import re
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke
REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
# Files that a reader makes, or that a run leaves.
MADE_BY_READERS = {"configs/mine.py", "configs/rates.py", "demo/hf", "demo/result.json", "demo/run/report.html"}


def missing_paths(text: str) -> set[str]:
    """Returns the paths of the repository that a text names and that do not exist."""
    named = re.findall(r"\b(?:configs|constraints|demo|docs|launch|mice_jax|studies|tests)/[\w./-]*\w", text)
    return {n for n in named if n not in MADE_BY_READERS and not (REPOSITORY / n).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_path_in_a_page_exists(page: Path) -> None:
    assert missing_paths(page.read_text()) == set()


def test_a_missing_path_is_found() -> None:
    assert missing_paths("see `mice_jax/train.py` and docs/no_such_page.md.") == {"docs/no_such_page.md"}


def test_tutorial_shows_the_config_to_copy() -> None:
    body = (REPOSITORY / "configs" / "sft.py").read_text().split('"""\n', 1)[1].strip()
    assert body in (REPOSITORY / "docs" / "tutorial.md").read_text()


def test_config_to_copy_validates() -> None:
    get_config = runpy.run_path(str(REPOSITORY / "configs" / "sft.py"))["get_config"]
    get_config().validate()
    assert get_config("models/other").model.init_from == "models/other"
