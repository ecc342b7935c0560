"""Packages that no command uses, but that transformers, tensorboardX and others import where they are installed.

They take longer to import than all the rest of a command. A command's process hides them while it imports what it
needs, and finds what it finds on a machine without them. A library's user may need them: there nothing is hidden.
"""

import sys

PACKAGES = ("torch", "tensorflow", "boto3", "google.cloud.storage")


def hide() -> None:
    """Makes imports of these packages fail as if they were not installed, unless something has imported them."""
    for name in PACKAGES:
        if name not in sys.modules:
            # Python documents None in sys.modules as the way to make an import fail.
            sys.modules[name] = None  # type: ignore[assignment]


def show() -> None:
    """Makes these packages importable again, for a user's own tasks and for stores in the cloud."""
    for name in PACKAGES:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
