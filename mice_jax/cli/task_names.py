"""Names of benchmark tasks, read from the text of their YAML files.

lm-evaluation-harness takes half a minute to import and to index its 14,000 files; reading their text takes a second.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from mice_jax.errors import UserError, install_command

MT_BENCH = "mt_bench"  # the name of MT-Bench among the tasks; not a task of the harness
LEAST_HARNESS = (0, 4, 13)  # the first version of lm-eval that works here
SUFFIXES = (".yaml", ".yml", "")  # files that others include have none
DEFINED = re.compile(r"^(?:task|group|tag): *[\"']?([\w./-]+)[\"']? *(?:#.*)?$", re.M)


def check_harness() -> None:
    """Raises UserError if lm-eval is not installed or is too old."""
    install = install_command("eval")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"benchmarks need the package lm-eval: {install}.")
    there, least = version("lm_eval"), ".".join(map(str, LEAST_HARNESS))
    if tuple(int(n) for n in re.findall(r"\d+", there)[:3]) < LEAST_HARNESS:
        raise UserError(f"benchmarks need lm-eval {least} or newer, and {there} is installed: {install}.")


def check_include_path(include_path: str) -> None:
    """Raises UserError if the path is neither "" nor a folder."""
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"include_path={include_path} is not a folder. Give a folder with the YAML files of tasks.")


def check_names(names: Sequence[str], include_path: str, needs_harness: bool) -> None:
    """Checks that each name occurs in the YAML file of some task, where the harness is installed.

    A name that passes may still be unknown, because the text of a file is searched and not its meaning.

    Args:
      names: Names of tasks or groups.
      include_path: A folder with YAML files of further tasks; "" adds none.
      needs_harness: Whether the command runs the tasks, so that the harness has to be there.

    Raises:
      UserError: The harness is missing or too old, or a name occurs in no file.
    """
    asked = [name for name in names if isinstance(name, str) and name != MT_BENCH]
    check_include_path(include_path)
    if not asked:
        return
    if needs_harness:
        check_harness()
    harness = importlib.util.find_spec("lm_eval")
    if harness is None or not harness.submodule_search_locations:
        return
    own_files = _files(include_path)
    files = _files(Path(harness.submodule_search_locations[0]) / "tasks") + own_files
    for name in asked:
        _check_syntax([file for file in own_files if name in _defined([file])])
        if not _occurs(name, files):
            message = describe_unknown(name, _defined(files))
            if include_path:
                own = ", ".join(sorted(_defined(_files(include_path)))) or "no task"
                message += f" The files in include_path={include_path} define {own}."
            raise UserError(message)


def _check_syntax(files: Sequence[Path]) -> None:
    """Raises UserError if one of the files is no YAML."""
    for file in files:
        try:
            yaml.compose(_text(file))
        except yaml.MarkedYAMLError as e:
            line = e.problem_mark.line + 1 if e.problem_mark else 1
            raise UserError(f"{file} line {line} is no valid YAML: {e.problem}. Correct the file.") from None


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Returns the error message for a name that is not among the known ones."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = f"; the nearest are {', '.join(close)}" if close else ""
    return f"there is no task {name!r}{near}. Tasks of your own are read from the folder of include_path."


def _files(folder: Path | str) -> list[Path]:
    """Returns the files of a folder that may define tasks; none for ""."""
    if not folder:
        return []
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [file for file in found if file.suffix in SUFFIXES]


def _defined(files: Sequence[Path]) -> set[str]:
    return {name for file in files for name in DEFINED.findall(_text(file))}


def _occurs(name: str, files: Sequence[Path]) -> bool:
    # Most tasks are defined in a file or folder of their name, so that few files are read for a name that exists.
    likely = sorted(files, key=lambda file: name not in file.stem and name.split("_")[0] not in file.parts)
    # It is the value of a key (task, group, tag or a name in a group) or an entry of a list of such values.
    named = re.compile(
        rf"^(?:.*\b(?:task|group|tag)\b.*[:,\[ ]| *- *)[\"']?{re.escape(name)}[\"']? *(?:$|[,\]#])", re.M
    )
    return any(named.search(_text(file)) for file in likely)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
