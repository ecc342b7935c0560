"""Measures the training step on packed rows: against transformers and torch, its growth, and the cost of its start.

    python bench/step.py                                  # 10m on this machine's GPU, else its CPU: some minutes
    python bench/step.py --size=60m --parts=peers
    python bench/step.py --size=llama-3b --rows=2 --remat=dots --rounds=5

Parts:
  peers    ours against transformers' model in a hand-written loop, with the same weights and the same rows of samples.
           Lengths are log-normal, as those of chats are, and half of each sample is trained. The peers are sdpa with a
           mask of the packed samples and, on a GPU, flex attention with a block mask, torch.compile on both, and
           Liger's kernels if they are installed. The loops are what a competent user would write: logits for trained
           tokens only, gradients accumulated over the microbatches of a step, clipping, fused AdamW. Each run is a
           separate process; the sides take turns, and a pair is one round. The losses of the first step must agree
  growth   seconds and temporary memory of a step by its rows (1x to 64x) and by the devices that a CPU is split into
           (1 to 8, on the same cores, which shows the cost of splitting). Memory by vocabulary (32k to 256k, a model of
           one layer), next to the size of all tokens' logits, which never exist at once
  start    times to trace, lower and compile the first microbatch, and the ratio of the first step to XLA's part

tokens/s count real tokens (no padding) over whole steps. share is the fraction of the device's peak: model FLOPs of
real tokens, with attention by the samples' own lengths (`hardware.train_flops`), over the time and the peak rate. The
peak is the rate of a large float32 matrix product on a CPU (ours, for both sides), or the data sheet's on a GPU. peak
is VmHWM on a CPU and device memory on a GPU. CPU seconds are user and system time of the whole process; on a shared
machine, they are more reliable than wall-clock time.

Our side starts with huge pages, as `mice` does, and the peers start as a script does. `--devices=2` is
`JAX_NUM_CPU_DEVICES=2` for our side: the rows are split between two devices of the machine, which run concurrently.

On a GPU, weights and moments are float32 and products bfloat16, by autocast on torch's side. mistral-7b has bfloat16
moments on both sides, for which torch's AdamW needs bfloat16 weights too, and bfloat16 sums on ours. `--remat=full` is
gradient checkpointing on torch's side too; `dots`, which saves the results of matrix products, has no equivalent there.

Targets: 1.5 times sdpa on a CPU, 1.3 times the fastest peer on an H200 and 55 % of its peak at llama-3b.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would spin while others work
os.environ.setdefault("JAX_PLATFORMS", "cuda" if Path("/proc/driver/nvidia").exists() else "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # each side has the device to itself
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mice_jax.runtime import xla_flags

# Each size has d_model, d_ff, layers, query heads, key heads, head_dim, vocabulary, and whether embeddings are tied.
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True),
    "10m": (256, 1024, 10, 4, 2, 64, 4096, True),
    "60m": (512, 1792, 16, 8, 4, 64, 4096, True),
    "llama-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32768, False),
}
PURE_BFLOAT16 = ("mistral-7b",)  # these sizes have bfloat16 moments and, on torch's side, bfloat16 weights
MEAN_LOG, SPREAD_LOG = 5.5, 0.9  # log-normal distribution of lengths, with a median of 245 tokens
RATE, CLIP = 1e-4, 1.0
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
LOSS_TOLERANCE = {"cpu": 1e-4, "gpu": 2e-2}  # tolerance of the first step's loss, relative to its value
WARM_UP = 1  # number of unmeasured steps


# ------------------------------------------------------------------------------------------------ what both sides get
def make_rows(rows: int, slots: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Makes packed rows [B T]; the last half of each sample is trained."""
    from mice_jax.data.loader import empty_rows, put_sample

    rng = np.random.default_rng(seed)
    arrays = empty_rows(rows, slots)
    for row in range(rows):
        at = segment = 0
        while at < slots - 16:
            length = min(int(np.clip(rng.lognormal(MEAN_LOG, SPREAD_LOG), 16, slots)), slots - at)
            segment += 1
            put_sample(
                arrays, row, at, segment, rng.integers(0, vocab, length), np.arange(length) >= length // 2, "token"
            )
            at += length
    return arrays


