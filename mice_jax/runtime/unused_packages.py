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
    keep_pandas_from_pyarrow()


def keep_pandas_from_pyarrow() -> None:
    """Keeps pyarrow from importing pandas, which its first array does where pandas is installed.

    pyarrow looks for pandas once, and again where something asks it for a data frame, so all conversions still work.
    """
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is None or "pandas" in sys.modules:
        return
    absent = _NoPandas()
    sys.meta_path.insert(0, absent)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(absent)


class _NoPandas:
    """A finder of modules that does not find pandas. With None in sys.modules pyarrow would fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)
