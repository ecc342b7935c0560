"""What new users get wrong in the commands of the documentation: each mistake is one paragraph with the fix."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runs import DEPRECATED, REPOSITORY, make_chats, write_config, write_init, write_jsonl
from mice_jax.cli import main
from mice_jax.config import to_dict

pytestmark = [
    pytest.mark.smoke,
    *(pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning") for message in DEPRECATED),
]

CONFIG, RUN, SFT = "--config=run.py", "--workdir=runs/sft", f"--config={REPOSITORY}/configs/sft.py"
# The arguments of `mice`, and what its answer has to say.
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a misspelt command": ("trian", ["'trian'", "did you mean 'train'"]),
    "a chat as a command": ("chat --model=init", ["'chat'", "generate --model=MODEL"]),
    "nothing but the command": ("train", ["--config is missing", "FILE.py"]),
    "no workdir": (f"train {CONFIG}", ["--workdir is missing", "folder of the run"]),
    "a misspelt config file": (f"train --config=rum.py {RUN}", ["rum.py does not exist", "did you mean run.py"]),
    "a config in another folder": (f"train --config=x/y.py {RUN}", ["x/y.py does not exist; paths are relative to"]),
    "a misspelt flag": (f"train --confg=run.py {RUN}", ["--confg", "did you mean 'config'"]),
    "a field without its group": (f"train {CONFIG} {RUN} --lr=1", ["did you mean '--config.optim.learning_rate'"]),
    "a flag without its value": (f"prepare {CONFIG} --inspect", ["--inspect has no value", "--inspect=VALUE"]),
    "a config without its flag": ("train run.py", ["'run.py'", "--name=value"]),
    "a misspelt field": (f"train {CONFIG} {RUN} --config.optim.learning_rte=1", ["did you mean 'optim.learning_rate'"]),
    "an abbreviated field": (f"train {CONFIG} {RUN} --config.optim.lr=1", ["did you mean 'optim.learning_rate'"]),
    "a field of no group": (f"train {CONFIG} {RUN} --config.batch_size=8", ["did you mean 'optim.batch_size'"]),
    "a group of fields": (f"train {CONFIG} {RUN} --config.data=1", ["a group of fields", "such as data.tokenizer"]),
    "a word for a switch": (f"train {CONFIG} {RUN} --config.data.skip_bad=on", ["skip_bad=on", "true or false"]),
    "a field of a list": (
        f"train {CONFIG} {RUN} --config.data.phases[0].source[1].path=b.jsonl",
        ["did you mean 'data.phases[0].sources[1].path'"],
    ),
    "a list without an index": (
        f"train {CONFIG} {RUN} --config.data.phases.num_epochs=2",
        ["did you mean 'data.phases[0].num_epochs'"],
    ),
    "a mesh beyond the cores": (
        f"train {CONFIG} {RUN} --config.mesh.fsdp=999",
        ["mesh.fsdp=999", "needs 999 devices", "JAX_NUM_CPU_DEVICES=999"],
    ),
    "a workdir in another store": (f"train {CONFIG} --workdir=s3://bucket/run", ["s3://", "gs://", "mount the store"]),
    "a tracker that is not installed": (
        f"train {CONFIG} {RUN} --config.log.trackers=mlflow",
        ["'mlflow'", "is not installed", "pip install"],
    ),
    "the best checkpoint by a loss that is not measured": (
        f"train {CONFIG} {RUN} --config.checkpoint.keep_best=1 --config.checkpoint.best_metric=eval/loss",
        ["best_metric='eval/loss'", "holds out no data", "data.validation_fraction"],
    ),
    "a model's folder as a workdir": (f"train {CONFIG} --workdir=init", ["init holds a model", "another folder"]),
    "a workdir below a file": (f"train {CONFIG} --workdir=run.py/sft", ["run.py is a file", "must be a folder"]),
    "a tokenizer that is not there": (
        f"train {CONFIG} {RUN} --config.data.tokenizer=nowhere",
        ["the tokenizer 'nowhere' is not a folder", "owner/name"],
    ),
    "weights that are cut": (
        f"train {CONFIG} {RUN} --config.model.init_from=half",
        ["half/model.safetensors (9 bytes) is damaged or truncated", "Download it again"],
    ),
    "weights of another format": (
        f"train {CONFIG} {RUN} --config.model.init_from=pickle",
        ["pickle has neither model.safetensors nor", "as safetensors first"],
    ),
    "a phase that is not there": (
        f"train {CONFIG} {RUN} --config.data.phases[3].num_epochs=2",
        ["phases[3]", "count from 0", "mice config"],
    ),
    "data as a config": (f"train --config=chats.jsonl {RUN}", ["chats.jsonl", "takes a Python file"]),
    "a config that returns nothing": (f"train --config=none.py {RUN}", ["none.py", "`return c`"]),
    "a word for a number": (
        f"train {CONFIG} {RUN} --config.optim.batch_size=many",
        ["batch_size=many", "a whole number"],
    ),
    "a negative rate": (f"train {CONFIG} {RUN} --config.optim.learning_rate=-1", ["-1.0 must be at least 0"]),
    "a misspelt schedule": (f"train {CONFIG} {RUN} --config.optim.schedule=cosin", ["constant, linear, cosine, wsd"]),
    "a model of the Hub without a network": (f"train {SFT} {RUN}", ["hf download Qwen/Qwen2.5-1.5B", "Unset"]),
    "a model folder that is not there": (
        f"train {CONFIG} {RUN} --config.model.init_from=/models/mouse",
        ["/models/mouse does not exist", "Hugging Face folder"],
    ),
    "a model without its config": (
        f"train {CONFIG} {RUN} --config.model.init_from=random:runs",
        ["runs/config.json, which does not exist"],
    ),
    "a misspelt attention": (f"train {CONFIG} {RUN} --config.model.attention=flash", ["'flash'", "cudnn", "blockwise"]),
    "a file as a workdir": (f"train {CONFIG} --workdir=table.csv", ["table.csv is a file", "folder"]),
    "a misspelt template": (
        f"train {CONFIG} {RUN} --config.data.chat_template=chatlm",
        ["did you mean 'chatml'", "plain"],
    ),
    "data that are not there": (
        f"prepare {CONFIG} --config.data.phases[0].sources[0].path=data/chats.jsonl",
        ["'data/chats.jsonl' names no file", ".parquet", "Source.path"],
    ),
    "a misspelt format": (
        f"prepare {CONFIG} --config.data.phases[0].sources[0].format=share_gpt",
        ["sources[0].format='share_gpt'", "did you mean 'sharegpt'"],
    ),
    "a spreadsheet as data": (
        f"prepare {CONFIG} --config.data.phases[0].sources[0].path=table.csv",
        ["table.csv", ".jsonl"],
    ),
    "a word for a count": (f"prepare {CONFIG} --inspect=many", ["--inspect=many", "a whole number"]),
    "no topology": (f"plan {CONFIG}", ["--topology is missing", "cpu:N"]),
    "an unknown device": (f"plan {CONFIG} --topology=h10:1", ["'h10'", "did you mean 'h100'", "cpu:8"]),
    "a slice of other directions": (f"plan {CONFIG} --topology=v5e:2x3x9", ["not a slice of TPU v5e", "2x4"]),
    "a run in the folder of a sweep": (f"train {CONFIG} --workdir=swept", ["folder of a sweep", "swept/runs"]),
    "a run whose config.json is cut": (f"train {CONFIG} --workdir=cut", ["cut/config.json is damaged", "a copy"]),
    "a run with another config": (
        f"train {CONFIG} --workdir=done",
        ["done was made with another config", "optim.learning_rate: 0.5 -> "],
    ),
    "a file as the folder to export to": ("export --workdir=made --output=run.py", ["run.py already exists"]),
    "questions that are not there": ("generate --model=init --input=q.jsonl --output=a.jsonl", ["q.jsonl is not a f"]),
    "a misspelt template of a question": (
        "generate --model=init --prompt=x --chat_template=chatlm",
        ["--chat_template='chatlm'", "did you mean 'chatml'"],
    ),
    "a sweep in the folder of a run": ("sweep --config=sweep.py --workdir=cut", ["cut is the folder of a run"]),
    "an axis of texts": ("sweep --config=texts.py --workdir=sweeps/b", ["optim.batch_size='8'", "the sweep", "int"]),
    "a file as the folder of tasks": (
        "evaluate --model=init --tasks=mine --include_path=run.py",
        ["include_path=run.py is not a folder"],
    ),
    "no number of devices": (f"plan {CONFIG} --topology=H100", ["the number of devices is missing", "h100:8"]),
    "a branch of a misspelt run": (
        "branch --from=ini --at=9 --workdir=b --axes=optim.beta1=0.8",
        ["--from=ini", "did you mean init"],
    ),
    "a sweep of a model that is not there": (
        "sweep --config=sweep.py --workdir=sweeps/a",
        ["model.init_from=inti", "Hugging Face folder"],
    ),
    "a run's config for a sweep": (f"sweep {CONFIG} --workdir=sweeps/a", ["get_sweep(arg)", "Sweep"]),
    "no model": ("generate --prompt=Hello", ["--model is missing", "Hugging Face folder"]),
    "a model that is not there": ("generate --model=sft_hf --prompt=Hello", ["sft_hf does not exist", "owner/name"]),
    "a folder without a model": ("generate --model=runs --prompt=Hello", ["runs holds no model", "config.json"]),
    "a repository that is not there": ("generate --model=Qwen/Qwen9 --prompt=x", ["Qwen/Qwen9", "hf download"]),
    "questions without a file for answers": ("generate --model=init --input=q.jsonl", ["--output go together"]),
    "a question and a file of them": (
        "generate --model=init --prompt=x --input=chats.jsonl --output=a.jsonl",
        ["--prompt and --input are both given"],
    ),
    "answers in a folder that is not there": (
        "generate --model=init --input=chats.jsonl --output=no/a.jsonl",
        ["--output=no/a.jsonl", "no folder no", "relative to"],
    ),
    "answers over their questions": (
        "generate --model=init --input=chats.jsonl --output=chats.jsonl",
        ["--output=chats.jsonl is --input itself"],
    ),
    "a folder for answers": (
        "generate --model=init --input=chats.jsonl --output=runs",
        ["runs is a folder", "F.jsonl"],
    ),
    "a step of a Hugging Face folder": ("generate --model=init --prompt=x --step=3", ["step=3", "a run's workdir"]),
    "a step that was not saved": ("generate --model=made --prompt=x --step=9", ["made/checkpoints has no step 9", "5"]),
    "the checkpoints as a model": ("generate --model=made/checkpoints --prompt=x", ["the workdir, made", "STEP"]),
    "a checkpoint that is not there": ("generate --model=made/checkpoints/9 --prompt=x", ["no step 9; it has 5"]),
    "a probability of 2": ("generate --model=init --prompt=x --top_p=2", ["top_p=2.0", "at most 1"]),
    "random weights for an answer": ("generate --model=random:init --prompt=x", ["random weights", "trained weights"]),
    "weights for an answer that are cut": ("generate --model=half --prompt=x", ["half/model.safetensors", "damaged"]),
    "a hot temperature": ("generate --model=sft_hf --prompt=x --temperature=hot", ["--temperature=hot", "a number"]),
    "an evaluation of no model": ("evaluate --tasks=mmlu", ["--model is missing"]),
    "an evaluation without tasks": ("evaluate --model=init", ["--tasks is missing", "mmlu"]),
    "a negative limit": ("evaluate --model=init --tasks=mmlu --limit=-1", ["limit=-1.0", "a number of documents"]),
    "checkpoints of a Hugging Face folder": (
        "evaluate --model=init --tasks=mmlu --all_checkpoints",
        ["--all_checkpoints is for a run", "--model=init"],
    ),
    "one checkpoint and all of them": (
        "evaluate --model=made --tasks=mmlu --all_checkpoints --step=5",
        ["--all_checkpoints scores all steps", "Leave one out"],
    ),
    "a folder for scores": ("evaluate --model=init --tasks=mmlu --output=runs", ["runs is a folder", "F.json"]),
    "a judge that is not named": ("evaluate --model=init --tasks=mt_bench --output=a.json", ["--judge_url=https://"]),
    "a dtype that is not stored": ("export --workdir=made --output=out --dtype=fp16", ["fp16", "float32, bfloat16"]),
    "a running average that was not kept": (
        "export --workdir=made --output=out --average",
        ["made/checkpoints/5 holds no average", "mice average"],
    ),
    "an upload to no repository": ("export --workdir=made --output=out --push_to=mine", ["mine must be owner/name"]),
    "more checkpoints than there are": ("average --workdir=made --last=3", ["made has 1 complete checkpoint: 5"]),
    "a branch of a model": (
        "branch --from=init --at=9 --axes=optim.beta1=0.8 --workdir=b",
        ["init", "that of a model"],
    ),
    "branches without a folder": ("branch --from=made --at=9 --axes=optim.beta1=0.8", ["--workdir is missing"]),
    "branches that do not differ": ("branch --from=made --at=9 --workdir=b", ["--axes is missing", "batch_size=16,32"]),
    "an export of no run": (
        "export --workdir=nowhere --output=out",
        ["nowhere is not a run's workdir", "no such folder"],
    ),
    "an export of a misspelt run": ("export --workdir=ini --output=out", ["no such folder; did you mean init"]),
    "an export to nowhere": ("export --workdir=runs/sft", ["--output is missing", "folder to write"]),
    "a report of no run": ("report --workdir=runs", ["neither the folder of a run", "sweep.json"]),
    "a report of a model": ("report --workdir=init", ["init is neither the folder of a run"]),
    "a report of a missing folder": ("report --workdir=nowhere", ["nowhere does not exist"]),
    "an average of no run": ("average --workdir=nowhere --last=3", ["nowhere"]),
    "the evidence of no sweep": ("evidence --sweeps=runs", ["not the folder of a sweep", "sweep.json"]),
}

# Those that are not found before the imports of the command, which are light for these commands.
FOUND_LATER = {
    "a sweep in the folder of a run", "an axis of texts", "a sweep of a model that is not there",
    "a run's config for a sweep", "a report of no run", "a report of a model", "a report of a missing folder",
    "the evidence of no sweep",
}  # fmt: skip

SWEEP = """
import runpy
from mice_jax.config import Sweep

