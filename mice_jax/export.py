"""Write a run's model as a Hugging Face folder: safetensors, config, tokenizer, chat template, model card.

  mice export --workdir=runs/demo --output=demo_hf
  mice export --workdir=runs/demo --step=400 --dtype=bfloat16 --output=demo_hf_400
  mice export --workdir=runs/demo --average --output=demo_hf_average
  mice export --workdir=runs/lora --adapter --output=demo_adapter
  mice export --workdir=runs/demo --output=demo_hf --push_to=ORG/NAME

The dtype is that of the weights the run started from, unless --dtype=float32 or --dtype=bfloat16 is given. --average
takes the average of the weights that a run with train.ema_half_life keeps, instead of the weights. A run with
model.lora is exported merged with its base or, with --adapter, as the adapter that PEFT loads. --push_to uploads the
folder to the Hugging Face Hub, with the token in HF_TOKEN; a new repository is private.
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

import jax

from mice_jax.cli import flag_checks
from mice_jax.cli.flags import define_export
from mice_jax.data.tokenizer import load_tokenizer, save_tokenizer
from mice_jax.model_source import (
    AdapterRun,
    ModelSource,
    adapter_run,
    exported_generation_config,
    load_adapters,
    resolve_source,
    resolve_step,
)
from mice_jax.models import hf, peft_format, untrained
from mice_jax.sharding import make_mesh
from mice_jax.storage import hub, jsonl
from mice_jax.storage.model_names import check_workdir, no_adapter
from mice_jax.storage.outputs import check_new_folder
from mice_jax.storage.recorded_config import AVERAGED
from mice_jax.storage.workdir import METRICS, Workdir
from mice_jax.training import build
from mice_jax.training.model_card import README, licence_of, model_card


def export(values: command.Values) -> None:
    """Writes the model of the run in --workdir to the folder --output.

    Args:
      values: The values of the command's flags.

    Raises:
      UserError: A flag is not valid, the output exists, or the checkpoint cannot be read.
    """
    workdir, output = command.workdir_of(values), Path(command.required(values, "output"))
    flag_checks.check_export(values)
    check_workdir(workdir)
    check_new_folder("output", output)
    source = dataclasses.replace(resolve_source(str(workdir)), averaged=values.average)
    dtype = values.dtype or source.config.get("dtype", "float32")
    step = resolve_step(source, values.step)
    assert step is not None, "a run has steps"
    adapters = adapter_run(source)
    if values.adapter:
        if adapters is None:
            raise no_adapter(workdir)
        dtype = values.dtype or "float32"
    tokenizer = load_tokenizer(str(source.folder))
    # The export is written to a temporary folder and renamed once it is complete, so that no reader sees half of it.
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if values.adapter and adapters is not None:
        count = _save_adapter(partial, source, adapters, step, dtype)
    else:
        model = build.load_for_inference(source, step=step)
        count = hf.save_params(partial, model.params, model.decoder, source.config, dtype, source.folder)
        untrained.copy_processor_files(source.folder, partial)
        generation = exported_generation_config(source, tokenizer)
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, partial)
    card = _model_card(source, step, dtype, output.resolve().name)
    (partial / README).write_text(card, encoding="utf-8")
    if output.exists():
        output.rmdir()
    partial.rename(output)
    print(f"exported {count:,} parameters in {dtype} to {output}")
    part = "" if adapters is None else "the adapter alone, " if values.adapter else "merged with the adapter, "
    print(f"weights: {part}{_average(source, step) or _of_step(source, step)}")
    if values.push_to is not None:
        print(f"uploaded to {hub.upload(output, values.push_to)}")


def _save_adapter(folder: Path, source: ModelSource, run: AdapterRun, step: int, dtype: str) -> int:
    """Writes the adapter of a run's checkpoint as PEFT loads it; returns its number of parameters."""
    adapters = load_adapters(source, run.lora, make_mesh(1, -1, 1), step)
    place = run.base.workdir or run.base.folder
    base = run.base.hosted.repo if run.base.hosted else str(place.resolve() if isinstance(place, Path) else place)
    config = {
        "r": run.lora.rank,
        "lora_alpha": run.alpha,
        "use_rslora": run.rslora,
        "use_dora": run.lora.dora,
        "base_model_name_or_path": base,
    }
    return peft_format.write_adapter(
        folder, jax.device_get(adapters), source.spec, source.architecture, config=config, dtype=dtype
    )


def _average(source: ModelSource, step: int) -> str:
    """Returns what the exported weights are an average of; empty if they are those after a step."""
    run = Workdir(source.folder.parent)
    if source.averaged:
        half_life = (run.read_json("config.json") or {}).get("train", {}).get("ema_half_life", 0)
        return f"the running average after step {step}, with a half-life of {half_life:,g} samples"
    return (run.read_json(AVERAGED) or {}).get("average", "")


def _of_step(source: ModelSource, step: int) -> str:
    """Returns the step of the weights, and of how many steps where the run goes on after it."""
    steps = (Workdir(source.folder.parent).read_json("data_report.json") or {}).get("steps", step)
    return f"those after step {step}" + (f" of {steps}" if step < steps else "")


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
