"""Which checkpoints of a run are kept."""

import math
from collections.abc import Collection, Mapping

SavedSteps = Mapping[int, Mapping[str, float]]  # step -> {"samples": ..., and "score" where it was measured}


def checkpoints_to_keep(
    saved: SavedSteps,
    *,
    keep_last: int,
    keep_best: int,
    keep_every: int,
    mode: str,
    also: Collection[int] = (),
) -> set[int]:
    """Returns the steps to keep, which is the union of what each rule keeps, or all steps if no rule is set.

    Args:
      saved: samples and score of each saved step.
      keep_last: number of newest steps to keep; with any rule set, the newest step is always kept.
      keep_best: number of steps with the best scores to keep.
      keep_every: keep each step that is the first at or past a multiple of this many samples.
      mode: "min" if a lower score is better, "max" if a higher score is.
      also: steps to keep in any case.

    Returns:
      A subset of the steps in `saved`.
    """
    steps = sorted(saved)
    if not (keep_last or keep_best or keep_every):
        return set(steps)
    kept = set(steps[-max(1, keep_last) :]) | set(rank_by_score(saved, mode)[:keep_best]) | (set(also) & set(steps))
    previous_samples = 0
    for step in steps:
        samples = int(saved[step]["samples"])
        if keep_every and samples // keep_every > previous_samples // keep_every:
            kept.add(step)
        previous_samples = samples
    return kept


def rank_by_score(saved: SavedSteps, mode: str) -> list[int]:
    """Returns the steps that have a finite score, the best first; among equal scores, the earlier step comes first."""
    scores = {step: s["score"] for step, s in saved.items() if math.isfinite(s.get("score", math.nan))}
    sign = 1 if mode == "min" else -1
    return sorted(scores, key=lambda step: (sign * scores[step], step))
