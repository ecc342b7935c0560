"""The Dockerfile: a linter's opinion, and what it copies. `make docker` builds it where Docker runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers.runs import REPOSITORY

pytestmark = pytest.mark.smoke
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "hadolint", "--no-color", file]
    return subprocess.run(command, capture_output=True, text=True)


def test_hadolint_finds_nothing() -> None:
    assert hadolint(REPOSITORY / "Dockerfile").stdout == ""


def test_hadolint_finds_a_relative_workdir(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.12-slim\nWORKDIR here\n")
    assert hadolint(tmp_path / "Dockerfile").returncode == 1


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copied = [path for line in DOCKERFILE.splitlines() if line.startswith("COPY ") for path in line.split()[1:-1]]
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((REPOSITORY / path).exists() for path in copied)


def test_extras_and_python_are_those_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.M)
    suggested = re.findall(r"EXTRAS=([a-z,]+)", DOCKERFILE)
    assert extras in suggested
    assert {extra for extras in suggested for extra in extras.split(",")} <= set(project["optional-dependencies"])
    (python,) = re.findall(r"^FROM python:(3\.\d+)-slim$", DOCKERFILE, re.M)
    assert f"constraints/py{python.replace('.', '')}.txt" in DOCKERFILE
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
