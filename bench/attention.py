"""Measures attention alone, forward and backward, over packed rows: its speed against torch's, and its scaling.

    python bench/attention.py                                    # on this machine's GPU, else its CPU: some minutes
    python bench/attention.py --rows=4 --heads=32 --kv-heads=8 --head-dim=128 --rounds=20

It needs torch, the peer. Every side gets the same arrays, in bfloat16 on a GPU and float32 on a CPU, which are on the
device beforehand, and returns the output and the gradients of queries, keys and values. The sides take turns, and the
results of each are first compared with the reference backend.

  packed  rows of samples whose lengths are log-normal, as chats are
          ours         every backend that supports such a run on this device; `reference` on a CPU only
          flex         torch's flex attention, compiled, with the block mask of the packed samples. The mask is made
                       beforehand, because a model makes it once per batch for all layers. On a CPU it has no backward
                       pass, so the forward pass is also measured alone
          sdpa         on a CPU: torch's scaled_dot_product_attention with a [T, T] mask
          cudnn whole  on a GPU: cuDNN's causal attention over rows that are one sample each, which needs no packing
  growth  our backends on rows of 64-token samples, against rows of one sample. If the time were proportional to the sum
          of the squared lengths, the former would take 1 / 64 of the time. Since blocks of 64 slots are computed
          completely, the bound is 1 / 33, plus the time that does not depend on lengths

Targets, on an H100 or H200: `auto` at least 1.2 times as fast as flex, and at most 1.15 times the time of cuDNN whole.
"""

# pyright: reportMissingImports=false
# The peer is in the bench extra, which lint does not install.

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would spin while the others work
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same device
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("JAX_PLATFORMS", DEVICE)  # must be set before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mice_jax.errors import UserError
from mice_jax.models import hf
from mice_jax.models.attention import BACKENDS, AttentionRequirements, attend, choose_backend
from mice_jax.models.attention.reference import reference
from mice_jax.models.attention.score_function import Scoring
from mice_jax.packing_limits import max_segments

Run = Callable[[], Any]  # runs one forward and backward pass and waits for it
# bfloat16 rounds weights, outputs and their gradients by 2^-9 each; float32 by 6e-8, over sums of up to 4,096 terms.
CLOSE = {"bfloat16": 0.03, "float32": 1e-4}
MEAN_LOG, SPREAD_LOG = 6.0, 0.9  # log-normal distribution of lengths, with a median of 400 tokens


def lengths_of(slots: int, rng: np.random.Generator) -> list[int]:
    """Draws the lengths of a row's samples until one does not fit."""
    lengths: list[int] = []
    while len(lengths) < max_segments(slots):
        length = int(np.clip(rng.lognormal(MEAN_LOG, SPREAD_LOG), 16, slots))
        if sum(lengths) + length > slots:
            break
        lengths.append(length)
    return lengths


def segments_of(rows: list[list[int]], slots: int) -> np.ndarray:
    """Returns the segment ids, int32 [B T], of rows of samples with these lengths."""
    segments = np.zeros((len(rows), slots), np.int32)
    for row, lengths in zip(segments, rows, strict=True):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(ids)] = ids
    return segments


