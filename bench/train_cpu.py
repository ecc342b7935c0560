"""Measures training speed and memory on a CPU against TRL's SFTTrainer, paired in one run.

Both sides train the same Llama from the same weights on the same chats, with the same template, trained tokens, maximum
length, AdamW, float32 and number of samples per step. The short chats are those of bench/documentation_chats.py.
With `--lengths=long`, several of them are joined, so that lengths are like those of real chats: log-normal, with a
median of 245 tokens, up to 4,096. Each run is a separate process. The sides take turns, round after round, so that
slow minutes of the machine affect both. A pair is one round.

    python bench/train_cpu.py                       # 10m, 3 rounds of 16 steps of 64 samples: about 20 minutes
    python bench/train_cpu.py --size=1m --rounds=5
    python bench/train_cpu.py --lengths=long --batch=32 --steps=8 --per_device=8
    JAX_NUM_CPU_DEVICES=2 python bench/train_cpu.py   # our side splits the CPU into two devices
    python bench/train_cpu.py --samplers=random,batch_rebalance --per_device=16

It needs the peer: pip install -e '.[bench]' -c constraints/py311.txt

TRL runs with padding, because without FlashAttention its packing lets documents attend to each other. It has the
settings that a competent user would choose on a CPU: no gradient checkpointing, no bf16, the fused optimizer, and the
fastest of a few per-device batches (tried first, unmeasured). torch's threads wait passively, unless you set
OMP_WAIT_POLICY, because spinning threads delay each other on a shared machine. TRL is measured with three samplers
(`train_sampling_strategy`):
  random           its default: microbatches hold samples in the order in which they are drawn
  group_by_length  similar lengths are grouped, so that steps are no longer random samples of the data
  batch_rebalance  samples are sorted within a step, which holds the same samples with little padding
Our side starts with huge pages, as `mice` does, and TRL starts as a script does.
The order of the data is arranged so that step i holds the same samples on both sides (except for group_by_length).

tokens/s count real tokens (no padding) over the wall-clock time of whole steps, including data and update, from the end
of one step to the end of the next. The first WARM_UP steps, and those in which this project compiled a shape, are left
out on all sides (their number and the compile seconds are printed). "real" is the fraction of computed slots that hold
a token. peak is VmHWM of the whole process (with a checkpoint saved at its end), and growth is its part after the
imports, since the runtimes differ. ratio is ours over theirs, by pair: median (least, most). On a shared machine, only
the ratios are reliable. The losses of the first step must agree to 1e-3, since weights, samples and trained tokens are
the same.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mice_jax.config import Config, Phase, Source
from mice_jax.runtime import xla_flags

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3
MAX_LENGTH = {"demo": 1024, "long": 4096}
MEAN_LOG, SPREAD_LOG = 5.5, 0.9  # log-normal distribution of the lengths of long chats, in tokens
LEARNING_RATE = 1e-3
OURS = "ours"
SAMPLERS = ("random", "group_by_length", "batch_rebalance")
PER_DEVICE = (4, 8, 16, 32)  # per-device batches that are tried for the peer
CALIBRATION_STEPS = 3  # steps of each per-device batch; the first is not measured
LOSS_TOLERANCE = 1e-3
# Each size has d_model, d_ff, layers, query heads and key heads.
SIZES = {"1m": (128, 384, 4, 4, 2), "10m": (256, 1024, 10, 4, 2), "60m": (512, 1792, 16, 8, 4)}
# The template is that of the chats, with the tags that define the trained tokens for both sides.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def main() -> int:
    """Runs the benchmark or one of its tasks; returns the exit code."""
    args = parse_args()
    if args.task:
        TASKS[args.task](args)
        return 0
    if missing := [m for m in ("torch", "trl", "datasets") if importlib.util.find_spec(m) is None]:
        pins = "py311" if sys.version_info < (3, 12) else "py312"
        install = f"pip install -e '.[bench]' -c constraints/{pins}.txt"
        print(f"error: the peers {', '.join(missing)} are not installed: {install}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        spawn(args, "setup")
        per_device = {s: args.per_device or calibrated(args, s) for s in args.samplers}
        rounds = []
        for number in range(args.rounds):
            sides = [OURS, *args.samplers]
            args.number = number
            rounds.append({s: spawn(args, "ours" if s == OURS else "trl", s, per_device.get(s, 0)) for s in sides})
            print(f"round {number + 1}: {one_line(rounds[-1])}", file=sys.stderr)
    report(args, per_device, rounds)
    return 0


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help=f"steps a run, of which {WARM_UP} are warm-up")
    parser.add_argument("--batch", type=int, default=64, help="samples per step")
    parser.add_argument("--lengths", choices=MAX_LENGTH, default="demo", help="of the chats")
    parser.add_argument("--samplers", type=lambda text: text.split(","), default=list(SAMPLERS))
    parser.add_argument("--per_device", type=int, default=0, help="the peer's; 0 = the fastest of a few")
    for internal in ("--task", "--folder", "--sampler", "--out"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.samplers) - set(SAMPLERS):
        parser.error(f"--samplers has {', '.join(sorted(unknown))}; there are {', '.join(SAMPLERS)}")
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps={args.steps} leaves nothing to measure: give at least {WARM_UP + 2}")
    if args.per_device and args.batch % args.per_device:
        parser.error(f"--per_device={args.per_device} does not divide --batch={args.batch}")
    return args


def calibrated(args: argparse.Namespace, sampler: str) -> int:
    """Returns the peer's fastest per-device batch with a sampler."""
    tried = spawn(args, "calibrate", sampler)
    print(f"{sampler}, tokens/s by per-device batch: {tried['tokens_per_s']}", file=sys.stderr)
    return tried["fastest"]


