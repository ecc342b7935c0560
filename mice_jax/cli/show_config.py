"""Print the config that a command would get: the file's values, its overrides, and every default.

  mice config --config=configs/demo.py
  mice config --config=configs/demo.py --config.optim.learning_rate=1e-3

Each line can be copied into a config file. A comment shows the default of a value that differs from it.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mice_jax.cli import command
from mice_jax.cli.flags import define_config
from mice_jax.config import Config


def show(values: command.Values) -> None:
    """Prints the config, then raises ConfigError if it is not valid."""
    config = command.unchecked_config_of(values)
    print("\n".join(_lines(config, Config(), "c")))
    config.validate()


def _lines(part: Any, default: Any, name: str) -> Iterator[str]:
    """An assignment for every field of a config or one of its sections."""
    for field in dataclasses.fields(part):
        value, default_value = getattr(part, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _lines(value, default_value, f"{name}.{field.name}")
            continue
        comment = "" if value == default_value else f"  # default {_text(default_value)}"
        yield f"{name}.{field.name} = {_text(value)}{comment}"


def _text(value: Any) -> str:
    """A value as Python source; of a phase or a source, only what differs from its defaults."""
    if isinstance(value, list):
        return f"[{', '.join(_text(v) for v in value)}]"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    default: Any = type(value)()  # type: ignore[operator]
    changed = [f.name for f in dataclasses.fields(value) if getattr(value, f.name) != getattr(default, f.name)]
    return f"{type(value).__name__}({', '.join(f'{n}={_text(getattr(value, n))}' for n in changed)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command.run(__doc__, define_config, show, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