class Arrays:
    """Queries, keys, values and the gradient of the output, [B T N H], and the segments of their rows."""

    def __init__(self, args: argparse.Namespace, rows: list[list[int]], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.dtype, self.scale = args.dtype, args.head_dim**-0.5
        shapes = [(len(rows), args.slots, n, args.head_dim) for n in (args.heads, *[args.kv_heads] * 2, args.heads)]
        self.arrays = [rng.normal(size=s).astype(np.float32) for s in shapes]
        self.segments = segments_of(rows, args.slots)

    def in_jax(self) -> list[jax.Array]:
        """Returns the arrays [B T N H] on JAX's device."""
        return [jnp.asarray(x, self.dtype) for x in self.arrays]

    def in_torch(self) -> list[torch.Tensor]:
        """Returns the arrays [B N T H] on torch's device."""
        moved = [torch.tensor(x).to(DEVICE, getattr(torch, self.dtype)).transpose(1, 2) for x in self.arrays]
        return [x.contiguous().requires_grad_(i < 3) for i, x in enumerate(moved)]


# ---------------------------------------------------------------------------------------- the sides
def in_jax(f: Callable[..., jax.Array], arrays: Arrays, backward: bool) -> Run:
    """Makes a run of an attention function in JAX; without `backward`, only its forward pass."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        if not backward:
            return (f(q, k, v, segments),)
        out, pull = jax.vjp(lambda *x: f(*x, segments), q, k, v)
        return out, *pull(d_out)

    inputs = (*arrays.in_jax(), jnp.asarray(arrays.segments))
    return lambda: jax.block_until_ready(run(*inputs))


def ours(arrays: Arrays, backward: bool, backend: str) -> Run:
    """Makes a run of one of our backends."""
    scoring = Scoring(arrays.scale, None, None)
    return in_jax(lambda q, k, v, s: attend(q, k, v, s, scoring, backend=backend), arrays, backward)


def row_by_row(scale: float, *inputs: jax.Array) -> jax.Array:
    """Computes reference attention with one row's scores in memory at a time."""
    scoring = Scoring(scale, None, None)

    def of_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, segments = (x[None] for x in row)
        return reference(q, k, v, segments, scoring)[0]

    return jax.lax.map(of_row, inputs)


def cudnn_whole(arrays: Arrays, backward: bool) -> Run:
    """Makes a run of cuDNN's causal attention over rows of one sample."""

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, scale=arrays.scale, is_causal=True, implementation="cudnn")

    return in_jax(whole, arrays, backward)


def in_torch(f: Callable[..., torch.Tensor], arrays: Arrays, backward: bool) -> Run:
    """Makes a run of an attention function in torch; without `backward`, only its forward pass."""
    q, k, v, d_out = (x if backward else x.detach() for x in arrays.in_torch())

    def run() -> Any:
        out = f(q, k, v)
        made = (out, *torch.autograd.grad(out, (q, k, v), d_out)) if backward else (out,)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return tuple(x.transpose(1, 2) for x in made)

    return run


