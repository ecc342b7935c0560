"""Measures generation on a CPU in tokens per second, against transformers' `generate`, paired in one run.

    python bench/decode.py                         # 10m, 3 rounds: some minutes
    python bench/decode.py --size=60m --rounds=5

Both sides hold the same Llama with the same random weights in float32, in one process, and take turns, round after
round. They answer the same prompts, greedily, 16 at once, and their answers are compared token by token. transformers
gets left-padded batches of prompts of similar lengths, its own cache and its default attention (SDPA). torch's threads
wait passively, unless you set OMP_WAIT_POLICY. All programs are compiled before the first round.

  even    16 prompts, --new tokens each: the whole call, and its decoding alone (without the time to first tokens)
  ragged  64 prompts whose answers end at different lengths: one in --ends ids ends an answer. transformers continues
          a batch until its longest answer ends; ours gives the free row to the next prompt.

tokens/s count the tokens of answers. CPU seconds of all threads are printed next to wall-clock seconds. On a shared
machine, CPU seconds and ratios are more reliable. ratio is ours over theirs, by pair: median (least, most).
Target: 2.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would spin while the other side works
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mice_jax.inference.sampler import Sampler, Sampling
from mice_jax.model_source import load_params, resolve_source
from mice_jax.models.transformer import make_decoder
from mice_jax.runtime import xla_flags
from mice_jax.sharding import make_mesh, param_shardings

BATCH = 16
VOCAB = 8192
# Each size has d_model, d_ff, layers, query heads and key heads.
SIZES = {"1m": (128, 384, 4, 4, 2), "10m": (256, 1024, 10, 4, 2), "60m": (512, 1792, 16, 8, 4)}

Answers = list[list[int]]
Side = Callable[[list[list[int]], int, list[int]], Answers]  # takes prompts, a number of tokens, and ids that end


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    args = parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = sides(args, Path(folder))
    even = [rng.integers(0, VOCAB, n).tolist() for n in rng.integers(16, 128, BATCH)]
    ragged = [rng.integers(0, VOCAB, n).tolist() for n in rng.integers(16, 128, 4 * BATCH)]
    ends = rng.choice(VOCAB, VOCAB // args.ends, replace=False).tolist()
    works = {"first": (even, 1, []), "even": (even, args.new, []), "ragged": (ragged, args.new, ends)}
    rounds: list[dict[str, Any]] = []
    for number in range(-1, args.rounds):  # the first round compiles and is not counted
        taken: dict[str, Any] = {}
        for name, work in works.items():
            taken[name] = [measured(side, work) for side in (ours, theirs)]
            same = sum(a == b for a, b in zip(*(m["answers"] for m in taken[name]), strict=True))
            print(f"round {number + 1}: {name}, {same} of {len(work[0])} answers are the same", file=sys.stderr)
        if number >= 0:
            rounds.append(taken)
    report(args, rounds)
    return 0


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--ends", type=int, default=64, help="of so many ids, one ends an answer of `ragged`")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ the sides
def sides(args: argparse.Namespace, folder: Path) -> tuple[Side, Side]:
    """Makes the two sides, transformers' first, with the same weights."""
    d, f, layers, heads, kv_heads = SIZES[args.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=4096, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    origin, mesh = resolve_source(str(folder)), make_mesh(1, 1, 1)
    decoder = make_decoder(origin.spec)
    params = load_params(origin, decoder, param_shardings(decoder.abstract, decoder.axes, mesh))
    sampler = Sampler(decoder, jnp.float32)

    def ours(prompts: list[list[int]], new: int, ends: list[int]) -> Answers:
        return [a.ids for a in sampler.generate(params, prompts, Sampling(new), ends, batch_size=BATCH)]

    def theirs(prompts: list[list[int]], new: int, ends: list[int]) -> Answers:
        settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=ends or None)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: Answers = [[] for _ in prompts]
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            with torch.inference_mode():
                found: Any = model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[misc]
            for i, row in zip(batch, found[:, width:].tolist(), strict=True):
                answers[i] = row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
        return answers

    return theirs, ours


def measured(side: Side, work: tuple[list[list[int]], int, list[int]]) -> dict[str, Any]:
    """Runs a side; returns wall-clock seconds, CPU seconds and its answers."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = side(*work)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "answers": answers}


# ------------------------------------------------------------------------------------------------ figures
def speeds(taken: dict[str, Any], clock: str) -> dict[str, list[float]]:
    """Computes the tokens per second of each side for each kind of work."""

    def tokens(name: str, side: int) -> int:
        return sum(map(len, taken[name][side]["answers"]))

    def seconds(name: str, side: int) -> float:
        return taken[name][side][clock]

    found = {name: [tokens(name, s) / seconds(name, s) for s in (0, 1)] for name in ("even", "ragged")}
    decoding = [(tokens("even", s) - tokens("first", s)) / (seconds("even", s) - seconds("first", s)) for s in (0, 1)]
    return {"even": found["even"], "even, decoding": decoding, "ragged": found["ragged"]}


def report(args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Prints the table and the line of JSON."""
    line: dict[str, Any] = {"bench": "decode", "size": args.size, "rounds": args.rounds, "new": args.new}
    print(f"{'':<24}{'ours':>10}{'theirs':>10}   ratio")
    for clock in ("wall", "cpu"):
        by_round = [speeds(taken, clock) for taken in rounds]
        for name in by_round[0]:
            ours, theirs = (statistics.median(r[name][s] for r in by_round) for s in (0, 1))
            ratios = [r[name][0] / r[name][1] for r in by_round]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            print(f"{name + ', ' + clock:<24}{ours:>10,.0f}{theirs:>10,.0f}   {spread}")
            line[f"{name}, {clock}"] = {"ours": ours, "theirs": theirs, "ratios": [round(x, 3) for x in ratios]}
    print(json.dumps(line | {"cpus": os.cpu_count()}))


if __name__ == "__main__":
    xla_flags.reexec_with_huge_pages()  # `mice` does so too; here both sides get huge pages
    sys.exit(main())
