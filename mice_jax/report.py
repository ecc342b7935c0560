"""Write one HTML page of a run, of several runs, or of a sweep.

  mice report --workdir=runs/demo
  mice report --workdir=runs/a,runs/b,runs/c --output=compared.html
  mice report --workdir=sweeps/rates
  mice report --workdir=runs/demo --serve       # a page that follows a run in progress

The page is self-contained: it opens from disk and needs no network. By default it is written to report.html in the
folder of the run or sweep; for several runs, in the current folder. A run that has not ended is shown as far as it is.
With --serve the page is served to browsers on this machine alone, and shows what the run has written since.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("report")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mice_jax.cli.flags import define_report
from mice_jax.errors import UserError
from mice_jax.report_page import live, page, read_runs
from mice_jax.storage.outputs import check_output_file
from mice_jax.storage.paths import download_small_files, parse_path

MAX_WARNINGS = 10  # printed for things that could not be read; the page lists all of them


def begin(values: command.Values) -> None:
    """Writes the report page that the flags describe."""
    folders = [_folder(name) for name in command.required(values, "workdir")]
    if not folders:
        raise UserError("--workdir is empty. See --help for an example.")
    if len(folders) > 1 and (sweeps := [f for f in folders if read_runs.is_sweep(f)]):
        raise UserError(f"--workdir: {sweeps[0]} is a sweep. Give it alone, or some of the runs in {sweeps[0]}/runs.")
    console = Console(highlight=False, soft_wrap=True)
    if values.serve:
        _serve(values, folders, console)
        return
    if values["port"].present:
        raise UserError("--port is the port of --serve, which is missing.")
    output = _output(values, folders)
    problems, verdicts = page.write(folders, output)
    for problem in problems[:MAX_WARNINGS]:
        console.print(f"[yellow]warning: {escape(problem)}[/yellow]")
    if len(problems) > MAX_WARNINGS:
        console.print(f"[yellow]and {len(problems) - MAX_WARNINGS} more warnings; the page lists all[/yellow]")
    for line in verdicts:
        console.print(escape(line))
    console.print(f"report: {escape(str(output))}")


def _serve(values: command.Values, folders: list[Path], console: Console) -> None:
    """Serves the page until Ctrl-C."""
    if values.output is not None:
        raise UserError("--serve writes no file. Leave out --output, or --serve.")
    if remote := [name for name in values.workdir if "://" in name]:
        raise UserError(f"--serve reads folders on this disk, and {remote[0]} is in a bucket. Leave out --serve.")
    page.render(page.collect(folders))  # What is missing is said here, not to the browser.
    with live.LiveReport(folders, values.port) as server:
        console.print(f"report: {server.address} follows {escape(','.join(values.workdir))}; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _folder(name: str) -> Path:
    """Returns the local folder of a run or a sweep; from a bucket, all but its checkpoints is copied to this disk."""
    place = parse_path(name)
    folder = place if isinstance(place, Path) else download_small_files(place)
    if not folder.is_dir():
        raise UserError(f"--workdir: the folder {name} does not exist.")
    if not (read_runs.is_sweep(folder) or read_runs.is_run(folder)):
        raise UserError(
            f"--workdir: {name} is neither the folder of a run (it would hold metrics.jsonl or a run's config.json) "
            "nor that of a sweep (sweep.json)."
        )
    return folder


def _output(values: command.Values, folders: list[Path]) -> Path:
    given = values.workdir
    if values.output is None and "://" in given[0]:
        raise UserError(f"--output is missing. {given[0]} is in a bucket; give a file on this disk, F.html.")
    default = Path(page.REPORT) if len(folders) > 1 else folders[0] / page.REPORT
    output = Path(values.output) if values.output else default
    check_output_file(output, "F.html")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command.run(__doc__, define_report, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