def get_sweep(arg=""):
    base = runpy.run_path("run.py")["get_config"]()
    base.model.init_from = "inti"
    return Sweep(base=base, axes={"optim.learning_rate": [1e-3, 1e-4]}, metric="train/loss", seeds=[0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, data and a model without weights."""
    folder = tmp_path_factory.mktemp("new")
    write_config(folder / "run.py", write_jsonl(folder / "chats.jsonl", make_chats(9)), write_init(folder / "init"))
    (folder / "sweep.py").write_text(SWEEP)
    (folder / "texts.py").write_text(
        SWEEP.replace("inti", "init").replace("learning_rate", "batch_size").replace("1e-3", "'8'")
    )
    for name in ("half", "pickle"):
        write_init(folder / name)
    (folder / "half" / "model.safetensors").write_bytes(b"\x99" + b"\0" * 8)
    (folder / "made" / "checkpoints" / "5").mkdir(parents=True)
    for name in ("swept/sweep.json", "cut/config.json", "made/model/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model": ')
    (folder / "runs").mkdir()
    (folder / "table.csv").write_text("question,answer\n")
    (folder / "none.py").write_text("def get_config(arg=''):\n    pass\n")
    config = to_dict(runpy.run_path(str(folder / "run.py"))["get_config"]())
    config["optim"]["learning_rate"] = 0.5
    (folder / "done").mkdir()
    (folder / "done" / "config.json").write_text(json.dumps(config | {"resolved": {}}))
    return folder


def _refuse(module: str) -> None:
    raise AssertionError(f"{module} was imported before the mistake was found")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_paragraph_with_the_fix(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[name]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if name not in FOUND_LATER:
        monkeypatch.setattr(main.importlib, "import_module", _refuse)
    assert main._run(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    assert all(word in said for word in words), said
    assert said.rstrip()[-1] in ".?)" and not any(part.name == "sft" for part in (folder / "runs").iterdir())


CPU_S = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "mice_jax", *sys.argv[1:]], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "train --confg=run.py",
        f"train {CONFIG} {RUN} --config.optim.batch_size=0",
        f"train {CONFIG} {RUN} --config.model.init_from=half",
        "generate --model=Qwen/Qwen9",
        "export --workdir=made --output=out --step=9",
    ],
)
def test_mistake_costs_little_in_a_process_of_its_own(arguments: str, folder: Path) -> None:
    """A busy machine may double the time; with the imports of training it would be five seconds and more."""
    command = [sys.executable, "-c", CPU_S, *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    code, seconds = done.stdout.split()
    assert code == "2" and float(seconds) < 3.0
