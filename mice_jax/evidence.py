"""Measure what the rules of sweeps save and what they lose, on finished sweeps and on synthetic ones.

  mice evidence --sweeps=sweeps/rates,sweeps/schedules
  mice evidence --sweeps=curves.npz --synthetic=0 --rules=bracket,median --output=evidence.json

Each rule runs by its own code on the stored curves and sees only what it has run. It chooses an arm by some seeds, and
the arm is scored on the others, for all ways to divide the seeds. Intervals are 95 %, by a bootstrap of whole sweeps.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("evidence")  # --help and wrong flags need none of the imports below

# isort: split
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mice_jax.cli.flags import define_evidence
from mice_jax.config_checks import nearest
from mice_jax.errors import UserError
from mice_jax.storage.outputs import check_output_file
from mice_jax.sweeps import evidence, stored_sweeps, synthetic
from mice_jax.sweeps.rule import SweepRule

WIDTH = 140  # columns of the table where the output is not a terminal


def begin(values: command.Values) -> None:
    """Scores the rules that the flags name on the sweeps that they name."""
    rules = _rules(values.rules)
    output = _output(values.output)
    sweeps = [stored_sweeps.load(Path(name)) for name in values.sweeps]
    repeated = {s.name for s in sweeps if sum(s.name == other.name for other in sweeps) > 1}
    sweeps = [
        dataclasses.replace(s, name=name) if s.name in repeated else s
        for s, name in zip(sweeps, values.sweeps, strict=True)
    ]
    sweeps += synthetic.sweeps(values.synthetic)
    if not sweeps:
        raise UserError("--sweeps is missing, and --synthetic is 0. Name a finished sweep. See --help for an example.")
    errors = Console(stderr=True, highlight=False)
    with errors.status("") as status:
        scores = evidence.evaluate(
            sweeps,
            rules,
            values.seeds,
            values.workers,
            progress=lambda done: status.update(f"{done} of {len(sweeps)} sweeps"),
        )
    summaries = evidence.summarise(scores)
    _print(summaries)
    if output:
        output.write_text(json.dumps(_plain(scores, summaries), indent=1, allow_nan=False) + "\n")


def _rules(names: Sequence[str]) -> Mapping[str, SweepRule]:
    for name in names:
        if name not in evidence.RULES:
            raise UserError(
                f"--rules: {name!r} is not a rule of `mice evidence`{nearest(name, evidence.RULES)} Give names of "
                f"{', '.join(evidence.RULES)}."
            )
    return {name: evidence.RULES[name] for name in names} or evidence.RULES


def _output(name: str | None) -> Path | None:
    if name is None:
        return None
    output = Path(name)
    check_output_file(output, "F.json")
    return output


def _print(summaries: Sequence[evidence.Summary]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table()
    for header in ("sweeps", "rule"):
        table.add_column(header)
    for header in ("saved, %", "regret, %", f"P(> {evidence.MISS:.0%})", "winner lost", "time, runs"):
        table.add_column(header, justify="right")
    group = ""
    for s in summaries:
        if s.group != group:
            table.add_section()
        table.add_row(
            f"{s.group} ({s.sweeps})" if s.group != group else "",
            s.rule,
            _interval(s.saved, 0),
            _interval(s.regret, 2),
            f"{s.misses:.2f}",
            f"{s.winner_lost:.2f}",
            f"{s.wall_clock:.1f}",
        )
        group = s.group
    console.print(table)
    for s in summaries:
        if s.rule.startswith("bracket"):
            console.print(_verdict(s))


def _interval(values: tuple[float, float, float], digits: int) -> str:
    mean, low, high = (f"{100 * v:.{digits}f}" for v in values)
    return f"{mean} [{low}, {high}]"


def _verdict(s: evidence.Summary) -> str:
    verdict = "meets" if s.passes else "misses"
    return (
        f"{s.rule}, {s.group} ({s.sweeps} {'sweep' if s.sweeps == 1 else 'sweeps'}): {verdict} the targets. Saved "
        f"{s.saved[0]:.0%} (at least {evidence.MIN_SAVED:.0%}), upper end of the mean regret {s.regret[2]:.2%} (at "
        f"most {evidence.MAX_REGRET:.0%}), P(regret > {evidence.MISS:.0%}) {s.misses:.2f} (at most "
        f"{evidence.MAX_MISSES})."
    )


def _plain(scores: Sequence[evidence.Score], summaries: Sequence[evidence.Summary]) -> dict[str, Any]:
    """Returns what the file of --output holds; null stands for a number that is not finite."""
    return {
        "scores": [_finite(dataclasses.asdict(s)) for s in scores],
        "summaries": [_finite(dataclasses.asdict(s)) | {"passes": s.passes} for s in summaries],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command.run(__doc__, define_evidence, begin, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
