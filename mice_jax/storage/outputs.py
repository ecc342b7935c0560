"""Checks of the files and folders that commands write to, which import nothing."""

from pathlib import Path

from mice_jax.errors import UserError


def check_new_folder(flag: str, folder: Path) -> None:
    """Raises UserError where the folder that a command is to write is there already and is not empty, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--{flag}={folder} already exists. Give a folder that does not exist yet, or is empty.")


def check_output_file(output: Path, example: str) -> None:
    """Checks the file that a command is to write.

    Args:
        output: the value of --output.
        example: what such a file is called, as in "F.json".

    Raises:
        UserError: if it is a folder, or the folder that it would be in does not exist.
    """
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; give a file, {example}.")
    if not output.parent.is_dir():
        raise UserError(
            f"--output={output}: there is no folder {output.parent}. Make it, or give a file in one that exists; paths "
            f"are relative to {Path.cwd()}."
        )
