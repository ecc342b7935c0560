"""A command that takes no time, for tests of the process that runs commands; see `main`."""

import os
import signal
import sys

KEPT: list[object] = []


def main(argv: list[str]) -> int:
    """Prints the process, then does what the first argument says.

    Args:
        argv: "kill" ends the process by SIGKILL; "keep" leaves a large array behind; a number is the exit code.
    """
    print(os.getpid(), os.environ.get("TINY", ""), sys.argv[1:])
    if argv == ["kill"]:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if argv == ["keep"]:
        import jax.numpy as jnp

        KEPT.append(jnp.zeros(2**25))
        return 0
    return int(argv[0])
