"""How every verb begins and ends: its flags, its short help, and errors turned into one paragraph and a code.

A verb calls `run(__doc__, define_flags, main)`. Flags are absl's, kept in a set of their own, so that any number
of verbs can live in one process; the config is a file read by ml_collections, with `--config.field=value` after.
"""

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from mice_jax import config
from mice_jax.config import Config, ConfigError, field_names, nearest
from mice_jax.errors import Preempted, StoppedByRule, UserError
from mice_jax.storage.paths import RunPath, parse_path

Values = flags.FlagValues
HELP = {"h", "help", "helpfull"}
# In the environment of a process of a cluster, or of one that has a parent (supervise.py).
SEVERAL = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MICE_JAX_PARENT_PIPE")


def run(
    doc: str | None,
    define: Callable[[Values, list[str]], None],
    main: Callable[[Values], int | None],
    argv: Sequence[str],
    refused: Callable[[Exception], None] = lambda e: None,
) -> int:
    """Runs a verb on its arguments (without the program's name) and returns its exit code.

    0 done; 2 the user's input is wrong; 3 stopped by a rule; 75 preempted with its state saved. `refused` is called
    with an error that is the user's, once it is printed.
    """
    arguments = ["mice", *argv]
    logging.set_verbosity(logging.ERROR)  # libraries' warnings to each other are not the user's
    try:
        values = Values()
        define(values, arguments)
        if {a.lstrip("-") for a in argv if a.startswith("-")} & HELP:
            print(_help(doc, values))
            return 0
        _parse(values, arguments)
        return main(values) or 0
    except (UserError, ConfigError, StoppedByRule, Preempted) as e:
        word = {2: "error", 3: "stopped", 75: "preempted"}[e.exit_code]
        print(f"{word}: {e}", file=sys.stderr, flush=True)
        if e.exit_code == 2:
            refused(e)
        return e.exit_code


def check_first(argv: Sequence[str]) -> int:
    """Refuses a config before a verb's imports, which take seconds: 2 where it cannot be run, else 0.

    Nothing is looked at where this may be one of several processes, as the others have to hear of a refusal: the verb
    looks again, and tells them.
    """
    place = Values()
    define_distributed(place)
    names = [a.lstrip("-").partition("=")[0] for a in argv]
    if set(names) & {*place, *HELP} or any(variable in os.environ for variable in SEVERAL):
        return 0
    kept, word_follows = [], False
    for argument, name in zip(argv, names, strict=True):
        is_config = name.partition(".")[0] in ("config", "noconfig")
        if is_config or (word_follows and not argument.startswith("--")):
            kept.append(argument)
        word_follows = is_config and "=" not in argument

    def look(values: Values) -> None:
        config_of(values)

    return run(None, define_config, look, kept)


def define_config(values: Values, argv: list[str]) -> None:
    """Defines --config and, from what follows it, its overrides."""
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py[:arg] that defines get_config(arg)", flag_values=values, sys_argv=argv
    )


def define_distributed(values: Values) -> None:
    """Defines the flags by which several processes find each other."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes make up the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is", flag_values=values)
    flags.DEFINE_integer(
        "expect_devices", None, "refuse to run on another number of devices, all processes counted", flag_values=values
    )


def place_of(argv: Sequence[str]) -> tuple[str | None, int | None, int | None]:
    """The flags by which processes find each other, read where the rest of the arguments cannot be."""
    values = Values()
    define_distributed(values)
    values(["mice", *argv], known_only=True)
    return values.coordinator_address, values.num_processes, values.process_id


def config_of(values: Values) -> Config:
    """The validated config that --config and its overrides make."""
    made = values.config if values["config"].present else required(values, "config")
    if not isinstance(made, Config):
        kind = type(made).__name__
        raise UserError(f"get_config of --config returned a {kind}; it must return a mice_jax.config.Config.")
    made.validate()
    return made


def made_by(values: Values) -> dict[str, Any]:
    """The config's file and what the command line changed in it, for config.json."""
    flag: Any = values["config"]  # ml_collections' own kind of flag
    return {"config_file": flag.config_filename, "overrides": dict(flag.override_values)}


