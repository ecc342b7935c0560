"""Build a run's token stores ahead of it, and look at what will be trained on.

  mice prepare --config=configs/demo.py
  mice prepare --config=configs/demo.py --inspect=3

--inspect=N shows N samples of each phase as the model will see them, trained tokens marked.
"""

import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax import command
from mice_jax.config import Config
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.dataset import Dataset, build_dataset
from mice_jax.data.mixture import Mixture
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.start import find_origin


def define(values: command.Values, argv: list[str]) -> None:
    command.define_config(values, argv)
    flags.DEFINE_integer("inspect", 0, "samples of each phase to show", lower_bound=0, flag_values=values)


def prepare(values: command.Values) -> None:
    config = command.config_of(values)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    origin_folder = config.data.tokenizer or str(find_origin(config.model.init_from).folder)
    encoder = ChatEncoder(load_tokenizer(origin_folder, config.data.chat_template))
    data = build_dataset(config.data, encoder, lambda what: console.print(f"[dim]{escape(what)}[/dim]"))
    console.print(_table(data))
    if values.inspect:
        _inspect(config, data, encoder, values.inspect, console)


def _table(data: Dataset) -> Table:
    table = Table("source", "read", "kept", "dropped", "truncated", "tokens", "trained", "median", "longest")
    held_out = {f"{name} (held out)": s for name, s in data.report["validation"].items()}
    for name, s in (data.report["sources"] | held_out).items():
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in s["dropped"].items()) or "0"
        lengths = s["length_percentiles"]
        counts = [f"{s[k]:,}" for k in ("read", "kept")] + [dropped]
        counts += [f"{s[k]:,}" for k in ("truncated", "tokens")]
        trained = f"{s['loss_tokens'] / max(1, s['tokens']):.0%}"
        table.add_row(name, *counts, trained, *(str(lengths.get(p, "-")) for p in ("50", "100")))
    return table


def _inspect(config: Config, data: Dataset, encoder: ChatEncoder, count: int, console: Console) -> None:
    """The first samples of each phase's first step, in the order of the run."""
    for number, phase in enumerate(data.phases):
        mixture = Mixture(data.phases[: number + 1], batch_size=config.optim.batch_size, seed=config.seed)
        first = next(i for i in range(len(mixture)) if mixture.step(i).phase == number)
        for sample in mixture.step(first).samples[:count]:
            ids, trained = data.corpus.sample(int(sample))
            marked = int(trained[1:].sum())
            console.rule(f"{phase.name}: sample {sample}, {len(ids)} tokens, {marked} trained on")
            print(encoder.show(ids, trained, color=console.is_terminal))


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define, prepare, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
