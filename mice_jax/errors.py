"""The errors that end a command, and their exit codes.

Raise `UserError` for everything that the user can fix: its text is one paragraph that says what is wrong, where (file,
line, field), the value found, and the fix. Invariants of the code are `assert`s, which keep their traceback.
"""

import difflib
import os
import sys
from collections.abc import Collection
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


class UserError(ValueError):
    """The input or the config is wrong; the command prints `error: ...` and exits with 2."""

    exit_code = 2


class AgreedError(UserError):
    """A `UserError` that every process of the run raises, so that none of them waits for another."""


class StoreError(UserError):
    """A remote store cannot be reached or written, after retries."""


class StoppedByRule(Exception):
    """A rule ended the run (a non-finite loss, an early stop); exits with 3, the reason printed."""

    exit_code = 3


class Preempted(Exception):
    """The run ended early with its state saved; exits with 75. The same command resumes it, except after a pause."""

    exit_code = 75


class Interrupted(Preempted):
    """The user ended the run with Ctrl-C; exits with 75, its state saved."""


class Paused(Preempted):
    """The run has come to `train.pause_at_share`, which must be moved to go on; exits with 75, its state saved."""


def one_line(error: BaseException) -> str:
    """Returns the text of a library's error on one line, to be quoted in a message."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def sentence(text: str) -> str:
    """Returns the text with a full stop at its end, unless it ends a sentence by itself."""
    return text if text.endswith(("?", ".")) else f"{text}."


def format_count(count: int, noun: str) -> str:
    """Returns a count with its noun in the singular or plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def did_you_mean(name: str, names: Collection[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Returns the end of an error message about an unknown name.

    Args:
        name: the name that was given.
        names: the names that are known.
        otherwise: what the message ends with if none of them is close.
        cutoff: how close it must be, from 0 to 1, as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def nearest_path(path: str | Path, otherwise: str) -> str:
    """Returns the end of an error message about a path that does not exist.

    Args:
        path: the path.
        otherwise: what the message ends with if its folder has no similar name.
    """
    folder, name = Path(path).parent, Path(path).name
    names = os.listdir(folder) if folder.is_dir() else []
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {folder / close[0]}?" if close else otherwise


def install_command(extra: str) -> str:
    """Returns how to install one of the extras of pyproject.toml, to be quoted in a message.

    Extras are installed from a checkout, since no package index has mice_jax, with the versions that were tested.
    """
    if (CHECKOUT / "pyproject.toml").is_file():
        pins = CHECKOUT / "constraints" / ("py311.txt" if sys.version_info < (3, 12) else "py312.txt")
        return f"pip install -c '{pins}' -e '{CHECKOUT}[{extra}]'"
    return f"pip install -e '.[{extra}]' in a checkout of mice_jax"
