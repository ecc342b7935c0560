"""Runs the study of what a small model learns and keeps, in as many sittings as it takes.

    python studies/recall/run.py --workdir=studies/recall/runs --minutes=60
    python studies/recall/run.py --workdir=/tmp/recall --size=smoke

It makes the data, trains the base model, checks that it knows its world, and runs the sweeps one after the other. After
--minutes, what runs is saved and the command ends with 75; the same command goes on from there.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import mice_jax  # noqa: F401  (first, because it silences transformers' advice to install torch)

# isort: split
from keep import keep
from mice_jax.cli import command
from mice_jax.errors import Preempted, UserError
from mice_jax.sweeps.study import read_summary
from recall import OLD, SCALES, SIZES, scale_of
from world import write_world

SWEEPS = ("batch", "final", "control", "schedule", "phases")
MIN_KNOWN = 0.8  # exact match of the base on each part of its world
END_S = 300.0  # how long a run may take to save its state


def define(values: command.Values, argv: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "folder of the study", flag_values=values)
    flags.DEFINE_float("minutes", 0.0, "length of this sitting, 0 = to the end", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("workers", 2, "trials at a time", 1, flag_values=values)
    flags.DEFINE_enum("size", "study", list(SIZES), "how much is run", flag_values=values)


def begin(values: command.Values) -> int:
    folder = Path(command.required(values, "workdir"))
    end = time.monotonic() + 60 * values.minutes if values.minutes else float("inf")
    folder.mkdir(parents=True, exist_ok=True)
    scale = folder / "scale.txt"
    if scale.exists() and scale.read_text().strip() != values.size:
        raise UserError(f"--size={values.size}: {folder} was begun with {scale.read_text().strip()}.")
    scale.write_text(values.size + "\n")
    if not (folder / "data" / "phases_done").exists():
        write_world(folder / "data", SIZES[values.size])
        (folder / "data" / "phases_done").touch()
    base = folder / "base"
    if (read_summary(base) or {}).get("status") != "completed":
        run("train", [f"--config={HERE / 'base.py'}:{folder}", f"--workdir={base}"], end)
    check_base(base, folder)
    for name in SWEEPS:
        print(f"\n== {name} ==", flush=True)
        config = [f"--config={HERE / f'{name}.py'}:{folder}", f"--workdir={folder / name}"]
        try:
            run("sweep", [*config, f"--workers={values.workers}"], end)
        finally:
            if values.size == "study" and (folder / name / "results.csv").is_file():
                keep(folder / name, HERE / "results" / f"{name}.jsonl.gz")
    return 0


def run(verb: str, arguments: list[str], end: float) -> None:
    """Runs a command as a child until the sitting ends; it saves its state then."""
    child = subprocess.Popen([sys.executable, "-m", f"mice_jax.{verb}", *arguments])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the child is told
    try:
        code = child.wait(None if end == float("inf") else max(1.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.send_signal(signal.SIGTERM)
        code = child.wait(END_S)
    if code == Preempted.exit_code:
        raise Preempted("the sitting is over; run the same command to go on.")
    if code:
        sys.exit(code)


def check_base(base: Path, folder: Path) -> None:
    """Raises UserError where the base does not know its world, so that there is nothing to forget."""
    last = json.loads((base / "summary.json").read_text())["last_metrics"]
    known = {name: last[f"eval/{name}/exact_match"] for name in OLD}
    print(f"the base knows {', '.join(f'{v:.0%} of {k}' for k, v in known.items())}", flush=True)
    if min(known.values()) < MIN_KNOWN and scale_of(str(folder)) == SCALES["study"]:
        raise UserError(
            f"{base} knows too little of its world: {known}, at least {MIN_KNOWN} of each is needed. Raise base_epochs "
            "in studies/recall/recall.py, and train it again in a new folder."
        )


def main() -> int:
    return command.run(__doc__, define, begin, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
