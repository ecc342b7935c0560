"""JSON files of runs and sweeps, which a full disk or a copy that was cut can leave damaged."""

import json
from typing import Any

from mice_jax.errors import UserError
from mice_jax.storage.paths import RunPath


def read_json(file: RunPath) -> Any:
    """Returns the content of a JSON file; None where it does not exist.

    Raises:
      UserError: The file is damaged.
    """
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:  # no JSON, or no UTF-8
        raise UserError(
            f"{file} is damaged: {e}. Restore it from a copy (a summary.json can be removed too, and is written anew), "
            "or start again in another folder."
        ) from None
