"""`mice <verb>`: looks a verb up by name and runs it."""

import importlib
import sys

from mice_jax.cli import command
from mice_jax.runtime import xla_flags

VERBS = {
    "train": "fine-tune a model, or resume a run",
    "prepare": "tokenise the data ahead of a run, and look at it",
    "plan": "what will fit which devices, and what it would take",
    "sweep": "run many trials of a config, and stop the poor ones early",
    "report": "write one HTML page of a run, of several, or of a sweep",
    "evaluate": "score a model on benchmarks",
    "export": "write a run's model as a Hugging Face folder",
    "generate": "answer prompts with a model, or chat",
}
CONFIGURED = ("train", "prepare", "plan")  # whose --config is a run's


def start() -> None:
    """What the installed `mice` runs."""
    xla_flags.reexec_with_huge_pages()
    main()


def main() -> None:
    verb, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("-h", "--help", "help"):
        listed = "\n".join(f"  {name:<10} {what}" for name, what in VERBS.items())
        print(f"mice <verb> [--flag=value ...]\n\n{listed}\n\nmice <verb> --help has an example of each.")
        return
    if verb not in VERBS:
        print(f"error: {verb!r} is no verb of mice; it has {', '.join(VERBS)}.", file=sys.stderr)
        sys.exit(2)
    if verb in CONFIGURED and (code := command.check_first(arguments)):
        sys.exit(code)
    sys.exit(importlib.import_module(f"mice_jax.{verb}").main(arguments))
