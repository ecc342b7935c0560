"""The study's models compiled by `mice plan` for the TPUs that their configs name, without a TPU.

`-m aot_ci` compiles one of them only, `-m aot` all of them.
"""

import ast
import dataclasses
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from helpers.runs import REPOSITORY
from mice_jax.cli.config_file import allow_imports_next_to
from mice_jax.planning import ahead_of_time
from mice_jax.sharding import make_mesh
from mice_jax.step import Jitted

FOLDER = REPOSITORY / "configs" / "paper"
PROCESSES = 2  # at a time, of about 2 GB each
# Parameters by hand or as published: of granite-3b, tied embeddings of 49,152 x 2,560 and 32 layers with biases.
PARAMS = {
    "granite-7b": 6_738_415_616,
    "granite-3b": 49_152 * 2560
    + 32 * (4 * 2560 * 2560 + 3 * 2560 * 10_240 + 4 * 2560 + 2 * 10_240 + 2560 + 2 * 2560)
    + 2560,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
}
MAX_ERROR = 0.15  # largest relative error of the memory model against the compiler


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model and a mesh that shipped configs train it on, and the first such config's file and variant."""

    model: str
    mesh: tuple[int, int, int]
    topology: str
    config: str

    def __str__(self) -> str:
        return f"{self.model}-{self.topology}"


def pairs() -> list[Pair]:
    """All there are among the study's configs, each with the topology that the docstring names for it."""
    known = runpy.run_path(str(FOLDER / "paper_models.py"))
    found: dict[tuple[str, Any], Pair] = {}
    for file in sorted(FOLDER.glob("*.py"), key=lambda f: (f.stem != "recipes", f.stem)):
        if file.stem.startswith("paper_"):
            continue
        allow_imports_next_to(file)
        made = runpy.run_path(str(file))
        told = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("Topology: ")[2].partition("\n")[0]
        for variant in made["VARIANTS"]:
            config = made["get_config"](variant)
            model, mesh = Path(config.model.init_from).name, dataclasses.astuple(config.mesh)
            topology = known["POD_TOPOLOGY"] if config.mesh == known["POD"] else known["TOPOLOGIES"][model]
            assert topology in re.findall(r"v\w+:[0-9x]+", told), f"{file.name} does not name {topology}"
            pair = Pair(model, mesh, topology, f"{file}:{variant}")
            size = config.optim.batch_size  # the largest batch has the most rows a device
            found[model, mesh] = max(found.get((model, mesh), (0, pair)), (size, pair), key=lambda sized: sized[0])
    return [pair for _, pair in found.values()]


PAIRS = pairs()
# For a v5e: with the SparseCores of a v5p, libtpu's compiler sometimes ends with a stack overflow (BUILD_NOTES.md).
IN_CI = next(pair for pair in PAIRS if str(pair) == "llama-3.2-3b-v5e:4x4")
SELECTABLE = [pytest.param(pair, marks=pytest.mark.aot_ci if pair == IN_CI else (), id=str(pair)) for pair in PAIRS]


def plan(pair: Pair) -> dict[str, Any]:
    """The JSON that `mice plan` prints.

    The held-out loss needs less memory than the function that trains, so it is compiled for one model only.
    """
    flags = [f"--config={pair.config}", f"--topology={pair.topology}"]
    if pair.model != "granite-3b":
        flags += ["--config.data.validation_fraction=0"]
    command = [sys.executable, "-m", "mice_jax.plan", *flags, "--json", "--compile_minutes=0"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plans(request: pytest.FixtureRequest) -> Iterator[dict[Pair, Future]]:
    """The plan of each model that is selected; PROCESSES of them are computed at a time."""
    selected = [item.callspec.params.get("pair") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {pair: pool.submit(plan, pair) for pair in PAIRS if pair in selected}


def test_the_configs_train_each_model_on_a_named_topology() -> None:
    assert len(PAIRS) <= 6 and {p.model for p in PAIRS} == PARAMS.keys()
    assert max(math.prod(map(int, p.topology.partition(":")[2].split("x"))) for p in PAIRS) == 512


@pytest.mark.aot
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pair", SELECTABLE)
def test_a_model_compiles_for_and_fits_its_tpus(pair: Pair, plans: dict[Pair, Future]) -> None:
    planned = plans[pair].result()
    gib = {name: planned[name] / 2**30 for name in ("bytes_per_device", "hbm_bytes", "arguments_bytes", "temp_bytes")}
    print(
        pair, planned["planned"], gib, planned["functions"], planned["estimate"], planned["compile_s"]
    )  # shown by -rP
    assert planned["compiled"] and planned["fits"] and planned["planned"]["attention"] == "splash"
    assert planned["planned"]["rows_per_device"] >= 1
    assert not any(f["out_of_memory"] for f in planned["functions"].values())
    # Parameters, their sums and two moments in float32, split over the fsdp axis: to 1 %, since single numbers, norms
    # and a microbatch come with it and arrays are padded to tiles.
    ways = planned["planned"]["mesh"]["fsdp"]
    counted = 16 * PARAMS[pair.model] / ways
    assert counted <= planned["functions"]["apply"]["arguments"] <= 1.01 * counted
    # The arithmetic by which `train` chooses.
    assert abs(planned["estimate"]["total"] / planned["functions"]["accumulate"]["total"] - 1) < MAX_ERROR


@pytest.mark.aot
@pytest.mark.aot_ci
def test_a_program_that_does_not_fit_is_reported_with_its_memory() -> None:
    target = ahead_of_time.find_topology("v5e:1x1")
    mesh = make_mesh(1, 1, 1, target.devices)

    sort = Jitted(lambda x: jnp.sort(jnp.sort(x, axis=0), axis=1), mesh)

    def need(rows: int) -> ahead_of_time.CompiledMemory:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        x = jax.ShapeDtypeStruct((rows, 2**20), jnp.float32, sharding=sharding)
        return ahead_of_time._compile_function("sort", sort, (x,), (), platform="tpu")

    small, large = need(2**8), need(2**12)  # 1 and 16 GiB, of which a sort holds some copies
    assert not small.out_of_memory and large.out_of_memory
    assert large.arguments == 2**34 and large.total > target.chip.memory > small.total >= 2**30
