"""How every command begins and ends: flags, a short help, and errors as one paragraph with an exit code.

A command calls `run(__doc__, define_<command>, main, argv)`; its flags are in cli/flags.py. Each command has its own
set of absl flags, so that any number of commands can run in one process.
"""

import ast
import functools
import importlib.util
import os
import select
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from absl import flags, logging

from mice_jax.cli import early_checks
from mice_jax.cli.config_file import parse_flags
from mice_jax.cli.flags import COMMANDS, DefineFlags, Values, define_processes
from mice_jax.cli.task_names import check_names
from mice_jax.config import Config, ConfigError
from mice_jax.errors import Interrupted, Paused, Preempted, StoppedByRule, UserError
from mice_jax.runtime import cluster, slow_imports, watchdog, xla_flags

if TYPE_CHECKING:
    from mice_jax.storage.paths import RunPath

HELP_FLAGS = {"h", "help", "helpfull"}
# Environment variables of a process that may be one of several.
MULTI_PROCESS_ENV = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
INTERRUPTED = 130  # exit code of a command that Ctrl-C ended, as shells report SIGINT
INTERRUPTED_MESSAGE = "interrupted: run the same command again"
CLOSED_PIPE = 141  # exit code of a command whose output nobody reads any more, as shells report SIGPIPE


# ---------------------------------------------------------------------------------------- running a command
def run(
    doc: str | None,
    define: DefineFlags,
    main: Callable[[Values], int | None],
    argv: Sequence[str],
    on_user_error: Callable[[Exception], None] = lambda e: None,
) -> int:
    """Runs a command on its arguments.

    Args:
      doc: the command's help, without its flags.
      define: defines the command's flags; see cli/flags.py.
      main: the command itself; it gets the parsed flags.
      argv: the arguments, without the program's name.
      on_user_error: called with an error that the user has to fix, after it is printed.

    Returns:
      The exit code: 0 done; 2 the user's input is wrong; 3 stopped by a rule; 75 preempted or paused, its state saved;
      130 interrupted by Ctrl-C.
    """
    slow_imports.end()
    logging.set_verbosity(logging.ERROR)  # users need not see the warnings of libraries to each other

    def parse_and_run() -> int:
        values = Values()
        arguments = ["mice", *argv]
        define(values, arguments)
        if asks_for_help(argv):
            print(_help(doc, values))
            return 0
        parse_flags(values, arguments)
        return main(values) or 0

    try:
        return exit_on_closed_pipe(parse_and_run)
    except (UserError, ConfigError, StoppedByRule, Preempted) as e:
        names = {Paused: "paused", Interrupted: "interrupted"}
        label = names.get(type(e)) or {2: "error", 3: "stopped", 75: "preempted"}[e.exit_code]
        print(f"{label}: {e}", file=sys.stderr, flush=True)
        if e.exit_code == 2:
            on_user_error(e)
        return e.exit_code
    except KeyboardInterrupt:
        print(INTERRUPTED_MESSAGE, file=sys.stderr, flush=True)
        return INTERRUPTED


