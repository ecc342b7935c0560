"""Write a run's model as a Hugging Face folder: safetensors, config, tokenizer, chat template, model card.

  mice export --workdir=runs/demo --output=demo_hf
  mice export --workdir=runs/demo --step=400 --dtype=bfloat16 --output=demo_hf_400
  mice export --workdir=runs/demo --average --output=demo_hf_average
  mice export --workdir=runs/demo --output=demo_hf --push_to=ORG/NAME

The dtype is that of the weights the run started from, unless --dtype=float32 or --dtype=bfloat16 is given. --average
takes the average of the weights that a run with train.ema_half_life keeps, instead of the weights. --push_to uploads
the folder to the Hugging Face Hub, with the token in HF_TOKEN; a new repository is private.
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("export")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mice_jax.cli.flags import define_export
from mice_jax.data.tokenizer import load_tokenizer, save_tokenizer
from mice_jax.errors import UserError
from mice_jax.model_source import ModelSource, resolve_source, resolve_step, stop_ids
from mice_jax.models import hf, untrained
from mice_jax.storage import hub, jsonl
from mice_jax.storage.workdir import METRICS, Workdir
from mice_jax.training import build
from mice_jax.training.model_card import README, licence_of, model_card
from mice_jax.training.run_files import AVERAGED

DTYPES = ("float32", "bfloat16")


def export(values: command.Values) -> None:
    """Writes the model of the run in --workdir to the folder --output.

    Args:
      values: The values of the command's flags.

    Raises:
      UserError: A flag is not valid, the output exists, or the checkpoint cannot be read.
    """
    workdir, output = command.workdir_of(values), Path(command.required(values, "output"))
    if not (workdir / "model" / "config.json").exists():
        raise UserError(f"--workdir={workdir} is not a run's workdir: it has no model/config.json.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} already exists. Remove it, or give another folder.")
    source = dataclasses.replace(resolve_source(str(workdir)), averaged=values.average)
    dtype = values.dtype or source.config.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}.")
    if values.push_to is not None:
        hub.check_upload(values.push_to)
    step = resolve_step(source, values.step)
    assert step is not None, "a run has steps"
    model = build.load_for_inference(source, step=step)
    tokenizer = load_tokenizer(str(source.folder))
    # The export is written to a temporary folder and renamed once it is complete, so that no reader sees half of it.
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = hf.save_params(partial, model.params, model.decoder, source.config, dtype, source.folder)
    untrained.copy_processor_files(source.folder, partial)
    save_tokenizer(tokenizer, partial)
    generation = _generation_config(source.config, tokenizer)
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    card = _model_card(source, step, dtype, output.resolve().name)
    (partial / README).write_text(card, encoding="utf-8")
    if output.exists():
        output.rmdir()
    partial.rename(output)
    print(f"exported {count:,} parameters in {dtype} to {output}")
    print(f"weights: {_average(source, step) or f'those after step {step}'}")
    if values.push_to is not None:
        print(f"uploaded to {hub.upload(output, values.push_to)}")


def _generation_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns generation_config.json: answers end at the token that ends a turn, and at the model's own stop tokens."""
    generation = {"eos_token_id": stop_ids(config, tokenizer), "do_sample": False}
    if config.get("bos_token_id") is not None:
        generation["bos_token_id"] = config["bos_token_id"]
    return generation | ({} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id})


def _average(source: ModelSource, step: int) -> str:
    """Returns what the exported weights are an average of; empty if they are those after a step."""
    run = Workdir(source.folder.parent)
    if source.averaged:
        half_life = (run.read_json("config.json") or {}).get("train", {}).get("ema_half_life", 0)
        return f"the running average after step {step}, with a half-life of {half_life:,g} samples"
    return (run.read_json(AVERAGED) or {}).get("average", "")


def _model_card(source: ModelSource, step: int, dtype: str, title: str) -> str:
    """Returns the text of README.md, from the files that the run has written about itself."""
    run = Workdir(source.folder.parent)
    config, report, summary = (run.read_json(f"{name}.json") or {} for name in ("config", "data_report", "summary"))
    records = (r for r in jsonl.read(run.local / METRICS) if r["step"] == step)
    return model_card(
        title,
        config,
        report,
        summary,
        next(records, {}),
        step=step,
        dtype=dtype,
        licence=licence_of(source.folder),
        average=_average(source, step),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; `argv` is by default that of the process."""
    return command.run(__doc__, define_export, export, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
