"""Runs the study at mouse scale, about 80 minutes on two CPU cores.

    python studies/mouse/run.py --workdir=studies/mouse/runs

It makes the data, pretrains a small base model on Python's documentation, runs the sweeps of this folder, asks
each trial the held-out questions and writes the page, WORKDIR/README.md. The same command again goes on where it was.
While sweeps run, page.py writes the page of the trials so far.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import mice_jax  # noqa: F401  (first, because it silences transformers' advice to install torch)

# isort: split
from ask import Asked
from mice_jax import sweep, train
from mice_jax.cli import command
from mice_jax.storage.paths import write_atomically
from mice_jax.sweeps.study import read_summary
from page import ANSWERS, SWEEPS, write_page
from study_data import PHASES, Entry, clip, make_data, read_documentation, train_tokenizer, write_model_config

VOCAB_SIZE = 2048
MODEL_SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3}
MODEL_SIZES |= {"num_key_value_heads": 1}


def define(values: command.Values, argv: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "folder of the study", flag_values=values)
    flags.DEFINE_integer("workers", 2, "trials at a time", 1, flag_values=values)


def begin(values: command.Values) -> int:
    folder = Path(command.required(values, "workdir"))
    if not (folder / "data" / "documents.jsonl").exists():
        prepare(folder / "data")
    if (read_summary(folder / "base") or {}).get("status") != "completed":
        config = f"{HERE / 'mouse_base.py'}:{folder}"
        if code := train.main([f"--config={config}", f"--workdir={folder / 'base'}"]):
            return code
    for name in SWEEPS:
        print(f"\n== {name} ==", flush=True)
        config = f"{HERE / f'mouse_{name}.py'}:{folder}"
        if code := sweep.main([f"--config={config}", f"--workdir={folder / name}", f"--workers={values.workers}"]):
            return code
        ask(folder / name, folder / "data")
    print(f"\n{write_page(folder, folder)}")
    return 0


def ask(sweep_folder: Path, data: Path) -> None:
    """Asks each completed trial the held-out questions with short answers; writes how many answers are right."""
    model = None
    for run in sorted((sweep_folder / "runs").iterdir(), key=lambda r: int(r.name)):
        if (read_summary(run) or {}).get("status") != "completed" or (run / ANSWERS).exists():
            continue
        model = model or Asked(run)
        model.load(run)
        right = {p: model.exact_match(data / f"{p}.heldout.jsonl") for p in ("instructions", "skills")}
        write_atomically(run / ANSWERS, json.dumps(right) + "\n")


def prepare(folder: Path) -> None:
    """Writes the data with its tokenizer, the documents to pretrain on, and the config of the base model."""
    make_data(folder)
    train_tokenizer(folder, [folder / f"{phase}.jsonl" for phase in PHASES], VOCAB_SIZE)
    file = write_model_config(folder, VOCAB_SIZE)
    file.write_text(json.dumps(json.loads(file.read_text()) | MODEL_SIZES, indent=2) + "\n", encoding="utf-8")
    held_out = (folder / "knowledge.heldout.jsonl").read_text(encoding="utf-8")
    texts = "".join(json.dumps({"text": text}) + "\n" for text in documents(read_documentation(), held_out))
    # This file is written last: it marks the folder as complete.
    (folder / "documents.jsonl").write_text(texts, encoding="utf-8")


def documents(entries: list[Entry], held_out: str) -> Iterator[str]:
    """Yields the documentation of each entry once, in pieces of a sample's size, without what `held_out` asks about."""
    excluded = {e.doc for e in entries if f"`{e.name}`" in held_out or f" about {e.name}?" in held_out}
    for doc in dict.fromkeys(e.doc for e in entries if e.doc not in excluded):
        yield from pieces(doc)


def pieces(text: str) -> Iterator[str]:
    """Cuts a text between paragraphs, else lines, else words, into parts of at most MAX_CHARS."""
    while text := text.strip():
        piece = clip(text)
        yield piece
        text = text[len(piece) :]


def main() -> int:
    return command.run(__doc__, define, begin, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
