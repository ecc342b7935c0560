"""Checks of what a command names, its files and folders among them, before its imports, which take seconds."""

import difflib
from pathlib import Path

from absl import flags

from mice_jax.cli.topology_names import parse_topology
from mice_jax.config import Config
from mice_jax.data.source_names import held_out_sources
from mice_jax.data.template_names import check_template_name
from mice_jax.errors import UserError


def check_places(command: str, values: flags.FlagValues) -> None:
    """Checks the local files, the folders and the devices that the flags and the config of a command name.

    What is in a store or on a server is not looked for: the command itself finds out.

    Args:
      command: the name of the command.
      values: its parsed flags; a config is valid.

    Raises:
      UserError: one of them is not there, or is something else.
    """
    if command in ("train", "prepare"):
        check_inputs(values.config)
    if command == "plan":  # It needs neither weights nor data.
        parse_topology(values.topology)
    if command in ("generate", "evaluate"):
        _check_model(values.model, "--model=")
        check_template_name(values.chat_template, "--chat_template=")
    if command == "generate" and values.input and values.output and not Path(values.input).is_file():
        raise UserError(f"--input={values.input} is not a file; paths are relative to {Path.cwd()}.")
    if command == "branch":
        _check_exists("from", Path(str(values["from"].value)))
    is_local = "workdir" in values and "://" not in (values.workdir or "")
    if command in ("export", "average") and is_local:
        _check_exists("workdir", Path(values.workdir))
    if command == "export":
        _check_export(Path(values.workdir) if is_local else None, Path(values.output))
    if command == "train" and is_local:
        _check_workdir(Path(values.workdir), values.config)


def check_inputs(config: Config) -> None:
    """Checks that the model, the chat template and the data of a run are there, as far as this disk shows it.

    Raises:
      UserError: one of them is not there.
    """
    _check_model(config.model.init_from, "model.init_from=")
    check_template_name(config.data.chat_template)
    _check_data(config)


def _check_exists(flag: str, workdir: Path) -> None:
    if not workdir.exists():
        near = difflib.get_close_matches(workdir.name, [folder.name for folder in workdir.parent.glob("*")], n=1)
        end = f"; did you mean {workdir.parent / near[0]}?" if near else f"; paths are relative to {Path.cwd()}."
        raise UserError(f"--{flag}={workdir} is not a run's workdir: there is no such folder{end}")


def _check_workdir(workdir: Path, config: Config) -> None:
    from mice_jax.storage.recorded_config import check_same_config  # it imports fsspec, which --help does not need

    if workdir.is_file():
        raise UserError(f"--workdir={workdir} is a file, and must be the folder of a run. Give another path.")
    if (workdir / "sweep.json").is_file():
        raise UserError(
            f"--workdir={workdir} is the folder of a sweep, whose runs are in {workdir / 'runs'}. Give the run a "
            "folder of its own."
        )
    check_same_config(workdir, config)


def _check_export(workdir: Path | None, output: Path) -> None:
    # They import huggingface_hub and fsspec, which --help does not need.
    from mice_jax.storage.model_names import check_workdir
    from mice_jax.storage.paths import check_new_folder

    if workdir:
        check_workdir(workdir)
    check_new_folder("output", output)


def _check_model(name: str, field: str) -> None:
    from mice_jax.storage.model_names import check_model_name  # it imports huggingface_hub, which --help does not need

    check_model_name(name, field)


def _check_data(config: Config) -> None:
    from mice_jax.data.readers import files_of, is_remote  # it imports pyarrow, which --help does not need

    trained = [source for phase in config.data.phases for source in phase.sources]
    for source in [*trained, *held_out_sources(config.data)]:
        if not is_remote(source.path) and not source.path.startswith(("hf:", "tfds:")):
            files_of(source.path)
