"""Training speed and memory on a CPU: this project against TRL's SFTTrainer, paired in one run.

Both sides train the same Llama from the same weights on the same chats, with the same template, trained tokens, maximum
length, AdamW, float32 and number of samples a step. The chats are the demo's (demo/make_data.py), which are short, or
with `--lengths=long` as many of them on end as make lengths like those of real chats: log-normal, a median of 245
tokens, up to 4,096. Each run has a process of its own; the
sides take turns, round after round, so that a machine's slow minutes strike both. A pair is one round.

    python bench/train_cpu.py                       # 10m, 3 rounds of 16 steps of 64 samples: about 20 minutes
    python bench/train_cpu.py --size=1m --rounds=5
    python bench/train_cpu.py --lengths=long --batch=32 --steps=8 --per_device=8
    JAX_NUM_CPU_DEVICES=2 python bench/train_cpu.py   # our side splits the CPU into two devices
    python bench/train_cpu.py --samplers=random,batch_rebalance --per_device=16

It needs the peer: pip install -e '.[bench]' -c constraints/py311.txt

TRL runs padded, as without FlashAttention its packing lets documents see each other, and with what a competent user
would choose on a CPU: no gradient checkpointing, no bf16, the fused optimizer, and the per-device batch that is
fastest among a few (tried first, unmeasured). torch's threads wait passively (OMP_WAIT_POLICY; yours counts where you
set one): spinning, they hold each other up on a machine that others use. It is measured with three samplers, its
`train_sampling_strategy`:
  random           its default: microbatches are samples in the order they are drawn in
  group_by_length  alike lengths beside each other: steps are no longer random samples of the data
  batch_rebalance  sorted within a step: each step holds the same samples, with little padding
Our side starts in huge pages, as `mice` does, and TRL as a script does.
The order of the data is arranged so that step i holds the same samples on both sides (but for group_by_length).

The figures: tokens/s are real tokens (padding is none) over the wall clock of whole steps, data and update included,
on both sides from the end of one step to the end of the next. Left out on all sides are the first WARM_UP steps and
those in which this project compiled a shape (it says how many, and the seconds that compiling took). "real" is the
share of computed slots that held a token. peak is VmHWM of the whole process (with a checkpoint saved at its end),
growth what of it came after the imports, since the runtimes differ. ratio is ours over theirs, by pair: median
(least, most). On a machine that others use too, read the ratios only.
The losses of the first step must agree to 1e-3: same weights, same samples, same trained tokens.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does without.

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
MEAN_LOG, SPREAD_LOG = 5.5, 0.9  # of long chats' tokens
LEARNING_RATE = 1e-3
OURS = "ours"
SAMPLERS = ("random", "group_by_length", "batch_rebalance")
PER_DEVICE = (4, 8, 16, 32)  # tried for the peer
CALIBRATION_STEPS = 3  # of each, the first unmeasured
LOSS_TOLERANCE = 1e-3
# hidden, MLP, layers, query heads, key heads
SIZES = {"1m": (128, 384, 4, 4, 2), "10m": (256, 1024, 10, 4, 2), "60m": (512, 1792, 16, 8, 4)}
# The demo's template, with the tags by which both sides know what is trained.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def main() -> int:
    args = parse_args()
    if args.task:
        TASKS[args.task](args)
        return 0
    if missing := [m for m in ("torch", "trl", "datasets") if importlib.util.find_spec(m) is None]:
        pins = "py311" if sys.version_info < (3, 12) else "py312"
        mend = f"pip install -e '.[bench]' -c constraints/{pins}.txt"
        print(f"error: {', '.join(missing)} not installed, which this measures against: {mend}", file=sys.stderr)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help=f"steps a run, of which {WARM_UP} are warm-up")
    parser.add_argument("--batch", type=int, default=64, help="samples a step")
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
    tried = spawn(args, "calibrate", sampler)
    print(f"{sampler}, tokens/s by per-device batch: {tried['tokens_per_s']}", file=sys.stderr)
    return tried["fastest"]


def spawn(args: argparse.Namespace, task: str, sampler: str = "", per_device: int = 0) -> dict[str, Any]:
    """Runs one task in a process of its own and returns what it measured."""
    out = Path(args.folder) / "result.json"
    out.unlink(missing_ok=True)
    names = ("size", "steps", "batch", "lengths", "folder", "number")
    command = [sys.executable, str(Path(__file__).resolve()), f"--task={task}", f"--out={out}", f"--sampler={sampler}"]
    command += [f"--{n}={getattr(args, n)}" for n in names] + [f"--per_device={per_device}"]
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": f"{args.folder}/hf", "TQDM_DISABLE": "1"}
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # it may ask for more devices than one
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | kept | quiet | {"PYTHONPATH": str(ROOT)}
    if task == "ours":
        environment = xla_flags.HUGE_PAGES_ENV | environment  # as `mice` starts; a script of the peer's does not
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(f"{task} {sampler}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done.returncode or not out.exists():
        sys.exit(f"the {task} of {sampler or 'both sides'} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


# ------------------------------------------------------------------------------------------------ what both sides get
def setup(args: argparse.Namespace) -> None:
    """Leaves `model` (weights, tokenizer, template), ours.jsonl and, in the order our steps take them, trl.jsonl."""
    import numpy as np

    from mice_jax.data.mixture import Mixture, PhasePools, Pool

    folder, count = Path(args.folder), args.steps * args.batch
    subprocess.run([sys.executable, str(ROOT / "demo/make_data.py"), str(folder / "data")], check=True)
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
    """So many chats, each of the turns of as many samples as come nearest to a length that is drawn."""
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
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_model(args: argparse.Namespace, init: Path, out: Path) -> None:
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
    """Our side's run: `arg` is folder,batch,lengths; every choice of speed is left to "auto"."""
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
    import jax

    from mice_jax import train

    imported = memory_mib("VmRSS")
    workdir = Path(args.folder) / f"run{args.number}"
    compiled: list[tuple[int, float]] = []  # the step during which it happened, seconds

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
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ----------------------------------------------------------------------------------------------------------- the peer
def run_trl(args: argparse.Namespace) -> None:
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import trl  # noqa: F401

    imported = memory_mib("VmRSS")
    result = train_trl(args, args.per_device, args.steps)
    write_result(args, result | {"compiled_in": []} | peak(imported))