def flex(arrays: Arrays, backward: bool) -> Run:
    """Makes a run of torch's flex attention."""
    ids = torch.tensor(arrays.segments, device=DEVICE)

    def sees(b: Any, _: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (ids[b, q] == ids[b, k]) & (ids[b, q] > 0)

    rows, slots = ids.shape
    mask = create_block_mask(sees, rows, None, slots, slots, device=DEVICE)
    compiled = torch.compile(flex_attention, fullgraph=True)
    return in_torch(lambda *x: compiled(*x, block_mask=mask, scale=arrays.scale, enable_gqa=True), arrays, backward)


def sdpa(arrays: Arrays, backward: bool) -> Run:
    """Makes a run of torch's scaled_dot_product_attention with a mask."""
    ids = torch.tensor(arrays.segments, device=DEVICE)
    mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()

    def attention(*x: torch.Tensor) -> torch.Tensor:
        out = scaled_dot_product_attention(*x, attn_mask=mask, scale=arrays.scale, enable_gqa=True)
        return out * (ids > 0)[:, None, :, None]  # the mask lets padding attend to itself

    return in_torch(attention, arrays, backward)


def able(args: argparse.Namespace) -> list[str]:
    """Returns the backends that support such a run here, without `reference`; the choice of "auto" comes first."""
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128}
    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads, "head_dim": args.head_dim}
    rest = {"hidden_size": args.heads * args.head_dim, "intermediate_size": 128, "num_hidden_layers": 1}
    config = names | heads | rest | {"max_position_embeddings": args.slots, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    spec, device = hf.spec_from_config(config, Path("config.json")), jax.devices()[0]
    found = []
    for name in [b for b in BACKENDS if b != "reference"]:
        try:
            found.append(
                choose_backend(
                    name,
                    AttentionRequirements(
                        spec,
                        platform=device.platform,
                        compute_capability=getattr(device, "compute_capability", None),
                        dtype=args.dtype,
                        max_length=args.slots,
                        deterministic=False,
                    ),
                )
            )
        except UserError as e:
            print(f"left out: {e}")
    return found


# ---------------------------------------------------------------------------------------- measuring
def check_close(name: str, made: Any, expected: Any, dtype: str) -> None:
    """Exits if the output or a gradient differs from the expected one by too large a part of its largest entry."""
    for x, e in zip(made, expected, strict=True):
        x, e = (np.asarray(y.detach().float().cpu() if isinstance(y, torch.Tensor) else y, np.float32) for y in (x, e))
        gap = np.abs(x - e).max() / np.abs(e).max()
        if not gap < CLOSE[dtype]:
            sys.exit(f"{name} differs from plain attention by {gap:.2g} of its largest entry")


def times(sides: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Measures the milliseconds of a pass; the sides take turns, and the first pass of each turn is not measured."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            sides[name]()
            began = time.perf_counter()
            sides[name]()
            found[name].append(1000 * (time.perf_counter() - began))
    return found


def packed(args: argparse.Namespace, backends: list[str], backward: bool) -> dict[str, list[float]]:
    """Measures all sides on packed rows; returns the milliseconds of each."""
    rng = np.random.default_rng(1)
    arrays = Arrays(args, [lengths_of(args.slots, rng) for _ in range(args.rows)])
    sides = {f"ours {name}": ours(arrays, backward, name) for name in backends}
    if DEVICE == "cuda" or not backward:  # flex attention has no backward pass on a CPU
        sides["flex"] = flex(arrays, backward)
    if DEVICE == "cpu":
        sides |= {"ours reference": ours(arrays, backward, "reference"), "sdpa": sdpa(arrays, backward)}
    expected = in_jax(functools.partial(row_by_row, arrays.scale), arrays, backward)()
    for name, run in sides.items():
        check_close(name, run(), expected, args.dtype)
    if DEVICE == "cuda":
        sides["cudnn whole"] = cudnn_whole(Arrays(args, [[args.slots]] * args.rows), backward)
    samples = sum(len(np.unique(row[row > 0])) for row in arrays.segments)
    print(f"\n{'forward and backward' if backward else 'forward'}: {args.rows} rows of {args.slots}, {samples} samples")
    return times(sides, args.rounds)


def growth(args: argparse.Namespace, backends: list[str]) -> dict[str, list[float]]:
    """Measures our backends on rows of short samples and on rows of one sample; returns the milliseconds of each."""
    kinds = {"64-token samples": [64] * (args.slots // 64), "one sample": [args.slots]}
    print(f"\nforward and backward: {args.rows} rows of {args.slots}, of short samples and of one long one")
    sides = {}
    for backend in backends:
        for kind, row in kinds.items():
            sides[f"{backend}, {kind}"] = ours(Arrays(args, [row] * args.rows), True, backend)
    return times(sides, args.rounds)


def print_times(found: dict[str, list[float]], over: dict[str, str]) -> None:
    """Prints the median of each side, and the ratios of pairs to the side that `over` names."""
    for name, ms in found.items():
        ratio = ""
        if name in over:
            ratios = [a / b for a, b in zip(ms, found[over[name]], strict=True)]
            ratio = f"{statistics.median(ratios):8.3f} ({min(ratios):.3f}, {max(ratios):.3f}) of {over[name]}"
        print(f"{name:<32}{statistics.median(ms):>10.2f} ms{ratio}")


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    on_gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--dtype", choices=tuple(CLOSE), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    args = parser.parse_args()
    device = jax.devices()[0]
    if (device.platform == "gpu") != on_gpu:
        sys.exit(f"torch is on {DEVICE} and jax on {device.platform}: install both for the same device")
    backends = able(args)
    figures: dict[str, Any] = {"bench": "attention", "device": device.device_kind, "jax": jax.__version__}
    figures |= {"torch": torch.__version__, **vars(args)}
    for part, backward in (("forward", False), ("forward_backward", True)):
        figures[part] = packed(args, backends, backward)
        print_times(figures[part], {n: f"ours {backends[0]}" for n in figures[part] if n != f"ours {backends[0]}"})
    figures["growth"] = growth(args, backends)
    shorts = [n for n in figures["growth"] if n.endswith("64-token samples")]
    print_times(figures["growth"], {n: n.replace("64-token samples", "one sample") for n in shorts})
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