def spawn(args: argparse.Namespace, task: str, sampler: str = "", per_device: int = 0) -> dict[str, Any]:
    """Runs one task in a separate process and returns what it measured."""
    out = Path(args.folder) / "result.json"
    out.unlink(missing_ok=True)
    names = ("size", "steps", "batch", "lengths", "folder", "number")
    command = [sys.executable, str(Path(__file__).resolve()), f"--task={task}", f"--out={out}", f"--sampler={sampler}"]
    command += [f"--{n}={getattr(args, n)}" for n in names] + [f"--per_device={per_device}"]
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": f"{args.folder}/hf", "TQDM_DISABLE": "1"}
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # XLA_FLAGS may set a number of devices
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | kept | quiet | {"PYTHONPATH": str(ROOT)}
    if task == "ours":
        environment = (
            xla_flags.HUGE_PAGES_ENV | environment
        )  # `mice` starts with huge pages, a script of the peer does not
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(f"{task} {sampler}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done.returncode or not out.exists():
        sys.exit(f"the {task} of {sampler or 'both sides'} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


# ------------------------------------------------------------------------------------------------ what both sides get
def setup(args: argparse.Namespace) -> None:
    """Writes `model` (weights, tokenizer, template), ours.jsonl and, in the order of our steps, trl.jsonl."""
    import numpy as np

    from mice_jax.data.mixture import Mixture, PhasePools, Pool

    folder, count = Path(args.folder), args.steps * args.batch
    subprocess.run([sys.executable, str(ROOT / "bench/documentation_chats.py"), str(folder / "data")], check=True)
    files = sorted(f for f in (folder / "data").glob("*.jsonl") if "heldout" not in f.name)
    samples = [line for f in files for line in f.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(samples)
    if args.lengths == "long":
        samples = joined(samples, count, folder / "data" / "init")
    samples = list(itertools.islice(itertools.cycle(samples), count))
    pools = [PhasePools("stacked", 1.0, (Pool(np.arange(count)),))]
    mixture = Mixture(pools, batch_size=args.batch, seed=0)
    order = np.concatenate([mixture.step(i).samples for i in range(args.steps)])
    write_lines(folder / "ours.jsonl", samples)
    write_lines(folder / "trl.jsonl", [samples[i] for i in order])
    write_model(args, folder / "data" / "init", folder / "model")
    write_result(args, {"samples": count})


def joined(samples: list[str], count: int, tokenizer: Path) -> list[str]:
    """Makes `count` chats by joining the turns of samples until the chat is closest to a drawn length."""
    import numpy as np
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    chats = [[m for m in json.loads(line)["messages"] if m["role"] != "system"] for line in samples]
    sizes = [len(ids) for ids in encode.apply_chat_template(chats, tokenize=True, return_dict=False)]
    lengths = np.clip(np.random.default_rng(0).lognormal(MEAN_LOG, SPREAD_LOG, count), 16, MAX_LENGTH["long"] - 1)
    source, found = itertools.cycle(zip(chats, sizes, strict=True)), []
    for length in lengths:
        messages, size = next(source)
        for more, tokens in source:
            if size + tokens / 2 > length or size + tokens > MAX_LENGTH["long"]:
                break
            messages, size = messages + more, size + tokens
        found.append(json.dumps({"messages": messages}))
    return found


def write_lines(path: Path, lines: list[str]) -> None:
    """Writes lines to a file."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_model(args: argparse.Namespace, init: Path, out: Path) -> None:
    """Writes random weights and the tokenizer with the benchmark's template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(init)
    chats = [json.loads(line)["messages"] for line in (out.parent / "ours.jsonl").read_text().splitlines()[:200]]
    before = tokenizer.apply_chat_template(chats, tokenize=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = MAX_LENGTH[args.lengths]
    assert before == tokenizer.apply_chat_template(chats, tokenize=False), "the tags change the text"
    tokenizer.save_pretrained(out)
    hidden, mlp, layers, heads, kv_heads = SIZES[args.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((init / "config.json").read_text())["vocab_size"],
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_LENGTH[args.lengths],
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(out)


# ----------------------------------------------------------------------------------------------------------- our side
def get_config(arg: str = "") -> Config:
    """Returns the config of our side; `arg` is folder,batch,lengths, and every setting that affects speed is "auto"."""
    folder, batch, lengths = arg.rsplit(",", 2)
    c = Config()
    c.model.init_from = f"{folder}/model"
    c.model.compute_dtype = "float32"
    c.data.max_length = MAX_LENGTH[lengths]
    c.data.overlong = "error"
    c.data.phases = [Phase(name="stacked", sources=[Source(path=f"{folder}/ours.jsonl")])]
    c.data.cache_dir = f"{folder}/cache"
    c.optim.batch_size = int(batch)
    c.optim.learning_rate = LEARNING_RATE
    c.checkpoint.every_samples = 0
    return c


def run_ours(args: argparse.Namespace) -> None:
    """Measures our side in this process."""
    import jax

    from mice_jax import train

    imported = memory_mib("VmRSS")
    workdir = Path(args.folder) / f"run{args.number}"
    compiled: list[tuple[int, float]] = []  # the step and the seconds of each compilation

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append((1 + len(metrics_of(workdir)), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    code = train.main(
        [f"--config={Path(__file__).resolve()}:{args.folder},{args.batch},{args.lengths}", f"--workdir={workdir}"]
    )
    assert code == 0, f"train exited with {code}"
    lines = metrics_of(workdir)
    total = [line["tokens"] for line in lines]
    slots = sum((b - a) / m["slot_efficiency"] for a, b, m in zip([0, *total], total, lines, strict=False))
    result = {
        "tokens": [b - a for a, b in itertools.pairwise([0, *total])],
        "seconds": [line["step_time_s"] for line in lines],
        "first_loss": lines[0]["loss"],
        "slots": slots,
        "compiled_in": sorted({step for step, _ in compiled}),
        "compile_s": sum(seconds for _, seconds in compiled),
        "resolved": json.loads((workdir / "config.json").read_text())["resolved"],
    }
    write_result(args, result | peak(imported))


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metrics of the steps that a run has done so far."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["step"]]


# ----------------------------------------------------------------------------------------------------------- the peer
def run_trl(args: argparse.Namespace) -> None:
    """Measures TRL in this process."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import trl  # noqa: F401

    imported = memory_mib("VmRSS")
    result = train_trl(args, args.per_device, args.steps)
    write_result(args, result | {"compiled_in": []} | peak(imported))


def calibrate(args: argparse.Namespace) -> None:
    """Measures the tokens/s of each per-device batch over a few steps, and writes the fastest batch."""
    speeds = {}
    for per_device in (n for n in PER_DEVICE if args.batch % n == 0):
        run = train_trl(args, per_device, CALIBRATION_STEPS)
        speeds[per_device] = sum(run["tokens"][1:]) / sum(run["seconds"][1:])
    fastest = max(speeds, key=lambda n: speeds[n])
    write_result(args, {"fastest": fastest, "tokens_per_s": {n: round(s) for n, s in speeds.items()}})


def train_trl(args: argparse.Namespace, per_device: int, steps: int) -> dict[str, Any]:
    """Trains with TRL for some steps; returns what was measured."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    folder = Path(args.folder)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=args.batch // per_device,
        train_sampling_strategy="sequential" if args.sampler == "random" else args.sampler,  # the file is shuffled
        max_length=MAX_LENGTH[args.lengths],
        assistant_only_loss=True,
        packing=False,
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        logging_first_step=True,  # the loss of the first step is compared
        save_strategy="no" if steps < args.steps else "steps",  # saves one checkpoint at the end, as our side does
        save_steps=steps,
        report_to="none",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = SFTTrainer(model, config, train_dataset=trl_dataset(args), processing_class=tokenizer)
    stamps, seen, slots = [time.perf_counter()], [0], [0]
    trainer.add_callback(stamp_steps(lambda: (stamps.append(time.perf_counter()), seen.append(tokens_seen(trainer)))))
    collate = trainer.data_collator

    def counted(samples: list[Any]) -> Any:
        batch = collate(samples)
        slots[0] += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counted
    trainer.train()
    assert len(stamps) == steps + 1, f"{len(stamps) - 1} steps instead of {steps}"
    return {
        "tokens": [b - a for a, b in itertools.pairwise(seen)],
        "seconds": [b - a for a, b in itertools.pairwise(stamps)],
        "first_loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line),
        "slots": slots[0],
    }


def trl_dataset(args: argparse.Namespace) -> Any:
    """Returns the chats in the order of our steps, and inverts the shuffle that batch_rebalance makes with its seed."""
    import torch
    from datasets import Dataset

    lines = (Path(args.folder) / "trl.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line) for line in lines]
    if args.sampler == "batch_rebalance":
        shuffled = torch.randperm(len(chats), generator=torch.Generator().manual_seed(42)).tolist()
        chats = [chat for _, chat in sorted(zip(shuffled, chats, strict=True), key=lambda pair: pair[0])]
    return Dataset.from_list(chats)


def tokens_seen(trainer: Any) -> int:
    """Returns the tokens that TRL has trained on."""
    return int(trainer._total_train_tokens)  # TRL counts them by the attention mask for its own log


def stamp_steps(on_end: Callable[[], Any]) -> Any:
    """Returns a callback that calls `on_end` at the end of each step."""
    from transformers import TrainerCallback

    class Stamp(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            on_end()

    return Stamp()


# ---------------------------------------------------------------------------------------------------------- measuring
def memory_mib(field: str) -> float:
    """Returns VmRSS (current) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def peak(imported: float) -> dict[str, float]:
    """Returns the peak memory of this process, and its growth after the imports, in MiB."""
    most = memory_mib("VmHWM")
    return {"peak_mib": most, "growth_mib": most - imported}


def write_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes the result of a task for the parent process."""
    Path(args.out).write_text(json.dumps(result))


def speed(run: dict[str, Any], left_out: set[int]) -> float:
    """Returns real tokens/s over the steps that are measured."""
    steps = [i for i in range(len(run["seconds"])) if i >= WARM_UP and i + 1 not in left_out]
    assert steps, "every step compiled something: give more --steps"
    return sum(run["tokens"][i] for i in steps) / sum(run["seconds"][i] for i in steps)


def speeds_of(round_: dict[str, Any]) -> dict[str, float]:
    """Returns the tokens/s of each side in a round."""
    left_out = set(round_[OURS]["compiled_in"])
    return {side: speed(run, left_out) for side, run in round_.items()}


def one_line(round_: dict[str, Any]) -> str:
    """Formats the tokens/s of each side in a round."""
    return ", ".join(f"{side} {s:,.0f} tokens/s" for side, s in speeds_of(round_).items())


def report(args: argparse.Namespace, per_device: dict[str, int], rounds: list[dict[str, Any]]) -> None:
    """Prints the table and the line of JSON."""
    speeds = [speeds_of(r) for r in rounds]
    first = {side: run["first_loss"] for side, run in rounds[0].items()}
    summary = {}
    for side in [OURS, *args.samplers]:
        runs = [r[side] for r in rounds]
        ratios = [s[OURS] / s[side] for s in speeds]
        summary[side] = {
            "tokens_per_s": [round(s[side], 1) for s in speeds],
            "ratios": [round(x, 3) for x in ratios],
            "ratio": round(statistics.median(ratios), 3),
            "real": round(sum(runs[0]["tokens"]) / runs[0]["slots"], 4),
            "peak_mib": round(statistics.median(r["peak_mib"] for r in runs)),
            "growth_mib": round(statistics.median(r["growth_mib"] for r in runs)),
            "first_loss": first[side],
            "per_device": per_device.get(side, 0),
        }
    same = [s for s in args.samplers if s != "group_by_length"]  # their first step holds the same samples as ours
    agree = all(abs(first[s] - first[OURS]) <= LOSS_TOLERANCE for s in same)
    ours = [r[OURS] for r in rounds]
    left_out = [len([s for s in r["compiled_in"] if s > WARM_UP]) for r in ours]
    print_table(summary)
    print(f"ours resolved: {ours[0]['resolved']}")
    print(f"compiling took {statistics.median(r['compile_s'] for r in ours):.1f} s, steps left out for it: {left_out}")
    print(f"first-step losses {'agree' if agree else 'DO NOT AGREE'} within {LOSS_TOLERANCE}")
    settings = {n: getattr(args, n) for n in ("size", "lengths", "rounds", "steps", "batch")} | {"cpus": os.cpu_count()}
    print(json.dumps({"bench": "train_cpu", **settings, "first_losses_agree": agree, "sides": summary}))


def print_table(summary: dict[str, dict[str, Any]]) -> None:
    """Prints the table of all sides."""
    print(f"{'':<18}{'tokens/s':>10}{'real':>7}{'peak':>11}{'growth':>11}{'first loss':>12}   ours / theirs")
    for side, s in summary.items():
        name = side if side == OURS else f"trl {side}"
        ratio = "" if side == OURS else f"{s['ratio']:.2f} ({min(s['ratios']):.2f}, {max(s['ratios']):.2f})"
        memory = f"{s['peak_mib']:>7,} MiB{s['growth_mib']:>7,} MiB"
        tokens = statistics.median(s["tokens_per_s"])
        print(f"{name:<20}{tokens:>8,.0f}{s['real']:>7.2f}{memory:>22}{s['first_loss']:>12.5f}   {ratio}")


TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "setup": setup,
    "calibrate": calibrate,
    "ours": run_ours,
    "trl": run_trl,
}

if __name__ == "__main__":
    sys.exit(main())
