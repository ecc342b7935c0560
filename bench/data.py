"""Measures the data path: tokenising, planning, loading and the start of a run, against peers where they exist.

    python bench/data.py                                  # all parts, small: under 5 minutes on 2 cores
    python bench/data.py --parts=tokenise --chats=20000 --rounds=5
    python bench/data.py --parts=planning,scale           # a minute, without jax, datasets or torch
    python bench/data.py --parts=warm --warm=1000000      # needs 10 GB of disk

Peers (a part or a line whose peer is not installed is skipped with a message):
    pip install -e '.[bench]' -c constraints/py311.txt    # datasets, and torch for the next
    pip install --no-deps instructlab-training && pip install numba

The parts, and what both sides have in common:

tokenise  A JSONL file of chats becomes Arrow on disk, by N processes of one tokenizer thread each. The chats are
          synthetic: log-normal lengths (mean of log 6.2 tokens, sigma 0.9), one to four exchanges, words of syllables
          drawn by Zipf's law, and a byte-level BPE trained on them. The time is from the file to the finished Arrow
          files, in a fresh process with an empty cache. It excludes imports and loading the tokenizer, and includes
          starting the processes (ours come from a fresh server, `datasets` forks). Ids and masks are compared sample by
          sample before any figure.
            mice_jax          build_store: ids and mask, and also checks, hashes and places of every record
            datasets          load_dataset("json") and map: ids and mask by apply_chat_template with
                              return_assistant_tokens_mask; one batch per call, compact integer types, no other columns
            datasets, one by one  the same for one chat at a time, which is how trainers such as TRL map theirs
            datasets, ids     the same without the mask: the text by apply_chat_template, then the tokenizer called on
                              the batch. It does less than our side and shows the cost of the mask
planning  Every step of an epoch is planned by StepSource.plan, as the loader calls it, and by the packer of
          instructlab-training (LPT, compiled by numba, warmed up first), for 8 devices and steps of 3,840 and 128
          samples. `1 row` is 4,096 slots per device for both. `own choice` is LPT's default of 60,000 tokens per
          device, and for us the number of rows of 4,096 that a step fills, up to that limit. Speed is CPU time from
          the lengths to lists of samples. For `one device` LPT is called once, as each of its processes does (ours
          plans all devices and lists the rows of one); for `all devices` it is called for each. Efficiency is real
          tokens over computed slots. LPT's minibatches have no padding, but its devices wait for the fullest one, so a
          minibatch computes the number of devices times the fullest one's tokens. `fixed` is best-fit-decreasing into
          rows of 4,096, rounded up to whole microbatches, which is the limit of a planner with one shape; its speed is
          not measured. LPT sorts a step by length before it cuts it into minibatches; our microbatches are comparable
          samples of the step.
scale     Plans all steps of an epoch of a million samples in steps of 3,840: seconds, and peak memory of the process.
loader    A consumer takes 200,000 tokens/s, with one host process and 8 devices. The figure is the fraction of time
          that it waits, without the first step (the start). A second consumer only takes steps, which gives the
          loader's top speed.
warm      From a store in the cache to the arrays of the first step: build_store (with the source's cached digest),
          Corpus, Mixture, plan and arrays, in a fresh process, without imports and tokenizer. The tokens are synthetic;
          everything else is written and opened by the real code, with a warm page cache. `digest` is the additional
          time to hash the source if its digest is not cached.

Figures are medians of rounds in which the sides take turns; ratios are ours over theirs by round, median (least, most).
On a shared machine, the ratio of CPU times is more reliable for parts that run in one process.
"""