def required(values: Values, name: str) -> Any:
    """A flag's value; UserError where it was not given."""
    if values[name].value is None:
        raise UserError(f"--{name} is missing. See --help for an example.")
    return values[name].value


def workdir_of(values: Values) -> RunPath:
    """The folder that --workdir names, on disk or in a bucket."""
    return parse_path(required(values, "workdir"))


def find_neighbours(file: Path) -> None:
    """Lets a config import what lies beside it, as a script may."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _parse(values: Values, argv: list[str]) -> None:
    _check_config_flags(argv)
    if any(a.lstrip("-").partition("=")[0] == "config" for a in argv):
        find_neighbours(Path(_config_file(argv)))
    sys.modules.pop("config_config", None)  # ml_collections would run a second file on top of a first one's names
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as e:
        raise UserError(f"--{e.flagname} is no flag of this command{nearest(e.flagname, values)}") from None
    except flags.Error as e:
        if "parsing config file" in str(e):  # the file's own error, wrapped in absl's
            raise _config_error(e, argv) from e
        raise UserError(f"{e}.") from None
    except Exception as e:
        raise _config_error(e, argv) from e
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; every argument is given as --name=value. See --help.")


def _check_config_flags(argv: list[str]) -> None:
    """What ml_collections would only say in a traceback, or not at all: no such file, no such field."""
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if name == "config" and not Path(_config_file(argv)).is_file():
            raise UserError(f"--config: there is no file {_config_file(argv)}.")
        field = re.sub(r"^(no)?config\.", "", name)
        if field != name and re.sub(r"\[-?[0-9]+\]", "[]", field) not in field_names():
            raise ConfigError(f"--config.{field}: the config has no field {field}{nearest(field, field_names())}")


def _config_error(e: Exception, argv: list[str]) -> UserError:
    """The config file's own failure, or an ill-typed override, in words: with the file's line if it has one."""
    cause: BaseException = e
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    file = os.path.abspath(_config_file(argv))
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if os.path.abspath(f.filename) == file]
    indexed = [a for a in argv if re.match(r"-{1,2}config\..*\[", a)]
    if isinstance(cause, IndexError) and indexed and not frames:
        return UserError(f"a list of the config is shorter than one of these says: {', '.join(indexed)}.")
    if isinstance(cause, AttributeError) and "get_config" in str(cause):
        return UserError(f"{_config_file(argv)} defines no get_config(arg) that returns the config.")
    if isinstance(cause, SyntaxError):
        return UserError(f"{cause.filename} line {cause.lineno} is not Python: {cause.msg}.")
    where = f"{frames[-1].filename} line {frames[-1].lineno}: " if frames else ""
    kind = "" if isinstance(cause, ConfigError) else f"{type(cause).__name__}: "
    said = str(cause).strip() + _nearest_keyword(str(cause))
    return UserError(f"{where}{kind}{said}{'' if said.endswith(('.', '?')) else '.'}")


def _nearest_keyword(said: str) -> str:
    """What Python 3.11 leaves out of its word on an unexpected argument of one of the config's classes."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", said)
    part = getattr(config, match[1], None) if match else None
    return nearest(match[2], [f.name for f in dataclasses.fields(part)]) if match and part else ""


def _config_file(argv: list[str]) -> str:
    """The file that --config names."""
    at = next(i for i, a in enumerate(argv) if a.lstrip("-").partition("=")[0] == "config")
    value = argv[at].partition("=")[2] or " ".join(argv[at + 1 : at + 2])
    return value if Path(value).exists() else value.split(":")[0]


def _help(doc: str | None, values: Values) -> str:
    lines = [
        f"  --{name}: {flag.help}"
        for name, flag in sorted(values._flags().items())
        if flag.help and "absl" not in str(type(flag.parser))[:8]
    ]
    return (doc or "").strip() + "\n\nFlags:\n" + "\n".join(lines)
