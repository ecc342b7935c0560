"""`mice plan` compared with XLA's report on what `train` runs and with counts by hand."""

import dataclasses
import json
import math
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from helpers.models import spec_of
from helpers.runs import REPOSITORY, read_json, read_metrics, run_train, run_verb, setting
from mice_jax import plan
from mice_jax.cli import topology_names
from mice_jax.cli.format import format_duration
from mice_jax.config import Config, locate
from mice_jax.errors import UserError
from mice_jax.hardware import CHIPS, Chip, find_chip
from mice_jax.models.attention.cudnn import cudnn, softmax_bytes
from mice_jax.models.attention.score_function import Scoring
from mice_jax.models.spec import ShortConv
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.planning import ahead_of_time, planner, step_time
from mice_jax.planning.ahead_of_time import CompiledMemory, assume_compute_capability
from mice_jax.sharding import abstract_mesh, make_mesh
from mice_jax.training import build, memory_model

DEVICES = 8
FIELDS = {
    "fits", "bytes_per_device", "hbm_bytes", "arguments_bytes", "temp_bytes", "compile_s", "rows_per_device",
}  # fmt: skip
LONE = "--compile_minutes=0"  # nothing is compiled but the run as it is
ALL = "--compile_minutes=60"  # however slow the machine is

# Of the model in runs.py by hand: embedding and output projection, their 300 rows padded to a multiple of 128; two
# layers of q, k, v, o, the MLP, two norms; the last norm.
VOCAB, D, Q, K, F = 384, 16, 16, 8, 48
PARAMS = 2 * VOCAB * D + 2 * (2 * D * Q + 2 * D * K + 3 * D * F + 2 * D) + D


