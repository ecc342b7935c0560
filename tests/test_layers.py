"""What fresh interpreters load; import-linter keeps the layers (pyproject.toml)."""

import ast
import subprocess
import sys

import pytest

from helpers.runs import REPOSITORY
from mice_jax.cli.flags import COMMANDS

PACKAGE = REPOSITORY / "mice_jax"
DATA = sorted((PACKAGE / "data").glob("*.py"))
ACCELERATOR = ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_data_modules_import_no_jax_and_packing_imports_numba_late() -> None:
    """Grain, which only the loader needs, imports jax itself; transformers imports torch where it is installed."""
    modules = [f"mice_jax.data.{f.stem}" for f in DATA if f.stem not in ("__init__", "loader", "best_fit")]
    code = f"""
import sys, {", ".join(modules)}
print([m for m in {(*ACCELERATOR[:5], "numba")} if m in sys.modules])
import numpy as np, mice_jax.data.packing as p
for samples in (8, 1000):
    p.pack_steps(np.ones((1, samples), int), p.microbatch_shapes(128, 1), 1, np.random.default_rng(0))
    print([m for m in {(*ACCELERATOR[:5], "numba")} if m in sys.modules])
"""
    assert run_python(code).split("\n")[:3] == ["[]", "[]", "['numba']"]


@pytest.mark.slow
def test_the_loader_imports_no_more_than_grain_and_commands_no_numba() -> None:
    code = f"""
import sys, grain
names = {ACCELERATOR[:5]}
before = [m for m in names if m in sys.modules]
import mice_jax.data.loader
print(before == [m for m in names if m in sys.modules])
import mice_jax.sweep, mice_jax.prepare
print("numba" in sys.modules)
"""
    assert run_python(code).split("\n")[:2] == ["True", "False"]


def test_every_command_is_a_module_with_a_main() -> None:
    for command in COMMANDS.values():
        file = REPOSITORY / f"{command.module.replace('.', '/')}.py"
        functions = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert "main" in functions, command.module


def test_the_config_is_read_and_a_sweep_is_run_without_jax() -> None:
    """A sweep has three kinds of processes, and only its trials need jax, whose import takes seconds."""
    assert run_python("import sys, mice_jax.config, mice_jax.sweep\nprint('jax' in sys.modules)").strip() == "False"
