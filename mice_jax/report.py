"""Write one HTML page of a run, of several runs, or of a sweep.

  mice report --workdir=runs/demo
  mice report --workdir=runs/a,runs/b,runs/c --output=compared.html
  mice report --workdir=sweeps/rates

The page holds all that it shows: it opens from disk, without a network. It is report.html in the run's or the sweep's
folder, or of several runs in this one, where --output names no other file. A run that goes on is shown as far as it is.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("report")  # --help and wrong flags need none of the imports below, which take seconds

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mice_jax.cli.flags import define_report
from mice_jax.errors import UserError
from mice_jax.report_page import page, read_runs
from mice_jax.storage.paths import download_small_files, parse_path

SHOWN = 10  # of the things that could not be read


def begin(values: command.Values) -> None:
    folders = [_folder(name) for name in command.required(values, "workdir")]
    if not folders:
        raise UserError("--workdir is empty. See --help for an example.")
    if len(folders) > 1 and (sweeps := [f for f in folders if read_runs.is_sweep(f)]):
        raise UserError(f"--workdir: {sweeps[0]} is a sweep; give it alone, or some of the runs in its folder runs.")
    output = _output(values, folders)
    console = Console(highlight=False, soft_wrap=True)
    problems = page.write(folders, output)
    for problem in problems[:SHOWN]:
        console.print(f"[yellow]warning: {escape(problem)}[/yellow]")
    if len(problems) > SHOWN:
        console.print(f"[yellow]and {len(problems) - SHOWN} more, all of them on the page[/yellow]")
    console.print(f"report: {escape(str(output))}")


def _folder(name: str) -> Path:
    """A run's or a sweep's folder; what is in a bucket is copied here, but for its checkpoints."""
    place = parse_path(name)
    folder = place if isinstance(place, Path) else download_small_files(place)
    if not folder.is_dir():
        raise UserError(f"--workdir: there is no folder {name}.")
    if not (read_runs.is_sweep(folder) or read_runs.is_run(folder)):
        raise UserError(f"--workdir: {name} holds no run (metrics.jsonl, config.json) and no sweep (sweep.json).")
    return folder


def _output(values: command.Values, folders: list[Path]) -> Path:
    given = values.workdir
    if values.output is None and "://" in given[0]:
        raise UserError(f"--output is missing: the page of {given[0]}, which is in a bucket, is written to this disk.")
    default = Path(page.REPORT) if len(folders) > 1 else folders[0] / page.REPORT
    output = Path(values.output) if values.output else default
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.absolute().parent}.")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; give a file, F.html.")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define_report, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
