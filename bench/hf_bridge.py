"""Measures import and export of Hugging Face folders against transformers' from_pretrained and save_pretrained.

    python bench/hf_bridge.py                  # a Llama of 1.2 B parameters in float32, 3 rounds: about 5 minutes
    python bench/hf_bridge.py --layers=4 --rounds=5 --dtype=bfloat16

It needs torch, the peer's backend, and disk space for three copies of the checkpoint (15 GB), which it creates from
random weights and removes at the end.

Each side of a round is a separate process, and the sides take turns. Both hold the parameters in float32 on the CPU,
as training does, and compute the logits of the same 16 tokens.

  import   from before the folder is opened to the first logits, with libraries imported beforehand. The forward pass
           is included because transformers maps the file and reads it only then. Our time includes compiling.
  export   writes the same parameters to a new folder, in float32
  RssAnon  the growth of anonymous memory (/proc/self/status) from the start of the import or export to its peak, over
           the bytes of the parameters that the process keeps. Mapped files do not count. The import's peak is taken
           before the forward pass. A value of 1 is the parameters themselves.

Targets: import at most 2x and export at most 1x transformers' time; RssAnon of the import at most 1.15. The two logits
must agree to 1e-4 of their largest. The page cache holds the checkpoint on both sides (it was just written, and is
read once unmeasured). On a virtual machine, memory that has not been used for a while is about ten times slower to
allocate. Both sides therefore touch 6 GiB before the import, and the second of two exports is measured.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [(7 * i + 3) % 1000 for i in range(16)]
TOUCHED = 6 * 2**30
SIDES = ("mice_jax", "transformers")


def config_of(layers: int) -> dict[str, Any]:
    """Returns the config.json of Llama 3.2 1B with another number of layers."""
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True, "hidden_act": "silu"}
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    return names | sizes | heads | rest


# ---------------------------------------------------------------------------------------- memory
def anonymous_bytes() -> int:
    """Returns the anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system's /proc/self/status has no RssAnon")


@contextmanager
def peak_of(found: dict[str, Any], name: str) -> Iterator[None]:
    """Writes the seconds of the block and the peak growth of anonymous memory to `found`."""
    before, most, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    yield
    found[f"{name}_s"] = time.perf_counter() - start
    stop.set()
    watcher.join()
    found[f"{name}_bytes"] = max(most[0], anonymous_bytes()) - before


def touch_memory(size: int) -> None:
    """Allocates and frees memory, so that the next measurement does not wait for memory of the host."""
    fresh = np.empty(size, np.uint8)
    fresh[::4096] = 1


def twice(found: dict[str, Any], output: Path, export: Callable[[Path], Any]) -> None:
    """Measures the second of two exports."""
    export(output)
    shutil.rmtree(output)
    output.mkdir()
    with peak_of(found, "export"):
        export(output)


# ---------------------------------------------------------------------------------------- the sides
def ours(folder: Path, output: Path) -> dict[str, Any]:
    """Measures our side in this process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from mice_jax.models import hf
    from mice_jax.models.transformer import Compute, make_decoder
    from mice_jax.sharding import make_mesh, param_shardings

    found: dict[str, Any] = {}
    mesh = make_mesh(1, -1, 1)
    jax.block_until_ready(jnp.zeros(1))  # starts JAX's runtime, because importing torch starts torch's
    touch_memory(TOUCHED)
    start = time.perf_counter()
    with peak_of(found, "load"):
        config = hf.read_config(folder / "config.json")
        decoder = make_decoder(hf.spec_from_config(config, folder / "config.json"))
        shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
        params = jax.block_until_ready(hf.load_params(folder, decoder, "LlamaForCausalLM", shardings))
    compute = Compute(jnp.dtype("float32"), "blockwise", "none")
    tokens = jnp.array([TOKENS], jnp.int32)
    positions, segments = jnp.arange(16, dtype=jnp.int32)[None], jnp.ones_like(tokens)

    def forward(params: Any) -> jax.Array:
        model = decoder.bind(params)
        return model.logits(model.hidden(tokens, positions, segments, compute))

    compiling = time.perf_counter()
    compiled = jax.jit(forward).lower(params).compile()
    found["compile_s"] = time.perf_counter() - compiling
    found["logits"] = np.asarray(compiled(params))[0, -1, :64].tolist()
    found["import_s"] = time.perf_counter() - start
    found["kept_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    twice(found, output, lambda folder: hf.save_params(folder, params, decoder, config, "float32"))
    return found


def theirs(folder: Path, output: Path) -> dict[str, Any]:
    """Measures transformers in this process."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  imported on the first use otherwise

    found: dict[str, Any] = {}
    touch_memory(TOUCHED)
    start = time.perf_counter()
    with peak_of(found, "load"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found["logits"] = model(torch.tensor([TOKENS])).logits[0, -1, :64].tolist()
    found["compile_s"] = 0.0
    found["import_s"] = time.perf_counter() - start
    found["kept_bytes"] = sum(p.nbytes for p in model.parameters())
    twice(found, output, model.save_pretrained)
    return found


TASKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"mice_jax": ours, "transformers": theirs}


