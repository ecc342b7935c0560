"""Reads --config and its overrides, and turns every failure into a message with the file, line or field."""

import dataclasses
import difflib
import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags

from mice_jax import config
from mice_jax.config import ConfigError, field_names
from mice_jax.config_checks import OTHER_NAMES, nearest, nearest_field
from mice_jax.errors import UserError

LIBRARY_SENTENCES = {
    r"invalid literal for int\(\) with base 10: .*": "it must be a whole number",
    r"could not convert string to float: .*": "it must be a number",
    r"\('Non-boolean argument to boolean flag', .*\)": "it must be true or false",
    r"Missing value for flag (--\S+)": r"\1 has no value: write \1=VALUE",
}


def parse_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses a command's arguments, running the config file if --config names one.

    Args:
      values: the command's flags, already defined.
      argv: the program's name and the arguments.

    Raises:
      UserError: a flag, the config file or one of its overrides is wrong.
    """
    _check_config_flags(argv)
    if any(_flag_name(a) == "config" for a in argv):
        allow_imports_next_to(Path(_config_file(argv)))
    sys.modules.pop("config_config", None)  # ml_collections would run a second file on top of the first one's names
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as e:
        raise UserError(f"unknown flag --{e.flagname}{_nearest_flag(e.flagname, values)}") from None
    except flags.Error as e:
        if "parsing config file" in str(e):  # the file's own error, wrapped in absl's
            raise _config_error(e, argv) from e
        raise UserError(f"{_in_words(str(e))}.") from None
    except Exception as e:
        raise _config_error(e, argv) from e
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every argument is given as --name=value. See --help.")


def _nearest_flag(name: str, values: flags.FlagValues) -> str:
    """Returns the end of the error about an unknown flag, which may be a field of the config without its group."""
    if hasattr(type(values._flags().get("config")), "override_values"):  # the command takes fields of the config
        last = OTHER_NAMES.get(name, name)
        fields = sorted((f for f in field_names() if f.rpartition(".")[2] == last), key=lambda f: "[]" in f)
        if fields:
            return f"; did you mean '--config.{fields[0].replace('[]', '[0]')}'?"
    return nearest(name, values)


def _in_words(error: str) -> str:
    """Returns absl's sentence about a flag's value, with what it and Python say of the value in words."""
    for of_library, words in LIBRARY_SENTENCES.items():
        error = re.sub(of_library, words, error)
    return error


def _missing_file(file: Path) -> UserError:
    close = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.py")], n=1)
    suggestion = f"; did you mean {file.parent / close[0]}?" if close else f"; paths are relative to {Path.cwd()}."
    return UserError(f"--config: the file {file} does not exist{suggestion}")


def allow_imports_next_to(file: Path) -> None:
    """Lets a config file import modules from its folder, as a script may."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _flag_name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def _check_config_flags(argv: list[str]) -> None:
    """Reports a missing file or an unknown field, for which ml_collections raises various errors."""
    for argument in argv:
        name = _flag_name(argument)
        if name == "config" and not Path(_config_file(argv)).is_file():
            raise _missing_file(Path(_config_file(argv)))
        field = re.sub(r"^(no)?config\.", "", name)
        if field != name and re.sub(r"\[-?[0-9]+\]", "[]", field) not in field_names():
            raise ConfigError(f"--config.{field}: the config has no field {field}{nearest_field(field, field_names())}")


def _config_error(e: Exception, argv: list[str]) -> UserError:
    """The failure of a config file, with its line, or of an override, as the user's error."""
    cause: BaseException = e
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    file = os.path.abspath(_config_file(argv))
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if os.path.abspath(f.filename) == file]
    indexed = [a for a in argv if re.match(r"-{1,2}config\..*\[", a)]
    if isinstance(cause, IndexError) and indexed and not frames:
        return UserError(
            f"an index is past the end of its list in the config: {', '.join(indexed)}. Indices count from 0; "
            "`mice config` prints the lists."
        )
    if isinstance(cause, AttributeError) and "get_config" in str(cause):
        return UserError(
            f"{_config_file(argv)} defines no get_config(arg) that returns the config; --config takes a Python file "
            "that does."
        )
    if isinstance(cause, SyntaxError):
        kind = "" if str(cause.filename).endswith(".py") else " --config takes a Python file."
        return UserError(f"{cause.filename} line {cause.lineno} is not valid Python: {cause.msg}.{kind}")
    where = f"{frames[-1].filename} line {frames[-1].lineno}: " if frames else ""
    kind = "" if isinstance(cause, ConfigError) else f"{type(cause).__name__}: "
    text = str(cause).strip() + _nearest_keyword(str(cause))
    end = "" if text.endswith((".", "?")) else "."
    return UserError(f"{where}{kind}{text}{end}")


def _nearest_keyword(error: str) -> str:
    """The closest field's name, for Python's error about an unexpected argument of one of the config's classes."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", error)
    part = getattr(config, match[1], None) if match else None
    if match is None or part is None:
        return ""
    return nearest_field(match[2], [f.name for f in dataclasses.fields(part)])


def _config_file(argv: list[str]) -> str:
    """The file that --config names, without its argument."""
    index = next(i for i, a in enumerate(argv) if _flag_name(a) == "config")
    value = argv[index].partition("=")[2] or " ".join(argv[index + 1 : index + 2])
    return value if Path(value).exists() else value.split(":")[0]
