"""Compares a compiled microbatch with the limits that a good program keeps, by the compiler's own schedule.

The limits are those of a mesh without a tensor axis, where every all-gather is of parameters and every reduction of
gradients.
"""

import dataclasses
import math
from collections.abc import Sequence

from mice_jax.hardware import Chip, matmul_flops
from mice_jax.models.spec import ModelSpec
from mice_jax.planning import scheduled_hlo
from mice_jax.planning.scheduled_hlo import Array, Collective, Counts, Instruction

LARGE = 2**20  # bytes of an array that is worth a line
MAX_EXTRA_FLOPS = 1.03  # FLOPs of a program over those of the model
MIN_OVERLAP = 0.95  # share of the bytes of collectives that are sent while products run
MAX_EXPOSED = 0.10  # share of the time in which a device waits for a collective
# Splash computes scores over whole rows, below the diagonal. Products of [T S] and [S H] in each of its kernels:
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of a program, with its limit.

    Attributes:
      name: What it is.
      value: The figure, with its unit.
      limit: The limit, as a sentence would say it.
      kept: Whether the figure keeps it.
    """

    name: str
    value: str
    limit: str
    kept: bool


def count_microbatch(text: str, chip: Chip, *, rows: int, slots: int, chunk: int) -> Counts:
    """Counts what a compiled `accumulate` does on one device, if every slot has a loss.

    Args:
      text: The compiled program.
      chip: The device.
      rows: Rows of the microbatch on one device.
      slots: Slots of a row.
      chunk: Tokens whose logits are computed at once; the loop over them has as many rounds as tokens with a loss need.
    """
    return scheduled_hlo.count(
        scheduled_hlo.parse_program(text),
        peak_flops=chip.peak_flops,
        link_rate=chip.link_rate,
        unknown_trips=-(-rows * slots // chunk),
        kernel_flops=splash_flops,
    )


def count_schedule(text: str) -> Counts:
    """Counts a compiled `accumulate` of which only the schedule matters, with any rates and one round of the loss."""
    program = scheduled_hlo.parse_program(text)
    return scheduled_hlo.count(program, peak_flops=1.0, link_rate=1.0, unknown_trips=1, kernel_flops=splash_flops)


def overlap(counts: Counts) -> float | None:
    """Returns the share of the bytes of collectives that are sent while products run; None if nothing is sent."""
    sent = _sent_bytes(counts.collectives)
    return _sent_bytes([c for c in counts.collectives if c.overlaps]) / sent if sent else None


def _sent_bytes(collectives: Sequence[Collective]) -> float:
    """Returns the bytes that one device sends in all rounds of the collectives."""
    return sum(c.times * c.sent_bytes for c in collectives)


def splash_flops(kernel: Instruction, operands: Sequence[Array]) -> float:
    """Returns the FLOPs of one of splash's kernels; 0 for any other custom call.

    Half of the scores are below the diagonal. This holds on average also for devices that share a row, of which each
    has some of the queries and all keys.

    Args:
      kernel: The call, whose name says which kernel it is.
      operands: The arrays that it is given. The first that hold numbers are queries [N T H] and keys [K S H], with a
        leading dim for several rows.
    """
    products = next((count for name, count in SPLASH_PRODUCTS.items() if kernel.name.startswith(name)), 0)
    shapes = [a.shape for a in operands if a.dtype in ("bf16", "f32") and len(a.shape) >= 3]
    if not products or len(shapes) < 2:
        return 0.0
    (*heads, queries, head_dim), (*_, keys, _) = shapes[:2]
    return products * 2 * math.prod(heads) * queries * keys * head_dim / 2


def figures(counts: Counts, spec: ModelSpec, *, params: int, tokens: int, remat: str, itemsize: int) -> list[Figure]:
    """Compares the figures of a microbatch with their limits.

    Args:
      counts: What the program does on one device.
      spec: The model.
      params: Its number of parameters.
      tokens: The slots of the microbatch on one device.
      remat: The rematerialisation policy.
      itemsize: Bytes of a number of the compute dtype.
    """
    gathers = [c for c in counts.collectives if c.kind == "all-gather"]
    reductions = [c for c in counts.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    large_reductions = [c for c in reductions if c.full_bytes >= LARGE]
    gathered, reduced = _bytes(gathers), _bytes(reductions)
    model = 3 * matmul_flops(spec) * tokens
    allowed = model * (4 / 3 if remat == "full" else 1)
    share = overlap(counts)
    overlapping = 1.0 if share is None else share
    exposed = counts.exposed_s / (counts.compute_s + counts.exposed_s)
    copies = [c for c in counts.copies if c.in_loop and c.array.size > LARGE]
    lowest = {2: {"bf16"}, 4: {"f32"}}[itemsize]
    return [
        Figure(
            "FLOPs of products",
            f"{counts.flops:.4g}, {counts.flops / model:.3f} of the model's",
            f"{MAX_EXTRA_FLOPS * allowed / model:.3f} of the model's",
            counts.flops <= MAX_EXTRA_FLOPS * allowed,
        ),
        Figure(
            "all-gathers of parameters",
            f"{_dtypes(gathers)}, {gathered / params / itemsize:.2f} times the parameters",
            f"{', '.join(lowest)}, at most twice the parameters",
            {d for c in gathers if c.full_bytes >= LARGE for d in c.dtypes} <= lowest
            and gathered <= 2.01 * params * itemsize,
        ),
        Figure(
            "reduction of gradients",
            f"{_kinds(reductions)}, {reduced / params / 4:.2f} times the parameters in float32",
            "reduce-scatter, f32, once the parameters",
            all(c.kind == "reduce-scatter" and c.dtypes == ("f32",) for c in large_reductions)
            and reduced <= 1.01 * params * 4,
        ),
        Figure(
            "bytes sent while products run",
            f"{overlapping:.0%} of {_sent_bytes(counts.collectives) / 1e9:.2f} GB",
            f"{MIN_OVERLAP:.0%}",
            overlapping >= MIN_OVERLAP,
        ),
        Figure(
            "time exposed",
            f"{1e3 * counts.exposed_s:.2f} ms exposed, {1e3 * counts.compute_s:.2f} ms of products, {exposed:.1%}",
            f"{MAX_EXPOSED:.0%}",
            exposed <= MAX_EXPOSED,
        ),
        Figure(
            "copies in loops above 1 MiB",
            f"{len(copies)}, {sum(c.array.size for c in copies) / 1e6:.0f} MB a round",
            "none",
            not copies,
        ),
        Figure(
            "transfers to or from the host",
            ", ".join(counts.host_transfers) or "none",
            "none",
            not counts.host_transfers,
        ),
    ]


def _bytes(collectives: list[Collective]) -> int:
    return sum(c.times * c.full_bytes for c in collectives)


def _dtypes(collectives: list[Collective]) -> str:
    """The dtypes of collectives of large arrays."""
    return ", ".join(sorted({d for c in collectives if c.full_bytes >= LARGE for d in c.dtypes})) or "none"


def _kinds(collectives: list[Collective]) -> str:
    """The kinds and dtypes of collectives of large arrays, each with its bytes."""
    sums: dict[str, int] = {}
    for c in collectives:
        if c.full_bytes >= LARGE:
            kind = f"{c.kind} {'/'.join(c.dtypes)}"
            sums[kind] = sums.get(kind, 0) + c.times * c.full_bytes
    return ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sorted(sums.items())) or "none"
