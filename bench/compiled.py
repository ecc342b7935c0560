"""Compiles the step of a model for devices that this machine does not need, and compares it with limits.

    python bench/compiled.py --model=granite-3b --topology=v5p:2x2x1
    python bench/compiled.py --model=tests/data/configs/SmolLM3-3B.json --topology=v6e:2x4 --layers=4
    python bench/compiled.py --model=mistral-7b --topology=v5p:8x8x8 --mesh=8,-1,1 --collectives

The program is `accumulate`, the gradients of one microbatch, with the rows and the remat policy that `mice train` would
choose, or those given. Layers are scanned, so a program of four layers (the default) has the same loops as the whole
model. `--layers=0` compiles all. The head and the embedding weigh more in a shallow model: compare shares with care.

On a TPU topology, libtpu writes the scheduled program before it generates code, which takes most of its time. The
compilation is therefore stopped as soon as the program is there. What a collective's start and done have between them
is the compiler's schedule, and the seconds are arithmetic with the peaks of the data sheet: neither is a measurement.
`--flags` are more flags for libtpu, and `--text` reads a program that was written before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = ROOT / "configs" / "paper" / "shapes"
# Only the scheduled program is written, and none of the code generator's hundreds of files.
DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false"
PROGRAM = "*TLP-hlo.txt"  # one for each compiled function, of which `accumulate` is the largest
MIN_PROGRAM_BYTES = 100_000  # those of the small functions that JAX compiles on the way are smaller
POLL_S = 0.5


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="granite-3b", help="a folder of configs/paper/shapes, or a config.json")
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--mesh", default="1,-1,1", help="sizes of the axes data, fsdp and tensor")
    parser.add_argument("--layers", type=int, default=4, help="0 for all")
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument(
        "--rows", type=int, default=0, help="rows on a device; 0 for those that mice train would choose"
    )
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--reduce_dtype", default="float32")
    parser.add_argument("--flags", default="", help="more flags for libtpu")
    parser.add_argument("--text", default="", help="read this program instead of compiling one")
    parser.add_argument("--save", default="", help="keep the program in this file")
    parser.add_argument("--collectives", action="store_true", help="list every collective and every large copy")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------- the program
class Run:
    """A model on a topology, as `mice plan` plans it, and the same with fewer layers."""

    def __init__(self, args: argparse.Namespace):
        from mice_jax.config import Config, Phase
        from mice_jax.models import hf
        from mice_jax.planning import ahead_of_time
        from mice_jax.planning.planner import RunPlan

        file = Path(args.model) if args.model.endswith(".json") else SHAPES / args.model / "config.json"
        whole = json.loads(file.read_text())
        shallow = whole | ({"num_hidden_layers": args.layers} if args.layers else {})
        if args.layers and "layer_types" in whole:
            shallow["layer_types"] = whole["layer_types"][: args.layers]
        self.topology = ahead_of_time.find_topology(args.topology)
        config = Config()
        config.data.phases = [Phase(name="bench", num_steps=1)]
        config.data.max_length = args.slots
        config.model.compute_dtype = "bfloat16"
        config.model.remat, config.train.rows_per_device = args.remat, args.rows
        config.optim.reduce_dtype = args.reduce_dtype
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = map(int, args.mesh.split(","))

        def plan(model: dict[str, Any]) -> RunPlan:
            spec, architecture = hf.spec_from_config(model, file), model["architectures"][0]
            work = {"samples": config.optim.batch_size, "mean_length": 512.0, "deadline": 0.0}
            return RunPlan(config, spec, architecture, self.topology, **work)

        self.layout, self.run = plan(whole).layout, plan(shallow)
        self.slots = args.slots

    def compile(self) -> str:
        """Compiles `accumulate`; returns the program."""
        from mice_jax.training.precompile import abstract_batch

        fns, mesh = self.run.step_functions(self.layout)
        batch = abstract_batch(mesh, self.layout.rows, self.slots)
        return fns.accumulate.compile(fns.abstract_state.params, fns.abstract_sums, batch).as_text()


def program_of(args: argparse.Namespace) -> str:
    """Compiles in a process of its own, since libtpu reads its flags once; returns the scheduled program."""
    with tempfile.TemporaryDirectory(prefix="mice_compiled_") as folder:
        written = Path(folder) / "compiled.txt"
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP.format(folder=folder)} {args.flags}".strip()
        env = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], f"--child={written}"], env=env)
        try:
            while child.poll() is None:
                if text := _scheduled(Path(folder)):
                    return text
                time.sleep(POLL_S)
            if child.returncode:
                sys.exit(child.returncode)
            return _scheduled(Path(folder)) or written.read_text()
        finally:
            child.kill()
            child.wait()


def _scheduled(folder: Path) -> str:
    """The program that libtpu has written, if it is complete; else an empty text."""
    found = max(folder.glob(PROGRAM), key=lambda file: file.stat().st_size, default=None)
    if found is None or found.stat().st_size < MIN_PROGRAM_BYTES:
        return ""
    text = found.read_text()
    return text if text.rstrip().endswith("}") and "\nENTRY " in text else ""


# ---------------------------------------------------------------------------------------- the figures
def main() -> None:
    args = parsed()
    if args.child:
        Path(args.child).write_text(Run(args).compile())
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    text = Path(args.text).read_text() if args.text else program_of(args)
    if args.save:
        Path(args.save).write_text(text)
    report(args, text)


def report(args: argparse.Namespace, text: str) -> None:
    """Prints each figure of a program with its limit."""
    import jax
    import numpy as np

    from mice_jax.hardware import train_flops
    from mice_jax.loss import tokens_per_chunk
    from mice_jax.planning import compiled_step, step_time
    from mice_jax.planning.compiled_step import LARGE

    run = Run(args)
    chip, rows, slots = run.topology.chip, run.layout.rows, run.slots
    inputs = run.run.memory_inputs(run.layout.sizes)
    params = sum(x.size for x in jax.tree.leaves(inputs.decoder.abstract))
    chunk = tokens_per_chunk(inputs.decoder.vocab_rows)
    counts = compiled_step.count_microbatch(text, chip, rows=rows, slots=slots, chunk=chunk)
    found = compiled_step.figures(
        counts, run.run.spec, params=params, tokens=rows * slots, remat=run.layout.remat, itemsize=2
    )
    seconds = counts.compute_s / step_time.MATMUL_EFFICIENCY + counts.exposed_s
    mfu = train_flops(run.run.spec, np.full(rows, float(slots))) / seconds / chip.peak_flops
    facts = {
        "model": args.model,
        "topology": args.topology,
        "mesh": run.layout.sizes,
        "layers": run.run.spec.num_layers,
        "rows": rows,
        "slots": slots,
        "remat": run.layout.remat,
        "flags": args.flags,
        "mfu": mfu,
    }
    if args.json:
        print(json.dumps(facts | {f.name: {"value": f.value, "limit": f.limit, "kept": f.kept} for f in found}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("mfu", "flags")))
    width = max(len(f.name) for f in found)
    for f in found:
        print(f"{f.name:{width}}  {'kept' if f.kept else 'OFF '}  {f.value}  (limit: {f.limit})")
    assumed = f"if products run at {step_time.MATMUL_EFFICIENCY:.0%} of the peak"
    print(f"{'MFU of whole rows':{width}}        {mfu:.1%}, {assumed}")
    if args.collectives:
        for c in counts.collectives:
            state = f"overlaps {c.overlapped_flops:.2g} FLOPs" if c.is_async else "overlaps nothing"
            print(f"  {c.times:3} x {c.kind} {'/'.join(c.dtypes)} {c.full_bytes / 1e6:.2f} MB, {state}: {c.op_name}")
        for c in counts.copies:
            if c.array.size > LARGE:
                print(f"  {c.times:3} x {c.opcode} {c.array.dtype}{list(c.array.shape)}: {c.op_name}")


if __name__ == "__main__":
    main()
