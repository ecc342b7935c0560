"""What the user got wrong, told in one paragraph with the place and the mend; never a traceback."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.runs import (
    CHATML,
    chat,
    make_tokenizer,
    run_export,
    run_prepare,
    run_train,
    run_verb,
    setting,
    start_train,
    write_init,
    write_jsonl,
)
from mice_jax import train as train_module

Spoil = Callable[[Path], list[str]]  # breaks something in a folder made by `setting`; returns flags


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """data (chats.jsonl), init and run.py, which together are a good run."""
    setting(tmp_path / "run", samples=16)
    return tmp_path / "run"


def refused(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one paragraph that is all of stderr."""
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and "Error:" not in err.replace("ZeroDivisionError:", ""), err
    return err


def train(folder: Path, *flags: str) -> int:
    return run_train(folder / "run.py", folder / "work", *flags)


# ---------------------------------------------------------------------------------------- data
GOOD = chat("who?", "mice")
USER = {"role": "user", "content": "who?"}


def with_lines(*records: Any) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
        (folder / "chats.jsonl").write_text(text)
        return []

    return spoil


def with_template(template: str) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / "chat.jinja").write_text(template)
        return [f"--config.data.chat_template={folder}/chat.jinja"]

    return spoil


def gone(folder: Path) -> list[str]:
    (folder / "chats.jsonl").unlink()
    return []