def lengths_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the lengths, int [n], of all samples of packed rows."""
    return np.concatenate([np.bincount(row[row > 0])[1:] for row in arrays["segment_ids"]])


def config_of(size: str, slots: int, vocab: int = 0, layers: int = 0) -> dict[str, Any]:
    """Returns the config.json of a size, with another vocabulary or number of layers if given."""
    hidden, mlp, depth, heads, kv_heads, head_dim, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab or vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": slots,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


# ----------------------------------------------------------------------------------------------------------- our side
class Ours:
    """A model of random or given weights, and its step on one mesh."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], weights: Path | None = None, devices: int = 1):
        import jax
        import jax.numpy as jnp

        from mice_jax import optim
        from mice_jax.models import attention, hf, transformer
        from mice_jax.sharding import make_mesh, param_shardings
        from mice_jax.step import make_step

        self.mesh = make_mesh(1, devices, 1, jax.devices()[:devices])
        device = jax.devices()[0]
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
        self.spec = hf.spec_from_config(config, Path("config.json"))
        self.decoder = transformer.make_decoder(self.spec, 1)
        backend = attention.choose_backend(
            "auto",
            attention.AttentionRequirements(
                self.spec,
                platform=device.platform,
                compute_capability=getattr(device, "compute_capability", None),
                dtype=dtype,
                max_length=args.slots,
                deterministic=False,
            ),
        )
        small = "bfloat16" if args.size in PURE_BFLOAT16 else "float32"
        (beta1, beta2), eps = ADAM["betas"], ADAM["eps"]
        optimizer = optim.make_optimizer(
            grad_clip=CLIP, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, moments_dtype=small
        )
        compute = transformer.Compute(jnp.dtype(dtype), backend, args.remat)
        self.fns = make_step(self.decoder, optimizer, self.mesh, compute, accumulate_dtype=small)
        if weights is None:
            self.state = self.fns.init(jax.random.key(0))
        else:
            shardings = param_shardings(self.decoder.abstract, self.decoder.axes, self.mesh)
            params = hf.load_params(weights, self.decoder, config["architectures"][0], shardings)
            self.state = self.fns.from_params(params)
        self.sums = self.fns.zero_sums()

    def step(self, microbatches: list[dict[str, np.ndarray]]) -> float:
        """Runs a step and waits for its loss, which is returned."""
        from mice_jax.sharding import put_rows

        for rows in microbatches:
            self.sums = self.fns.accumulate(self.state.params, self.sums, put_rows(rows, self.mesh))
        self.state, self.sums, measured = self.fns.apply(self.state, self.sums, RATE)
        return float(measured["loss"])

    def accumulate_program(self, rows: dict[str, np.ndarray]) -> Any:
        """Compiles the accumulation of a microbatch."""
        from mice_jax.sharding import put_rows

        return self.fns.accumulate.compile(self.state.params, self.sums, put_rows(rows, self.mesh))


