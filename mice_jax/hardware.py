"""Speed, memory and bandwidth of one device of each kind, and the FLOPs of training a model.

A device is what JAX calls a device: a whole chip, or half of a TPU7x chip. Speeds and bandwidths are from the data
sheets (docs.cloud.google.com/tpu/docs; NVIDIA A100, H100, H200, B200), for dense products. The memory of a TPU is what
its compiler (libtpu 0.0.52) gives to a program, that of a GPU the share that JAX preallocates.
"""

import dataclasses
import functools
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mice_jax.models.mixers import MIXERS
from mice_jax.models.spec import Kind, ModelSpec, is_recurrent

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind can do."""

    kinds: tuple[str, ...]  # prefixes of the `device_kind` of such devices
    peak_flops: float  # FLOP/s of bfloat16 products
    memory: float  # bytes that a program can use
    memory_rate: float  # bytes/s
    link_rate: float  # bytes/s sent to neighbours, over all links together
    platform: str = "tpu"
    devices: int = 1  # number of JAX devices on one chip
    capability: str | None = None  # compute capability, for an NVIDIA GPU
    sparse_cores: bool = False  # whether a TPU has SparseCores that run collectives while its products run
    host_rate: float = 16e9  # bytes/s to host memory, and as many from it
    host_memory: float = math.inf  # bytes of the host's memory for each of its devices
    host_devices: int = 8  # devices of a full host


def _gpu(kind: str, capability: str, *rates: float, host: tuple[float, float], host_devices: int = 8) -> Chip:
    rate, memory = host
    return Chip(
        (kind,),
        *rates,
        platform="gpu",
        capability=capability,
        host_rate=rate,
        host_memory=memory,
        host_devices=host_devices,
    )


# By the first part of a topology's name. What is known of hosts:
# - host_rate: GPUs have x16 links of PCIe 4.0 (32e9 each way) or 5.0 (64e9), by their data sheets. "How to Scale Your
#   Model", part 2 (jax-ml.github.io/scaling-book/tpus) gives a v4 16e9, v5 chips about as much, and a v6e 32e9. That of
#   a TPU7x is an assumption.
# - host_memory: that of Google Cloud's machine type with all chips of a host, in GB, by its pages on TPU and GPU
#   machines: ct4p-hightpu-4t 407, ct5lp-hightpu-8t 384, ct5p-hightpu-4t 448, ct6e-standard-8t 1440, tpu7x-standard-4t
#   960, a2-highgpu-8g 680, a2-ultragpu-8g 1360, a3-highgpu-8g 1872, a3-ultragpu-8g 2952, a4-highgpu-8g 3968. Those of
#   ct4p, a3-ultragpu and a4 were not looked up again. The 64 GB of a host with one GPU of 24 GB are an assumption.
CHIPS: dict[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1.2e12, 270e9, host_memory=101e9, host_devices=4),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.82e12, 200e9, host_memory=48e9),
    "v5p": Chip(
        ("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2.765e12, 600e9,
        sparse_cores=True, host_memory=112e9, host_devices=4,
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1.6e12, 400e9,
        sparse_cores=True, host_rate=32e9, host_memory=180e9,
    ),
    "tpu7x": Chip(
        ("TPU7x",), 1153.5e12, 94.74 * GIB, 3.69e12, 300e9,
        devices=2, sparse_cores=True, host_rate=32e9, host_memory=120e9,
    ),
    "l4": _gpu("NVIDIA L4", "8.9", 121e12, 18.1e9, 0.3e12, 32e9, host=(32e9, 64e9), host_devices=1),
    "rtx4090": _gpu(
        "NVIDIA GeForce RTX 4090", "8.9", 165e12, 19.3e9, 1.008e12, 32e9, host=(32e9, 64e9), host_devices=1
    ),
    "a100-40": _gpu("NVIDIA A100-SXM4-40GB", "8.0", 312e12, 31.7e9, 1.55e12, 300e9, host=(32e9, 85e9)),
    "a100": _gpu("NVIDIA A100", "8.0", 312e12, 63.8e9, 2.0e12, 300e9, host=(32e9, 170e9)),
    "h100": _gpu("NVIDIA H100", "9.0", 989e12, 63.7e9, 3.35e12, 450e9, host=(64e9, 234e9)),
    "h200": _gpu("NVIDIA H200", "9.0", 989e12, 112.8e9, 4.8e12, 450e9, host=(64e9, 369e9)),
    "b200": _gpu("NVIDIA B200", "10.0", 2250e12, 144e9, 7.7e12, 900e9, host=(64e9, 496e9)),
}  # fmt: skip

# JAX preallocates this share of a GPU's memory, unless the environment variable sets another. The memory of GPUs in
# CHIPS is this share.
DEFAULT_GPU_MEMORY_FRACTION = 0.75
GPU_MEMORY_FRACTION_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
GPUS_PER_HOST = 8
NETWORK_RATE = 50e9  # bytes/s from one GPU to GPUs of other hosts: an assumption, a link of 400 Gbit/s per GPU
CPU_MEMORY_RATE = 20e9  # bytes/s of all CPU devices of a machine together: an assumption


def gpu_memory_fraction() -> float:
    """The share of a GPU's memory that JAX preallocates."""
    return float(os.environ.get(GPU_MEMORY_FRACTION_VARIABLE) or DEFAULT_GPU_MEMORY_FRACTION)


