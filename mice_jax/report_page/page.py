"""Writes the report: one self-contained HTML page of a run, of several runs or of a sweep.

Python collects and downsamples the numbers (content.py); the page's own script (assets/page.js) draws them with Plotly.
Text from data or configs reaches the page in a JSON block only and is inserted as text, never as HTML.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mice_jax.errors import UserError, install_command
from mice_jax.report_page import content, read_runs
from mice_jax.storage.paths import write_atomically

REPORT = "report.html"
ASSETS = Path(__file__).parent / "assets"


def write(folders: Sequence[Path], output: Path) -> list[str]:
    """Writes the page of a run, a sweep or several runs.

    Args:
        folders: the folder of one sweep, or those of one or more runs.
        output: the HTML file.

    Returns:
        A sentence for each thing that could not be read.
    """
    is_sweep = len(folders) == 1 and read_runs.is_sweep(folders[0])
    data = content.of_sweep(folders[0]) if is_sweep else content.of_runs(folders)
    write_atomically(output, render(data))
    return [f"{p['run']}: {p['text']}" if p["run"] else p["text"] for p in data["problems"]]


def render(data: dict[str, Any]) -> str:
    """Returns the HTML of a page with the given content; raises UserError where Plotly is not installed."""
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
    return template.render(data=data, plotly=get_plotlyjs(), css=css, js=js)