def run_ours(args: argparse.Namespace, steps: list[list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Measures our side in this process."""
    import jax

    from mice_jax import hardware

    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    ours = Ours(args, config_of(args.size, args.slots), Path(args.folder) / "model", args.devices)
    result = timed(ours.step, steps)
    device = jax.devices()[0]
    peak = hardware.peak_flops(device) or 0.0
    if device.platform != "cpu":
        result["peak_mib"] = device.memory_stats()["peak_bytes_in_use"] / 2**20
    flops = [sum(hardware.train_flops(ours.spec, lengths_of(m)) for m in step) for step in steps]
    return result | {
        "peak_flops": peak * args.devices,
        "flops": flops,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


# ----------------------------------------------------------------------------------------------------------- the peer
def run_torch(args: argparse.Namespace, steps: list[list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Measures a peer in this process."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if args.side == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    attention = "sdpa" if args.side == "sdpa" else "flex_attention"
    dtype = torch.bfloat16 if args.size in PURE_BFLOAT16 else torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        Path(args.folder) / "model", dtype=dtype, attn_implementation=attention
    )
    model = loaded.to(device)
    model.train()
    model.config.use_cache = False
    if args.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    body: Any = torch.compile(model.model) if on_gpu else model.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True, **ADAM)

    def mask_of(ids: torch.Tensor) -> Any:
        if attention == "sdpa":
            seen = (ids[:, None, :, None] == ids[:, None, None, :]).tril()  # padding sees padding, so no row is empty
            return torch.zeros(seen.shape, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)

        def sees(b: Any, _: Any, q: Any, k: Any) -> Any:
            return (q >= k) & (ids[b, q] == ids[b, k])

        return create_block_mask(sees, len(ids), None, ids.shape[1], ids.shape[1], device=device, _compile=True)

    def step(microbatches: list[dict[str, np.ndarray]]) -> float:
        total = sum(float(m["loss_weights"].sum()) for m in microbatches)
        optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for m in microbatches:
            x = {name: torch.from_numpy(a).to(device, non_blocking=True) for name, a in m.items()}
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu and dtype == torch.float32):
                mask = mask_of(x["segment_ids"])
                if attention == "sdpa" and on_gpu:
                    mask = mask.to(torch.bfloat16)
                hidden = body(
                    input_ids=x["tokens"].long(), position_ids=x["positions"].long(), attention_mask=mask
                ).last_hidden_state
                trained = x["loss_weights"] > 0
                logits = model.lm_head(hidden[trained]).float()
                loss = torch.nn.functional.cross_entropy(logits, x["targets"][trained].long(), reduction="sum") / total
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss_sum)

    result = timed(step, steps)
    if on_gpu:
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result | {"torch": torch.__version__}


def write_model(args: argparse.Namespace) -> None:
    """Writes random weights as a Hugging Face folder, from which both sides start."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if args.size in ("tiny", "10m", "60m") else torch.bfloat16
    torch.set_default_dtype(dtype)
    config = config_of(args.size, args.slots)
    LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}, dtype=dtype)
    ).save_pretrained(Path(args.folder) / "model")


# ---------------------------------------------------------------------------------------------------------- measuring
def timed(
    step: Callable[[list[dict[str, np.ndarray]]], float], steps: list[list[dict[str, np.ndarray]]]
) -> dict[str, Any]:
    """Runs the steps; returns the loss, wall-clock and CPU seconds of each, and the peak memory of the process."""
    losses, seconds, cpu_seconds = [], [], []
    for microbatches in steps:
        began, used = time.perf_counter(), time.process_time()
        losses.append(step(microbatches))
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"losses": losses, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}


def steps_of(args: argparse.Namespace) -> list[list[dict[str, np.ndarray]]]:
    """Makes the microbatches of all steps."""
    vocab = SIZES[args.size][6]
    return [
        [make_rows(args.rows, args.slots, vocab, 1000 * i + j) for j in range(args.microbatches)]
        for i in range(WARM_UP + args.steps)
    ]


