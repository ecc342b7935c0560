"""Measures the held-out loss: over all held-out samples, by source, and by phase if there are several."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from mice_jax.data.dataset import HeldOut
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.sharding import put_rows

T = TypeVar("T")

MACRO = "eval/macro_loss"  # the mean over sources, in which a small source counts as much as a large one

TOGETHER = 512  # The number of samples that are packed together.


def metric_names(held_out: Sequence[HeldOut], by_phase: bool) -> list[str]:
    """Returns the names of the metrics that `evaluate` returns."""
    if not held_out:
        return []
    sources = dict.fromkeys(f"eval/{h.name}/loss" for h in held_out)
    phases = dict.fromkeys(f"eval/phase/{p}/loss" for h in held_out for p in h.phases * by_phase)
    return ["eval/loss", MACRO, *sources, *phases]


def sources(held_out: Sequence[HeldOut], source: Callable[[Mixture], StepSource]) -> list[StepSource]:
    """Returns the steps of one pass over each set of held-out samples."""
    return [source(_once(h)) for h in held_out]


def evaluate(
    loss: Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    held_out: Sequence[HeldOut],
    source: Callable[[Mixture], StepSource],
    mesh: jax.sharding.Mesh,
    by_phase: bool,
) -> dict[str, float]:
    """Measures the held-out losses. Each is a mean over tokens, even if the training uses another loss reduction.

    Args:
      loss: Returns the loss_sum and the weight_sum of a microbatch.
      held_out: The held-out samples of each source.
      source: Packs the steps of a mixture for this mesh.
      mesh: The run's mesh.
      by_phase: Whether to measure the loss of each phase too.

    Returns:
      The losses by name, see `metric_names`.
    """
    sums: dict[str, tuple[float, float]] = {}
    for h, steps in zip(held_out, sources(held_out, source), strict=True):
        loss_sum, weight_sum = _sums(loss, steps, mesh)
        names = {f"eval/{h.name}/loss", "eval/loss", *(f"eval/phase/{p}/loss" for p in h.phases * by_phase)}
        for name in names:
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + loss_sum, before[1] + weight_sum)
    losses = {name: loss_sum / weight_sum for name, (loss_sum, weight_sum) in sums.items()}
    if held_out:
        losses[MACRO] = statistics.fmean(
            losses[name] for name in dict.fromkeys(f"eval/{h.name}/loss" for h in held_out)
        )
    return {name: losses[name] for name in metric_names(held_out, by_phase)}


def _once(held_out: HeldOut) -> Mixture:
    """Returns a mixture that visits each held-out sample once."""
    return Mixture([PhasePools(held_out.name, 1.0, (Pool(held_out.ids),))], batch_size=TOGETHER, seed=0)


def _sums(loss: Callable[..., Any], steps: StepSource, mesh: jax.sharding.Mesh) -> tuple[float, float]:
    """Returns the sums of losses and of weights over all microbatches."""
    loss_sum = weight_sum = 0.0
    microbatches = itertools.chain.from_iterable(steps[i]["microbatches"] for i in range(len(steps)))
    for sums in _one_behind(loss(put_rows(rows, mesh)) for rows in microbatches):
        found = jax.device_get(sums)
        loss_sum, weight_sum = loss_sum + float(found[0]), weight_sum + float(found[1])
    return loss_sum, weight_sum


def _one_behind(queued: Iterator[T]) -> Iterator[T]:
    """Yields each item after the next one is queued, so that rows are packed while the devices compute."""
    before = next(queued, None)
    for after in queued:
        assert before is not None
        yield before
        before = after
    if before is not None:
        yield before
