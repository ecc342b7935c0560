"""Parts of tests of whole runs: tiny chat data, a tokenizer, a model of 18,512 parameters, and config files."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mice_jax import export, prepare, train
from mice_jax.data.bad_records import BadRecords, BadRecordsError
from mice_jax.data.readers import Reader
from mice_jax.data.sources import Sample, parse_block
from mice_jax.runtime import xla_flags

REPOSITORY = Path(__file__).parents[2]
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = ["mice", "learn", "compete", "with", "elephants", "large", "batches", "low", "rates", "cold", "red", "barn"]
TIMES = ("tokens_per_s", "mfu", "mfu_6p", "step_time_s")  # fields of metrics.jsonl that differ between equal runs
# Messages of warnings that other packages cause.
DEPRECATED = ["the load_module.. method is deprecated"]  # ml_collections calls it up to Python 3.11

# Variables for the commands that tests start; conftest.py has set the others in this process.
ENVIRONMENT = dict(xla_flags.HUGE_PAGES_ENV)  # a command then does not execute itself again for huge pages

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------- data
def chat(*turns: str, **keys: Any) -> Record:
    """Makes a sample whose turns alternate between the user and the assistant."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]} | keys


def make_chats(count: int, seed: int = 0, longest: int = 24) -> list[Record]:
    """Makes chats of very unequal lengths, all of them different."""
    rng = random.Random(seed)

    def words(least: int) -> str:
        most = max(least, round(longest * rng.random() ** 3))
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [chat(f"{seed} {i}: {words(0)}", words(1)) for i in range(count)]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """Writes a JSONL file; returns its path."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def read_samples(reader: Reader, format: str = "messages", skip_bad: Counter[str] | None = None) -> Iterator[Sample]:
    """Yields every sample of a source, in order; bad records are counted by reason, or are an error for None."""
    for block in reader.blocks():
        for found in parse_block(block, reader.places, format):
            if isinstance(found, Sample):
                yield found
            elif skip_bad is None:
                bad = BadRecords()
                bad.add([found])
                raise BadRecordsError(bad)
            else:
                skip_bad[found.reason] += 1


# ---------------------------------------------------------------------------------------- model
def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE with ids below 300, whose eos token ends a turn."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=296, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def write_init(folder: Path, template: str | None = CHATML, **keys: Any) -> Path:
    """Writes a folder for `random:`, with config.json and tokenizer."""
    make_tokenizer(template).save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


# ---------------------------------------------------------------------------------------- configs
def write_config(path: Path, data: Path, init: Path, body: str = "") -> Path:
    """Writes a config file with 8 samples per step; `body` may set more fields of `c`."""
    lines = [
        '"""A run of a test."""',
        "",
        "from mice_jax.config import Config, Eval, Mesh, Model, Phase, Source",
        "",
        "",
        'def get_config(arg: str = "") -> Config:',
        "c = Config()",
        f"c.model.init_from = 'random:{init}'",
        f"c.data.cache_dir = '{path.parent / 'stores'}'",
        "c.data.max_length = 128",
        f"c.data.phases = [Phase(name='stacked', num_epochs=1.0, sources=[Source(path='{data}')])]",
        "c.optim.batch_size = 8",
        "c.optim.learning_rate = 1e-2",
        "c.train.rows_per_device = 1",
        *body.splitlines(),
        "return c",
    ]
    path.write_text("\n".join([*lines[:6], *("    " + line for line in lines[6:])]) + "\n")
    return path


def setting(folder: Path, body: str = "", *, samples: int = 40, **init: Any) -> Path:
    """Writes data, init folder and config file of a run to `folder`; returns the config file."""
    folder.mkdir(exist_ok=True)
    data = write_jsonl(folder / "chats.jsonl", make_chats(samples))
    return write_config(folder / "run.py", data, write_init(folder / "init", **init), body)


# ---------------------------------------------------------------------------------------- commands
def run_train(config: Path, workdir: Path, *flags: str) -> int:
    """Runs `mice train` in this process; returns the exit code."""
    return run_verb(train.main, [f"--config={config}", f"--workdir={workdir}", *flags])


def run_prepare(config: Path, *flags: str) -> int:
    """Runs `mice prepare` in this process; returns the exit code."""
    return run_verb(prepare.main, [f"--config={config}", *flags])


def run_export(workdir: Path, output: Path, *flags: str) -> int:
    """Runs `mice export` in this process; returns the exit code."""
    return run_verb(export.main, [f"--workdir={workdir}", f"--output={output}", *flags])


def run_verb(main: Any, arguments: list[str]) -> int:
    """Calls the main function of a command; returns its exit code."""
    with warnings.catch_warnings():  # the caller's filters stay in place for all other warnings
        for message in DEPRECATED:
            warnings.filterwarnings("ignore", message, DeprecationWarning)
        return main(arguments)


def start_train(config: Path, workdir: Path, *flags: str, devices: int = 8, **more: str) -> subprocess.Popen[str]:
    """Starts `mice train` as a separate process, which a test may kill; stdout and stderr share one pipe."""
    command = [sys.executable, "-m", "mice_jax.train", f"--config={config}", f"--workdir={workdir}", *flags]
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)


def place_flags(count: int) -> list[list[str]]:
    """Returns the flags by which `count` processes of one run find each other, for each of them, at a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    together = [f"--coordinator_address={address}", f"--num_processes={count}"]
    return [[*together, f"--process_id={i}"] for i in range(count)]


