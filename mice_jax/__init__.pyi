from collections.abc import Sequence
from typing import Any, Protocol

from mice_jax.api import Model as Model
from mice_jax.api import load_model as load_model
from mice_jax.config import Config

__version__: str

class _Train(Protocol):
    def __call__(self, config: Config, workdir: str) -> dict[str, Any]:
        """Trains a model in `workdir`, or resumes the run there; returns what summary.json holds."""

    def main(self, argv: Sequence[str] | None = None) -> int: ...

class _Prepare(Protocol):
    def __call__(self, config: Config, quiet: bool = False) -> dict[str, Any]:
        """Builds the token stores of a run; returns what data_report.json holds."""

    def main(self, argv: Sequence[str] | None = None) -> int: ...

train: _Train
prepare: _Prepare