def calibrate(args: argparse.Namespace) -> None:
    """Tokens/s of each per-device batch, over a few steps; the fastest."""
    speeds = {}
    for per_device in (n for n in PER_DEVICE if args.batch % n == 0):
        run = train_trl(args, per_device, CALIBRATION_STEPS)
        speeds[per_device] = sum(run["tokens"][1:]) / sum(run["seconds"][1:])
    fastest = max(speeds, key=lambda n: speeds[n])
    write_result(args, {"fastest": fastest, "tokens_per_s": {n: round(s) for n, s in speeds.items()}})


def train_trl(args: argparse.Namespace, per_device: int, steps: int) -> dict[str, Any]:
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
        logging_first_step=True,  # the loss that is compared; the step is warm-up
        save_strategy="no" if steps < args.steps else "steps",  # one checkpoint at the end, as we do
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
    """The chats in the order our steps take them; batch_rebalance shuffles by a seed of its own, which is undone."""
    import torch
    from datasets import Dataset

    lines = (Path(args.folder) / "trl.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line) for line in lines]
    if args.sampler == "batch_rebalance":
        shuffled = torch.randperm(len(chats), generator=torch.Generator().manual_seed(42)).tolist()
        chats = [chat for _, chat in sorted(zip(shuffled, chats, strict=True), key=lambda pair: pair[0])]
    return Dataset.from_list(chats)


def tokens_seen(trainer: Any) -> int:
    return int(trainer._total_train_tokens)  # counted by the attention mask, as it does for its own log


def stamp_steps(on_end: Callable[[], Any]) -> Any:
    from transformers import TrainerCallback

    class Stamp(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            on_end()

    return Stamp()


# ---------------------------------------------------------------------------------------------------------- measuring
def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def peak(imported: float) -> dict[str, float]:
    most = memory_mib("VmHWM")
    return {"peak_mib": most, "growth_mib": most - imported}


def write_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    Path(args.out).write_text(json.dumps(result))


def speed(run: dict[str, Any], left_out: set[int]) -> float:
    """Real tokens/s over the steps that are measured."""
    steps = [i for i in range(len(run["seconds"])) if i >= WARM_UP and i + 1 not in left_out]
    assert steps, "every step compiled something: give more --steps"
    return sum(run["tokens"][i] for i in steps) / sum(run["seconds"][i] for i in steps)


def speeds_of(round_: dict[str, Any]) -> dict[str, float]:
    left_out = set(round_[OURS]["compiled_in"])
    return {side: speed(run, left_out) for side, run in round_.items()}


def one_line(round_: dict[str, Any]) -> str:
    return ", ".join(f"{side} {s:,.0f} tokens/s" for side, s in speeds_of(round_).items())


def report(args: argparse.Namespace, per_device: dict[str, int], rounds: list[dict[str, Any]]) -> None:
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
    same = [s for s in args.samplers if s != "group_by_length"]  # whose first step holds the same samples
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
