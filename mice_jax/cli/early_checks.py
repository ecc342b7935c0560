"""Checks of what a command names, its files and folders among them, before its imports, which take seconds.

What is in a store or on a server is not looked for: the command itself finds out. So does everything here that a caller
from Python skips.
"""

from collections.abc import Callable
from pathlib import Path

from absl import flags

from mice_jax.cli.topology_names import parse_topology
from mice_jax.cli.tracker_names import check_trackers
from mice_jax.config import Config, holds_data_out
from mice_jax.data.source_names import held_out_sources
from mice_jax.data.template_names import check_template_name
from mice_jax.errors import UserError, nearest_path
from mice_jax.storage.outputs import check_new_folder

Values = flags.FlagValues


def check_places(command: str, values: Values) -> None:
    """Checks the local files, folders, devices and packages that the flags and the config of a command name.

    Args:
      command: the name of the command.
      values: its parsed flags; a config is valid.

    Raises:
      UserError: one of them is not there, or is something else.
    """
    for check in CHECKS.get(command, ()):
        check(values)


# ---------------------------------------------------------------------------------------- training
def check_inputs(config: Config) -> None:
    """Checks that the model, the chat template and the data of a run are there, as far as this disk shows it.

    Raises:
      UserError: one of them is not there.
    """
    from mice_jax.storage.model_names import check_tokenizer_name  # it imports huggingface_hub, as below

    _check_model(config.model.init_from, "model.init_from=")
    if config.data.tokenizer:
        check_tokenizer_name(config.data.tokenizer)
    check_template_name(config.data.chat_template)
    _check_data(config)


def _check_config(values: Values) -> None:
    check_inputs(values.config)


def _check_packages(values: Values) -> None:
    check_trackers(values.config.log.trackers)


def _check_mesh(values: Values) -> None:
    from mice_jax.runtime import cpu_devices
    from mice_jax.storage.json_file import read_json
    from mice_jax.storage.recorded_config import CONFIG

    if all(values[name].value is None for name in ("coordinator_address", "num_processes", "expect_devices")):
        recorded = read_json(Path(values.workdir) / CONFIG) if _is_local(values.workdir) else None
        cpu_devices.check_mesh(values.config, cpu_devices.recorded_count(recorded or {}))


def _check_best_metric(values: Values) -> None:
    """Checks that something is evaluated where checkpoints are selected by an evaluation's metric."""
    config = values.config
    name = config.checkpoint.best_metric
    selects = config.checkpoint.keep_best or any(phase.seed_from == "best" for phase in config.data.phases)
    if selects and name.startswith("eval/") and not (holds_data_out(config) or config.eval.tasks):
        raise UserError(
            f"checkpoint.best_metric={name!r} selects among checkpoints, but no line of metrics.jsonl will have it, "
            "since the run holds out no data and has no benchmarks. Hold out some (data.validation_fraction=0.01, or "
            "data.validation), set eval.tasks, or select by the metric 'loss'."
        )


def _check_weights(values: Values) -> None:
    """Looks at the files of the weights that a run starts from, which one that resumes needs for LoRA only."""
    from mice_jax.storage.checkpoint_steps import saved_steps

    config = values.config
    if config.model.lora.rank or not (_is_local(values.workdir) and saved_steps(Path(values.workdir))):
        _check_files(config.model.init_from)


def _check_run_folder(values: Values) -> None:
    from mice_jax.storage.paths import check_store
    from mice_jax.storage.recorded_config import check_same_config

    check_store(values.workdir)
    if not _is_local(values.workdir):
        return
    workdir = Path(values.workdir)
    for path in (workdir, *workdir.parents):
        if path.is_file():
            raise UserError(f"--workdir={workdir}: {path} is a file, and must be a folder. Give another path.")
    if (workdir / "sweep.json").is_file():
        raise UserError(
            f"--workdir={workdir} is the folder of a sweep, whose runs are in {workdir / 'runs'}. Give the run a "
            "folder of its own."
        )
    check_same_config(workdir, values.config)


