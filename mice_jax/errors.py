"""The ways in which a command ends that are not "done", and their exit codes.

Raise `UserError` for whatever the user can mend: its text is one paragraph that says what is wrong, where
(file, line, field), both values, and the mend. Invariants of our own are `assert`s, and keep their traceback.
"""


class UserError(ValueError):
    """The input or the config is wrong; the command prints `error: ...` and exits with 2."""

    exit_code = 2


class AgreedError(UserError):
    """A `UserError` that every process of the run raises, so that none of them waits for another."""


class StoreError(UserError):
    """What is not on this machine cannot be reached or written, though it was tried for a while."""


class StoppedByRule(Exception):
    """A rule ended the run (a non-finite loss, an early stop); exits with 3, the reason printed."""

    exit_code = 3


class Preempted(Exception):
    """The run was asked to leave and has saved its state; exits with 75: run again to go on."""

    exit_code = 75


def one_line(error: BaseException) -> str:
    """What a library's error says, to stand inside a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