def run_plan(config: Path, capsys: pytest.CaptureFixture[str], *flags: str, topology: str = "cpu:8") -> dict[str, Any]:
    capsys.readouterr()
    assert run_verb(plan.main, [f"--config={config}", f"--topology={topology}", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def plan_error(config: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The message of a plan that ends with exit code 2."""
    capsys.readouterr()
    assert run_verb(plan.main, [f"--config={config}", *flags]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and not out
    return err


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("plan") / "run")


# ---------------------------------------------------------------------------------------- against what is run
class Spy:
    """Calls a function of the step and records the shapes and shardings of its arguments."""

    def __init__(self, function: Any):
        self._function, self.compile = function, function.compile
        self.compile_in, self.forget_cancelled = function.compile_in, function.forget_cancelled
        self.calls: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(jax.tree.map(self._shape, arguments))
        return self._function(*arguments)

    @staticmethod
    def _shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    def memory(self) -> set[tuple[int, int]]:
        """Bytes of arguments and of temporary memory of each program that was run."""
        found = set()
        for arguments in {str(a): a for a in self.calls}.values():
            m = self.compile(*arguments).memory_analysis()
            made = m.output_size_in_bytes - m.alias_size_in_bytes + m.generated_code_size_in_bytes
            found.add((m.argument_size_in_bytes, m.temp_size_in_bytes + made))
        return found


@pytest.mark.slow
def test_a_plan_has_the_numbers_of_what_train_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases of different rates, frozen parameters, tensor parallelism, held-out data; rows and remat chosen."""
    body = (
        "c.mesh = Mesh(data=2, fsdp=2, tensor=2)\n"
        "c.data.validation_fraction = 0.5\n"
        "c.train.rows_per_device = 0\n"
        "c.optim.batch_size = 64\n"
        "c.optim.frozen = ['model.embed_tokens.weight']\n"
        "c.optim.moments_dtype = 'bfloat16'\n"
        "p = c.data.phases[0]\n"
        "c.data.phases = [p, Phase(name='second', sources=p.sources, learning_rate=1e-3, optimizer='reset')]"
    )
    file = setting(tmp_path / "run", body, samples=256)
    spies: dict[str, Spy] = {}
    make_step = build.make_step

    def spying(*arguments: Any, **settings: Any) -> Any:
        fns = make_step(*arguments, **settings)
        spies.update({name: Spy(getattr(fns, name)) for name in ("accumulate", "apply", "evaluate")})
        return fns._replace(**spies)

    monkeypatch.setattr(build, "make_step", spying)
    monkeypatch.setattr(build, "shared_step_functions", build.own_step_functions)
    workdir = tmp_path / "workdir"
    assert run_train(file, workdir) == 0
    ran = dict(spies)
    monkeypatch.setattr(build, "make_step", make_step)
    said = run_plan(file, capsys, LONE)
    resolved = read_json(workdir, "config.json")["resolved"]
    resolved["mesh"] = {"sequence": 1} | resolved["mesh"]  # an axis of one device is left out
    for name in ("mesh", "rows_per_device", "remat", "attention", "compute_dtype"):
        assert said["planned"][name] == resolved[name], name
    report = read_json(workdir, "data_report.json")
    kept = report["sources"].values()
    assert said["mean_length"] == pytest.approx(sum(s["tokens"] for s in kept) / sum(s["kept"] for s in kept))
    assert said["steps"] == read_metrics(workdir)[-1]["step"]
    held = {  # beside a function's arguments, by hand: what of the state and sums is not among them
        "accumulate": said["optimizer_bytes"] + 4,
        "apply": 0,
        "evaluate": said["optimizer_bytes"] + 4 + said["sums_bytes"] + 4 * 4 + SOURCE_SUMS,
    }
    for name, spy in ran.items():
        assert spy.calls, name
        planned = said["functions"][name]
        # Of a run's few shapes the largest is planned; there are samples enough for it to be run.
        assert (planned["arguments"] - held[name], planned["temporary"]) == max(spy.memory()), name
    assert said["bytes_per_device"] == max(f["total"] for f in said["functions"].values())
    # Can it fail? Another remat is another program.
    other = run_plan(file, capsys, LONE, "--config.model.remat=full")
    assert other["functions"]["accumulate"]["temporary"] != said["functions"]["accumulate"]["temporary"]


SOURCE_SUMS = 4 * 4  # four float32 sums of the only source


def batch_bytes(rows: int, slots: int) -> int:
    """Of tokens, targets, segment_ids, positions, loss_weights; one source alone needs no array of sources."""
    return 5 * 4 * rows * slots


@pytest.mark.slow
def test_the_arguments_are_parameters_moments_and_sums_counted_by_hand(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_plan(config, capsys, LONE)
    own = 4 * PARAMS // DEVICES  # all dims of 16 are split in eight
    scalars = 4 + 4 + 4 * 4 + SOURCE_SUMS  # step, Adam's count, the sums' four
    assert said["peak_function"] == "accumulate"
    assert said["arguments_bytes"] == 4 * own + scalars + batch_bytes(1, 128)
    assert (said["params_bytes"], said["optimizer_bytes"], said["sums_bytes"]) == (own, 2 * own + 4, own)
    assert said["arguments_bytes"] + said["temp_bytes"] == said["bytes_per_device"] <= said["hbm_bytes"]
    rate_and_limit = 4 + 4  # the learning rate, and the limit of the gradient norm
    assert said["functions"]["apply"]["arguments"] == 4 * own + scalars + rate_and_limit
    # Moments of half the size and rows twice as long change the numbers accordingly.
    flags = ("--config.optim.moments_dtype=bfloat16", "--config.data.max_length=256")
    other = run_plan(config, capsys, LONE, *flags)
    assert other["arguments_bytes"] == said["arguments_bytes"] - own + batch_bytes(1, 128)
    # On one device all is whole.
    alone = run_plan(config, capsys, LONE, topology="cpu:1")
    assert alone["functions"]["apply"]["arguments"] == 16 * PARAMS + scalars + rate_and_limit


def test_bfloat16_weights_halve_the_bytes_of_parameters_and_need_no_cast() -> None:
    config, decoder = Config(), make_decoder(spec_of(), 1)
    estimates = {}
    for dtype in ("float32", "bfloat16"):
        config.model.param_dtype = dtype
        inputs = build.memory_inputs(
            config, decoder, "LlamaForCausalLM", make_mesh(1, 4, 2, jax.devices()[:8]), "bfloat16", "reference"
        )
        estimates[dtype] = memory_model.estimate_memory(inputs, 1, "full")
    wide, narrow = estimates["float32"], estimates["bfloat16"]
    norms = 5 * 32 * 4 // 4  # float32 on a quarter of the devices
    assert narrow.params == (wide.params - norms) // 2 + norms
    assert (wide.cast, narrow.cast) == (wide.params // 2, norms // 2)
    assert (narrow.optimizer, narrow.sums, narrow.gradients) == (wide.optimizer, wide.sums, wide.gradients)


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "float32") for name in ("adamw", "adafactor", "muon", "lion", "sgd")), ("adamw", "bfloat16")],
)
def test_an_abstract_state_is_laid_out_as_start_makes_it(name: str, dtype: str) -> None:
    config = Config()
    config.optim.name, config.model.param_dtype = name, dtype
    decoder = make_decoder(spec_of(), 1)
    mesh = make_mesh(1, 4, 2, jax.devices()[:8])
    compute = Compute(jnp.dtype("float32"), "reference", "none")
    fns = build.step_functions(config, decoder, "LlamaForCausalLM", mesh, compute)
    with jax.set_mesh(mesh):
        made = jax.eval_shape(fns.from_params.jitted, fns.abstract_state.params)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, fns.abstract_state)]
    assert shapes[0] == shapes[1]
    # What is as large as all parameters is split as they are: nothing of that size lies whole on every device.
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made.opt_state))
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(made.params)) * 4
    moments = {"adamw": 2, "muon": 1, "lion": 1, "sgd": 1}.get(name, 0)
    assert whole >= moments * params
    if moments:
        assert memory_model.bytes_per_device(fns.abstract_state.opt_state) < whole / 3