# pyright: reportMissingImports=false
# Lint does not install the peers.

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 4096
NUM_DEVICES = 8
MEAN_LOG, SIGMA = 6.2, 0.9  # log-normal distribution of a sample's length in tokens
MEAN_LENGTH = 723  # mean of these lengths, clipped to 16..4096
PEER_BUDGET = 60_000  # tokens per device, the default of the peer's planner
VOCABULARY = 32_000
WORDS = 60_000  # number of different words
# This is the Zipf-Mandelbrot law: the most frequent word is about one in twenty, as in English.
ZIPF = np.cumsum(1 / (np.arange(WORDS) + 3.7) ** 1.05)
ZIPF /= ZIPF[-1]
TRAIN_CHATS = 3_000  # number of texts that the tokenizer is trained on
STEP_SAMPLES = (3840, 128)
CONSUMED_PER_S = 200_000  # tokens/s of the paced consumer
LOADER_STEP = 128  # samples of a step
FAST_EPOCHS = 20  # epochs of the fast consumer
# The template is that of many chat models, with the tags that define the trained tokens for both sides.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OURS, LPT, FIXED = "mice_jax", "LPT", "fixed"
PEER, PEER_PLAIN, PEER_IDS = "datasets", "datasets, one by one", "datasets, ids"


def main() -> int:
    """Runs the benchmark or one of its tasks; returns the exit code."""
    args = parse_args()
    if args.task:
        TASKS[args.task](args)
        return 0
    results = []
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        args.folder = folder
        for part in args.parts:
            started = time.perf_counter()
            results += PARTS[part](args)
            print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print_table(results)
    settings = {n: getattr(args, n) for n in ("chats", "rounds", "samples", "scale", "warm")}
    print(
        json.dumps({"bench": "data", **settings, "cpus": os.cpu_count(), "load": os.getloadavg(), "results": results})
    )
    return 0


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=5_000, help="that are tokenised and loaded")
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--samples", type=int, default=38_400, help="planned in each round")
    parser.add_argument("--scale", type=int, default=1_000_000, help="samples")
    parser.add_argument("--warm", type=int, default=100_000, help="samples of the warm store")
    parser.add_argument("--tmp", help="folder for what is written, the system's own by default")
    for internal in ("--task", "--folder", "--out", "--side"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.samples < max(STEP_SAMPLES) or args.rounds < 1 or args.chats < 2 * LOADER_STEP:
        parser.error(f"give at least {max(STEP_SAMPLES)} samples, {2 * LOADER_STEP} chats and one round")
    return args


def spawn(args: argparse.Namespace, task: str, **settings: Any) -> dict[str, Any]:
    """Runs one task in a separate process and returns what it measured."""
    out = Path(args.folder) / "result.json"
    out.unlink(missing_ok=True)
    names = ("chats", "scale", "warm", "folder")
    given = {n: getattr(args, n) for n in names} | settings | {"task": task, "out": out}
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": f"{args.folder}/hf", "TQDM_DISABLE": "1"}
    quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(Path(__file__).resolve()), *(f"--{k}={v}" for k, v in given.items())]
    done = subprocess.run(command, env=os.environ | quiet | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode or not out.exists():
        print(f"the task {task} {settings} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
        return {}
    return json.loads(out.read_text())


# ------------------------------------------------------------------------------------------------------------- inputs
def draw_lengths(count: int, seed: int) -> np.ndarray:
    """Draws the lengths of samples, int64 [count]."""
    drawn = np.random.default_rng(seed).lognormal(MEAN_LOG, SIGMA, count)
    return np.clip(np.round(drawn), 16, MAX_LENGTH).astype(np.int64)


def make_chats(args: argparse.Namespace) -> None:
    """Writes chats.jsonl and `tokenizer`."""
    folder, rng = Path(args.folder), np.random.default_rng(0)
    words = made_words(rng)
    tokenizer = trained_tokenizer([" ".join(draw_words(rng, words, 500)) for _ in range(TRAIN_CHATS)])
    tokenizer.save_pretrained(folder / "tokenizer")
    probe = " ".join(draw_words(rng, words, 20_000))
    tokens_per_word = len(tokenizer(probe)["input_ids"]) / 20_000
    tokens = 0
    with (folder / "chats.jsonl").open("w") as file:
        for length in draw_lengths(args.chats, seed=1):
            chat = made_chat(rng, draw_words(rng, words, max(4, int(length / tokens_per_word))))
            file.write(json.dumps({"messages": chat}) + "\n")
            tokens += int(length)
    write_result(args, {"vocabulary": len(tokenizer)})


def made_words(rng: np.random.Generator) -> np.ndarray:
    """Makes words of one to four syllables, of which the frequent ones are short."""
    onsets = ["", *"bcdfghlmnprstvw", "br", "ch", "cl", "pr", "sh", "st", "th", "tr"]
    ends = [
        v + c for v in ("a", "e", "i", "o", "u", "ea", "ou") for c in ("", "n", "r", "s", "t", "l", "nd", "st", "ng")
    ]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        count = 1 + min(3, int(rng.integers(1 + len(words) // 300) ** 0.3))
        words["".join(str(rng.choice(onsets)) + str(rng.choice(ends)) for _ in range(count))] = None
    return np.array(list(words))


def draw_words(rng: np.random.Generator, words: np.ndarray, count: int) -> list[str]:
    """Draws words of a text, some of them with punctuation or a capital."""
    drawn = words[np.searchsorted(ZIPF, rng.random(count))].tolist()
    for at in np.flatnonzero(rng.random(count) < 0.12).tolist():  # ends of sentences, clauses or paragraphs
        drawn[at] += str(rng.choice([".", ",", ",", ":", ".\n\n", "?", " 1", " (2)"]))
        if at + 1 < count:
            drawn[at + 1] = drawn[at + 1].capitalize()
    return drawn


def made_chat(rng: np.random.Generator, words: list[str]) -> list[dict[str, str]]:
    """Makes a chat, sometimes with a system message; questions are about a third as long as answers."""
    exchanges = min(int(rng.integers(1, 5)), max(1, len(words) // 40))
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.3 else []
    for part in np.array_split(np.arange(len(words)), exchanges):
        middle = int(part[0] + max(1, len(part) // 4))
        messages.append({"role": "user", "content": " ".join(words[part[0] : middle])})
        messages.append({"role": "assistant", "content": " ".join(words[middle : part[-1] + 1])})
    return messages


def trained_tokenizer(texts: list[str]) -> Any:
    """Trains a byte-level BPE on texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=10**9
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def need_chats(args: argparse.Namespace) -> None:
    """Makes the chats if they do not exist yet."""
    if not (Path(args.folder) / "chats.jsonl").exists():
        spawn(args, "make_chats")


# ------------------------------------------------------------------------------------------------------------ tokenise
def part_tokenise(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all sides of `tokenise`."""
    need_chats(args)
    sides = [OURS, PEER, PEER_PLAIN, PEER_IDS] if importlib.util.find_spec("datasets") else [OURS]
    if len(sides) == 1:
        print(
            "tokenise: datasets is not installed (pip install datasets), so only our side is measured", file=sys.stderr
        )
    results = []
    for workers in args.workers:
        rounds = []
        for number in range(args.rounds):
            turns = sides if number % 2 == 0 else sides[::-1]
            runs = {s: spawn(args, TOKENISERS[s], workers=workers, side=s) for s in turns}
            if not all(runs.values()):
                return results
            check_agreement(runs)
            rounds.append(runs)
        results += tokenise_results(workers, sides, rounds)
    return results


def tokenise_results(workers: int, sides: list[str], rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Computes speeds and ratios from the rounds of `tokenise`."""
    part, results = f"tokenise, {workers} {'process' if workers == 1 else 'processes'}", []
    for side in sides:
        runs = [r[side] for r in rounds]
        for unit in ("samples", "tokens"):
            speed = statistics.median(r[unit] / r["seconds"] for r in runs)
            results.append(result(part, f"{side}: {unit}/s", speed))
        if side != OURS:
            ratios = [r[side]["seconds"] / r[OURS]["seconds"] for r in rounds]
            target = None if side == PEER_IDS else 1.5
            results.append(ratio_result(part, f"speed, ours / {side}", ratios, target))
            if workers == 1:  # CPU time of our workers is unknown, since they are not children of this process
                ratios = [r[side]["cpu_s"] / r[OURS]["cpu_s"] for r in rounds]
                results.append(ratio_result(part, f"CPU time, {side} / ours", ratios, None))
    return results


def check_agreement(runs: dict[str, Any]) -> None:
    """Exits if the ids or the masks of the sides differ in any sample."""
    ids = {r["ids"] for r in runs.values()}
    masks = {r["masks"] for r in runs.values() if r["masks"]}
    if len(ids) > 1 or len(masks) > 1:
        sys.exit(f"ids or masks of the sides differ, so that there is nothing to compare: {runs}")


def tokenise_ours(args: argparse.Namespace) -> None:
    """Measures our side of `tokenise` in this process."""
    from mice_jax.data.store import build_store

    folder, encoder = Path(args.folder), our_encoder(args)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started, cpu = time.perf_counter(), cpu_seconds()
        store = build_store(
            str(folder / "chats.jsonl"),
            format="messages",
            encoder=encoder,
            skip_bad=False,
            cache_dir=Path(cache),
            workers=args.workers[0],
        )
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        samples = [store.sample(i) for i in range(len(store))]
        write_tokenised(args, seconds, cpu, [s[0] for s in samples], [s[1] for s in samples])


def our_encoder(args: argparse.Namespace) -> Any:
    """Loads the tokenizer of our side."""
    from mice_jax.data.chat import ChatEncoder
    from mice_jax.data.tokenizer import load_tokenizer

    return ChatEncoder(load_tokenizer(str(Path(args.folder) / "tokenizer")))


def tokenise_peer(args: argparse.Namespace) -> None:
    """Measures a peer of `tokenise` in this process."""
    import datasets
    from transformers import AutoTokenizer

    folder, masked, batched = Path(args.folder), args.side != PEER_IDS, args.side != PEER_PLAIN
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    columns: dict[str, Any] = {"input_ids": datasets.List(datasets.Value("int32"))}
    if masked:
        columns["assistant_masks"] = datasets.List(datasets.Value("int8"))
    workers = args.workers[0]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started, cpu = time.perf_counter(), cpu_seconds()
        data: Any = datasets.load_dataset(
            "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=cache
        )
        data = data.map(
            ids_and_mask if masked else ids_only,
            fn_kwargs={"tokenizer": tokenizer},
            batched=batched,
            batch_size=PEER_BATCH,
            remove_columns=data.column_names,
            features=datasets.Features(columns),
            num_proc=workers if workers > 1 else None,  # None maps in this process
        )
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        arrays = data.with_format("numpy")
        masks = list(arrays["assistant_masks"]) if masked else []
        write_tokenised(args, seconds, cpu, list(arrays["input_ids"]), masks)


PEER_BATCH = 200  # the default of 1,000 is equally fast


def ids_and_mask(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenizes chats with the mask of trained tokens."""
    done = tokenizer.apply_chat_template(
        batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return {"input_ids": done["input_ids"], "assistant_masks": done["assistant_masks"]}


def ids_only(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenizes chats without the mask of trained tokens."""
    texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
    return {"input_ids": tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]}


def write_tokenised(args: argparse.Namespace, seconds: float, cpu: float, ids: list[Any], masks: list[Any]) -> None:
    """Writes times, counts and digests of a side of `tokenise`."""
    tokens = sum(map(len, ids))
    digests = {"ids": digest(ids, np.int32), "masks": digest(masks, np.uint8)}
    write_result(args, {"seconds": seconds, "cpu_s": cpu, "samples": len(ids), "tokens": tokens, **digests})


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def digest(arrays: list[Any], dtype: Any) -> str:
    """Hashes the length and content of every sample."""
    import hashlib

    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(f"{len(array)} ".encode() + np.asarray(array, dtype).tobytes())
    return hashed.hexdigest() if arrays else ""


TOKENISERS = {OURS: "tokenise_ours"} | dict.fromkeys((PEER, PEER_PLAIN, PEER_IDS), "tokenise_peer")


# ------------------------------------------------------------------------------------------------------------ planning
def part_planning(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all planners."""
    lpt = lpt_packer()
    results = []
    for samples in STEP_SAMPLES:
        chosen = min(PEER_BUDGET // MAX_LENGTH, round(samples * MEAN_LENGTH / (MAX_LENGTH * NUM_DEVICES)))
        for what, rows, budget in (("1 row", 1, MAX_LENGTH), ("own choice", chosen, PEER_BUDGET)):
            runs = [
                planned(draw_lengths(args.samples, seed), rows, samples, budget, lpt, seed)
                for seed in range(args.rounds)
            ]
            results += planning_results(f"plan, {samples:,} a step, {what}", runs)
    return results


def lpt_packer() -> Callable[..., list[list[int]]] | None:
    """Imports the peer's packer from its file, since its package imports torch, deepspeed and more."""
    try:
        import numba  # noqa: F401

        distribution = importlib.metadata.distribution("instructlab-training")
    except (ImportError, importlib.metadata.PackageNotFoundError) as e:
        install = "pip install --no-deps instructlab-training && pip install numba"
        print(f"planning: {e}, so the peer is not measured: {install}", file=sys.stderr)
        return None
    path = str(distribution.locate_file("instructlab/training/batch_packer.py"))
    spec = importlib.util.spec_from_file_location("batch_packer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.batch_lengths_to_minibatches_lpt([100] * 64, MAX_LENGTH, NUM_DEVICES, 0)  # the first call compiles
    return module.batch_lengths_to_minibatches_lpt


class Lengths:
    """The part of a corpus that planning uses."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths


def step_source(corpus: Any, count: int, samples: int, rows: int, epochs: float = 1.0) -> Any:
    """Makes the steps of `count` samples, `samples` per step, in microbatches of `rows` rows per device."""
    from mice_jax.data.loader import StepSource
    from mice_jax.data.mixture import Mixture, PhasePools, Pool
    from mice_jax.data.packing import microbatch_shapes

    pools = [PhasePools("stacked", epochs, (Pool(np.arange(count)),))]
    return StepSource(
        corpus=corpus,
        mixture=Mixture(pools, batch_size=samples, seed=0),
        shapes=microbatch_shapes(MAX_LENGTH, rows_per_shard=rows),
        num_shards=NUM_DEVICES,
        shards=tuple(range(NUM_DEVICES)),
        loss_reduction="token",
        seed=0,
    )


def planned(
    lengths: np.ndarray, rows: int, samples: int, budget: int, lpt: Any, turn: int
) -> dict[str, tuple[list[float], float]]:
    """Measures samples/s (lists of one device, and of all devices) and slot efficiency of each planner."""

    def fresh() -> Any:
        source = step_source(Lengths(lengths), len(lengths), samples, rows)
        source.mixture.step(0)  # draws the epoch's order, which is not part of the time of either side
        return source

    fresh().plan(0)  # compiles the planner and fills the cache of layouts
    mixture = fresh().mixture
    numbers = range(len(lengths) // samples)
    steps = [lengths[mixture.step(i).samples] for i in numbers]
    tokens, count = sum(int(s.sum()) for s in steps), len(steps) * samples
    lists = [s.tolist() for s in steps]  # the peer's collator passes lists too
    sides: dict[str, Callable[[Any, int], Any]] = {OURS: lambda source, devices: our_lists(source, devices, numbers)}
    if lpt:
        sides[LPT] = lambda _, devices: [[lpt(step, budget, NUM_DEVICES, d) for d in range(devices)] for step in lists]
    speeds: dict[str, list[float]] = {side: [] for side in (OURS, FIXED, LPT)}
    made: dict[str, Any] = {}
    for devices in (1, NUM_DEVICES):
        for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            source = fresh()
            made.pop(side, None)
            gc.collect()  # garbage of the other side must not count as this side's time
            started = time.process_time()
            made[side] = sides[side](source, devices)
            speeds[side].append(count / (time.process_time() - started))
    source = fresh()
    slots = {OURS: sum(len(m.rows) * m.shape.slots for i in numbers for m in source.plan(i))}
    slots[FIXED] = sum(fixed(step, rows) for step in steps)
    if lpt:
        slots[LPT] = sum(lpt_slots(*of_step) for of_step in zip(lists, made[LPT], strict=True))
    return {side: (speeds[side], tokens / n) for side, n in slots.items()}


def our_lists(source: Any, devices: int, numbers: range) -> list[list[list[list[int]]]]:
    """Lists the samples of each row of the first devices, by step and microbatch."""
    return [[m.rows[: devices * m.shape.rows] for m in source.plan(i)] for i in numbers]


def lpt_slots(lengths: list[int], by_device: list[list[list[int]]]) -> int:
    """Counts the slots of LPT: the number of devices times the fullest one's tokens, summed over minibatches.

    A device without a sample gets -1, which stands for a sample of 5 tokens.
    """
    loads = [[sum(lengths[i] if i >= 0 else 5 for i in m) for m in device] for device in by_device]
    fullest = np.max(np.array(loads), axis=0)
    assert sum(i >= 0 for device in by_device for m in device for i in m) == len(lengths)
    return NUM_DEVICES * int(fullest.sum())


def fixed(lengths: np.ndarray, rows_per_device: int) -> int:
    """Counts the slots of best-fit-decreasing: a sample goes to the tightest row that fits it, else to a new one."""
    rooms: list[int] = []
    rows = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows += 1
            insort(rooms, MAX_LENGTH - length)
        else:
            insort(rooms, rooms.pop(at) - length)
    together = NUM_DEVICES * rows_per_device
    return -(-rows // together) * together * MAX_LENGTH


def planning_results(part: str, runs: list[dict[str, tuple[list[float], float]]]) -> list[dict[str, Any]]:
    """Computes speeds, efficiencies and ratios from the rounds of `planning`."""
    results = []
    whose = ("one device", "all devices")
    for side in runs[0]:
        for which, what in enumerate(whose if side != FIXED else ()):
            speed = statistics.median(r[side][0][which] for r in runs)
            results.append(result(part, f"{side}: samples/s, {what}", speed))
        efficiency = statistics.median(r[side][1] for r in runs)
        results.append(result(part, f"{side}: slot efficiency", efficiency))
    if LPT in runs[0]:
        for which, what in enumerate(whose):
            ratios = [r[OURS][0][which] / r[LPT][0][which] for r in runs]
            results.append(ratio_result(part, f"speed, ours / LPT, {what}", ratios, 10))
        ratios = [r[OURS][1] / r[LPT][1] for r in runs]
        results.append(ratio_result(part, "slot efficiency, ours / LPT", ratios, 1))
    return results


# --------------------------------------------------------------------------------------------------------------- scale
def part_scale(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures planning at scale."""
    runs = [r for _ in range(args.rounds) if (r := spawn(args, "plan_all"))]
    if not runs:
        return []
    part, run = f"plan {args.scale:,} samples", middle_run(runs)
    return [
        result(part, "seconds, all steps of an epoch", run["seconds"], at_most=5),
        result(part, "peak MiB of the process", run["peak_mib"], at_most=1024),
        result(part, "MiB of that after the imports", run["growth_mib"]),
    ]


def plan_all(args: argparse.Namespace) -> None:
    """Plans all steps of an epoch in this process."""
    # The mean is 700 tokens after clipping.
    drawn = np.random.default_rng(0).lognormal(np.log(700) - SIGMA**2 / 2 + 0.02, SIGMA, args.scale)
    lengths = np.clip(drawn, 16, MAX_LENGTH).astype(np.int32)
    import mice_jax.data.best_fit
    import mice_jax.data.loader  # noqa: F401

    imported = memory_mib("VmRSS")
    started = time.perf_counter()
    source = step_source(Lengths(lengths), args.scale, STEP_SAMPLES[0], rows=4)
    microbatches = sum(len(source.plan(i)) for i in range(len(source)))
    seconds = time.perf_counter() - started
    peak = memory_mib("VmHWM")
    result = {"seconds": seconds, "peak_mib": peak, "growth_mib": peak - imported, "microbatches": microbatches}
    write_result(args, result | {"mean_length": float(lengths.mean())})


# -------------------------------------------------------------------------------------------------------------- loader
def part_loader(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the loader."""
    need_chats(args)
    run = spawn(args, "load")
    if not run:
        return []
    part = f"load, {LOADER_STEP} a step"
    return [
        result(part, f"share waited at {CONSUMED_PER_S:,} tokens/s", run["waited"], at_most=0.01),
        result(part, "seconds to the first step", run["first_s"]),
        result(part, "tokens/s, nothing else done", run["tokens_per_s"]),
    ]


def load(args: argparse.Namespace) -> None:
    """Measures about 20 s of a paced consumer, then FAST_EPOCHS epochs of a fast one."""
    from mice_jax.data.loader import load_steps
    from mice_jax.data.mixture import Corpus
    from mice_jax.data.store import build_store

    folder, encoder = Path(args.folder), our_encoder(args)
    chats = str(folder / "chats.jsonl")
    store = build_store(
        chats, format="messages", encoder=encoder, skip_bad=False, cache_dir=folder / "cache", workers=2
    )
    source = step_source(Corpus([store], MAX_LENGTH), len(store), LOADER_STEP, rows=4, epochs=FAST_EPOCHS)
    waits, spans = [], []
    started = time.perf_counter()
    steps = load_steps(source, 0, 0)
    for step in steps:
        waits.append(time.perf_counter() - started)
        span = step["tokens"] / CONSUMED_PER_S
        time.sleep(span)
        spans.append(span)
        if sum(spans) > 20:
            break
        started = time.perf_counter()
    waited = sum(waits[1:]) / (sum(waits[1:]) + sum(spans[1:]))
    started = time.perf_counter()
    tokens = sum(step["tokens"] for step in load_steps(source, 0, 0))  # each step has all of its arrays
    speed = tokens / (time.perf_counter() - started)
    write_result(args, {"waited": waited, "first_s": waits[0], "tokens_per_s": speed})


# ---------------------------------------------------------------------------------------------------------- warm start
def part_warm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the start of a run whose store is in the cache."""
    need_chats(args)
    if not spawn(args, "make_warm"):
        return []
    runs = [r for _ in range(args.rounds) if (r := spawn(args, "open_warm"))]
    for name in ("warm.jsonl", "warm"):
        subprocess.run(["rm", "-r", "-f", f"{args.folder}/{name}"], check=True)
    if not runs:
        return []
    part, run = f"warm start, {args.warm:,} samples", middle_run(runs)
    return [
        result(part, "seconds to the first step's arrays", run["seconds"], at_most=10),
        *(result(part, f"of that: {name}", seconds) for name, seconds in run["shares"].items()),
        result(part, "seconds of the digest, not remembered", run["digest_s"]),
        result(part, "peak MiB of the process", run["peak_mib"]),
        result(part, "GiB of the store", run["store_gib"]),
    ]


def make_warm(args: argparse.Namespace) -> None:
    """Writes a source and its store with build_store, except that the tokens are synthetic."""
    from unittest import mock

    from mice_jax.data import store as store_module

    folder, encoder = Path(args.folder), our_encoder(args)
    lines = (folder / "chats.jsonl").read_bytes().splitlines(keepends=True)
    source = folder / "warm.jsonl"
    with source.open("wb") as file:
        for start in range(0, args.warm, len(lines)):
            file.writelines(lines[: args.warm - start])
    time.sleep(6)  # the digest of a file that changed in the last seconds is not cached
    with mock.patch.object(store_module, "tokenise", lambda *_, **__: made_up_blocks(args.warm)):
        store_module.build_store(
            str(source), format="messages", encoder=encoder, skip_bad=False, cache_dir=folder / "warm"
        )
    write_result(args, {"made": True})


def made_up_blocks(samples: int) -> Iterator[tuple[float, Any]]:
    """Yields synthetic blocks as `tokenise` does, in blocks of the size that readers yield."""
    import pyarrow as pa

    from mice_jax.data.bad_records import BadRecords
    from mice_jax.data.readers import BLOCK_RECORDS
    from mice_jax.data.tokenise import SCHEMA, TokenisedBlock

    rng, lengths = np.random.default_rng(0), draw_lengths(samples, seed=2)
    for start in range(0, samples, BLOCK_RECORDS):
        some = lengths[start : start + BLOCK_RECORDS]
        offsets = pa.array(np.cumsum([0, *some]), pa.int32())
        tokens, count = int(some.sum()), len(some)
        made = {
            "tokens": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, VOCABULARY, tokens, np.int32))),
            "trained": pa.ListArray.from_arrays(offsets, pa.array(np.ones(tokens, np.uint8))),
            "num_trained": pa.array(some - 1, pa.int32()),
            "content_hash": pa.array(rng.integers(0, 2**63, count), pa.uint64()),
            "number": pa.array(np.arange(start + 1, start + 1 + count), pa.uint64()),
        }
        zeros = pa.array(np.zeros(count, np.uint8))
        columns = [made.get(f.name, zeros.cast(f.type) if f.name not in made else None) for f in SCHEMA]
        batch = pa.record_batch(columns, schema=SCHEMA).serialize().to_pybytes()
        yield (start + count) / samples, TokenisedBlock(batch, count, tokens, BadRecords(), {})


def open_warm(args: argparse.Namespace) -> None:
    """Measures the start from the cached store in this process."""
    from mice_jax.data import loader  # noqa: F401
    from mice_jax.data.mixture import Corpus
    from mice_jax.data.readers import file_digests
    from mice_jax.data.store import build_store

    folder, encoder = Path(args.folder), our_encoder(args)
    path = folder / "warm.jsonl"
    stamps = [time.perf_counter()]
    store = build_store(str(path), format="messages", encoder=encoder, skip_bad=False, cache_dir=folder / "warm")
    stamps.append(time.perf_counter())
    corpus = Corpus([store], MAX_LENGTH)
    stamps.append(time.perf_counter())
    source = step_source(corpus, len(store), STEP_SAMPLES[0], rows=4)
    source.mixture.step(0)
    stamps.append(time.perf_counter())
    step = source[0]
    stamps.append(time.perf_counter())
    assert len(store) == args.warm and step["samples"] == STEP_SAMPLES[0]
    peak = memory_mib("VmHWM")
    with tempfile.TemporaryDirectory() as nothing_remembered:
        file_digests([path], Path(nothing_remembered))
    digest_s = time.perf_counter() - stamps[-1]
    size = sum(f.stat().st_size for f in (folder / "warm").rglob("tokens.arrow")) / 2**30
    names = ("build_store", "Corpus", "Mixture's order", "first step")
    shares = dict(zip(names, np.diff(stamps).tolist(), strict=True))
    measured = {"seconds": stamps[-1] - stamps[0], "shares": shares, "digest_s": digest_s}
    write_result(args, measured | {"peak_mib": peak, "store_gib": size})


# ----------------------------------------------------------------------------------------------------------- reporting
def memory_mib(field: str) -> float:
    """Returns VmRSS (current) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def write_result(args: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Writes the result of a task for the parent process."""
    Path(args.out).write_text(json.dumps(measured))


def middle_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the run of median time."""
    return sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]


def result(
    part: str, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None, spread: str = ""
) -> dict[str, Any]:
    """Makes a line of the table, with a target if `at_least` or `at_most` is given."""
    target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    met = value >= at_least if at_least is not None else value <= at_most if at_most is not None else None
    return {"part": part, "what": what, "value": value, "target": target, "met": met, "spread": spread}


def ratio_result(part: str, what: str, ratios: list[float], target: float | None) -> dict[str, Any]:
    """Makes a line of the table from ratios, with their median and spread."""
    spread = f"({min(ratios):.4g}, {max(ratios):.4g})"
    return result(part, what, statistics.median(ratios), at_least=target, spread=spread)


def print_table(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(f"{'':<34}{'':<40}{'':>12}  {'target':<10}{'':<6}(least, most)")
    for r in results:
        value = f"{r['value']:,.0f}" if r["value"] >= 1000 else f"{r['value']:.4g}"
        met = {True: "met", False: "SHORT", None: ""}[r["met"]]
        print(f"{r['part']:<34}{r['what']:<40}{value:>12}  {r['target']:<10}{met:<6}{r['spread']}")


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "tokenise": part_tokenise,
    "planning": part_planning,
    "scale": part_scale,
    "loader": part_loader,
    "warm": part_warm,
}
TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "make_chats": make_chats,
    "tokenise_ours": tokenise_ours,
    "tokenise_peer": tokenise_peer,
    "plan_all": plan_all,
    "load": load,
    "make_warm": make_warm,
    "open_warm": open_warm,
}

if __name__ == "__main__":
    sys.exit(main())