def _check_data(config: Config) -> None:
    from mice_jax.data.readers import files_of, is_remote  # it imports pyarrow, which --help does not need

    trained = [source for phase in config.data.phases for source in phase.sources]
    for source in [*trained, *held_out_sources(config.data)]:
        if not is_remote(source.path) and not source.path.startswith(("hf:", "tfds:")):
            files_of(source.path)


def _check_topology(values: Values) -> None:
    parse_topology(values.topology)  # Planning needs neither weights nor data.


# ---------------------------------------------------------------------------------------- a trained model
def _check_model_to_use(values: Values) -> None:
    from mice_jax.storage.model_names import check_trained_model

    _check_model(values.model, "--model=")
    check_trained_model(values.model, values.step, "all_checkpoints" in values and values.all_checkpoints)
    check_template_name(values.chat_template, "--chat_template=")
    _check_step(Path(values.model), values.step)
    _check_files(values.model)


def _check_step(workdir: Path, step: int | None) -> int | None:
    """Returns the step of the checkpoint that a command loads; None if the folder is not a run on this disk."""
    from mice_jax.storage.checkpoint_steps import choose_step, saved_steps

    if workdir.parent.name == "checkpoints" and workdir.name.isdigit():  # the checkpoint itself
        workdir, step = workdir.parent.parent, int(workdir.name) if step is None else step
    if not (workdir / "checkpoints").is_dir():
        return None
    return choose_step(workdir / "checkpoints", saved_steps(workdir), step)


def _check_files(model: str) -> None:
    """Looks at the headers of the weights in a Hugging Face folder on this disk."""
    from mice_jax.models.checkpoint_files import check_files

    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        check_files(folder)


def _check_model(name: str, field: str) -> None:
    from mice_jax.storage.model_names import check_model_name  # it imports huggingface_hub, which --help does not need

    check_model_name(name, field)


# ---------------------------------------------------------------------------------------- a run
def _check_workdir(values: Values) -> None:
    """Checks that --workdir is that of a run."""
    from mice_jax.storage.model_names import check_workdir
    from mice_jax.storage.paths import check_store

    check_store(values.workdir)
    if _is_local(values.workdir):
        _check_exists("workdir", Path(values.workdir))
        check_workdir(Path(values.workdir))


def _check_export(values: Values) -> None:
    from mice_jax.storage.checkpoint_steps import check_has_average
    from mice_jax.storage.model_names import no_adapter
    from mice_jax.storage.recorded_config import read_run_config

    check_new_folder("output", Path(values.output))
    if not _is_local(values.workdir):
        return
    workdir = Path(values.workdir)
    step = _check_step(workdir, values.step)
    if values.average:
        check_has_average(workdir / "checkpoints" / str(step))
    if values.adapter and not read_run_config("workdir", workdir)["model"].get("lora", {}).get("rank"):
        raise no_adapter(workdir)


def _check_average(values: Values) -> None:
    from mice_jax.storage.checkpoint_steps import check_last, saved_steps

    if values.output is not None:
        check_new_folder("output", Path(values.output))
    if _is_local(values.workdir):
        check_last(Path(values.workdir), saved_steps(Path(values.workdir)), values.last)


def _check_trunk(values: Values) -> None:
    """Checks that --from of `mice branch` is the workdir of a run."""
    from mice_jax.storage.recorded_config import read_run_config

    run = Path(str(values["from"].value))
    _check_exists("from", run)
    read_run_config("from", run)


def _check_exists(flag: str, workdir: Path) -> None:
    if not workdir.exists():
        end = nearest_path(workdir, f"; paths are relative to {Path.cwd()}.")
        raise UserError(f"--{flag}={workdir} is not a run's workdir: there is no such folder{end}")


def _is_local(workdir: str) -> bool:
    return "://" not in workdir


CHECKS: dict[str, tuple[Callable[[Values], None], ...]] = {
    "train": (_check_config, _check_packages, _check_run_folder, _check_mesh, _check_best_metric, _check_weights),
    "prepare": (_check_config,),
    "plan": (_check_topology,),
    "generate": (_check_model_to_use,),
    "evaluate": (_check_model_to_use,),
    "export": (_check_workdir, _check_export),
    "average": (_check_workdir, _check_average),
    "branch": (_check_trunk,),
}