def exit_on_closed_pipe(main: Callable[[], int]) -> int:
    """Runs `main`, without a traceback where the reader of its output (`head`, a pager) has left."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _reader_has_left(stream)]
        if not unread:
            raise  # another pipe, not the terminal's
        for stream in unread:  # Python flushes them once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED_PIPE


def _reader_has_left(stream: IO[str]) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, AttributeError):  # no file (captured output), or no poll on this system
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _help(doc: str | None, values: Values) -> str:
    lines = [
        f"  --{name}: {flag.help}"
        for name, flag in sorted(values._flags().items())
        if flag.help and "absl" not in str(type(flag.parser))[:8]
    ]
    return (doc or "").strip() + "\n\nFlags:\n" + "\n".join(lines)


# ---------------------------------------------------------------------------------------- before slow imports
def before_imports(name: str) -> None:
    """Does what a command can do before its imports, which take seconds, where its module is run as a script.

    It restarts the process with huge pages and does what `early_exit` does. It exits where nothing is left to do.
    """
    argv = sys.argv[1:]
    if not asks_for_help(argv):
        xla_flags.reexec_with_huge_pages()
    code = early_exit(name, argv)
    if code is not None:
        sys.exit(code)
    slow_imports.begin()  # until `run`


def early_exit(name: str, argv: Sequence[str]) -> int | None:
    """Does what a command can do without its slow imports; None if the command has to run in this process.

    It answers --help, reports wrong flags and configs, and where training has several processes, starts the process
    that trains and waits for it. A command other than `train` that is one of several processes is left to itself,
    because it reports errors to the other processes too.
    """
    command = COMMANDS[name]
    if name in ("train", "evaluate"):  # Bars of the harness would disturb those of cli/progress_display.py.
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported.
    if asks_for_help(argv):
        return run(_docstring(command.module), command.define_flags, lambda values: 0, argv)
    if watchdog.is_child() or (name != "train" and _may_be_one_of_several(argv)):
        return None
    ended = False

    def check_and_watch(values: Values) -> int | None:
        nonlocal ended
        asked = config_of(values).eval if command.reads_run_config else None
        for flag in command.required:
            required(values, flag)
        command.check_flags(values)
        if asked is not None:
            check_names(asked.tasks, asked.include_path, needs_harness=name == "train")
        if name == "evaluate":
            check_names(values.tasks, values.include_path, needs_harness=True)
        early_checks.check_places(name, values)
        if name == "train" and cluster.is_multi_process(*processes_of(argv)):
            code = watchdog.run_child(command.module, argv, workdir_of(values))
            ended = True
            return code
        return None

    report = functools.partial(_report_to_other_processes, argv) if name == "train" else lambda e: None
    code = run(None, command.define_flags, check_and_watch, argv, report)
    return code if code or ended else None


def _report_to_other_processes(argv: Sequence[str], error: Exception) -> None:
    """Sends an error of this process, which will not train, to the other processes of the run, which wait for it."""
    try:
        processes = processes_of(argv)
        others = cluster.is_multi_process(*processes)
    except (UserError, flags.Error):  # Without valid flags the other processes cannot be found.
        return
    if others:
        watchdog.broadcast_startup_error(processes, str(error))


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the arguments contain a help flag."""
    return any(a.startswith("-") and a.lstrip("-") in HELP_FLAGS for a in argv)


def _may_be_one_of_several(argv: Sequence[str]) -> bool:
    process_flags = Values()
    define_processes(process_flags)
    given = {a.lstrip("-").partition("=")[0] for a in argv}
    return bool(given & {*process_flags}) or any(name in os.environ for name in MULTI_PROCESS_ENV)


def _docstring(module: str) -> str | None:
    """A module's docstring, read without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")), clean=False)


# ---------------------------------------------------------------------------------------- reading flags
def required(values: Values, name: str) -> Any:
    """A flag's value; UserError where it was not given."""
    if values[name].value is None:
        raise UserError(f"--{name} is missing: {values[name].help.rstrip(' .,')}. See --help for an example.")
    return values[name].value


def config_of(values: Values) -> Config:
    """The config of --config and its overrides, validated."""
    config = unchecked_config_of(values)
    config.validate()
    return config


def unchecked_config_of(values: Values) -> Config:
    """Returns the config of --config and its overrides, without checking their values."""
    config = values.config if values["config"].present else required(values, "config")
    if not isinstance(config, Config):
        kind = type(config).__name__
        file = config_provenance(values)["config_file"]
        raise UserError(
            f"{file}: get_config returned a {kind}; it must return a mice_jax.config.Config, so end it with `return c`."
        )
    return config


def config_provenance(values: Values) -> dict[str, Any]:
    """The config's file and the overrides of the command line, for config.json."""
    flag: Any = values["config"]  # a class that ml_collections does not export
    return {"config_file": flag.config_filename, "overrides": dict(flag.override_values)}


def workdir_of(values: Values) -> "RunPath":
    """The folder that --workdir names, on disk or in a bucket."""
    from mice_jax.storage.paths import parse_path  # it imports fsspec, which --help does not need

    return parse_path(required(values, "workdir"))


def processes_of(argv: Sequence[str]) -> tuple[str | None, int | None, int | None]:
    """Coordinator address, number of processes and process id, also where other arguments are wrong."""
    values = Values()
    define_processes(values)
    values(["mice", *argv], known_only=True)
    return values.coordinator_address, values.num_processes, values.process_id


# ---------------------------------------------------------------------------------------- commands from Python
def make_module_callable(module: str, function: Callable[..., Any]) -> None:
    """Makes a command's module callable, so that `mice_jax.train` is both the module and a function.

    Args:
      module: the name of the command's module.
      function: what a call of the module calls.
    """

    class CallableModule(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallableModule.__doc__ = function.__doc__
    sys.modules[module].__class__ = CallableModule
