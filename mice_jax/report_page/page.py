"""Writes the report: one self-contained HTML page of a run, of several runs or of a sweep.

Python collects and downsamples the numbers (content.py); the page's own script (assets/page.js) draws them with Plotly.
Text from data or configs reaches the page in a JSON block only and is inserted as text, never as HTML.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from mice_jax.errors import UserError, install_command
from mice_jax.report_page import claims_table, content, read_runs
from mice_jax.storage.paths import write_atomically

REPORT = "report.html"
ASSETS = Path(__file__).parent / "assets"
REFRESH_S = 5.0  # A page of a run in progress asks for what is new after so many seconds.


class Written(NamedTuple):
    """What a page that was written says in short.

    Attributes:
        problems: A sentence for each thing that could not be read.
        verdicts: A line for each registered claim.
    """

    problems: list[str]
    verdicts: list[str]


def write(folders: Sequence[Path], output: Path) -> Written:
    """Writes the page of a run, a sweep or several runs.

    Args:
        folders: the folder of one sweep, or those of one or more runs.
        output: the HTML file.
    """
    data = collect(folders)
    write_atomically(output, render(data))
    problems = [f"{p['run']}: {p['text']}" if p["run"] else p["text"] for p in data["problems"]]
    return Written(problems, claims_table.sentences(data["claims"]) if data["claims"] else [])


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the content of the page of a sweep or of runs, as plain JSON values."""
    is_sweep = len(folders) == 1 and read_runs.is_sweep(folders[0])
    return content.of_sweep(folders[0]) if is_sweep else content.of_runs(folders)


def render(data: dict[str, Any], live: bool = False) -> str:
    """Returns the HTML of a page.

    Args:
        data: The content, see `collect`.
        live: Whether the page asks the server that it came from for its content, every REFRESH_S seconds.

    Raises:
        UserError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(f"a report needs plotly. Install it with: {install_command('lab')}.") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template = environment.get_template("page.html.jinja")
    css, js = ((ASSETS / f"page.{kind}").read_text() for kind in ("css", "js"))
    return template.render(data=data, plotly=get_plotlyjs(), css=css, js=js, refresh_s=REFRESH_S if live else 0)