def spawn(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """Measures one side in a separate process."""
    out = Path(args.folder) / "result.json"
    out.unlink(missing_ok=True)
    names = ("size", "rows", "slots", "steps", "microbatches", "remat", "devices", "folder")
    command = [sys.executable, str(Path(__file__).resolve()), f"--side={side}", f"--out={out}"]
    command += [f"--{name}={getattr(args, name)}" for name in names]
    environment = (
        xla_flags.HUGE_PAGES_ENV if side == "ours" else {}
    ) | os.environ  # `mice` starts with huge pages, a peer's script does not
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not out.exists():
        print(f"{side} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return {}
    return json.loads(out.read_text())


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all sides and prints their table."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: torch is not installed, which this measures against: pip install -e '.[bench]'")
    import torch

    on_gpu = torch.cuda.is_available()
    sides = ["ours", "sdpa"] + ["flex"] * on_gpu
    sides += ["liger"] * (on_gpu and importlib.util.find_spec("liger_kernel") is not None)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        spawn(args, "model")
        rounds = [{side: spawn(args, side) for side in sides[:: 1 if i % 2 == 0 else -1]} for i in range(args.rounds)]
    steps = steps_of(args)[WARM_UP:]
    tokens = sum(int(lengths_of(m).sum()) for step in steps for m in step)
    trained = sum(int((m["loss_weights"] > 0).sum()) for step in steps for m in step)
    sides = [s for s in sides if all(r[s] for r in rounds)]
    if "ours" not in sides:
        sys.exit("error: our own side failed")
    first = {s: rounds[0][s]["losses"][0] for s in sides}
    tolerance = LOSS_TOLERANCE["gpu" if on_gpu else "cpu"]
    agree = all(abs(x - first["ours"]) <= tolerance * first["ours"] for x in first.values())
    ours = rounds[0]["ours"]
    peak = max(r["ours"]["peak_flops"] for r in rounds)  # the measurement that other processes disturbed least
    print(f"\n{args.size} on {ours['device']}: {tokens:,} tokens in {args.steps} steps, {trained / tokens:.0%} trained")
    print(f"{'':<8}{'tokens/s':>10}{'share':>8}{'CPU s':>8}{'peak':>12}   ours / theirs: speed, CPU seconds, memory")
    summary: dict[str, Any] = {}
    for side in sides:
        runs = [(r[side], r["ours"]) for r in rounds]
        clock = [sum(x["seconds"][WARM_UP:]) for x, _ in runs]
        cpu = [sum(x["cpu_seconds"][WARM_UP:]) for x, _ in runs]
        ratios = {
            "speed": [sum(x["seconds"][WARM_UP:]) / sum(o["seconds"][WARM_UP:]) for x, o in runs],
            "cpu": [sum(x["cpu_seconds"][WARM_UP:]) / sum(o["cpu_seconds"][WARM_UP:]) for x, o in runs],
            "memory": [o["peak_mib"] / x["peak_mib"] for x, o in runs],
        }
        of_side = {
            "tokens_per_s": tokens / statistics.median(clock),
            "share": sum(ours["flops"][WARM_UP:]) / statistics.median(clock) / peak if peak else None,
            "cpu_s": statistics.median(cpu),
            "peak_mib": statistics.median(x["peak_mib"] for x, _ in runs),
            "ratios": ratios,
        }
        summary[side] = of_side
        ratio_text = "" if side == "ours" else ", ".join(median_of(x) for x in ratios.values())
        share = f"{of_side['share']:.1%}" if of_side["share"] else "?"
        figures = f"{of_side['tokens_per_s']:>10,.0f}{share:>8}{of_side['cpu_s']:>8.1f}{of_side['peak_mib']:>8,.0f} MiB"
        print(f"{side:<8}{figures}   {ratio_text}")
    print(f"first-step losses {'agree' if agree else 'DO NOT AGREE'} within {tolerance} of the value: {first}")
    return {"agree": agree, "tokens": tokens, "trained": trained, "device": ours["device"], "sides": summary}


def median_of(ratios: list[float]) -> str:
    """Formats the median, the least and the most of ratios."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"


# ------------------------------------------------------------------------------------------------- growth and the start
def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Measures how a step grows with rows, devices and vocabulary."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    found: dict[str, Any] = {"rows": {}, "devices": {}, "vocabulary": {}}
    vocab = SIZES[args.size][6]
    ours = Ours(args, config_of(args.size, args.slots))
    unit = make_rows(1, args.slots, vocab, 0)
    ours.step([unit])
    print("\nrows of a step, in microbatches of one: seconds, over those of one row")
    for rows in (1, 4, 16, 64):
        used = time.process_time()
        began = time.perf_counter()
        ours.step([unit] * rows)
        found["rows"][rows] = (time.perf_counter() - began, time.process_time() - used)
        clock, cpu = (found["rows"][rows][i] / found["rows"][1][i] for i in (0, 1))
        print(f"{rows:>8}{found['rows'][rows][0]:>10.2f} s{clock:>8.1f}x{cpu:>8.1f}x in CPU seconds")
    print(
        "\ndevices (fsdp) that the CPU is split into, 8 rows: seconds, CPU seconds, temporary and resident MiB of one"
    )
    eight = make_rows(8, args.slots, vocab, 1)
    for devices in [n for n in (1, 2, 4, 8) if n <= jax.device_count()]:
        split = Ours(args, config_of(args.size, args.slots), devices=devices)
        memory = split.accumulate_program(eight).memory_analysis()
        split.step([eight])
        used, began = time.process_time(), time.perf_counter()
        split.step([eight])
        took = time.perf_counter() - began, time.process_time() - used
        sizes = [x / 2**20 for x in (memory.temp_size_in_bytes, memory.argument_size_in_bytes)]
        found["devices"][devices] = (*took, *sizes)
        print(f"{devices:>8}{took[0]:>10.2f}{took[1]:>10.2f}{sizes[0]:>10.0f}{sizes[1]:>10.0f}")
    tokens = 4 * args.slots
    print(f"\nvocabulary, one layer: temporary MiB of {tokens} tokens; less the gradient; of all logits")
    for vocab in (32_768, 65_536, 131_072, 262_144):
        one = Ours(args, config_of(args.size, args.slots, vocab=vocab, layers=1))
        temporary = one.accumulate_program(make_rows(4, args.slots, vocab, 0)).memory_analysis().temp_size_in_bytes
        sizes = [x / 2**20 for x in (temporary, temporary - 4 * vocab * one.spec.d_model, 4 * vocab * tokens)]
        found["vocabulary"][vocab] = sizes
        print("".join([f"{vocab:>8}", *(f"{x:>10.0f}" for x in sizes)]))
    return found


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the first step of a process without a compilation cache."""
    import jax

    took: dict[str, float] = {}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        name = event.rpartition("/")[2]
        took[name] = took.get(name, 0.0) + duration_secs

    rows = make_rows(args.rows, args.slots, SIZES[args.size][6], 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    ours = Ours(args, config_of(args.size, args.slots))
    took.clear()
    began = time.perf_counter()
    ours.step([rows])
    whole = time.perf_counter() - began
    jax.monitoring.unregister_event_duration_listener(listen)
    began = time.perf_counter()
    ours.step([rows])
    again = time.perf_counter() - began
    xla = took["backend_compile_duration"]
    parts = {"trace": took["jaxpr_trace_duration"], "lower": took["jaxpr_to_mlir_module_duration"], "compile": xla}
    ratio = (whole - again) / xla
    print(f"\nfirst step, {args.rows} rows: " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()))
    print(f"{whole:.2f} s, of a later one's {again:.2f} s: what the start added is {ratio:.2f} of XLA's own time")
    return parts | {"whole": whole, "again": again, "ratio": ratio}


def main() -> int:
    """Runs the benchmark or one of its sides; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["peers", "growth", "start"])
    parser.add_argument("--rows", type=int, default=4, help="of a microbatch")
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--microbatches", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help=f"measured, after {WARM_UP} of warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="that our side splits a CPU into; they divide --rows")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    for internal in ("--side", "--folder", "--out"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        if args.side == "model":
            write_model(args)
            result: dict[str, Any] = {}
        else:
            result = (run_ours if args.side == "ours" else run_torch)(args, steps_of(args))
        Path(args.out).write_text(json.dumps(result))
        return 0
    figures: dict[str, Any] = {"bench": "step", "cpus": os.cpu_count()}
    figures |= {k: v for k, v in vars(args).items() if k not in ("side", "folder", "out")}
    for part in args.parts:
        figures[part] = {"peers": peers, "growth": growth, "start": start}[part](args)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
