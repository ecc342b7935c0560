"""Checks a batch size that nobody chose against the data, and advises one.

The default of `optim.batch_size` is that of the study, whose data has hundreds of thousands of samples. On a small
data set it would make every step a whole epoch. The advice is that of the study's authors in the guide of training_hub,
their library (https://github.com/Red-Hat-AI-Innovation-Team/training_hub, `.claude/skills/training-hub-guide/SKILL.md`
at commit dad93f6): batches of 32 to 64 below 1,000 samples, 128 from 1,000 to 10,000, and 256 or more above; learning
rates of 5e-6 for small data sets and 1e-6 for large ones.
"""

from mice_jax.data.mixture import Mixture
from mice_jax.errors import UserError

ADVICE = (
    "32 to 64 samples below 1,000 samples, 128 up to 10,000 and 256 or more above, at a learning rate of 1e-6 to 5e-6"
)


def advised_batch_size(samples: int) -> int:
    """The smallest batch size that the study's authors advise for a data set of this many samples."""
    if samples < 1_000:
        return 32
    return 128 if samples <= 10_000 else 256


def check_default_batch_size(mixture: Mixture, batch_size: int) -> None:
    """Raises UserError if no step of some phase is full because `optim.batch_size` was left at its default.

    Args:
      mixture: the steps of the run.
      batch_size: the default. A phase that sets its batch size does not use it.

    Raises:
      UserError: the largest epoch of a phase has fewer samples than a batch; the text names a size.
    """
    sizes = {
        phase.name: size
        for phase, size in zip(mixture.phases, mixture.largest_epochs(), strict=True)
        if not phase.batch_size and size < batch_size
    }
    if not sizes:
        return
    listed = ", ".join(f"{name!r} ({size:,} samples an epoch)" for name, size in sizes.items())
    advised = advised_batch_size(max(sizes.values()))
    raise UserError(
        f"optim.batch_size is not set, and its default of {batch_size:,} samples is larger than an epoch of the phase "
        f"{listed}, so that each step would be a whole epoch. Set it, for example --config.optim.batch_size={advised}: "
        f"the study's authors advise {ADVICE} (docs/configs.md). Set to {batch_size} by you, it is only warned of."
    )