def find_chip(device: Any) -> Chip | None:
    """The entry of `CHIPS` for a device; None for a CPU or an unknown device."""
    known = {k: chip for chip in CHIPS.values() for k in chip.kinds if device.device_kind.startswith(k)}
    return known[max(known, key=len)] if known else None


def cpu_chip(count: int, peak_flops: float, memory: int) -> Chip:
    """Describes one of the CPU devices of a machine, which share its speed and memory equally.

    Args:
      count: the number of CPU devices.
      peak_flops: FLOP/s of the machine.
      memory: bytes of the machine.

    Returns:
      One device.
    """
    rate = CPU_MEMORY_RATE / count
    return Chip(
        ("cpu",), peak_flops / count, memory / count, rate, rate,
        platform="cpu", host_rate=rate, host_memory=memory / count, host_devices=count,
    )  # fmt: skip


def matmul_flops(spec: ModelSpec) -> int:
    """FLOPs a token of the forward pass without attention's scores and values: two for each weight of a product.

    The embedding look-up costs nothing; the output projection costs its matmul whether or not it is tied.
    """
    s = spec

    def of_mixer(kind: Kind) -> int:
        if is_recurrent(kind):
            return MIXERS[type(kind)].flops_per_token(s, kind)
        attention = s.attention_of(kind)
        projections = 0 if attention.keys == "borrowed" else 1 if attention.values_are_keys else 2
        heads = (3 if s.attention_gate else 2) * s.num_heads + projections * attention.num_kv_heads
        return 2 * s.d_model * attention.head_dim * heads

    of_layers = sum(of_mixer(kind) + 6 * s.d_model * s.d_ff_of(kind) for kind in s.mixers)
    own_embeddings = 2 * s.num_layers * 3 * s.d_model * s.per_layer_dim
    return of_layers + own_embeddings + 2 * s.vocab_size * s.d_model


def attention_flops(spec: ModelSpec, lengths: np.ndarray) -> float:
    """FLOPs of the forward attention over samples of these lengths.

    Causal attention over n tokens has n^2/2 pairs, each with head_dim multiply-adds for the score and as many for the
    value, in every head; a window of w leaves wn - w^2/2 of them.

    Args:
        spec: the model.
        lengths: tokens of each sample, int or float [samples].

    Returns:
        FLOPs of all layers with attention, and all samples, together.
    """
    n = lengths.astype(np.float64)
    of_layers = zip(spec.windows, spec.mixers, strict=True)
    attending = [(window, spec.attention_of(kind).head_dim) for window, kind in of_layers if not is_recurrent(kind)]
    seen = [(np.minimum(n, window or np.inf), dims) for window, dims in attending]
    return 4 * spec.num_heads * sum(dims * float((w * n - w * w / 2).sum()) for w, dims in seen)


def train_flops(spec: ModelSpec, lengths: np.ndarray, *, frozen: bool = False) -> float:
    """Model FLOPs of forward and backward, which costs twice as much, over samples; recomputation is not counted.

    Args:
        spec: the model.
        lengths: tokens of each sample, int or float [samples].
        frozen: whether only adapters are trained, so that the weights themselves have no gradients. The adapters' own
            products, a few percent, are not counted.

    Returns:
        FLOPs of all samples together.
    """
    tokens = float(lengths.astype(np.float64).sum())
    return passes_with_weights(frozen) * matmul_flops(spec) * tokens + 3 * attention_flops(spec, lengths)


def passes_with_weights(frozen: bool) -> int:
    """Returns how often a step multiplies by each weight: forward, and backward for activations and for the weight."""
    return 2 if frozen else 3


def customary_train_flops(spec: ModelSpec, tokens: int, num_params: int, length: int) -> float:
    """Computes the FLOPs of a step by the customary formula, (6 P + 12 L d S) per token (PaLM, arXiv 2204.02311).

    It counts the embedding as a product, and attention over whole rows of length S without a causal mask, both of which
    `train_flops` leaves out. Other frameworks report utilisation by it.

    Args:
        spec: the model's architecture: its layers with attention L, and the width d of all heads of each together.
        tokens: the number of real tokens of the step.
        num_params: the number of all parameters, P.
        length: the length of a row, S.
    """
    dims = sum(spec.attention_of(kind).head_dim for kind in spec.mixers if not is_recurrent(kind))
    return tokens * (6.0 * num_params + 12.0 * spec.num_heads * dims * length)


def peak_memory_bytes() -> int | None:
    """Returns the most memory that a local device has had in use so far; None if the devices do not count it."""
    counted = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in counted if peak is not None]
    return max(known) if known else None


def peak_flops(device: Any) -> float | None:
    """The peak FLOP/s of one device; None for an unknown device.

    That of a CPU is measured: the speed of a large float32 matrix product, divided among the process's CPU devices.
    """
    if device.platform == "cpu":
        return measure_matmul_flops() / jax.local_device_count()
    chip = find_chip(device)
    return chip.peak_flops if chip else None


def peak_flops_of_all_devices() -> float | None:
    """FLOP/s of all devices of the run together; None if the table lacks them."""
    peak = peak_flops(jax.local_devices()[0])
    return peak * jax.device_count() if peak else None


@functools.cache
def measure_matmul_flops(n: int = 384, repetitions: int = 100) -> float:
    """Measures the FLOP/s of a float32 product of two [n n] matrices on the first local device.

    A product takes milliseconds, and the fastest of many counts: on a busy machine some still run undisturbed. One
    process measures once.
    """
    x = jax.device_put(jnp.ones((n, n), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
