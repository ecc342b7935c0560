"""Finds the files of a Hugging Face folder: its config.json, and the safetensors file of each tensor."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mice_jax.errors import UserError


def read_config(file: Path) -> dict[str, Any]:
    """Reads a config.json as a dict; raises UserError if it is missing or is not a JSON object."""
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model needs its config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not JSON: {e}. Download it again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; it must hold an object.")
    return config


def tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor, from the index or from the header of the only file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map: dict[str, str] = read_config(index).get("weight_map", {})
        missing = sorted({f for f in weight_map.values() if not (folder / f).exists()})
        if single.exists() and single.name not in weight_map.values():
            whole = names_in(single)
            if missing:  # the single file is the only set that may be complete
                return dict.fromkeys(whole, single)
            if whole >= set(weight_map):
                raise UserError(
                    f"{folder} holds the weights twice: in {single.name}, and in the files that {index.name} names. "
                    "Readers choose differently between them (transformers takes the first): move one of the two away."
                )
        if missing:
            raise UserError(f"{index} names files that do not exist: {', '.join(missing)}. Download them again.")
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise UserError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json. Only safetensors is read; save "
            "a checkpoint of another kind as safetensors first."
        )
    return dict.fromkeys(names_in(single), single)


def check_files(folder: Path) -> None:
    """Raises UserError where a safetensors file of a folder is missing or truncated; reads their headers alone."""
    for file in sorted(set(tensor_files(folder).values())):
        open_tensors(file)


def names_in(file: Path) -> set[str]:
    """Returns the names of the tensors of a safetensors file."""
    with open_tensors(file) as f:
        return set(f.keys())


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file to read its header; raises UserError if it is damaged."""
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as e:
        size = file.stat().st_size
        raise UserError(f"{file} ({size} bytes) is damaged or truncated: {e}. Download it again.") from None
