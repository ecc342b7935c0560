"""Keeps what the trials of a sweep have measured, in one compressed file that is committed beside the study.

    python studies/recall/keep.py --sweep=studies/recall/runs/final --output=studies/recall/results/final.jsonl.gz

The first line of the file is sweep.json of the sweep, with its registered claims. Each further line is a trial:
its row of results.csv, of whose signals those after a tenth of a run are kept, and the lines of its metrics.jsonl that
have an evaluation. Paths are relative to the folder that holds the sweep. run.py calls this after each sweep.
"""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from mice_jax.cli import command
from mice_jax.errors import UserError

COLUMNS = ("number", "seed", "status", "steps", "samples", "metric", "reason")  # of results.csv, besides the axes
EARLY = "@10%"  # the end of the columns of signals that are kept: of the first evaluation after the start


def keep(sweep: Path, output: Path) -> int:
    """Writes the file.

    Args:
        sweep: The folder of the sweep, whose runs may still go on.
        output: The file, which is replaced if it exists.

    Returns:
        The number of trials that have an evaluation.

    Raises:
        UserError: The folder holds no sweep.
    """
    if not (sweep / "results.csv").is_file():
        raise UserError(f"{sweep} has no results.csv, so it is not the folder of a sweep that has begun.")
    lines = [json.loads((sweep / "sweep.json").read_text())]
    for row in csv.DictReader((sweep / "results.csv").read_text().splitlines()):
        trial = {n: row[n] for n in row if n in COLUMNS or "." in n.partition("@")[0] or n.endswith(EARLY)}
        if records := evaluations(sweep / "runs" / row["number"] / "metrics.jsonl"):
            lines.append(trial | {"evaluations": records})
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    text = text.replace(f"{sweep.resolve().parent}/", "")
    output.write_bytes(gzip.compress(text.encode(), mtime=0))
    return len(lines) - 1


def evaluations(metrics: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl that have an evaluation, that before the first step included."""
    if not metrics.is_file():
        return []
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record for record in records if any(name.startswith("eval/") for name in record)]


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a file that `keep` wrote: sweep.json, and the trials."""
    first, *trials = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    return first, trials


def define(values: command.Values, argv: list[str]) -> None:
    flags.DEFINE_string("sweep", None, "folder of the sweep", flag_values=values)
    flags.DEFINE_string("output", None, "file to write", flag_values=values)


def begin(values: command.Values) -> None:
    output = Path(command.required(values, "output"))
    count = keep(Path(command.required(values, "sweep")), output)
    print(f"{count} trials kept in {output}")


if __name__ == "__main__":
    sys.exit(command.run(__doc__, define, begin, sys.argv[1:]))