MUTE = {"messages": [USER, {"role": "assistant", "content": "mice", "train": False}]}
DATA: dict[str, tuple[Spoil, list[str]]] = {
    "a line that is not JSON": (with_lines(GOOD, '{"messages": ['), ["chats.jsonl line 2", "not JSON", "skip_bad"]),
    "a line that is no object": (with_lines(GOOD, GOOD, "[1]"), ["chats.jsonl line 3", "an object"]),
    "no messages": (with_lines({"turns": []}), ["chats.jsonl line 1", "messages", "turns"]),
    "a message without role": (
        with_lines(GOOD, {"messages": [{"content": "x"}]}),
        ["chats.jsonl line 2", "messages[0]", "role"],
    ),
    "a message without content": (
        with_lines({"messages": [USER, {"role": "assistant"}]}),
        ["chats.jsonl line 1", "messages[1]", "content"],
    ),
    "an unknown role": (
        with_lines({"messages": [{"role": "asistant", "content": "x"}]}),
        ["chats.jsonl line 1", "asistant", "did you mean 'assistant'"],
    ),
    "an empty data set": (with_lines(), ["chats.jsonl", "no sample"]),
    "nothing but bad lines, which are skipped": (
        lambda f: [*with_lines("{", {"turns": []})(f), "--config.data.skip_bad=True"],
        [
            "no sample",
            "all 2 records are bad (1 not JSON, 1 no messages)",
            "The first:",
            "chats.jsonl line 1: it is not JSON",
        ],
    ),
    "a source that is not there": (gone, ["chats.jsonl", "Source.path"]),
    "a format that is not known": (
        lambda f: ["--config.data.phases[0].sources[0].format=share_gpt"],
        ["share_gpt", "did you mean 'sharegpt'"],
    ),
    "a kind of file that is not read": (
        lambda f: [f"--config.data.phases[0].sources[0].path={(f / 'chats.jsonl').rename(f / 'chats.csv')}"],
        ["chats.csv", ".jsonl"],
    ),
    "every sample too long": (
        lambda f: ["--config.data.max_length=4"],
        ["stacked", "longer than max_length", "data.max_length=4", "16"],
    ),
    "one sample too long": (
        lambda f: ["--config.data.max_length=40", "--config.data.overlong=error"],
        ["chats.jsonl", "data.max_length=40", "drop"],
    ),
    "nothing to train on": (with_lines(MUTE, MUTE), ["stacked", ": 2 no trained token"]),
    "a template that changes contents": (
        with_template(CHATML.replace("{{ m.content }}", "{{ m.content | upper | reverse }}")),
        ["chats.jsonl lines 1, 2, ", "generation", "data.chat_template"],
    ),
    "a template that ends no turn": (
        with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"),
        ["chats.jsonl lines 1, 2, ", "never stop"],
    ),
    "a template that does not parse": (with_template("{% for m in %}"), ["chat.jinja line 1"]),
    "a template that is not there": (
        lambda f: [f"--config.data.chat_template={f}/none.jinja"],
        ["data.chat_template", "none.jinja"],
    ),
    "a template that refuses the chat": (
        with_template("{{ raise_exception('no chats today') }}"),
        ["chats.jsonl lines 1, 2, ", "no chats today"],
    ),
    "held-out data that is not there": (
        lambda f: ["--config.data.validation_fraction=0.9999"],
        ["stacked", "no sample to train on"],
    ),
    "no whole step": (
        lambda f: ["--config.data.drop_remainder=true", "--config.optim.batch_size=17"],
        ["optim.batch_size=17", "data.drop_remainder"],
    ),
    "less than a sample": (lambda f: ["--config.data.phases[0].num_epochs=0.001"], ["num_epochs", "stacked"]),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_an_error(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = DATA[name]
    said = refused(train(folder, *spoil(folder)), capsys)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name", ["a line that is not JSON", "nothing to train on", "a template that ends no turn"])
def test_bad_data_is_an_error_in_prepare_too(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = DATA[name]
    said = refused(run_prepare(folder / "run.py", *spoil(folder)), capsys)
    assert all(word in said for word in words), said


def test_tokenizer_without_a_template_is_an_error_with_the_field(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "init")
    write_init(folder / "init", template=None)
    said = refused(train(folder), capsys)
    assert "no chat template" in said and "data.chat_template" in said


# ---------------------------------------------------------------------------------------- config
CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "a misspelt field": (["--config.optim.learning_rte=1"], ["optim.learning_rte", "'optim.learning_rate'"]),
    "a misspelt flag": (["--wrkdir=x"], ["--wrkdir", "'workdir'"]),
    "an ill-typed field": (["--config.optim.batch_size=many"], ["optim.batch_size", "many"]),
    "a value out of bounds": (["--config.optim.batch_size=0"], ["optim.batch_size=0", "at least 1"]),
    "two problems": (["--config.optim.eps=-1", "--config.data.overlong=cut"], ["optim.eps=-1", "data.overlong='cut'"]),
    "a mesh that does not divide": (["--config.mesh.tensor=3"], ["mesh.tensor=3", "the number of devices, 8"]),
    "a mesh that is too small": (["--config.mesh.fsdp=4"], ["mesh.fsdp=4", "the number of devices, 8"]),
    "a mesh that is too large": (
        ["--config.mesh.data=16", "--config.mesh.fsdp=1"],
        ["mesh.data=16", "the number of devices, 8"],
    ),
    "rows that devices cannot share": (
        ["--config.mesh.sequence=3", "--config.data.max_length=128"],
        ["mesh.sequence=3", "data.max_length=128", "set it to 132"],
    ),
    "an unknown backend": (["--config.model.attention=magic"], ["model.attention='magic'", "auto"]),
    "a backend of other devices": (["--config.model.attention=cudnn"], ["platform cpu", "Set it to one of blockwise"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_bad_setting_is_an_error(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = CONFIG[name]
    said = refused(train(folder, *flags), capsys)
    assert all(word in said for word in words), said


FILES: dict[str, tuple[str, list[str]]] = {
    "not Python": ("def get_config(:\n", ["run.py line 1"]),
    "raising": ("def get_config(arg=''):\n    return 1 / 0\n", ["run.py line 2", "division by zero"]),
    "a dict": ("def get_config(arg=''):\n    return {'seed': 1}\n", ["dict", "Config"]),
    "misspelt": (
        "from mice_jax.config import Config\ndef get_config(arg=''):\n    c = Config()\n    c.optim.batchsize = 8\n",
        ["run.py line 4", "batchsize", "'batch_size'"],
    ),
    "ill-typed": (
        "from mice_jax.config import Config\ndef get_config(arg=''):\n"
        "    c = Config()\n    c.optim.batch_size = '8'\n    return c\n",
        ["optim.batch_size='8'", "int"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_config_file_is_an_error(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = FILES[name]
    (folder / "run.py").write_text(text)
    code = train(folder)
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


def test_missing_config_file_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.py").unlink()
    assert f"the file {folder}/run.py does not exist" in refused(train(folder), capsys)


def test_missing_flag_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir is missing" in refused(run_verb(train_module.main, [f"--config={folder}/run.py"]), capsys)
    assert "--config is missing" in refused(run_verb(train_module.main, [f"--workdir={folder}/work"]), capsys)


# ---------------------------------------------------------------------------------------- model
@pytest.fixture
def hf(folder: Path) -> Path:
    """A Hugging Face folder, made by transformers."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    rest = {"initializer_range": 0.1, "rms_norm_eps": 1e-5}  # as in helpers/runs.py, whose runs have its programs
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).save_pretrained(folder / "hf")
    make_tokenizer().save_pretrained(folder / "hf")
    return folder / "hf"


def edit(file: Path, **keys: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (config | keys).items() if v is not ...}))


def cut(hf: Path) -> None:
    data = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(data[: len(data) // 2])


def scribble(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes(b"\xff" * 64)


def index_alone(hf: Path) -> None:
    """Leaves an index whose file is missing; a complete model.safetensors beside it would be taken."""
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (hf / "model.safetensors").unlink()


MODEL: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "weights that are not there": (lambda hf: (hf / "model.safetensors").unlink(), ["hf", "model.safetensors"]),
    "weights cut short": (cut, ["hf/model.safetensors", "truncated"]),
    "weights that are none": (scribble, ["hf/model.safetensors", "damaged"]),
    "a file that the index names": (
        index_alone,
        ["model.safetensors.index.json", "model-1.safetensors"],
    ),
    "a family that is not there": (
        lambda hf: edit(hf / "config.json", architectures=["MambaForCausalLM"]),
        ["config.json", "MambaForCausalLM", "LlamaForCausalLM", "GraniteForCausalLM", "Gemma3ForCausalLM"],
    ),
    "an unknown kind of RoPE": (
        lambda hf: edit(hf / "config.json", rope_scaling={"rope_type": "ntk"}, rope_parameters=None),
        ["config.json", "rope_type='ntk'", "default, linear, llama3, yarn, longrope"],
    ),
    "another shape": (
        lambda hf: edit(hf / "config.json", intermediate_size=64),
        ["mlp.gate_proj.weight", "[48, 16]", "[64, 16]"],
    ),
    "more layers": (lambda hf: edit(hf / "config.json", num_hidden_layers=3), ["model.layers.2", "is missing"]),
    "fewer layers": (lambda hf: edit(hf / "config.json", num_hidden_layers=1), ["model.layers.1", "is unexpected"]),
    "no config": (lambda hf: (hf / "config.json").unlink(), ["hf/config.json"]),
    "a config that is not JSON": (lambda hf: (hf / "config.json").write_text("{"), ["hf/config.json", "JSON"]),
    "a family that is not known": (
        lambda hf: edit(hf / "config.json", architectures=["MouseForCausalLM"]),
        ["config.json", "MouseForCausalLM", "LlamaForCausalLM"],
    ),
    "a key that is missing": (lambda hf: edit(hf / "config.json", hidden_size=...), ["config.json", "hidden_size"]),
    "a key that is not known": (lambda hf: edit(hf / "config.json", whiskers=6), ["config.json", "whiskers=6"]),
    "a vocabulary too small": (
        lambda hf: edit(hf / "config.json", vocab_size=280),
        ["config.json", "280", "295", "data.tokenizer"],
    ),
    "no tokenizer": (
        lambda hf: [f.unlink() for f in (hf / "tokenizer.json", hf / "tokenizer_config.json")],
        ["hf", "tokenizer.json", "data.tokenizer"],
    ),
    "no folder": (lambda hf: shutil.rmtree(hf), ["hf", "Hugging Face folder"]),
}


@pytest.mark.parametrize("name", MODEL)
def test_bad_model_is_an_error(name: str, folder: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = MODEL[name]
    spoil(hf)
    capsys.readouterr()
    said = refused(train(folder, f"--config.model.init_from={hf}"), capsys)
    assert all(word in said for word in words), said
    assert not (folder / "work" / "checkpoints").exists()  # it was found before a checkpoint manager started threads


def test_unspoilt_model_is_trained(folder: Path, hf: Path) -> None:
    """What the tests above spoil is right, and so are the run's data and config."""
    assert train(folder, f"--config.model.init_from={hf}") == 0


def test_tokenizer_of_another_model_is_an_error(folder: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "init" / "config.json", vocab_size=200)
    said = refused(train(folder, f"--config.data.tokenizer={hf}"), capsys)
    assert "295" in said and "200" in said and str(folder / "init" / "config.json") in said


# ---------------------------------------------------------------------------------------- workdir
@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, with the workdir of a run that has ended; shared by tests that work on copies of it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    setting(folder, samples=16)
    assert train(folder) == 0
    return folder


@pytest.fixture
def trained(finished_run: Path) -> Iterator[Path]:
    """The folder of `finished_run`, whose workdir is put back after the test."""
    shutil.copytree(finished_run / "work", finished_run / "untouched")
    yield finished_run
    shutil.rmtree(finished_run / "work")
    (finished_run / "untouched").rename(finished_run / "work")


def test_workdir_of_another_config_names_each_field(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    metrics = (folder / "work" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    said = refused(train(folder, "--config.optim.learning_rate=0.5", "--config.data.phases[0].name=late"), capsys)
    assert "optim.learning_rate: 0.01 -> 0.5" in said and "'stacked' -> 'late'" in said
    assert str(folder / "work") in said and "batch_size" not in said
    assert (folder / "work" / "metrics.jsonl").read_bytes() == metrics
    assert train(folder, "--config.log.every_steps=3") == 0  # a field that may change


def test_workdir_without_its_metrics_is_an_error(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    (folder / "work" / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert "metrics.jsonl does not hold the steps 1 to 2" in refused(train(folder), capsys)


def test_workdir_that_is_a_file_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "work").write_text("")
    assert f"--workdir={folder}/work cannot be written" in refused(train(folder), capsys)


def test_init_from_a_run_without_a_checkpoint_is_an_error(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    for checkpoint in (folder / "work" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    code = run_train(folder / "run.py", folder / "next", f"--config.model.init_from={folder}/work")
    said = refused(code, capsys)
    assert "checkpoint" in said and str(folder / "work") in said


# ---------------------------------------------------------------------------------------- export and whole processes
def test_bad_exports_are_errors(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    out = folder / "out"
    work, adapter = folder / "work", folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    others = {
        folder: "it has no model/config.json",
        folder / "init": "it has a config.json of its own, so it is a Hugging Face folder already",
        adapter: "it has an adapter_config.json, so it is an adapter. mice generate, mice evaluate and model.init_from",
        work / "checkpoints" / "2": f"it is a checkpoint of one. Give --workdir={work} --step=2",
    }
    for other, words in others.items():
        said = refused(run_export(other, out), capsys)
        assert f"--workdir={other} is not a run's workdir: {words}" in said
    said = refused(run_export(work, out, "--step=1"), capsys)
    assert "no step 1" in said and "it has 2" in said and not out.exists()
    assert "--dtype=float16" in refused(run_export(work, out, "--dtype=float16"), capsys)
    assert "--step" in refused(run_export(work, out, "--step=last"), capsys)
    write_jsonl(folder / "file", [])
    for there in (folder / "file", folder / "init"):
        assert f"--output={there} already exists" in refused(run_export(work, there), capsys)
    assert (folder / "init" / "config.json").exists()
    assert not list(folder.glob(".*partial"))


@pytest.mark.slow
def test_process_writes_one_paragraph_to_stderr(folder: Path) -> None:
    (folder / "chats.jsonl").write_text("{not json\n")
    process = start_train(folder / "run.py", folder / "work", devices=1, TF_CPP_MIN_LOG_LEVEL="0")
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "chats.jsonl line 1" in errors[0]
    assert "Traceback" not in said and said.splitlines()[-1] == errors[0]


def test_workdir_at_an_unknown_store_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert run_verb(train_module.main, [f"--config={folder / 'run.py'}", "--workdir=s3://bucket/run"]) == 2
    assert "s3://bucket/run is in a s3:// store, but a workdir can be on disk" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
