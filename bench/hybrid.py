"""Measures what a token costs in a model with recurrent layers, next to a model of attention alone of the same size.

    python bench/hybrid.py                        # about a minute
    python bench/hybrid.py --layers=32 --rounds=9
    python bench/hybrid.py --model=granite4 --layers=10 --d_model=1536 --rounds=3    # a release's width: 3 minutes

Both models get the same microbatch of packed samples with log-normal lengths and have random weights. The width of
the MLP of the second is chosen so that both have as many parameters. What is measured is `accumulate` of a training
run: the loss, its gradients, and adding these to the sums of the step. The sides take turns, and a pair is one round.
CPU seconds are user and system time of all threads, which on a shared machine are more reliable than wall-clock time.

The script also prints how many layers of each are compiled, and the seconds that XLA took, at this depth and at half.
Target: a ratio of at most 1.3 at the width of a release. The scans of a narrow model weigh more, since their cost grows
with d_model, and that of products with weights with its square.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mice_jax.models.layer_groups import find_groups
from mice_jax.models.spec import GatedDelta, Mamba2, Mixer, ModelSpec, Rope, ShortConv
from mice_jax.models.transformer import Compute, make_decoder
from mice_jax.runtime import xla_flags
from mice_jax.sharding import batch_sharding, make_mesh
from mice_jax.step import StepFunctions, make_step

CONV = ShortConv(3, bias=False)
# Of each model: the kinds of layers that repeat, True for attention.
ATTENDS = {
    "lfm2": (False, False, True, False, False, True, False, True),
    "granite4": (False,) * 5 + (True,) + (False,) * 4,
    "qwen3_5": (False, False, False, True),
}


def mixer_of(model: str, d_model: int) -> Mixer:
    """The recurrent mixer of a model, with heads in the proportion to its width that its releases have."""
    if model == "granite4":
        return Mamba2(2 * d_model // 64, 64, 1, 128, taps=4, time_step_limits=(0, math.inf), bias=False, conv_bias=True)
    return GatedDelta(d_model // 128, d_model // 64, 128, 128, taps=4) if model == "qwen3_5" else CONV


def hybrid_spec(model: str, layers: int, d_model: int) -> ModelSpec:
    """The spec of a model with recurrent layers, whose list of mixers is repeated to a number of layers."""
    mixer = mixer_of(model, d_model)
    mixers = tuple(None if attends else mixer for attends in (ATTENDS[model] * layers)[:layers])
    rope, heads = Rope(1e6, 64, None), d_model // 64
    return ModelSpec(
        vocab_size=8192, d_model=d_model, d_ff=4 * d_model, num_layers=layers, num_heads=heads,
        num_kv_heads=max(1, heads // 4), head_dim=64, max_positions=4096, mixers=mixers,
        ropes=tuple(rope if kind is None else None for kind in mixers), windows=(None,) * layers,
        attention_scale=0.125, query_scale=None, attention_softcap=None, attention_gate=False, qk_norm="head",
        pre_norm=True, post_norm=False, norm_eps=1e-5, norm_offset=0.0, value_norm=False, activation="silu",
        qkv_bias=False, out_bias=False, mlp_bias=False, embedding_multiplier=1.0, residual_multiplier=1.0,
        layer_scales=False, per_layer_dim=0, logit_scale=1.0, logit_softcap=None, tie_embeddings=True, init_std=0.02,
    )  # fmt: skip


def num_params(spec: ModelSpec) -> int:
    """The number of parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(make_decoder(spec).abstract))


def dense_sibling(spec: ModelSpec) -> ModelSpec:
    """The model of attention alone with the width of the MLP that brings it closest to the same size."""
    layers, rope = spec.num_layers, next(rope for rope in spec.ropes if rope)
    dense = dataclasses.replace(spec, mixers=(None,) * layers, ropes=(rope,) * layers)
    more = (num_params(spec) - num_params(dense)) / (3 * layers * spec.d_model)
    return dataclasses.replace(dense, d_ff=spec.d_ff + round(more))


def packed_rows(rows: int, slots: int, vocab: int) -> dict[str, np.ndarray]:
    """Rows that are full of samples of log-normal lengths, about 200 tokens."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), np.int32)
    for row in range(rows):
        at, number = 0, 1
        while at < slots:
            end = min(slots, at + max(2, int(rng.lognormal(5, 0.8))))
            segments[row, at:end], positions[row, at:end] = number, np.arange(end - at)
            at, number = end, number + 1
    tokens = rng.integers(0, vocab, (rows, slots)).astype(np.int32)
    weights = np.ones((rows, slots), np.float32)
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "segment_ids": segments, "positions": positions,
        "loss_weights": weights,
    }  # fmt: skip


def serve(pipe: Connection, spec: ModelSpec, rows: dict[str, np.ndarray], remat: str) -> None:
    """Compiles a model, and adds the gradients of the rows to the sums of a step for each message.

    Each side has a process of its own: in one heap, memory that one frees costs the other system time.

    Args:
      pipe: answers are sent to it, first the facts about the model, then the CPU seconds of each microbatch.
      spec: the model.
      rows: the microbatch.
      remat: as in `Compute`.
    """
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    compute = Compute(jnp.dtype("float32"), "blockwise", remat)

    def compiled(spec: ModelSpec) -> tuple[StepFunctions, float]:
        step, start = make_step(make_decoder(spec), optax.identity(), mesh, compute), time.process_time()
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)) for name, x in rows.items()
        }
        step.accumulate.compile(step.abstract_params, step.abstract_sums, batch)
        return step, round(time.process_time() - start, 1)

    half = spec.num_layers // 2
    _, seconds_of_half = compiled(
        dataclasses.replace(
            spec, num_layers=half, mixers=spec.mixers[:half], ropes=spec.ropes[:half], windows=spec.windows[:half]
        )
    )
    step, seconds = compiled(spec)
    facts = {
        "params": num_params(spec),
        "layers_compiled": sum(len(group.runs) for group in find_groups(spec.mixers)),
        "compile_cpu_s": seconds,
        "compile_cpu_s_at_half_depth": seconds_of_half,
    }
    params, sums = step.init(jax.random.key(0)).params, step.zero_sums()
    batch = jax.device_put(rows, batch_sharding(mesh))
    pipe.send(facts)
    while pipe.recv() == "add":
        # The first is a warm-up: a machine may take memory back from the side that waits.
        sums = jax.block_until_ready(step.accumulate(params, sums, batch))
        start = time.process_time()
        sums = jax.block_until_ready(step.accumulate(params, sums, batch))
        pipe.send(time.process_time() - start)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lfm2", choices=sorted(ATTENDS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    spec = hybrid_spec(args.model, args.layers, args.d_model)
    specs = {"hybrid": spec, "dense": dense_sibling(spec)}
    rows = packed_rows(args.rows, args.slots, spec.vocab_size)
    result: dict[str, Any] = {}
    context, sides = multiprocessing.get_context("spawn"), {}
    for name, of_side in specs.items():
        sides[name], of_child = context.Pipe()
        context.Process(target=serve, args=(of_child, of_side, rows, args.remat), daemon=True).start()
        result[name] = sides[name].recv()  # the other side starts when this one waits
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            side.send("add")
            spent[name].append(side.recv())
    for side in sides.values():
        side.send("stop")
    ratios = [h / d for h, d in zip(spent["hybrid"], spent["dense"], strict=True)]
    for side, seconds in spent.items():
        result[side]["cpu_s_per_microbatch"] = round(statistics.median(seconds), 3)
    result |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    xla_flags.reexec_with_huge_pages()  # `mice` does so too; here both models get huge pages
    main()
