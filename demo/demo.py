"""Trains, exports and queries a small model in minutes on a laptop: `make demo` runs this.

It makes chats of three phases (make_data.py), shows what an untrained model answers, trains that model on all of them,
exports a Hugging Face folder and asks it what it was not trained on. An answer is right if it is the expected one,
letter for letter. The folder of this file then has data/, run/ (the workdir, with report.html), hf/ (the exported
model) and result.json.
"""

import json
import resource
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from mice_jax.runtime import xla_flags  # first: the package keeps transformers from advising us to install torch

if __name__ == "__main__":
    xla_flags.reexec_with_huge_pages()  # as `mice` does, before the imports below, which take seconds
    print("Importing JAX and transformers ...", flush=True)

# isort: split
import jax.numpy as jnp
from heartbeat import Heartbeat
from make_data import PHASES, Pair, Split, make_data

import mice_jax
from mice_jax import export, prepare, report, train
from mice_jax.api import Model
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.model_source import generation_config_of, resolve_source
from mice_jax.runtime import compile_cache
from mice_jax.storage.cache import cache_folder
from mice_jax.training import build

DATA, RUN, HF, RESULT = HERE / "data", HERE / "run", HERE / "hf", HERE / "result.json"
CONFIG = f"{ROOT / 'configs' / 'demo.py'}:{DATA}"
LONGEST_ANSWER = 40  # tokens; no expected answer is longer
BATCH = 64  # questions that are answered at once


def main() -> None:
    for folder in (DATA, RUN, HF):
        shutil.rmtree(folder, ignore_errors=True)
    RESULT.unlink(missing_ok=True)
    compile_cache.enable(cache_folder(""))  # the trained model then runs the programs compiled for the untrained one

    heading("Data: lists, the documentation of this Python, and small tasks")
    phases = make_data(DATA)
    for phase, split in phases.items():
        print(
            f"  {phase:<8} {len(split.trained):>6,} chats to train on, {len(split.held_out):>4,} questions to ask after"
        )

    heading("One sample as the model sees it; the loss is on the marked tokens")
    stop_unless_done(prepare.main([f"--config={CONFIG}", "--inspect=1"]))

    heading("Before training: what random weights answer")
    print("  XLA compiles each program when it is first needed, which takes some seconds.")
    before, answers = ask(untrained_model(), phases, limit=BATCH)  # its answers never end, so that all would take long
    show(answers)

    heading("Training: mice train --config=configs/demo.py --workdir=demo/run")
    print("  After a table of the run's settings, XLA compiles the training step; then there is a line every 25 steps.")
    stop_unless_done(train.main([f"--config={CONFIG}", f"--workdir={RUN}"]))

    heading("Export: mice export --workdir=demo/run --output=demo/hf")
    stop_unless_done(export.main([f"--workdir={RUN}", f"--output={HF}"]))

    heading("After training: what demo/hf answers")
    after, answers = ask(mice_jax.load_model(HF), phases)
    show(answers)

    heading("Report: mice report --workdir=demo/run")
    stop_unless_done(report.main([f"--workdir={RUN}"]))

    heading("Right answers to questions that were not trained on, letter for letter")
    print(table(before, after))
    print(f"  (Before training, the first {BATCH} questions of each phase were asked.)")
    figures = result(after, answers)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nThis took {figures['cpu_s']:.0f} CPU seconds. The figures are in {RESULT}.")
    print(NEXT)


NEXT = f"""
Ask it more:         mice generate --model={HF.relative_to(ROOT)}
With your own data:  write it to data/chats.jsonl as README.md shows, and set it and a model in a copy of configs/sft.py
Look at it:          mice prepare --config=configs/mine.py --inspect=3
Train on it:         mice train --config=configs/mine.py --workdir=runs/mine
(mice is in .venv/bin: source .venv/bin/activate)"""


def untrained_model() -> Model:
    """The model as training will begin with it."""
    source = resolve_source(f"random:{DATA / 'init'}")
    tokenizer = load_tokenizer(str(source.folder))
    return Model(build.load_for_inference(source), tokenizer, generation_config_of(source, tokenizer), jnp.float32)


def ask(
    model: Model, phases: dict[str, Split], limit: int | None = None
) -> tuple[dict[str, dict[str, int]], list[dict[str, str]]]:
    """Asks what is held out, at most `limit` of a phase; returns right answers by phase, and each phase's first."""
    scores, shown = {}, []
    for phase in PHASES:
        asked = phases[phase].held_out[:limit]
        print(f"  asking {len(asked)} questions of {phase} ...")
        answers = model.generate([p.prompt for p in asked], max_new_tokens=LONGEST_ANSWER, batch_size=BATCH)
        scores[phase] = exact_match(asked, answers)
        shown.append({"prompt": asked[0].prompt, "answer": answers[0], "expected": asked[0].answer})
    return scores, shown


def exact_match(asked: list[Pair], answers: list[str]) -> dict[str, int]:
    """How many answers are the expected ones, letter for letter, and how many were asked for."""
    return {"right": sum(p.answer == a for p, a in zip(asked, answers, strict=True)), "of": len(asked)}


def show(answers: list[dict[str, str]]) -> None:
    for a in answers:
        print(f"\n  > {a['prompt']}\n  {a['answer'][:80]!r}")


def table(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    """A line for each phase, with the right answers before and after training."""
    lines = [f"  {'phase':<10}{'before':>14}{'after':>14}"]
    for phase in PHASES:
        cells = (f"{score[phase]['right']} of {score[phase]['of']}" for score in (before, after))
        lines.append(f"  {phase:<10}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def result(after: dict[str, dict[str, int]], answers: list[dict[str, str]]) -> dict[str, object]:
    """The content of result.json; cpu_s is the CPU time of this process and its children, user and system."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = round(sum(u.ru_utime + u.ru_stime for u in usages), 1)
    return {"cpu_s": cpu_s, "exact": after, "answers": answers, "hf": str(HF)}


def heading(text: str) -> None:
    print(f"\n== {text} ==")


def stop_unless_done(exit_code: int) -> None:
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    with Heartbeat():
        main()
