"""Carries the tensors of a checkpoint that are not trained, such as a vision tower, from import to export bit for bit.

A run keeps them in a file of its `model` folder, so that it can be exported without the folder that it started from.
"""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from mice_jax.errors import UserError
from mice_jax.models.checkpoint_files import read_config, tensor_files
from mice_jax.models.tensors import copy_tensors

FILE = "untrained.safetensors"
# What transformers' processors read besides the tokenizer's files.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def prefixes(family: ModuleType, config: dict[str, Any] | None = None) -> tuple[str, ...]:
    """Returns the prefixes of the names of tensors that are not trained; most families have none.

    Args:
      family: the family of the model.
      config: the content of its config.json, by which some layers have tensors that nothing reads; None
        leaves these out.
    """
    unused = getattr(family, "unused", None)
    return getattr(family, "UNTRAINED", ()) + (unused(config) if unused and config is not None else ())


def keep(family: ModuleType, source: Path, folder: Path) -> None:
    """Copies what is not trained into a run's `model` folder; does nothing for most families.

    Args:
      family: the family of the model.
      source: the Hugging Face folder, or the `model` folder of another run.
      folder: the `model` folder to write to.
    """
    if not prefixes(family):
        return
    copy_processor_files(source, folder)
    if (source / FILE).exists():
        shutil.copyfile(source / FILE, folder / FILE)
        return
    files, kept = tensor_files(source), prefixes(family, read_config(source / "config.json"))
    copy_tensors(folder / FILE, {name: files[name] for name in sorted(files) if name.startswith(kept)})


def find(family: ModuleType, folder: Path) -> Path | None:
    """Returns the file of a run's `model` folder with the tensors that are not trained; None for most families.

    Raises:
      UserError: the family has such tensors, and the folder lacks them.
    """
    if not prefixes(family):
        return None
    if not (folder / FILE).exists():
        raise UserError(
            f"{folder} has no {FILE}, the tensors of {family.ARCHITECTURE} that are not trained "
            f"({', '.join(prefixes(family))}...). A run from random weights has none of them and cannot be exported."
        )
    return folder / FILE


def copy_processor_files(source: Path, folder: Path) -> None:
    """Copies the files of a processor, if there are any."""
    for name in PROCESSOR_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
