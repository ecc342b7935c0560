"""The running average of the weights: what each step counts in it, and the metrics of the average.

After step t the average is the mean of the weights after steps 1 to t. The weights after step k count
2^(-(samples since step k) / half_life) times the samples' share (1 - 2^(-(samples of step k) / half_life)), and the sum
of what they count is divided out. The weights before the first step do not count. So the average of a short run is not
pulled to its start: an update of the first step counts in full and one of the last step least, as under a decayed
learning rate.
"""

import math
from collections.abc import Collection, Mapping

from mice_jax.errors import UserError

PREFIX = "eval/average/"  # of the metrics of the average, in place of "eval/"


def newest_weight(half_life: float, samples: int, total_samples: int) -> float | None:
    """Returns what the weights after a step count in the average after that step.

    With d(n) = 2^(-n / half_life), this is (1 - d(samples)) / (1 - d(total_samples)): 1 after the first step, and
    1 - d(samples) in a long run. Both differences are computed without cancellation.

    Args:
      half_life: The samples after which weights count half; 0 if the run keeps no average.
      samples: The samples of the step.
      total_samples: The samples of the run so far, those of the step included.

    Returns:
      A number from 0 to 1; None if the run keeps no average.
    """
    if not half_life:
        return None
    rate = math.log(2) / half_life
    return math.expm1(-rate * samples) / math.expm1(-rate * total_samples)


def of_average(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns held-out metrics under the names that those of the average have."""
    return {of_average_name(name): value for name, value in metrics.items()}


def of_average_name(name: str) -> str:
    """Returns the name of a held-out metric of the average: eval/loss becomes eval/average/loss."""
    return PREFIX + name.removeprefix("eval/")


def check_source_names(names: Collection[str]) -> None:
    """Raises UserError if a held-out source has the name under which the average is measured."""
    reserved = PREFIX.split("/")[1]
    if reserved in names:
        raise UserError(
            f"a held-out source is named {reserved!r}, and train.ema_half_life measures the average of the weights as "
            f"{PREFIX}loss, which is also the name of that source's loss. Set Source.name to another name."
        )
