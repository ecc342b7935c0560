"""Trains, exports and queries a small model in minutes on a laptop: `make demo` runs this.

It makes chat data from the documentation of the Python installation, trains a small model from scratch on three phases
stacked, measures the held-out loss, exports a Hugging Face folder and asks it two questions. The folder of this file
then has data/ (made once), run/ (the workdir) and hf/ (the exported model).
"""

import json
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mice_jax.runtime import xla_flags  # first: the package keeps transformers from advising us to install torch

if __name__ == "__main__":
    xla_flags.reexec_with_huge_pages()  # as `mice` does, before the imports below, which take seconds

# isort: split
import jax.numpy as jnp
from make_data import PHASES, make_data, train_tokenizer, write_model_config

from mice_jax import export, train
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.inference.sampler import Sampler, Sampling
from mice_jax.model_source import resolve_source
from mice_jax.storage.workdir import METRICS
from mice_jax.training import build

DATA, RUN, HF = HERE / "data", HERE / "run", HERE / "hf"
VOCAB_SIZE = 2048
SCORED = 100  # held-out prompts a phase whose answers are compared word for word


def main() -> None:
    began = time.perf_counter()
    for folder in (DATA, RUN, HF):
        shutil.rmtree(folder, ignore_errors=True)

    heading("Data: from the documentation of this Python")
    counts = make_data(DATA)
    train_tokenizer(DATA, [DATA / f"{phase}.jsonl" for phase in PHASES], VOCAB_SIZE)
    write_model_config(DATA, VOCAB_SIZE)
    for name, count in counts.items():
        print(f"  {name:<28} {count:>6,} samples")

    heading("Training: mice train --config=configs/demo.py --workdir=demo/run")
    config = HERE.parent / "configs" / "demo.py"
    stop_unless_done(train.main([f"--config={config}:{DATA}", f"--workdir={RUN}"]))

    heading("Export: mice export --workdir=demo/run --output=demo/hf")
    stop_unless_done(export.main([f"--workdir={RUN}", f"--output={HF}"]))

    heading("Held out: loss, and answers that are right word for word")
    model = Model(HF)
    losses = held_out_losses()
    print(f"  {'phase':<14} {'loss, first':>12} {'loss, last':>12} {'exact match':>14}")
    for phase in PHASES:
        right, asked = model.exact_match(DATA / f"{phase}.heldout.jsonl")
        first, last = losses[0][f"eval/{phase}/loss"], losses[-1][f"eval/{phase}/loss"]
        print(f"  {phase:<14} {first:>12.3f} {last:>12.3f} {right:>8} of {asked}")
    print(f"  {'all':<14} {losses[0]['eval/loss']:>12.3f} {losses[-1]['eval/loss']:>12.3f}")

    heading("Two questions to demo/hf")
    for question in ("What is the smallest of 7, 2, 9?", "What does `json.dumps` do?"):
        answer, stopped = model.ask([[{"role": "user", "content": question}]], max_new_tokens=120)[0]
        print(f"  > {question}\n  {answer}{'' if stopped else ' ... (cut)'}\n")

    print(f"All of it took {time.perf_counter() - began:.0f} s. The run is in {RUN}, the model in {HF}.")
    print(f"Ask it more: .venv/bin/mice generate --model={HF}")


class Model:
    """An exported folder, loaded as any user's, or a run's workdir."""

    def __init__(self, folder: Path):
        source = resolve_source(str(folder))
        self._encoder = ChatEncoder(load_tokenizer(str(source.folder)))
        loaded = build.load_for_inference(source)
        self._params, self._sampler = loaded.params, Sampler(loaded.decoder, jnp.float32)
        self._tokenizer = self._encoder.tokenizer

    def load(self, folder: Path) -> None:
        """Takes the weights of a folder of the same model and tokenizer."""
        self._params = build.load_for_inference(resolve_source(str(folder))).params

    def ask(self, conversations: list[list[dict[str, str]]], max_new_tokens: int) -> list[tuple[str, bool]]:
        """The likeliest answer to each, and whether it ended by itself."""
        prompts = [self._encoder.prompt_ids(c) for c in conversations]
        answers = self._sampler.generate(
            self._params, prompts, Sampling(max_new_tokens), self._encoder.stop_ids(), batch_size=25
        )
        return [(str(self._tokenizer.decode(a.ids)), a.stopped) for a in answers]

    def exact_match(self, file: Path, count: int | None = SCORED) -> tuple[int, int]:
        """How many of the first held-out answers (None: of all) are given word for word, and how many were asked."""
        samples = [json.loads(line)["messages"] for line in file.read_text().splitlines()[:count]]
        answers = self.ask([s[:-1] for s in samples], max_new_tokens=60)
        right = sum(a == s[-1]["content"] for (a, _), s in zip(answers, samples, strict=True))
        return right, len(samples)


def held_out_losses() -> list[dict[str, float]]:
    """The held-out losses that the run measured, first to last."""
    records = [json.loads(line) for line in (RUN / METRICS).read_text().splitlines()]
    return [r for r in records if "eval/loss" in r]


def heading(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def stop_unless_done(exit_code: int) -> None:
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
