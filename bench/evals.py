"""Measures benchmarks in requests per second against lm-evaluation-harness's own `hf` model, on the same CPU.

    python bench/evals.py                        # 4 rounds, about ten minutes on two idle cores
    python bench/evals.py --documents=24 --rounds=2

It needs torch and accelerate, the peer's backend, and creates its model (a random Llama of 7 M parameters) and its
questions itself. Both sides get the same texts, as the harness makes them, and return log-likelihoods. The time
includes tokenizing on both sides, but not loading the model or compiling, which the first, unmeasured call does.

  context  each question has its own context of 400 tokens and four options of 4 to 12 tokens
  shots    all questions share five examples of 80 tokens; a question of 60 tokens and the letters A to D follow. The
           harness then computes one row for the four options, since its logits cache covers options of one token

The peer's batch size is the fastest of 1, 2, 4, 8, 16 and 32, tried on a third of the requests in every round.
The log-likelihoods of both sides must agree to 1e-3. Target: 4x on `context`. On a busy machine, the ratio of CPU
times is steadier than that of wall-clock times.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would spin while the other side works

import jax.numpy as jnp
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.evals.harness import MiceLM
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.model_source import resolve_source
from mice_jax.runtime import xla_flags
from mice_jax.training import build

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CLOSE = 1e-3
VOCAB = 8000


def write_model(folder: Path) -> None:
    """Writes a random Llama, and a tokenizer whose tokens are words such as w17."""
    words = {f"w{i}": i for i in range(VOCAB - 6)} | {c: VOCAB - 6 + i for i, c in enumerate([*"ABCD", "?", "<eos>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    ends = {"bos_token_id": None, "eos_token_id": VOCAB - 1, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).save_pretrained(folder)


def make_requests(part: str, documents: int) -> list[Instance]:
    """Makes the requests of a part, four for each document."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(VOCAB - 6)}" for _ in range(n))

    shots = " ".join(f"{words(79)} {rng.choice('ABCD')}" for _ in range(5))
    found = []
    for i in range(documents):
        if part == "context":
            context, options = words(400), [f" {words(rng.randint(4, 12))}" for _ in range(4)]
        else:
            context, options = f"{shots} {words(60)}", [" A", " B", " C", " D"]
        found += [Instance("loglikelihood", {}, (context, o), k, ("bench", i, 1)) for k, o in enumerate(options)]
    return found


def our_model(folder: Path) -> MiceLM:
    """Loads the model of our side."""
    loaded = build.load_for_inference(resolve_source(str(folder)))
    lm = MiceLM(loaded.decoder, loaded.mesh, jnp.float32, load_tokenizer(str(folder)), GenerationDefaults())
    lm.params = loaded.params
    return lm


def timed(lm: Any, requests: list[Instance]) -> tuple[float, float, list[float]]:
    """Scores requests; returns wall-clock seconds, CPU seconds, and the log-likelihoods."""
    began, busy = time.perf_counter(), time.process_time()
    found = lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - began, time.process_time() - busy, [logprob for logprob, _ in found]


def best_batch_size(peer: Any, requests: list[Instance]) -> int:
    """Returns the peer's fastest batch size."""
    some = requests[: max(4, len(requests) // 3)]
    seconds = {}
    for size in BATCH_SIZES:
        peer.batch_size_per_gpu = size
        seconds[size] = timed(peer, some)[0]
    return min(BATCH_SIZES, key=lambda size: seconds[size])


def compare(part: str, ours: MiceLM, peer: Any, documents: int, rounds: int) -> dict[str, Any]:
    """Measures both sides on a part; returns its figures."""
    requests = make_requests(part, documents)
    first = timed(ours, requests)[0]
    ratios, busy_ratios, speeds, sizes = [], [], [], []
    for _ in range(rounds):
        size = best_batch_size(peer, requests)
        peer.batch_size_per_gpu = size
        theirs, their_busy, wanted = timed(peer, requests)
        mine, my_busy, found = timed(ours, requests)
        gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        assert gap < CLOSE, f"log-likelihoods differ by {gap}"
        ratios.append(theirs / mine)
        busy_ratios.append(their_busy / my_busy)
        speeds.append((len(requests) / mine, len(requests) / theirs))
        sizes.append(size)
        print(
            f"{part}: ours {speeds[-1][0]:.1f}, hf {speeds[-1][1]:.1f} requests/s at batch size {size}; "
            f"CPU seconds {my_busy:.1f} and {their_busy:.1f}; gap {gap:.1e}",
            flush=True,
        )
    return {
        "part": part,
        "requests": len(requests),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "cpu_ratio": round(statistics.median(busy_ratios), 2),
        "ours_per_s": round(statistics.median(s[0] for s in speeds), 1),
        "hf_per_s": round(statistics.median(s[1] for s in speeds), 1),
        "hf_batch_sizes": sizes,
        "ours_first_time_s": round(first, 1),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", default="context,shots")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        ours = our_model(Path(folder))
        make_peer: Any = HFLM  # its decorator hides its parameters from the type checker
        peer = make_peer(folder, device="cpu", dtype="float32", batch_size=1)
        results = [compare(part, ours, peer, args.documents, args.rounds) for part in args.parts.split(",")]
    for r in results:
        both = f"{r['ours_per_s']:>8} requests/s  hf {r['hf_per_s']:>8}"
        print(f"{r['part']:<8} {both}  ratio {r['ratio']} of {r['ratios']}, of CPU time {r['cpu_ratio']}")
    print(json.dumps({"bench": "evals", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    xla_flags.reexec_with_huge_pages()  # `mice` does so too; here both sides get huge pages
    main()
