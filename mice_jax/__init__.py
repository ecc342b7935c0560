"""mice_jax: full supervised fine-tuning of small language models with exact large batches, in JAX."""

import importlib
import os
from typing import Any

# Only the tokenizers of transformers are used, so its warning that PyTorch is missing is not relevant.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"

# These names are imported when they are first used, so that `import mice_jax` stays fast and does not import JAX.
# Their types are in __init__.pyi.
_LAZY = {"Model": "mice_jax.api", "load_model": "mice_jax.api"}


# Each of these is the module of a command and, since it is callable, a function of the Python API too.
_CALLABLE = ("prepare", "train")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"mice_jax.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_CALLABLE})
