"""Measures loss and token accuracy on held-out samples: on all, by source, and by phase if there are several."""

import itertools
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from mice_jax.data.dataset import HeldOut
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.errors import UserError
from mice_jax.sharding import put_rows
from mice_jax.training.metric_names import KEPT, MACRO, MACRO_EXACT_MATCH

T = TypeVar("T")

TOGETHER = 512  # The number of samples that are packed together.


class Sums(NamedTuple):
    """Sums over held-out tokens, and numbers of samples, which are 0 where exact matches are not counted."""

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    matches: float = 0.0
    samples: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """Returns the sums over the tokens of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def metric_names(held_out: Sequence[HeldOut], by_phase: bool, exact_match: bool = False) -> list[str]:
    """Returns the names of the metrics that `evaluate` returns."""
    if not held_out:
        return []
    groups = dict.fromkeys(["eval", *(f"eval/{h.name}" for h in held_out), *_phases(held_out, by_phase)])
    kinds = ("loss", "token_accuracy", *(["exact_match"] if exact_match else []))
    measured = [f"{group}/{kind}" for group in groups for kind in kinds]
    return [measured[0], MACRO, *([MACRO_EXACT_MATCH] if exact_match else []), *measured[1:]]


def _phases(held_out: Sequence[HeldOut], by_phase: bool) -> list[str]:
    return [f"eval/phase/{phase}" for h in held_out for phase in h.phases * by_phase]


def check_retained(retain: Sequence[str], names: Collection[str]) -> None:
    """Raises UserError where a source to be retained is not held out, or where no other source is held out."""
    for name in retain:
        if name not in names:
            has = f"are {', '.join(sorted(names))}" if names else "do not exist"
            raise UserError(
                f"eval.retain names {name!r}, which is not a held-out source; those {has}. Hold the source out in "
                "data.validation, under that name."
            )
    if retain and not set(names) - set(retain):
        raise UserError(
            f"eval.retain={list(retain)} names all held-out sources, so none is left that shows what is learned. Hold "
            "out samples of what the run trains on too, in data.validation."
        )


def sources(held_out: Sequence[HeldOut], source: Callable[[Mixture], StepSource]) -> list[StepSource]:
    """Returns the steps of one pass over each set of held-out samples."""
    return [source(_once(h)) for h in held_out]


def evaluate(
    loss: Callable[[dict[str, jax.Array]], tuple[jax.Array, ...]],
    held_out: Sequence[HeldOut],
    source: Callable[[Mixture], StepSource],
    mesh: jax.sharding.Mesh,
    by_phase: bool,
    exact_match: bool = False,
    retain: Collection[str] = (),
) -> dict[str, float]:
    """Measures on held-out samples. Losses are means over tokens, even if the training uses another loss reduction.

    Args:
      loss: Returns what `StepFunctions.evaluate` does of a microbatch.
      held_out: The held-out samples of each source.
      source: Packs the steps of a mixture for this mesh.
      mesh: The run's mesh.
      by_phase: Whether to measure each phase too.
      exact_match: Whether `loss` counts exact matches.
      retain: The names of sources that the means over sources leave out.

    Returns:
      The metrics by name, see `metric_names`.
    """
    sums: dict[str, Sums] = {}
    for h, steps in zip(held_out, sources(held_out, source), strict=True):
        of_source = _sums(loss, steps, mesh)
        for group in {"eval", f"eval/{h.name}", *_phases([h], by_phase)}:
            sums[group] = of_source.plus(sums.get(group, Sums()))
    metrics: dict[str, float] = {}
    for group, total in sums.items():
        metrics[f"{group}/loss"] = total.loss / total.weight
        metrics[f"{group}/token_accuracy"] = total.correct / total.weight
        if exact_match:
            metrics[f"{group}/exact_match"] = total.matches / total.samples
    names = {h.name for h in held_out} - set(retain)
    if held_out:
        metrics[MACRO] = statistics.fmean(metrics[f"eval/{name}/loss"] for name in names)
    if held_out and exact_match:
        metrics[MACRO_EXACT_MATCH] = statistics.fmean(metrics[f"eval/{name}/exact_match"] for name in names)
    return {name: metrics[name] for name in metric_names(held_out, by_phase, exact_match)}


def known_before(metrics: Mapping[str, Any], retain: Sequence[str]) -> dict[str, float]:
    """Returns what a model knows of the sources to retain, by the names of the metrics that tell it.

    Args:
      metrics: What was measured before the first step.
      retain: The names of the sources.
    """
    kind = "exact_match" if all(f"eval/{name}/exact_match" in metrics for name in retain) else "token_accuracy"
    return {f"eval/{name}/{kind}": metrics[f"eval/{name}/{kind}"] for name in retain}


def kept(metrics: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """Returns the share that is kept of what was known before the first step, as the mean over sources.

    Args:
      metrics: What is measured now.
      known: What `known_before` returned; where it is empty or nothing of a source was known, nothing is returned.
    """
    if not known or min(known.values()) <= 0:
        return {}
    return {KEPT: statistics.fmean(metrics[name] / value for name, value in known.items())}


def _once(held_out: HeldOut) -> Mixture:
    """Returns a mixture that visits each held-out sample once."""
    return Mixture([PhasePools(held_out.name, 1.0, (Pool(held_out.ids),))], batch_size=TOGETHER, seed=0)


def _sums(loss: Callable[..., Any], steps: StepSource, mesh: jax.sharding.Mesh) -> Sums:
    """Returns the sums over all microbatches."""
    total = Sums()
    microbatches = itertools.chain.from_iterable(steps[i]["microbatches"] for i in range(len(steps)))
    for sums in _one_behind(loss(put_rows(rows, mesh)) for rows in microbatches):
        total = total.plus(Sums(*map(float, jax.device_get(sums))))
    return total


def _one_behind(queued: Iterator[T]) -> Iterator[T]:
    """Yields each item after the next one is queued, so that rows are packed while the devices compute."""
    before = next(queued, None)
    for after in queued:
        assert before is not None
        yield before
        before = after
    if before is not None:
        yield before
