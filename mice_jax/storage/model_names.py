"""What the name of a model can be, checked without the imports that reading a model takes."""

from pathlib import Path

from mice_jax.errors import UserError
from mice_jax.storage import hub
from mice_jax.storage.paths import RunPath

RANDOM = "random:"
# One of these makes a folder a model: a Hugging Face folder, an adapter of PEFT, the workdir of a run.
ADAPTER = "adapter_config.json"
CONTENTS = ("config.json", ADAPTER, "checkpoints", "model/config.json")


def check_model_name(name: str, given_as: str = "") -> None:
    """Checks that a model is where its name says, as far as that can be seen on this disk.

    Args:
      name: As `model.init_from`. A model of the Hub is looked for in the cache alone, and only where HF_HUB_OFFLINE is
        set; what is in a store is not looked for.
      given_as: The field or flag that gives it, such as "--model=", for the message.

    Raises:
      UserError: There is no such file or folder, or the folder holds no model.
    """
    if name.startswith(RANDOM):
        file = random_config(name)
        if not file.is_file():
            raise UserError(
                f"{given_as}{name} needs the file {file}, which does not exist. Give random:path/to/config.json or its "
                f"folder; paths are relative to {Path.cwd()}."
            )
        return
    if hub.is_hub_id(name):
        return hub.check_cached(name)
    if Path(name).name == "checkpoints" and not (Path(name) / "config.json").exists():
        raise UserError(
            f"{given_as}{name} is the folder of a run's checkpoints. Give the workdir, {Path(name).parent}, or one of "
            f"them, {name}/STEP."
        )
    if "://" in name or "checkpoints" in Path(name).parts:  # a store, or a checkpoint of a run
        return
    folder = Path(name)
    if not folder.is_dir():
        raise missing_model(f"{given_as}{name}")
    if not any((folder / content).exists() for content in CONTENTS):
        raise UserError(
            f"{given_as}{name} holds no model: it has none of {', '.join(CONTENTS[:2])} and checkpoints/. Give a "
            "Hugging Face folder, an adapter folder of PEFT, or a run's workdir."
        )


def check_tokenizer_name(name: str) -> None:
    """Raises UserError where the name of a tokenizer is neither a folder nor that of a model of the Hub."""
    if not hub.is_hub_id(name) and not Path(name).is_dir():
        raise UserError(f"the tokenizer {name!r} is not a folder. Give a folder, or a model of the Hub (owner/name).")


def check_trained_model(name: str, step: int | None, all_steps: bool = False) -> None:
    """Checks that the name of a model can be that of trained weights, and of a run where one of its steps is asked for.

    Args:
      name: As `model.init_from`.
      step: The step of the checkpoint that is asked for, if any.
      all_steps: Whether all checkpoints of a run are asked for.

    Raises:
      UserError: It cannot.
    """
    if name.startswith(RANDOM):
        raise UserError(f"The model {name} has random weights. Give a folder with trained weights.")
    if "://" in name or "checkpoints" in Path(name).parts or (Path(name) / "checkpoints").is_dir():  # perhaps a run
        return
    if step is not None:
        raise no_run(name, step)
    if all_steps:
        raise UserError(f"--all_checkpoints is for a run's workdir; --model={name} is a Hugging Face folder.")


def no_run(name: str, step: int) -> UserError:
    """Returns the error for a step of a model that is not a run."""
    return UserError(f"step={step} is for a run's workdir, and {name} is a Hugging Face model. Leave it out.")


def no_adapter(workdir: RunPath) -> UserError:
    """Returns the error for the adapter of a run that has none."""
    return UserError(
        f"--adapter: {workdir} trained the model's own weights (model.lora.rank=0), so it has no adapter. Leave "
        "--adapter out to export the model."
    )


def check_workdir(workdir: RunPath) -> None:
    """Raises UserError where a folder is not the workdir of a run."""
    if not (workdir / "model" / "config.json").exists():
        raise UserError(f"--workdir={workdir} is not a run's workdir: {_what_it_is(workdir)}.")


def _what_it_is(folder: RunPath) -> str:
    """Returns what a folder is if it is not the workdir of a run, and what to do instead, for an error message."""
    if folder.parent.name == "checkpoints":
        return f"it is a checkpoint of one. Give --workdir={folder.parent.parent} --step={folder.name}"
    if (folder / ADAPTER).exists():
        return (
            f"it has an {ADAPTER}, so it is an adapter. mice generate, mice evaluate and model.init_from "
            "take it as it is. For its base with the adapter merged into it, give the workdir of the run that trained "
            "it, or use PeftModel.from_pretrained(base, folder).merge_and_unload() of the package peft"
        )
    if (folder / "sweep.json").exists():
        return f"it is the folder of a sweep. Give one of its runs, {folder}/runs/NUMBER, by the table in results.csv"
    if (folder / "config.json").exists():
        return "it has a config.json of its own, so it is a Hugging Face folder already"
    return "it has no model/config.json"


def random_config(name: str) -> Path:
    """Returns the config.json of a model that is drawn at random, whose name gives it or its folder."""
    file = Path(name.removeprefix(RANDOM))
    return file / "config.json" if file.is_dir() else file


def missing_model(name: str) -> UserError:
    """Returns the error for a model that does not exist, whose name may follow the field or flag that gives it."""
    return UserError(
        f"{name} does not exist or is not a folder. Give a Hugging Face folder, a model of the Hub "
        "(owner/name), a run's workdir (or one of its checkpoints/<step>), or random:path/to/config.json."
    )
