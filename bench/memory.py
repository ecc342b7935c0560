"""Compares the memory of a training step by the compiler with the arithmetic by which a run chooses rows and remat.

    python bench/memory.py
    python bench/memory.py --topology=v5e:2x2 --compute_dtype=bfloat16    # the aot extra
    python bench/memory.py --options='int8 moments,bfloat16 weights' --layers=8

Each option is a run of one small model, whose step functions are compiled and not run. `compiled` is the larger peak of
`accumulate` and `apply`, with what stays resident beside them; `estimated` is the total of training/memory_model.py. A
CPU has no bfloat16 products: XLA casts the weights to float32 beforehand there, which a TPU or GPU does not.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
# The fields in which each run differs from the first.
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 moments": {"optim.moments_dtype": "bfloat16"},
    "int8 moments": {"optim.moments_dtype": "int8"},
    "moments on the host": {"optim.offload_moments": True},
    "bfloat16 weights": {"model.param_dtype": "bfloat16"},
    "bfloat16 weights and int8 moments": {"model.param_dtype": "bfloat16", "optim.moments_dtype": "int8"},
    "LoRA of rank 8": {"model.lora.rank": 8},
    "remat full": {"model.remat": "full"},
}


class Memory(NamedTuple):
    """Bytes of one device, by the compiler and by the arithmetic.

    Attributes:
        params: The parameters, exact.
        optimizer: The optimizer's state in the device's own memory, exact.
        accumulate: The peak of `accumulate` by the compiler, what is resident beside it included.
        apply: That of `apply`.
        estimated: The peak by the memory model.
    """

    params: int
    optimizer: int
    accumulate: int
    apply: int
    estimated: int

    @property
    def compiled(self) -> int:
        return max(self.accumulate, self.apply)


def measure(
    fields: dict[str, Any],
    topology: Any,
    *,
    model: dict[str, Any] | None = None,
    rows: int = 1,
    slots: int = 512,
    compute_dtype: str = "float32",
) -> Memory:
    """Compiles the step of a small model, split over all devices of a topology.

    Args:
        fields: Fields of the config, by their dotted names, and their values.
        topology: The devices, from `ahead_of_time.find_topology`.
        model: The content of its config.json.
        rows: Rows of a microbatch on one device.
        slots: Slots of a row.
        compute_dtype: The dtype of products and activations.
    """
    import jax.numpy as jnp

    from mice_jax.config import Config, locate
    from mice_jax.models import hf
    from mice_jax.models.transformer import Compute
    from mice_jax.planning.ahead_of_time import compile_memory
    from mice_jax.sharding import make_mesh
    from mice_jax.training import build, memory_model

    config, model = Config(), model or MODEL
    config.model.remat, config.data.max_length = "none", slots
    for name, value in fields.items():
        section, last = locate(config, name)
        setattr(section, last, value)
    spec, architecture = hf.spec_from_config(model, Path("config.json")), model["architectures"][0]
    mesh = make_mesh(1, -1, 1, devices=topology.devices)
    decoder = build.run_decoder(config, spec, architecture, tensor=1)
    compute = Compute(jnp.dtype(compute_dtype), "blockwise", config.model.remat)
    fns = build.step_functions(config, decoder, architecture, mesh, compute)
    inputs = build.memory_inputs(config, decoder, architecture, mesh, compute_dtype, "blockwise")
    estimate = memory_model.estimate_memory(inputs, rows, config.model.remat)
    accumulate, apply = compile_memory(fns, mesh, topology.chip, rows, slots, ("accumulate", "apply"))
    return Memory(estimate.params, estimate.optimizer, accumulate.total, apply.total, estimate.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="cpu:4")
    parser.add_argument("--compute_dtype", default="float32")
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch on one device")
    parser.add_argument("--slots", type=int, default=512)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    family, _, count = args.topology.partition(":")
    if family == "cpu":
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", count)

    from mice_jax.planning.ahead_of_time import find_topology

    topology, model = find_topology(args.topology), MODEL | {"num_hidden_layers": args.layers}
    columns = ("weights", "moments", "accumulate", "apply", "estimated", "of it")
    print(f"{'MiB of one device':33}", *(f"{name:>10}" for name in columns))
    found = {}
    for name in args.options.split(","):
        found[name] = m = measure(
            OPTIONS[name], topology, model=model, rows=args.rows, slots=args.slots, compute_dtype=args.compute_dtype
        )
        figures = [f"{x / 2**20:10.1f}" for x in m]
        print(f"{name:33}", *figures, f"{m.estimated / m.compiled:10.2f}", flush=True)
    print(json.dumps({"topology": args.topology, **{name: m._asdict() for name, m in found.items()}}))


if __name__ == "__main__":
    main()