def make_checkpoint(folder: Path, layers: int, dtype: str) -> None:
    """Writes a checkpoint of random weights."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax

    from mice_jax.models import hf
    from mice_jax.models.transformer import make_decoder

    config = config_of(layers)
    decoder = make_decoder(hf.spec_from_config(config, folder / "config.json"))
    hf.save_params(folder, jax.jit(decoder.init)(jax.random.key(0)), decoder, config, dtype)


# ---------------------------------------------------------------------------------------- rounds
def in_process(task: str, folder: Path, *more: str) -> str:
    """Runs a task in a separate process; returns its output."""
    command = [sys.executable, __file__, f"--task={task}", f"--folder={folder}", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Measures a side in a separate process."""
    output = folder.with_name(f"out_{side}")
    output.mkdir()
    try:
        return json.loads(in_process(side, folder, f"--output={output}").splitlines()[-1])
    finally:
        shutil.rmtree(output)


def check_same(a: list[float], b: list[float]) -> None:
    """Raises RuntimeError if the logits of the two sides differ."""
    worst = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, b))
    if worst > 1e-4:
        raise RuntimeError(f"the two sides' logits differ by {worst:.1e} of their largest: it is not the same model.")


def main() -> int:
    """Runs the benchmark or one of its tasks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the checkpoint")
    parser.add_argument("--scratch", default=None, help="folder for the checkpoints; default the system's")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "make":
        make_checkpoint(args.folder, args.layers, args.dtype)
        return 0
    if args.task:
        print(json.dumps(TASKS[args.task](args.folder, args.output)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        in_process("make", folder, f"--layers={args.layers}", f"--dtype={args.dtype}")
        rounds = []
        measure(SIDES[0], folder)  # fills the page cache with the files and the code of both sides
        measure(SIDES[1], folder)
        for i in range(args.rounds):
            turn = SIDES if i % 2 == 0 else SIDES[::-1]
            found = {side: measure(side, folder) for side in turn}
            check_same(*(found[side]["logits"] for side in SIDES))
            rounds.append(found)
            print(f"round {i + 1}: {line_of(found)}", flush=True)
    report(rounds, args)
    return 0


def line_of(found: dict[str, dict[str, Any]]) -> str:
    """Formats the figures of a round."""
    parts = []
    for side, f in found.items():
        load, export = (f[f"{k}_bytes"] / f["kept_bytes"] for k in ("load", "export"))
        parts.append(
            f"{side} import {f['import_s']:.2f} s (load {f['load_s']:.2f}, RssAnon {load:.3f}), export "
            f"{f['export_s']:.2f} s (+{export:.3f})"
        )
    return "; ".join(sorted(parts))


def report(rounds: list[dict[str, dict[str, Any]]], args: argparse.Namespace) -> None:
    """Prints the table of all rounds and the line of JSON."""
    kept = rounds[0]["mice_jax"]["kept_bytes"]
    print(f"\n{kept / 2**30:.2f} GiB of parameters, checkpoint in {args.dtype}, {len(rounds)} rounds")
    figures: dict[str, Any] = {"kept_bytes": kept, "dtype": args.dtype, "rounds": len(rounds)}
    print(f"{'':<24}{'mice_jax':>10}{'transformers':>14}{'ratio: median (least, most)':>32}{'target':>9}")
    for key, name, target in (
        ("import_s", "import, s", "2"), ("load_s", "  of it the load, s", ""),
        ("compile_s", "  of it compiling, s", ""), ("export_s", "export, s", "1"),
    ):  # fmt: skip
        ours, theirs = ([r[side][key] for r in rounds] for side in SIDES)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if all(theirs) else []
        middle = statistics.median(ratios) if ratios else None
        spread = f"{middle:.2f} ({min(ratios):.2f}, {max(ratios):.2f})" if ratios else ""
        print(f"{name:<24}{statistics.median(ours):>10.2f}{statistics.median(theirs):>14.2f}{spread:>32}{target:>9}")
        figures[key] = {"ours": ours, "theirs": theirs, "ratio": middle}
    for key, name, target in (
        ("load_bytes", "import, RssAnon", "1.15"),
        ("export_bytes", "export, RssAnon on top", ""),
    ):
        ours, theirs = ([r[side][key] / r[side]["kept_bytes"] for r in rounds] for side in SIDES)
        print(f"{name:<24}{max(ours):>10.3f}{max(theirs):>14.3f}{'of the parameters':>32}{target:>9}")
        figures[key] = {"ours": max(ours), "theirs": max(theirs)}
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
