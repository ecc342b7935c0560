"""Go on from a checkpoint of a run with other settings, and find the critical batch size by it.

  mice branch --from=runs/a --at=8192 --axes=optim.batch_size=16,32,64,128 --for=4096 --workdir=branches/a
  mice branch --from=runs/a --at=8192 --axes="optim.schedule=constant,wsd optim.decay_ratio=0.2" --workdir=branches/b

Each branch begins with the weights, moments, counters and place in the data of the checkpoint. By default the learning
rate follows the batch size by its square root, and beta2 keeps its half-life in samples. The branches are the trials of
a sweep: running the command again continues it, and mice report shows it.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("branch")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mice_jax.cli import flag_checks
from mice_jax.cli.flags import define_branch
from mice_jax.config_checks import beta2_of, rate_of
from mice_jax.runtime import watchdog
from mice_jax.sweeps import branches
from mice_jax.sweeps.trials import trial_config

WIDTH = 140  # columns of the table where the output is not a terminal


def begin(values: command.Values) -> int | None:
    """Plans the branches that the flags describe, and runs them as a sweep; returns the exit code."""
    flag_checks.check_branch(values)
    made = branches.plan(
        Path(command.required(values, "from")),
        command.required(values, "at"),
        values.axes,
        samples=int(values["for"].value or 0),
        scale=values.scale,
        seeds=flag_checks.parse_seeds(values.seeds),
        tolerance=values.tolerance,
    )
    _print(made)
    if values.dry_run:
        return 0
    workdir = Path(command.required(values, "workdir"))
    file = branches.write(made, workdir)
    arguments = [f"--config={file}", f"--workdir={workdir}", f"--workers={values.workers}"]
    return watchdog.run_child("mice_jax.sweep", arguments, workdir)


def _print(made: branches.Plan) -> None:
    """Prints each arm with what follows from its settings."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(*made.sweep.axes, "learning rate", "beta2", "steps", "samples")
    end = made.sweep.base.branch.samples
    for params, steps in made.ends:
        config = trial_config(made.sweep, params)
        values = [str(params[name]) for name in made.sweep.axes]
        rate = f"{rate_of(config.optim):.6g}"
        table.add_row(*values, rate, f"{beta2_of(config.optim):.6g}", f"{steps:,}", f"{end - made.samples:,}")
    console.print(table)
    seeds = f"seed{'s' * (len(made.sweep.seeds) > 1)} {', '.join(map(str, made.sweep.seeds))}"
    console.print(f"from {made.run}, step {made.step} ({made.samples:,} samples), to {end:,} samples, with {seeds}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command.run(__doc__, define_branch, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
