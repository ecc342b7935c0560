"""What the name of a model can be, checked without the imports that reading a model takes."""

from pathlib import Path

from mice_jax.errors import UserError
from mice_jax.storage import hub

RANDOM = "random:"
# One of these makes a folder a model: a Hugging Face folder, an adapter of PEFT, the workdir of a run.
CONTENTS = ("config.json", "adapter_config.json", "checkpoints", "model/config.json")


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


def random_config(name: str) -> Path:
    """Returns the config.json of a model that is drawn at random, whose name gives it or its folder."""
    file = Path(name.removeprefix(RANDOM))
    return file / "config.json" if file.is_dir() else file


def missing_model(name: str) -> UserError:
    """Returns the error for a name that is no folder; the field or flag that gives it may stand before it."""
    return UserError(
        f"{name} does not exist or is not a folder. Give a Hugging Face folder, a model of the Hub "
        "(owner/name), a run's workdir (or one of its checkpoints/<step>), or random:path/to/config.json."
    )
