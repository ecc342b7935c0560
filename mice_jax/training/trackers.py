"""Experiment trackers: TensorBoard, Weights & Biases and MLflow show the numbers of metrics.jsonl.

The id that a tracker gives to a run is stored in the workdir, so that a resumed run continues the same tracker run.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from mice_jax.config import Config, to_dict
from mice_jax.storage.workdir import METRICS, Workdir
from mice_jax.training.profiler import ProfileWriter
from mice_jax.training.writers import JsonlWriter, TensorBoardWriter, TerminalWriter, Writer, numbers

IDS = "tracking.json"


def make_writers(config: Config, workdir: Workdir, console: Console, steps_done: int, total_steps: int) -> list[Writer]:
    """Makes the writers of a run's records: metrics.jsonl, the trackers that the config names, and the terminal.

    Args:
      config: The run's config.
      workdir: The run's workdir.
      console: The console to print to.
      steps_done: The number of steps that were done before this process started.
      total_steps: The number of the run's last step.

    Returns:
      The writers, each of which must be closed.
    """
    log = config.log
    # The profiler comes last, so that a traced step includes the writing of the record of the step before.
    profile = [ProfileWriter(log.profile_steps, workdir.local / "tensorboard", steps_done)] if log.profile_steps else []
    return [
        JsonlWriter(workdir.local / METRICS),
        *make_trackers(log.trackers, workdir, project=log.project, every_steps=log.every_steps, config=to_dict(config)),
        TerminalWriter(console, steps_done, total_steps, log.every_steps),
        *profile,
    ]


def make_trackers(
    names: Sequence[str], run: Workdir, *, project: str, every_steps: int, config: dict[str, Any]
) -> list[Writer]:
    """Makes the trackers of a run. TensorBoard is always among them.

    Args:
      names: The trackers by name: "tensorboard", "wandb" or "mlflow".
      run: The run's workdir.
      project: The project (Weights & Biases) or experiment (MLflow) that the run belongs to.
      every_steps: The number of steps between two records that are sent to a tracker.
      config: The run's config, which the trackers show.

    Returns:
      The writers, with TensorBoard's first.
    """
    others = [name for name in dict.fromkeys(names) if name != "tensorboard"]
    made = [{"wandb": WandbWriter, "mlflow": MlflowWriter}[name](run, project, every_steps, config) for name in others]
    return [TensorBoardWriter(run.local / "tensorboard", every_steps), *made]


class WandbWriter:
    """Sends records to Weights & Biases, which takes the API key from its own environment variable or login."""

    def __init__(self, run: Workdir, project: str, every_steps: int, config: dict[str, Any]):
        """Starts a Weights & Biases run, or resumes the one whose id is in the workdir.

        Args:
          run: The run's workdir.
          project: The project that the run belongs to.
          every_steps: The number of steps between two records that are sent.
          config: The run's config.
        """
        wandb: Any = importlib.import_module("wandb")
        self._every = every_steps
        known = _known(run, "wandb")
        self._run = wandb.init(
            project=project, name=run.path.name, id=known, resume="allow", config=config, dir=str(run.local)
        )
        _keep(run, "wandb", self._run.id)

    def write(self, record: dict[str, Any]) -> None:
        """Sends the record's numbers if its step is a multiple of `every_steps`."""
        if record["step"] % self._every == 0:
            self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """Ends the Weights & Biases run."""
        self._run.finish()


class MlflowWriter:
    """Sends records to MLflow, at the server or folder that its own environment variable names."""

    def __init__(self, run: Workdir, project: str, every_steps: int, config: dict[str, Any]):
        """Starts an MLflow run, or resumes the one whose id is in the workdir.

        Args:
          run: The run's workdir.
          project: The experiment that the run belongs to.
          every_steps: The number of steps between two records that are sent.
          config: The run's config, which a new MLflow run stores as config.json.
        """
        mlflow: Any = importlib.import_module("mlflow")
        self._mlflow, self._every = mlflow, every_steps
        mlflow.set_experiment(project)
        known = _known(run, "mlflow")
        started = mlflow.start_run(run_id=known, run_name=None if known else run.path.name)
        if known is None:
            mlflow.log_dict(config, "config.json")
        _keep(run, "mlflow", started.info.run_id)

    def write(self, record: dict[str, Any]) -> None:
        """Sends the record's numbers if its step is a multiple of `every_steps`."""
        if record["step"] % self._every == 0:
            self._mlflow.log_metrics(numbers(record), step=record["step"])

    def close(self) -> None:
        """Ends the MLflow run."""
        self._mlflow.end_run()


def _known(run: Workdir, name: str) -> str | None:
    """Returns the id that a tracker gave to this run, or None if it has none yet."""
    return (run.read_json(IDS) or {}).get(name)


def _keep(run: Workdir, name: str, number: str) -> None:
    """Stores the id that a tracker gave to this run."""
    run.write_json(IDS, (run.read_json(IDS) or {}) | {name: number})
