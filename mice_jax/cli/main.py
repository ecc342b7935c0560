"""`mice <command>`: looks a command up by name and runs it."""

import importlib
import sys
from collections.abc import Sequence

from mice_jax import __version__
from mice_jax.cli import command, completion
from mice_jax.cli.flags import COMMANDS
from mice_jax.config_checks import nearest
from mice_jax.runtime import slow_imports, xla_flags

# What commands are called elsewhere.
OTHER_NAMES = {
    "chat": "generate --model=MODEL",
    "eval": "evaluate",
    "finetune": "train",
    "merge": "export",
    "resume": "train",
    "sft": "train",
    "tokenize": "prepare",
}


def start() -> None:
    """The entry point of the installed `mice`."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS and not command.asks_for_help(sys.argv):
        xla_flags.reexec_with_huge_pages()
    main()


def main() -> None:
    """Runs the command that the arguments name, and exits with its code."""
    try:
        code = command.exit_on_closed_pipe(lambda: _run(sys.argv[1:]))
    except KeyboardInterrupt:  # while the command's modules are imported; later, `command.run` sees it
        print(command.INTERRUPTED_MESSAGE, file=sys.stderr, flush=True)
        code = command.INTERRUPTED
    sys.exit(code)


def _run(argv: Sequence[str]) -> int:
    name, arguments = (argv[0] if argv else "--help"), argv[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"mice_jax {__version__}")
        return 0
    if name == "--completion":
        print(completion.script())
        return 0
    if name not in COMMANDS:
        near = f"; did you mean {OTHER_NAMES[name]!r}?" if name in OTHER_NAMES else nearest(name, COMMANDS)
        print(f"error: unknown command {name!r}{near} See mice --help.", file=sys.stderr)
        return 2
    code = command.early_exit(name, arguments)
    if code is None:
        slow_imports.begin()  # not before `early_exit`, which runs a part of the command and ends this again
        try:
            module = importlib.import_module(COMMANDS[name].module)
        finally:
            slow_imports.end()
        code = module.main(arguments)
    return code


def _help() -> str:
    listed = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"mice <command> [--flag=value ...]\n\n{listed}\n\nmice <command> --help has an example of each.\n"
        'eval "$(mice --completion)" lets bash and zsh complete commands, flags and config fields.'
    )