# ---------------------------------------------------------------------------------------- files of a run
def read_metrics(workdir: Path) -> list[Record]:
    """Reads the lines of the steps in metrics.jsonl."""
    return [line for line in read_all_metrics(workdir) if line["step"]]


def read_all_metrics(workdir: Path) -> list[Record]:
    """Reads metrics.jsonl, with the line before the first step where data is held out."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(records: Sequence[Record]) -> list[Record]:
    """Returns lines of metrics.jsonl without the fields that differ between equal runs."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def read_json(workdir: Path, name: str) -> Any:
    """Reads a JSON file of a workdir."""
    return json.loads((workdir / name).read_text())


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint (parameters, optimizer state and any average) with orbax alone."""
    found = {}
    for item in ("params", "opt_state", "average"):
        folder = workdir.resolve() / "checkpoints" / str(step) / item
        if item == "average" and not folder.exists():
            continue
        files = tuple((file, file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*")))
        found |= {f"{item}{name}": x for name, x in _arrays_in(folder, files).items()}
    return found


@functools.lru_cache(maxsize=64)
def _arrays_in(folder: Path, files: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Reads a part of a checkpoint, once for as long as its `files` stay the same; nothing may write to the arrays."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        whole = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=whole))
    found = {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for x in found.values():
        x.setflags(write=False)
    return found


def assert_equal_runs(a: Path, b: Path, step: int) -> None:
    """Asserts that two runs are bit-equal in metrics and in the checkpoint of their last step."""
    assert timeless(read_all_metrics(a)) == timeless(read_all_metrics(b))
    left, right = arrays(a, step), arrays(b, step)
    assert left.keys() == right.keys() and len(left) > 10
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].tobytes() == right[name].tobytes(), name
    assert read_json(a, "summary.json")["status"] == read_json(b, "summary.json")["status"] == "completed"


def lines_of(workdir: Path) -> int:
    """Returns the number of complete lines of steps in metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    raw = file.read_bytes() if file.exists() else b""
    return raw.count(b"\n") - raw.startswith(b'{"step": 0,')


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    try:
        return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
    except FileNotFoundError:
        return False


def kill_when(process: Any, ready: Callable[[], bool]) -> None:
    """Sends SIGKILL as soon as `ready` returns True; fails if the run ends before."""
    try:
        while not ready():
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
