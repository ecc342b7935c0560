"""Who imports whom, seen from the sources and from fresh interpreters."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mice_jax.cli import VERBS
from runs import REPOSITORY

PACKAGE = REPOSITORY / "mice_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
DATA = sorted((PACKAGE / "data").glob("*.py"))
ACCELERATOR = ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow")


def imported(text: str, relative_to: str = "mice_jax") -> Iterator[str]:
    """The modules that a source imports, at its top or within a function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{relative_to}." * bool(node.level) + (node.module or "")
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)


def is_of(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reader_of_imports_sees_each_kind() -> None:
    text = "import jax.numpy as jnp\ndef f():\n    from mice_jax import train\n    from flax.nnx import Module\n"
    found = set(imported(text))
    assert {"jax.numpy", "mice_jax.train", "flax.nnx"} <= found
    assert is_of("jax.numpy", ("jax",)) and not is_of("jaxtyping", ("jax",))


@pytest.mark.parametrize("file", DATA, ids=lambda f: f.stem)
def test_the_data_modules_name_no_accelerator_library(file: Path) -> None:
    named = set(imported(file.read_text()))
    assert not [m for m in named if is_of(m, ACCELERATOR)]
    assert not [m for m in named if is_of(m, ("mice_jax.models", "mice_jax.sharding", "mice_jax.step"))]


def test_data_modules_but_the_loader_bring_no_jax_into_a_worker() -> None:
    """Grain, which only the loader needs, imports jax itself; transformers imports torch where it is installed."""
    modules = [f"mice_jax.data.{f.stem}" for f in DATA if f.stem not in ("__init__", "loader")]
    code = f"import sys, {', '.join(modules)}\nprint([m for m in {ACCELERATOR[:5]} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_the_loader_brings_no_more_than_grain_does() -> None:
    tail = f"\nprint([m for m in {ACCELERATOR[:5]} if m in sys.modules])"
    assert run_python("import sys, mice_jax.data.loader" + tail) == run_python("import sys, grain" + tail)


def test_numba_waits_for_the_first_plan() -> None:
    plan = "; p.pack_steps(np.ones((1, 1), int), p.microbatch_shapes(128, 1), 1, np.random.default_rng(0))"
    told = "\nprint('numba' in sys.modules)"
    assert run_python("import sys, mice_jax.sweep, mice_jax.prepare" + told).strip() == "False"
    assert run_python("import sys, numpy as np, mice_jax.data.packing as p" + plan + told).strip() == "True"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_module_imports_a_verb(file: Path) -> None:
    verbs = tuple(f"mice_jax.{verb}" for verb in [*VERBS, "cli"])
    assert not [m for m in imported(file.read_text()) if is_of(m, verbs)]


@pytest.mark.parametrize("module", ["config", "loss", "optim", "models/spec", "data/packing", "rows"])
def test_a_leaf_imports_nothing_of_the_project_but_errors(module: str) -> None:
    named = imported((PACKAGE / f"{module}.py").read_text())
    shared = (
        "mice_jax.errors",
        *["mice_jax.rows", "mice_jax.data.best_fit"] * (module == "data/packing"),  # kernels are told of rows too
    )
    assert {m for m in named if is_of(m, ("mice_jax",)) and not is_of(m, shared)} <= {"mice_jax"}


def test_every_verb_is_a_module_with_a_main() -> None:
    for verb in VERBS:
        tree = ast.parse((PACKAGE / f"{verb}.py").read_text())
        assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_there_is_no_drawer_of_odds_and_ends() -> None:
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "registry"}


def test_the_config_is_read_without_jax() -> None:
    assert run_python("import sys, mice_jax.config\nprint('jax' in sys.modules)").strip() == "False"
