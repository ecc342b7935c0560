"""The config that a run was made with, which a resumed run is compared with before its imports."""

from pathlib import Path
from typing import Any

from mice_jax.config import Config, differences, to_dict
from mice_jax.errors import UserError
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import RunPath

CONFIG = "config.json"
AVERAGED = "average.json"  # marks a folder that `mice average` has written, which cannot be resumed
ADDED = ("resolved", "provenance")  # These keys of config.json are not fields of the config.


def is_run_config(content: Any) -> bool:
    """Returns whether the content of a config.json is that of a run, and not that of a model."""
    return "optim" in content


def read_run_config(flag: str, run: Path) -> dict[str, Any]:
    """Returns the content of the config.json of a run, the fields of its config and ADDED.

    Args:
      flag: The flag that gives the run, for messages.
      run: The workdir of the run, on this disk.

    Raises:
      UserError: It is not the workdir of a run, or the file is damaged.
    """
    there = read_json(run / CONFIG) if "://" not in str(run) else None
    if there is None or not is_run_config(there):
        what = f"it has no {CONFIG}" if there is None else f"its {CONFIG} is that of a model"
        raise UserError(
            f"--{flag}={run} is not the folder of a run on this disk: {what}. Give the --workdir of "
            "a run of mice train."
        )
    return there


def check_same_config(workdir: RunPath, config: Config, local: RunPath | None = None) -> None:
    """Checks that a run of the same config, apart from fields that a resume may change, is in a workdir, or none.

    Args:
      workdir: The workdir.
      config: The config of the run that is to start.
      local: The folder with the copy of the workdir's small files, where it is in a bucket.

    Raises:
      UserError: The workdir has a run of another config, or averaged weights.
    """
    folder = local or workdir
    if (folder / AVERAGED).exists():
        raise UserError(
            f"--workdir={workdir} holds weights that mice average has written, and no run to resume. Give another "
            "--workdir; model.init_from may name this one."
        )
    old = read_json(folder / CONFIG)
    if old is None:
        return
    if not is_run_config(old):
        raise UserError(
            f"--workdir={workdir} holds a model ({CONFIG} is that of one), and no run. Give another folder."
        )
    changed = differences({k: v for k, v in old.items() if k not in ADDED}, to_dict(config))
    if changed:
        raise UserError(
            f"--workdir={workdir} was made with another config, which differs in {'; '.join(changed)} (there -> "
            "here). Run it with the config that made it, or give another --workdir."
        )
