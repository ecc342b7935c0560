"""Average the weights of a run's last checkpoints, with the same weight for each.

  mice average --workdir=runs/demo --last=5
  mice average --workdir=runs/demo --last=5 --output=runs/demo_averaged
  mice export --workdir=runs/demo_averaged --output=demo_hf

The result is a folder that export, evaluate and generate take like a run's workdir. Its single checkpoint has the
number of the newest of the averaged steps. checkpoint.every_samples sets how far checkpoints are apart.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("average")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from mice_jax.checkpoint import CheckpointReader, Checkpoints
from mice_jax.cli.flags import define_average
from mice_jax.errors import UserError
from mice_jax.model_source import ModelSource, resolve_source
from mice_jax.models.transformer import Params
from mice_jax.step import TrainState
from mice_jax.storage.checkpoint_steps import check_last
from mice_jax.storage.model_names import check_workdir
from mice_jax.storage.outputs import check_new_folder
from mice_jax.storage.recorded_config import AVERAGED
from mice_jax.storage.workdir import Workdir
from mice_jax.training import build


def average(values: command.Values) -> None:
    """Writes the mean of the weights of the last checkpoints of --workdir to --output.

    Args:
      values: The values of the command's flags.

    Raises:
      UserError: A flag is not valid, the output exists, or the run has too few checkpoints.
    """
    workdir, last = command.workdir_of(values), int(command.required(values, "last"))
    check_workdir(workdir)
    source = resolve_source(str(workdir))
    steps, samples = _last_steps(source, last)
    output = _output(values, steps)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source.folder, partial / "model")

    run, made = Workdir(source.folder.parent), Workdir(partial)
    of = f"the mean of the weights after steps {', '.join(map(str, steps))}"
    made.write_json(AVERAGED, {"workdir": str(workdir), "steps": steps, "average": of})
    for name in ("config.json", "data_report.json", "summary.json"):
        if (content := run.read_json(name)) is not None:
            if name == "config.json" and "lora" in content["model"]:
                content["model"]["lora"]["rank"] = 0  # What is written is the mean of merged weights.
            made.write_json(name, content)
    checkpoints = Checkpoints(partial)
    params = mean_params(source, steps)
    checkpoints.save(TrainState(jnp.asarray(steps[-1], jnp.int32), params, None), {"samples": samples})
    checkpoints.wait()
    checkpoints.close()
    if output.exists():
        output.rmdir()
    partial.rename(output)
    print(f"averaged the weights after steps {', '.join(map(str, steps))} to {output}")
    print(f"next: mice export --workdir={output} --output=HF_DIR")


def mean_params(source: ModelSource, steps: Sequence[int]) -> Params:
    """Returns the mean of a run's parameters after several steps, summed in float32.

    Two sets of parameters are in memory at a time, split over all devices.

    Args:
      source: The run.
      steps: The steps, each of which has a checkpoint.
    """
    total = build.load_for_inference(source, step=steps[0]).params
    add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
    for step in steps[1:]:
        total = add(total, build.load_for_inference(source, step=step).params)
    divide = jax.jit(lambda total: jax.tree.map(lambda x: x / len(steps), total), donate_argnums=0)
    return divide(total)


def _last_steps(source: ModelSource, last: int) -> tuple[list[int], int]:
    """Returns the newest steps that have checkpoints, in order, and the samples that the run had seen at the end."""
    assert source.workdir is not None, "resolve_source has found a run"
    reader = CheckpointReader(source.workdir)
    steps = reader.steps()
    check_last(source.workdir, steps, last)
    samples = reader.samples(steps[-1])
    reader.close()
    return steps[-last:], samples


def _output(values: command.Values, steps: Sequence[int]) -> Path:
    """Returns the folder to write, which is absent or empty."""
    if values.output is None and "://" in str(values.workdir):
        raise UserError(f"--output is missing. {values.workdir} is in a bucket; give a folder on this disk.")
    default = Path(values.workdir) / "averages" / f"{steps[-1]}_last_{len(steps)}"
    output = Path(values.output) if values.output else default
    check_new_folder("output", output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; `argv` is by default that of the process."""
    return command.run(__doc__, define_average, average, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
