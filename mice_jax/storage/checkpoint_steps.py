"""The steps of a run's checkpoints, and the errors about those that are asked for and not there."""

from collections.abc import Sequence

from mice_jax.errors import UserError, format_count
from mice_jax.storage.paths import RunPath

AVERAGE = "average"  # the part of a checkpoint that holds the running average of the weights


def saved_steps(workdir: RunPath) -> list[int]:
    """Returns the steps of the complete checkpoints of a run on disk, in order; one that is being saved is left out."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def choose_step(folder: RunPath, steps: Sequence[int], asked: int | None) -> int:
    """Returns the step of the checkpoint to load.

    Args:
      folder: The folder of the checkpoints, for messages.
      steps: The steps of the checkpoints that there are, in order.
      asked: The step that is asked for; None takes the newest.

    Raises:
      UserError: There is no such checkpoint.
    """
    if not steps:
        raise UserError(f"{folder} holds no complete checkpoint.")
    if asked is not None and asked not in steps:
        raise UserError(f"{folder} has no step {asked}; it has {', '.join(map(str, steps))}.")
    return steps[-1] if asked is None else asked


def check_has_average(checkpoint: RunPath) -> None:
    """Raises UserError where a checkpoint has no running average of the weights."""
    if not (checkpoint / AVERAGE).exists():
        raise UserError(
            f"{checkpoint} holds no average of the weights: its run has train.ema_half_life=0, or mice average wrote "
            "it. Leave out --average or the /average at the end of the path, or take the mean of several checkpoints "
            "(mice average)."
        )


def check_last(workdir: RunPath, steps: Sequence[int], last: int) -> None:
    """Checks that a run has the checkpoints that `mice average` is to average.

    Args:
      workdir: The run's workdir, for messages.
      steps: The steps of its checkpoints.
      last: How many of the newest are to be averaged.

    Raises:
      UserError: It has fewer.
    """
    if len(steps) >= last:
        return
    there = f": {', '.join(map(str, steps))}" if steps else ""
    found = format_count(len(steps), "complete checkpoint")
    raise UserError(
        f"--last={last}: {workdir} has {found}{there}. Give a smaller number. For more, train with "
        f"checkpoint.keep_last={last} (0 keeps all, unless another keep_ field is set), and a "
        "checkpoint.every_samples that saves as many."
    )
