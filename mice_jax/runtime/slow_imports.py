"""What a command does around its imports, which take seconds: it makes them shorter, and the end of its process too."""

import gc

from mice_jax.runtime import unused_packages


def begin() -> None:
    """Hides packages that no command uses, and stops the garbage collector, which would visit imports many times."""
    unused_packages.hide()
    gc.disable()


def end() -> None:
    """Undoes `begin`, without an effect where that has been done; what was imported is never visited by the collector.

    Without this a process takes a second to collect its imports when it ends, and a forked one copies them.
    """
    unused_packages.show()
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
