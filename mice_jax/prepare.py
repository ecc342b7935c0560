"""Build a run's token stores ahead of it, and look at what will be trained on.

  mice prepare --config=configs/demo.py
  mice prepare --config=configs/demo.py --inspect=3
  mice prepare --config=configs/demo.py --report

--inspect=N shows N samples of each phase as the model will see them, trained tokens marked; with --ids token by token.
--report adds lengths, copies, the longest samples, what each epoch draws of each source, and how full the rows are.
--output=F.json writes all of it as data_report.json has it.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("prepare")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax.cli import flag_checks
from mice_jax.cli.flags import define_prepare
from mice_jax.cli.progress_display import Display
from mice_jax.config import Config
from mice_jax.data import statistics
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset
from mice_jax.data.loader import StepSource
from mice_jax.data.mixture import Mixture
from mice_jax.data.packing import microbatch_shapes
from mice_jax.errors import format_count
from mice_jax.training import build

WIDTH = 160  # columns of a table if the output is not a terminal


def prepare(values: command.Values) -> None:
    """Builds the token stores of a config and prints the reports that the flags select."""
    config = command.config_of(values)
    flag_checks.check_prepare(values)
    output = Path(values.output) if values.output else None
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    data, encoder = _open_data(config, console)
    whole = _report(config, data)
    console.print(statistics.summary_table(whole))
    if values.report:
        _print_report(whole, console)
    for sentence in data.warnings:
        console.print(f"[yellow]warning: {escape(sentence)}[/yellow]", soft_wrap=True)
    if output:
        output.write_text(json.dumps(whole, indent=1) + "\n")
    if values.inspect:
        _inspect(config, data.dataset, encoder, values.inspect, values.ids, console)


def _open_data(config: Config, console: Console) -> tuple[build.RunData, ChatEncoder]:
    inputs = build.inputs(config, weights=False)
    encoder = build.encoder(config, inputs.tokenizer)
    with Display(console) as display:
        for note in inputs.notes:
            display.log(note)
        data = build.data(config, encoder, display.log, display.watch)
    return data._replace(warnings=[*data.warnings, *build.length_warnings(config, inputs.source)]), encoder


def _report(config: Config, data: build.RunData) -> dict[str, Any]:
    """Returns the content of data_report.json."""
    return statistics.with_steps(data.dataset.report, _steps(config, data), data.total_steps, data.warnings)


def _steps(config: Config, data: build.RunData) -> StepSource:
    """Returns the run's steps, packed for the config's shards and rows; a size that it leaves open is 1."""
    shards = max(1, config.mesh.data) * max(1, config.mesh.fsdp)
    parts = 2 * config.mesh.sequence if config.mesh.sequence > 1 else 1
    shapes = microbatch_shapes(config.data.max_length, config.train.rows_per_device or 1, parts)
    return build.step_source(config, data, shapes, shards, tuple(range(shards)))


def _print_report(whole: dict[str, Any], console: Console) -> None:
    console.print(statistics.length_table(whole))
    console.print(_epoch_table(whole))
    for line in statistics.longest_lines(whole):
        console.print(f"longest: {escape(line)}", soft_wrap=True)
    packed_for = whole["packed_for"]
    console.print(
        f"{format_count(whole['steps'], 'step')}; in the first {min(statistics.NUM_PACKED_STEPS, whole['steps'])}, "
        f"{whole['packing_efficiency_of_first_steps']:.1%} of the slots are filled, packed for "
        f"{format_count(packed_for['shards'], 'shard')} of {format_count(packed_for['rows_per_shard'], 'row')} (of "
        "mesh and train.rows_per_device; 1 where they leave it open)"
    )


def _epoch_table(whole: dict[str, Any]) -> Table:
    """Returns a table of what each epoch draws from each source; consecutive equal epochs share a line."""
    table = Table("phase", "epochs", "steps", "samples", "of each source")
    for phase in whole["phases"]:
        first = 0
        for i, epoch in enumerate(phase["epochs"]):
            if i + 1 < len(phase["epochs"]) and phase["epochs"][i + 1] == epoch:
                continue
            drawn = ", ".join(f"{n:,} {escape(name)}" for name, n in epoch["by_source"].items())
            numbers = str(i + 1) if i == first else f"{first + 1} to {i + 1}, each"
            table.add_row(escape(phase["name"]), numbers, f"{epoch['steps']:,}", f"{epoch['samples']:,}", drawn)
            first = i + 1
    return table


def _inspect(config: Config, data: Dataset, encoder: ChatEncoder, count: int, ids: bool, console: Console) -> None:
    """Prints the first `count` samples of each phase's first step, in the order of the run."""
    for number, phase in enumerate(data.phases):
        mixture = Mixture(data.phases[: number + 1], batch_size=config.optim.batch_size, seed=config.seed)
        first = next(i for i in range(len(mixture)) if mixture.step(i).phase == number)
        for sample in mixture.step(first).samples[:count]:
            tokens, trained = data.corpus.sample(int(sample))
            where, marked = data.corpus.where(int(sample)), int(trained[1:].sum())
            title = f"{phase.name}: sample {sample}, {len(tokens)} tokens, {marked} trained on"
            console.rule(escape(f"{title}: {where}"))
            if ids:
                print(encoder.show_ids(tokens, trained, color=console.is_terminal))
            else:
                print(encoder.show(tokens, trained, color=console.is_terminal))


def prepare_in_python(config: Config, quiet: bool = False) -> dict[str, Any]:
    """Builds the token stores of a run; `mice_jax.prepare` is this function.

    Args:
      config: the config of the run.
      quiet: whether to show no progress.

    Returns:
      What data_report.json holds: samples read, kept and dropped, and why, with token counts by source.

    Raises:
      UserError: where the config is wrong or the data cannot be read.
    """
    config.validate()
    data, _ = _open_data(config, Console(highlight=False, quiet=quiet))
    return _report(config, data)


command.make_module_callable(__name__, prepare_in_python)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return command.run(__doc__, define_prepare, prepare, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
