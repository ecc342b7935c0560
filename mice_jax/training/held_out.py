"""Held-out loss: over everything held out, by source, and by phase where there are several."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from mice_jax.data.dataset import HeldOut
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.sharding import put_rows

T = TypeVar("T")

TOGETHER = 512  # samples that are packed together


def metric_names(held_out: Sequence[HeldOut], by_phase: bool) -> list[str]:
    """What `evaluate` measures."""
    if not held_out:
        return []
    sources = dict.fromkeys(f"eval/{h.name}/loss" for h in held_out)
    phases = dict.fromkeys(f"eval/phase/{p}/loss" for h in held_out for p in h.phases * by_phase)
    return ["eval/loss", *sources, *phases]


def sources(held_out: Sequence[HeldOut], source: Callable[[Mixture], StepSource]) -> list[StepSource]:
    """What is held out, each packed as the steps of one pass over it."""
    return [source(_once(h)) for h in held_out]


def evaluate(
    loss: Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    held_out: Sequence[HeldOut],
    source: Callable[[Mixture], StepSource],
    mesh: jax.sharding.Mesh,
    by_phase: bool,
) -> dict[str, float]:
    """The losses, each one ratio of sums over all its tokens: token-weighted whatever the training's reduction.

    Args:
      loss: a microbatch's loss_sum and weight_sum.
      source: packs the steps of a mixture, for this mesh.
    """
    sums: dict[str, tuple[float, float]] = {}
    for h, steps in zip(held_out, sources(held_out, source), strict=True):
        loss_sum, weight_sum = _sums(loss, steps, mesh)
        names = {f"eval/{h.name}/loss", "eval/loss", *(f"eval/phase/{p}/loss" for p in h.phases * by_phase)}
        for name in names:
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + loss_sum, before[1] + weight_sum)
    return {name: sums[name][0] / sums[name][1] for name in metric_names(held_out, by_phase)}


def _once(held_out: HeldOut) -> Mixture:
    return Mixture([PhasePools(held_out.name, 1.0, (Pool(held_out.ids),))], batch_size=TOGETHER, seed=0)


def _sums(loss: Callable[..., Any], steps: StepSource, mesh: jax.sharding.Mesh) -> tuple[float, float]:
    loss_sum = weight_sum = 0.0
    microbatches = itertools.chain.from_iterable(steps[i]["microbatches"] for i in range(len(steps)))
    for sums in _one_behind(loss(put_rows(rows, mesh)) for rows in microbatches):
        found = jax.device_get(sums)
        loss_sum, weight_sum = loss_sum + float(found[0]), weight_sum + float(found[1])
    return loss_sum, weight_sum


def _one_behind(queued: Iterator[T]) -> Iterator[T]:
    """Each one once the next is queued too: rows are packed, and go to the devices, while these work."""
    before = next(queued, None)
    for after in queued:
        assert before is not None
        yield before
        before = after
    if before is not None:
        yield before