# ---------------------------------------------------------------------------------------- what fits
def test_a_run_that_does_not_fit_is_reported_with_its_numbers(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_of_time, "host_memory_bytes", lambda: DEVICES * 40_000)
    said = run_plan(config, capsys, LONE)
    assert said.keys() >= FIELDS
    assert said["fits"] is False and said["rows_per_device"] == 0
    assert said["bytes_per_device"] > said["hbm_bytes"] == 40_000


@pytest.mark.parametrize(
    ("fixed", "per_row", "memory", "rows", "known_by"),
    [
        (100, 10, 175, 7, "compiled: one more does not fit"),
        (100, 10, 170, 7, "compiled: one more does not fit"),  # exactly full
        (100, 10, 105, 0, "compiled: one more does not fit"),
        (200, 10, 150, 0, "compiled: another function than accumulate does not fit"),
        (1, 0, 10**12, 1024, "compiled: no more are tried"),
    ],
)
def test_the_most_rows_are_those_of_which_one_more_does_not_fit(
    fixed: int, per_row: int, memory: int, rows: int, known_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, compiled = run_plan_of(memory, deadline=math.inf), []

    def compile_rows(layout: planner.Layout, only: Any) -> list[CompiledMemory]:
        compiled.append(layout.rows)
        return [CompiledMemory("accumulate", fixed, per_row * layout.rows)]

    monkeypatch.setattr(run, "compile", compile_rows)
    needs = [CompiledMemory("accumulate", fixed, per_row), CompiledMemory("apply", fixed, 0)]
    assert run.largest_rows(needs) == (rows, known_by)
    assert len(compiled) == len(set(compiled)) <= 12, "no number of rows is compiled twice"


def test_after_the_deadline_rows_are_estimated_from_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 10**8
    run = run_plan_of(memory, deadline=-math.inf)
    monkeypatch.setattr(run, "compile", lambda *_: pytest.fail("it compiles"))
    estimated = run.estimate(run.layout).total
    needs = [CompiledMemory("accumulate", 0, estimated + 1000), CompiledMemory("apply", 1, 0)]
    rows, known_by = run.largest_rows(needs)
    assert known_by == "estimated from the compiled rows"
    assert run.estimate(run.layout.with_rows(rows)).total + 1000 <= memory
    assert run.estimate(run.layout.with_rows(rows + 1)).total + 1000 > memory


def run_plan_of(memory: float, deadline: float) -> planner.RunPlan:
    """The plan of one row on one device with so much memory."""
    config = Config()
    config.data.max_length, config.train.rows_per_device, config.model.compute_dtype = 128, 1, "float32"
    chip = Chip(("cpu",), peak_flops=1e12, memory=memory, memory_rate=1e11, link_rate=1e10, platform="cpu")
    topology = ahead_of_time.Topology("cpu:1", chip, 1, jax.devices()[:1])
    return planner.RunPlan(
        config, spec_of(), "LlamaForCausalLM", topology, samples=8, mean_length=64, deadline=deadline
    )


@pytest.mark.slow
def test_the_flags_of_a_suggestion_give_the_memory_that_it_states(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_plan(config, capsys, ALL, "--config.data.max_length=512")
    least = next(s for s in said["suggestions"] if s["for"] == "least memory")
    assert least["known_by"] == "compiled" and least["bytes_per_device"] < said["bytes_per_device"]
    taken = run_plan(config, capsys, LONE, "--config.data.max_length=512", *least["flags"].split())
    functions = taken["functions"]
    assert max(functions[n]["total"] for n in ("accumulate", "apply")) == least["bytes_per_device"]


# ---------------------------------------------------------------------------------------- topologies
@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5q:2x2x2", "did you mean 'v5"),
        ("h20:8", "did you mean 'h200'"),
        ("toaster:8", "cpu, v4, v5e, v5p, v6e, tpu7x, l4, rtx4090, a100-40, a100, h100, h200, b200"),
        ("cpu", "as in cpu:8"),
        ("cpu:0", "as in cpu:8"),
        ("cpu:2x2", "as in cpu:8"),
        ("h100:8x2", "as in h100:8"),
        ("v5p:2x2x2x2", "did you mean '2x2x2'"),
        ("v5e:3x3", "is not a slice of TPU v5e"),
        ("v5p:8", "is not a slice of TPU v5p"),
    ],
)
def test_an_unknown_topology_is_an_error_with_the_nearest_one(
    topology: str, said: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_may_crash", lambda topology: False)  # A child's error would not be captured here.
    told = plan_error(config, capsys, f"--topology={topology}")
    assert f"--topology={topology}" in told and said in told


@pytest.mark.parametrize("family", topology_names.SLICES)
def test_libtpu_knows_every_slice_that_is_suggested(family: str) -> None:
    for shape in topology_names.SLICES[family]:
        target = ahead_of_time.find_topology(f"{family}:{shape}")
        chips = math.prod(int(n) for n in shape.split("x"))
        assert target.count == len(target.devices or []) == chips * target.chip.devices
        assert find_chip(target.devices[0]) == target.chip == CHIPS[family]


def test_every_kind_of_device_is_known_by_its_name() -> None:
    assert set(topology_names.KINDS) == {"cpu", *CHIPS}


def test_a_tpu7x_has_more_than_one_name() -> None:
    assert {ahead_of_time.find_topology(f"{name}:2x2x1").count for name in ("7x", "v7x", "tpu7x", "TPU7x")} == {8}


def test_a_missing_topology_or_device_file_is_an_error(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--topology is missing" in plan_error(config, capsys)
    gone = plan_error(config, capsys, "--topology=h100:8", f"--device_file={tmp_path / 'gone.pbtxt'}")
    assert "there is no such file" in gone
    (tmp_path / "h100.pbtxt").write_text("")
    told = plan_error(config, capsys, "--topology=h100:8", f"--device_file={tmp_path / 'h100.pbtxt'}")
    assert "[cuda]'" in told and "Without --device_file the plan is an estimate" in told


def test_without_a_compiler_a_plan_is_an_estimate(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_plan(config, capsys, topology="h200:8")
    assert said.keys() >= FIELDS and said["compiled"] is False and said["compile_s"] < 1
    assert said["planned"]["attention"] == "cudnn" and said["planned"]["compute_dtype"] == "bfloat16"
    assert said["arguments_bytes"] == 16 * PARAMS // DEVICES + 4  # without the batch and single numbers
    assert "estimated" in said["rows_known_by"] and said["rows_per_device"] > 1
    assert all(s["known_by"] == "estimated" for s in said["suggestions"])
    assert run_verb(plan.main, [f"--config={config}", "--topology=h200:8"]) == 0
    assert "an estimate: nothing was compiled" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- what is assumed
def test_what_is_unknown_is_listed_among_the_assumptions(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = config.parent / "init"
    (tmp_path / "config.json").write_text((init / "config.json").read_text())
    lone = f"--config.model.init_from=random:{tmp_path / 'config.json'}"
    said = run_plan(config, capsys, lone, topology="h200:8")
    assert said["days"] is None and said["mean_length"] == 128
    words = ("the tokenizer is not on this machine", "--mean_length", "--config.optim.max_steps", "60% of the peak")
    for word in words:
        assert any(word in a for a in said["assumptions"]), word
    given = ["--mean_length=64", "--config.optim.max_steps=86400", "--price_per_hour=2"]
    said = run_plan(config, capsys, lone, *given, topology="h200:8")
    assert said["days"] == pytest.approx(said["step_time_s"])
    assert said["cost"] == pytest.approx(said["days"] * 24 * 8 * 2)


def test_a_missing_model_is_planned_by_its_config_in_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = setting(tmp_path / "run")
    shapes = tmp_path / "run" / "shapes" / "small"
    shapes.mkdir(parents=True)
    (shapes / "config.json").write_text((tmp_path / "run" / "init" / "config.json").read_text())
    said = run_plan(file, capsys, "--config.model.init_from=models/small", topology="h200:8")
    assert said["params_bytes"] == 4 * PARAMS // DEVICES
    assert any("models/small is not on this machine" in a for a in said["assumptions"])
    assert "models/other is no path on this machine" in plan_error(
        file, capsys, "--topology=h200:8", "--config.model.init_from=models/other"
    )


def test_the_samples_of_a_step_are_the_mean_over_the_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = (
        "p = c.data.phases[0]\n"
        "c.data.phases = [Phase(name='a', sources=p.sources, {}batch_size=8),\n"
        "                 Phase(name='b', sources=p.sources, {}batch_size=24)]"
    )

    def samples(number: int, *num_steps: str) -> float:
        file = setting(tmp_path / str(number), phases.format(*num_steps), samples=48)
        said = run_plan(file, capsys, "--mean_length=10", topology="h200:8")
        return said["tokens_per_s"] * said["step_time_s"] / 10

    # An epoch is six steps of 8 samples, or two of 24.
    assert samples(0, "", "") == pytest.approx((6 * 8 + 2 * 24) / 8)
    assert samples(1, "num_steps=3, ", "num_steps=9, ") == pytest.approx((3 * 8 + 9 * 24) / 12)


# ---------------------------------------------------------------------------------------- time
def load_of(fsdp: int, tensor: int = 1, sequence: int = 1, **fields: Any) -> memory_model.MemoryInputs:
    config = Config()
    config.data.max_length = 1024
    for name, value in fields.items():
        setattr(*locate(config, name), value)
    spec = spec_of(d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=512, vocab_size=4096)
    spec = dataclasses.replace(spec, qkv_bias=False, out_bias=False, mlp_bias=False)  # all that is left is split
    mesh = make_mesh(1, fsdp, tensor, jax.devices()[: fsdp * tensor * sequence], sequence=sequence)
    return build.memory_inputs(config, make_decoder(spec, tensor), "LlamaForCausalLM", mesh, "bfloat16", "cudnn")


CHIP = Chip(("x",), peak_flops=1e12, memory=1e9, memory_rate=1e11, link_rate=1e10)


def test_remat_is_the_fastest_of_the_platform_unless_given_or_recorded() -> None:
    def chosen(platform: str, remat: str = "auto", memory: float = 1e12, recorded: Any = None) -> str:
        config = Config()
        config.data.max_length, config.model.remat = 1024, remat
        load = load_of(1)
        return build.rows_and_remat(config, load, mean_length=500, memory=memory, platform=platform, recorded=recorded)[
            1
        ]

    assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == ["dots", "none", "none"]
    assert [chosen(platform, memory=1) for platform in ("cpu", "gpu")] == ["full", "full"], "the leanest, in need"
    assert chosen("cpu", "none") == chosen("cpu", recorded={"remat": "none"}) == "none"


def test_the_step_time_is_that_of_matmuls_weights_and_update_by_hand() -> None:
    load = load_of(4)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(load.state.params))
    layers = load.decoder.spec.num_layers
    made = step_time.estimate_step_time(load, CHIP, rows=2, remat="none", samples=64, mean_length=500)
    rows = 64 * 500 / 0.95 / 4 / 1024  # of one device
    assert made.microbatches == math.ceil(rows / 2)
    slots = rows * 1024
    products = layers * (4 * 256 * 256 + 3 * 256 * 512) + 4096 * 256  # attention, MLP, output projection
    # 6 FLOPs a parameter and token, and of attention 3 x 4 x heads x head_dim x half the length, a layer.
    flops = slots * (6 * products + layers * 3 * 4 * 4 * 64 * 250)
    assert made.compute_s == pytest.approx(flops / 0.6e12)
    # Weights in bfloat16 are gathered twice and float32 gradients scattered, three quarters of them, each microbatch.
    assert made.network_s == pytest.approx(made.microbatches * params * 3 / 4 * (2 * 2 + 4) / 0.7e10)
    assert made.update_s == pytest.approx(params / 4 * 36 / 0.7e11)
    # Without SparseCores nothing overlaps.
    assert made.exposed_s == made.network_s
    assert made.seconds == pytest.approx(made.compute_s + made.network_s + made.update_s)
    assert 0 < made.mfu < 0.6
    # Recomputing costs a third more, and a chip of twice the peak half the time.
    again = step_time.estimate_step_time(load, CHIP, rows=2, remat="full", samples=64, mean_length=500)
    assert again.compute_s == pytest.approx(made.compute_s * 4 / 3)
    faster = step_time.estimate_step_time(load, dataclasses.replace(CHIP, peak_flops=2e12), 2, "none", 64, 500)
    assert faster.compute_s == pytest.approx(made.compute_s / 2)


@pytest.mark.parametrize(
    ("fields", "per_param"),
    [
        # Float32 sums are read twice and zeroed, the rest is read and written.
        ({}, 3 * 4 + 2 * (4 + 8)),
        ({"optim.moments_dtype": "bfloat16", "optim.offload_moments": True}, 3 * 4 + 2 * (4 + 4)),
        ({"optim.moments_dtype": "int8", "model.param_dtype": "bfloat16"}, 3 * 4 + 2 * (2 + 2 * 1.05)),
        ({"optim.name": "lion", "optim.accumulate_dtype": "bfloat16"}, 3 * 2 + 2 * (4 + 4)),
        ({"optim.name": "sgd", "optim.beta1": 0.0, "train.ema_half_life": 9.0}, 3 * 4 + 2 * (4 + 4)),
    ],
)
def test_update_moves_the_bytes_in_which_its_state_is_held(fields: dict[str, Any], per_param: float) -> None:
    load = load_of(1, **fields)
    made = step_time.estimate_step_time(load, CHIP, rows=2, remat="none", samples=64, mean_length=500)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(load.state.params))
    # Norms are float32 in any case, and blocks of 64 to 128 codes have a scale of four bytes.
    assert made.update_s == pytest.approx(params * per_param / 0.7e11, rel=0.01 if "int8" in fields.values() else 1e-5)


@pytest.mark.parametrize(
    ("platform", "sparse_cores", "overlap", "share"),
    [("tpu", True, None, 0.75), ("tpu", False, None, 0.0), ("gpu", False, None, 0.8), ("tpu", False, 0.5, 0.5)],
)
def test_communication_that_no_product_hides_is_exposed(
    platform: str, sparse_cores: bool, overlap: float | None, share: float
) -> None:
    chip = dataclasses.replace(CHIP, platform=platform, sparse_cores=sparse_cores, link_rate=1e11)
    made = step_time.estimate_step_time(load_of(4), chip, 2, "none", 64, 500, overlap)
    assert made.network_s < made.compute_s
    assert made.exposed_s == pytest.approx((1 - share) * made.network_s)
    assert f"{share:.0%} of the bytes" in step_time.describe_assumptions(chip, overlap)
    # What is sent while products run still takes its time, if that is longer than theirs.
    slow = dataclasses.replace(chip, link_rate=1e8)
    made = step_time.estimate_step_time(load_of(4), slow, 2, "none", 64, 500, overlap)
    longer = max(made.compute_s, share * made.network_s)
    assert made.seconds == pytest.approx(longer + (1 - share) * made.network_s + made.update_s)


def test_bfloat16_sums_over_devices_halve_their_bytes() -> None:
    load = load_of(4)
    halved = dataclasses.replace(load, reduce_dtype=jnp.dtype("bfloat16"))
    times = [step_time.estimate_step_time(x, CHIP, 2, "none", 64, 500).network_s for x in (load, halved)]
    assert times[1] == pytest.approx(times[0] * (2 * 2 + 2) / (2 * 2 + 4))


def test_devices_that_share_rows_split_slots_and_gather_keys_and_values() -> None:
    whole, split = (dataclasses.replace(load_of(2, sequence=n), attention="blockwise") for n in (1, 4))
    layers, params = 2, sum(math.prod(x.shape) for x in jax.tree.leaves(whole.state.params))
    alone, shared = (memory_model.estimate_memory(x, 2, "dots") for x in (whole, split))
    assert (shared.params, shared.optimizer, shared.sums) == (alone.params, alone.optimizer, alone.sums)
    assert shared.activations == alone.activations / 4
    # Without remat, keys and values [2 rows, 1024, 4 heads, 64] of bfloat16 are kept whole, besides a device's own.
    kept = [memory_model.estimate_memory(x, 2, "none").activations for x in (whole, split)]
    gathered = 2 * 2 * 1024 * 4 * 64 * 2
    assert kept[1] == kept[0] / 4 + layers * gathered
    # They are gathered twice in bfloat16, and their gradients scattered in float32; three quarters of each are sent.
    # Float32 gradients of a device's half of the parameters are all-reduced for each microbatch.
    times = [step_time.estimate_step_time(x, CHIP, 2, "full", 64, 500) for x in (whole, split)]
    row_slots = 64 * 500 / 0.95 / 2
    keys = layers * row_slots * 2 * 4 * 64 * (2 * 2 + 4) * 3 / 4
    sums = times[0].microbatches * params / 2 * 4 * 2 * 3 / 4
    assert times[1].compute_s == pytest.approx(times[0].compute_s / 4)
    assert times[1].network_s - times[0].network_s == pytest.approx((keys + sums) / 0.7e10)


@pytest.mark.parametrize(("remat", "passes"), [("none", 1), ("full", 2)])
def test_devices_that_share_rows_of_a_recurrent_model_move_queries(remat: str, passes: int) -> None:
    """In one of two layers, queries and results are sent in each pass forward, and their gradients once."""
    load = dataclasses.replace(load_of(1, sequence=4), attention="blockwise")
    layers = [(None, None), (ShortConv(3, bias=False), None)]
    of_layers = [
        dataclasses.replace(load.decoder, spec=dataclasses.replace(load.decoder.spec, mixers=x)) for x in layers
    ]
    times = [
        step_time.estimate_step_time(dataclasses.replace(load, decoder=x), CHIP, 2, remat, 64, 500) for x in of_layers
    ]
    slots = 64 * 500 / 0.95 / 4
    queries = slots * 4 * 64 * 2 * (passes + 1) * 2 * 3 / 4
    keys = 4 * slots * 2 * 4 * 64 * (passes * 2 + 4) * 3 / 4
    assert times[1].network_s - times[0].network_s == pytest.approx((queries - keys) / 0.7e10)


def test_one_device_has_no_network_time() -> None:
    assert step_time.estimate_step_time(load_of(1), CHIP, 2, "none", 64, 500).network_s == 0
    assert step_time.estimate_step_time(load_of(1, tensor=2), CHIP, 2, "none", 64, 500).network_s > 0


@pytest.mark.parametrize(
    ("sizes", "rates"),  # of data, fsdp, tensor: 450 GB/s within a host of eight, 50 GB/s out of it for each GPU
    [
        ((1, 8, 1), (450, 450, 450)),
        ((2, 4, 1), (450, 450, 450)),
        ((1, 16, 1), (400, 400, 450)),  # all eight of a host are in the group, whose links they share
        ((2, 8, 1), (50, 450, 450)),  # each sends its own part to its like on the other host
        ((4, 4, 1), (100, 450, 450)),
        ((1, 8, 2), (200, 200, 450)),
        ((8, 1, 8), (50, 50, 450)),
    ],
)
def test_gpus_of_a_host_share_its_links_to_other_hosts(sizes: tuple[int, ...], rates: tuple[int, ...]) -> None:
    mesh = abstract_mesh((*sizes[:2], 1, sizes[2]))
    there = {axis: rate for axis, rate in zip(("data", "fsdp", "tensor"), rates, strict=True) if mesh.shape[axis] > 1}
    assert {axis: step_time._link_rate(CHIPS["h100"], mesh, axis) / 1e9 for axis in there} == there
    assert {step_time._link_rate(CHIPS["v5p"], mesh, axis) for axis in there} == {CHIPS["v5p"].link_rate}


def test_twice_the_hosts_take_about_half_the_step_time() -> None:
    def seconds(*sizes: int) -> float:
        config = Config()
        config.data.max_length = 4096
        spec = spec_of(
            d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=14336, vocab_size=32768, num_layers=32,
            windows=(None,) * 32,
        )  # fmt: skip
        decoder, mesh = make_decoder(spec, sizes[2]), abstract_mesh((*sizes[:2], 1, sizes[2]))
        load = build.memory_inputs(config, decoder, "MistralForCausalLM", mesh, "bfloat16", "cudnn")
        return step_time.estimate_step_time(load, CHIPS["h100"], 2, "full", samples=3840, mean_length=1024).seconds

    # torchtitan's Llama 3.1 8B lost 3 % of a GPU's speed from 8 to 128 H100.
    assert 1.8 < seconds(1, 8, 1) / seconds(1, 16, 1) < 2.05
    assert seconds(1, 64, 1) < seconds(8, 1, 8)


# ---------------------------------------------------------------------------------------- GPUs that are not here
def test_attention_is_traced_for_the_planned_gpu_not_this_machine_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 99999)
    x, segments = jnp.zeros((1, 128, 2, 64), jnp.bfloat16), jnp.ones((1, 128), jnp.int32)

    def trace() -> Any:
        return jax.eval_shape(lambda x: cudnn(x, x, x, segments, Scoring(1.0, None, None)), x)

    with assume_compute_capability("9.0"):
        assert trace().shape == x.shape
    with assume_compute_capability("8.6"), pytest.raises(UserError, match="Hopper"):
        trace()
    with pytest.raises(UserError, match="Hopper"):  # this machine's: it has none
        trace()


def test_planning_with_cudnn_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    x, segments = jnp.zeros((1, 128, 2, 64), jnp.bfloat16), jnp.ones((1, 128), jnp.int32)
    with (
        assume_compute_capability("9.0"),
        pytest.raises(UserError, match=r"cuDNN is not detected.*model\.attention='pallas'"),
    ):
        cudnn(x, x, x, segments, Scoring(1.0, None, None))


def test_gpus_that_do_not_fill_whole_hosts_are_only_estimated(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "h100.pbtxt").write_text("")
    told = plan_error(config, capsys, "--topology=h100:12", f"--device_file={tmp_path / 'h100.pbtxt'}")
    assert "12 GPUs are not whole hosts of 8" in told and "Take 8 GPUs" in told
    said = run_plan(config, capsys, topology="h100:12")
    assert said["devices"] == 12 and not said["compiled"]


def test_a_plan_has_the_share_of_gpu_memory_that_jax_preallocates(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> tuple[float, str]:
        said = run_plan(config, capsys, topology="h100:8")
        return said["hbm_bytes"], " ".join(said["assumptions"])

    usual, told = planned()
    assert "75% of a GPU's memory" in told
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    more, told = planned()
    assert more == pytest.approx(usual / 0.75 * 0.9) and "90% of a GPU's memory" in told


def test_dims_that_the_mesh_does_not_divide_are_listed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(config, capsys, topology="h100:8")["replicated"] == []
    whole = run_plan(config, capsys, topology="h100:7")["replicated"]
    assert "embed.table embed=16" in whole
    assert run_verb(plan.main, [f"--config={config}", "--topology=h100:7"]) == 0
    assert "embed.table embed=16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("days", "said"),
    [(12.345, "12.3 days"), (1.0, "1 day"), (0.5, "12 hours"), (1 / 96, "15 minutes"), (5e-5, "4.32 seconds")],
)
def test_a_duration_is_printed_in_a_readable_unit(days: float, said: str) -> None:
    assert format_duration(days) == said


# ---------------------------------------------------------------------------------------- what attention needs
def load_on_cudnn(slots: int) -> memory_model.MemoryInputs:
    config = Config()
    config.data.max_length = slots
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    decoder = make_decoder(spec_of(num_heads=4, num_kv_heads=2, head_dim=64), 1)
    return build.memory_inputs(config, decoder, "LlamaForCausalLM", mesh, "bfloat16", "cudnn")


@pytest.mark.parametrize("slots", [512, 4096, 16384])
def test_the_softmax_sums_of_cudnn_are_counted_as_jax_allocates_them(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 99999)
    rows, scoring = 3, Scoring(scale=1.0, window=None, softcap=None)
    q, k = (jax.ShapeDtypeStruct((rows, slots, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
    with assume_compute_capability("9.0"):
        _, pull = jax.eval_shape(lambda s, *x: jax.vjp(lambda *x: cudnn(*x, s, scoring), *x), segments, q, k, k)
    sums = [x for x in jax.tree.leaves(pull) if x.dtype == jnp.float32 and x.ndim == 3]  # what is kept for backward
    (made,) = {math.prod(x.shape) * x.dtype.itemsize for x in sums}
    assert made == rows * softmax_bytes(slots, heads=4)


def test_the_memory_model_includes_the_softmax_sums_of_cudnn() -> None:
    def working(slots: int, attention: str, rows: int = 1) -> int:
        load = dataclasses.replace(load_on_cudnn(slots), attention=attention)
        return memory_model.estimate_memory(load, rows, "full").working

    # 4 bytes for each of four heads, of 16,384 slots, of one sample for each 16 of them.
    sums = 4 * 4 * 16384 * 1024
    for rows in (1, 3):
        assert working(16384, "cudnn", rows) - working(16384, "pallas", rows) == rows * sums
    load = load_on_cudnn(16384)
    kept = {
        a: memory_model.estimate_memory(dataclasses.replace(load, attention=a), 1, "none").activations
        for a in ("cudnn", "pallas")
    }
    assert kept["cudnn"] - kept["pallas"] == load.decoder.spec.num_layers * sums, "every layer keeps its own"


def test_rows_are_at_most_what_cudnn_can_index() -> None:
    load = load_on_cudnn(2**18)  # by 4 heads of 64: 2^26 entries a row, of which 2^31 - 1 are counted
    assert memory_model.max_useful_rows(load, "gpu", wanted=1000) == 31
    assert (
        memory_model.max_useful_rows(dataclasses.replace(load, attention="pallas"), "gpu", wanted=1000)
        == memory_model.MAX_ROWS
    )


@pytest.mark.parametrize(
    ("codes", "exit_code"),
    [
        ([0], 0),
        ([-signal.SIGSEGV, -signal.SIGSEGV, 0], 0),
        ([2], 2),
        ([-signal.SIGKILL], 137),
        ([-signal.SIGSEGV] * 4, 2),
    ],
)
def test_plan_for_sparse_cores_is_made_again_where_libtpu_crashes(
    codes: list[int],
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left, started = list(codes), []

    class Child:
        def wait(self) -> int:
            return left.pop(0)

    def start_child(module: str, arguments: list[str]) -> tuple[Child, int]:
        started.append((module, arguments))
        return Child(), os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(plan.watchdog, "start_child", start_child)
    flags = [f"--config={setting(tmp_path)}", "--topology=v5p:2x2x1"]
    assert run_verb(plan.main, flags) == exit_code
    assert started == [("mice_jax.plan", flags)] * len(codes) and not left
    said = capsys.readouterr().err
    assert said.count("libtpu's compiler crashed in attempt") == codes.count(-signal.SIGSEGV)
    assert ("error: libtpu's compiler crashed 4 times" in said) == (exit_code == 2 and len(codes) == 4)


# ---------------------------------------------------------------------------------------- documentation
def test_page_of_what_fits_where_is_up_to_date() -> None:
    made = runpy.run_path(str(REPOSITORY / "docs" / "make_what_fits.py"))
    text = made["PAGE"].read_text()
    head, tail = made["HEAD"], made["TAIL"]
    assert text.startswith(head) and text.endswith("\n" + tail), "run python docs/make_what_fits.py"
    lines = text.removeprefix(head).removesuffix(tail).splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [[f"| {m}", d] for m in made["MODELS"] for d in made["DEVICES"]]
    # One line stands for all, which take twenty seconds: of a run that does not fit as it is.
    assert made["planned_line"]("Llama 3.2 3B", "one GPU of 80 GB") in lines, "run python docs/make_what_fits.py"
