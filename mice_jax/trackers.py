"""Where a run's numbers are shown beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A tracker's own id for the run is kept in the workdir, so that a resumed run goes on in the same place.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from mice_jax.config import Config, to_dict
from mice_jax.errors import UserError
from mice_jax.metrics import JsonlWriter, TensorBoardWriter, TerminalWriter, Writer, numbers
from mice_jax.storage.workdir import METRICS, Workdir

IDS = "tracking.json"


def check_trackers(names: Sequence[str]) -> None:
    """UserError where a tracker's package is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.trackers has {name!r}, but the package {name} is not installed: pip install "
                "'mice_jax[tracking]', or leave it out."
            )


def make_writers(config: Config, workdir: Workdir, console: Console, first_step: int, total_steps: int) -> list[Writer]:
    """The writers of a run's records: metrics.jsonl, the trackers that the config names, and the terminal.

    Args:
      config: the run's config.
      workdir: its folder.
      console: the terminal.
      first_step: the number of steps that are done.
      total_steps: the number of the last step.
    """
    log = config.log
    return [
        JsonlWriter(workdir.local / METRICS),
        *make_trackers(log.trackers, workdir, project=log.project, every_steps=log.every_steps, config=to_dict(config)),
        TerminalWriter(console, first_step, total_steps, log.every_steps),
    ]


def make_trackers(
    names: Sequence[str], run: Workdir, *, project: str, every_steps: int, config: dict[str, Any]
) -> list[Writer]:
    """TensorBoard's writer, and one for each other name; `config` is shown with the run."""
    others = [name for name in dict.fromkeys(names) if name != "tensorboard"]
    made = [{"wandb": WandbWriter, "mlflow": MlflowWriter}[name](run, project, every_steps, config) for name in others]
    return [TensorBoardWriter(run.local / "tensorboard", every_steps), *made]


class WandbWriter:
    """Weights & Biases; the key comes from its own environment variable or login."""

    def __init__(self, run: Workdir, project: str, every_steps: int, config: dict[str, Any]):
        wandb: Any = importlib.import_module("wandb")
        self._every = every_steps
        known = _known(run, "wandb")
        self._run = wandb.init(
            project=project, name=run.path.name, id=known, resume="allow", config=config, dir=str(run.local)
        )
        _keep(run, "wandb", self._run.id)

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] % self._every == 0:
            self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """MLflow, at the server or folder that its own environment variable names."""

    def __init__(self, run: Workdir, project: str, every_steps: int, config: dict[str, Any]):
        mlflow: Any = importlib.import_module("mlflow")
        self._mlflow, self._every = mlflow, every_steps
        mlflow.set_experiment(project)
        known = _known(run, "mlflow")
        started = mlflow.start_run(run_id=known, run_name=None if known else run.path.name)
        if known is None:
            mlflow.log_dict(config, "config.json")
        _keep(run, "mlflow", started.info.run_id)

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] % self._every == 0:
            self._mlflow.log_metrics(numbers(record), step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()


def _known(run: Workdir, name: str) -> str | None:
    return (run.read_json(IDS) or {}).get(name)


def _keep(run: Workdir, name: str, number: str) -> None:
    run.write_json(IDS, (run.read_json(IDS) or {}) | {name: number})
