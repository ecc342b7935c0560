"""What one device of each kind can do: arithmetic, memory, and the links to the others; and what a model asks of it.

A device is what JAX calls one: a whole chip, but a half of a TPU7x chip. Arithmetic and bandwidths are from the makers'
data sheets (docs.cloud.google.com/tpu/docs, NVIDIA's of A100, H100, H200 and B200), dense, of a half where a device is
one; the memory of a TPU is what its compiler (libtpu 0.0.52) gives to a program, that of a GPU the share of what is on
it that JAX takes.
"""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.models.spec import ModelSpec

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    kinds: tuple[str, ...]  # how a device's `device_kind` may begin
    peak_flops: float  # FLOP/s of bfloat16 products
    memory: float  # bytes that a program may use
    memory_rate: float  # bytes/s
    link_rate: float  # bytes/s that a device can send to its neighbours, all links together
    platform: str = "tpu"
    devices: int = 1  # that JAX makes of one chip
    capability: str | None = None  # of an NVIDIA GPU


def _gpu(kind: str, capability: str, *rates: float) -> Chip:
    return Chip((kind,), *rates, platform="gpu", capability=capability)


# By the name that a topology begins with.
CHIPS: dict[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1.2e12, 270e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.82e12, 200e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2.765e12, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1.6e12, 400e9),
    "tpu7x": Chip(("TPU7x",), 1153.5e12, 94.74 * GIB, 3.69e12, 300e9, devices=2),
    "a100-40": _gpu("NVIDIA A100-SXM4-40GB", "8.0", 312e12, 31.7e9, 1.55e12, 300e9),
    "a100": _gpu("NVIDIA A100", "8.0", 312e12, 63.8e9, 2.0e12, 300e9),
    "h100": _gpu("NVIDIA H100", "9.0", 989e12, 63.7e9, 3.35e12, 450e9),
    "h200": _gpu("NVIDIA H200", "9.0", 989e12, 112.8e9, 4.8e12, 450e9),
    "b200": _gpu("NVIDIA B200", "10.0", 2250e12, 144e9, 7.7e12, 900e9),
}

TAKEN = 0.75  # of a GPU's memory, by JAX, and so in the table,
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # where this variable says nothing else
GPUS_OF_A_HOST = 8
NETWORK_RATE = 50e9  # bytes/s of one GPU to those of other hosts: a link of 400 Gbit/s each
CPU_MEMORY_RATE = 20e9  # bytes/s of a machine whose CPUs are the devices, all together


def share_taken() -> float:
    """What share of a GPU's memory JAX takes."""
    return float(os.environ.get(FRACTION) or TAKEN)


def find_chip(device: Any) -> Chip | None:
    """That of a device; None for a CPU, and for one that the table lacks."""
    known = {k: chip for chip in CHIPS.values() for k in chip.kinds if device.device_kind.startswith(k)}
    return known[max(known, key=len)] if known else None


def cpu_chip(count: int, peak_flops: float, memory: int) -> Chip:
    """One of the `count` devices that a machine's CPUs are made into, which share what it has."""
    rate = CPU_MEMORY_RATE / count
    return Chip(("cpu",), peak_flops / count, memory / count, rate, rate, platform="cpu")


def train_flops(spec: ModelSpec, lengths: np.ndarray) -> float:
    """Model FLOPs of forward and backward over samples of so many tokens, recomputation not counted.

    Each weight of a matrix product costs 2 FLOPs a token forward and 4 backward; the embedding look-up costs
    nothing, the output projection its product whether tied or not. Causal attention over a sample of n tokens has
    n^2/2 pairs, each with head_dim multiply-adds for the score and as many for the value, in every head; a window
    of w leaves wn - w^2/2 of them.
    """
    s = spec
    attention = 2 * s.d_model * s.head_dim * (s.num_heads + s.num_kv_heads)
    weights = s.num_layers * (attention + 3 * s.d_model * s.d_ff) + s.vocab_size * s.d_model
    n = lengths.astype(np.float64)
    seen = [np.minimum(n, window or np.inf) for window in s.windows]
    pairs = s.num_heads * s.head_dim * sum(float((w * n - w * w / 2).sum()) for w in seen)
    return 3 * (2 * weights * float(n.sum()) + 4 * pairs)


def peak_flops(device: Any) -> float | None:
    """FLOP/s that one device could do at most; None for one that the table lacks.

    A CPU's is measured, as the rate of a large float32 matrix product over all of the process's CPU devices.
    """
    if device.platform == "cpu":
        return measured_matmul() / jax.local_device_count()
    chip = find_chip(device)
    return chip.peak_flops if chip else None


def measured_matmul(n: int = 1024) -> float:
    x = jax.device_put(jnp.ones((n, n), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
