"""Score a model on benchmarks, with lm-evaluation-harness.

  mice evaluate --model=hf_folder --tasks=mmlu,arc_challenge --output=scores.json
  mice evaluate --model=runs/demo --tasks=gsm8k --apply_chat_template --log_samples --output=scores.json
  mice evaluate --model=runs/demo --tasks=mine --include_path=my_tasks --all_checkpoints --output=scores.json
  mice evaluate --model=hf_folder --tasks=mt_bench --judge_url=https://host/v1 --judge_model=NAME --output=scores.json

Tasks are named as the harness names them, or as the YAML files in --include_path do. The output is the harness's own
result format. With --all_checkpoints it is that of the newest one, with the scores of each under "checkpoints", and a
line for each is in the run's eval_scores.jsonl. What was scored before, with the same settings, is not scored again.
mt_bench is not the harness's: a judge grades the answers, which are kept beside the output (docs/mt_bench.md).
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("evaluate")  # --help and wrong flags need none of the imports below, which take seconds

# isort: split
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mice_jax.checkpoint import CheckpointReader
from mice_jax.cli.flags import define_evaluate
from mice_jax.cli.progress_display import Display
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.evals import benchmarks, mt_bench
from mice_jax.evals.benchmarks import Benchmark, Results, Settings
from mice_jax.inference.chat import ChatModel
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.inference.sampler import Sampler, cast_params
from mice_jax.model_source import (
    ModelSource,
    check_vocabulary,
    compute_dtype,
    fingerprint,
    generation_config_of,
    load_params,
    resolve_model,
    resolve_step,
)
from mice_jax.models.transformer import make_decoder
from mice_jax.runtime import compile_cache, distributed, xla_flags
from mice_jax.sharding import make_mesh, param_shardings
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.paths import RunPath, write_atomically
from mice_jax.storage.workdir import DIRECTIONS, SCORES


def evaluate(values: command.Values) -> None:
    # ------------------------------------------------------------------------------------ what is asked
    xla_flags.set_flags(deterministic=False)
    compile_cache.enable(cache_folder(""))
    distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
    lead = distributed.is_main_process()
    console = Console(quiet=not lead, highlight=False, soft_wrap=True)
    with distributed.raise_on_all_processes():
        distributed.check_devices(values.expect_devices)
        settings = _settings(values)
        output = _output(values)
        source = resolve_model(command.required(values, "model"), values.step)
        steps = _steps(source, values)
        tokenizer = load_tokenizer(str(source.folder), values.chat_template)
        check_vocabulary(source, tokenizer.get_vocab())
        dtype = compute_dtype(values.compute_dtype)
        if values.batch_size < 1:
            raise UserError(f"--batch_size={values.batch_size} must be at least 1.")
        if not values.tasks:
            raise UserError("--tasks is missing; give at least one, as in --tasks=mmlu,gsm8k.")
        own = [name for name in values.tasks if name != mt_bench.NAME]
        generation = generation_config_of(source, tokenizer)
        positions = source.spec.max_positions
        asked = benchmarks.load_benchmarks(own, values.include_path, settings, tokenizer, generation, positions)
        judged = _judged(values, generation)
        encoder = ChatEncoder(tokenizer) if judged or settings.apply_chat_template else None
        if judged and judged.system and encoder:  # a template may take none
            encoder.prompt_ids([{"role": "system", "content": judged.system}, {"role": "user", "content": ""}])
        template = encoder.fingerprint() if encoder else ""  # with the day, where it writes that
    distributed.assert_same_on_all_processes("tasks", " ".join(b.fingerprint for b in asked))

    # ------------------------------------------------------------------------------------ scores
    mesh = make_mesh(1, -1, 1)
    decoder = make_decoder(source.spec, mesh.shape["tensor"])
    shardings = param_shardings(decoder.abstract, decoder.axes, mesh)
    by_step: dict[int | None, Results] = {}
    with Display(console) as display:
        watch = _bars(display)
        if asked:
            from mice_jax.evals.harness import MiceLM  # it imports the harness, of which we know that it is there

            lm = MiceLM(decoder, mesh, dtype, tokenizer, generation, batch_size=values.batch_size, watch=watch)
        sampler = Sampler(decoder, dtype)  # one for all steps, as it compiles
        for step in steps:
            if asked:
                lm.params = None  # those of the step before are gone before the next come
            load = functools.partial(load_params, source, decoder, shardings, step=step)
            weights = functools.cache(lambda load=load: cast_params(load(), dtype))
            model = fingerprint(source, step) if lead else ""
            found: list[Results] = []
            for benchmark in asked:
                file = _cached(model, benchmark, [str(dtype), template])
                kept = json.loads(file.read_text()) if lead and file.exists() else None
                if distributed.is_true_on_any_process(kept is not None):  # only the lead looks
                    display.say(f"{_what(benchmark, step)} was scored before: {file}")
                else:
                    lm.params = weights()
                    kept = benchmarks.score(lm, benchmark, settings)
                    if lead:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(file, _text(kept))
                if kept is not None:
                    found.append(kept)
            if judged and encoder:
                which = f"{model} {dtype} {template}"
                file = output.with_suffix(f".{step}.mt_bench.jsonl" if values.all_checkpoints else ".mt_bench.jsonl")
                with jax.set_mesh(mesh):
                    stops = [*encoder.stop_ids(), *generation.stop_ids]
                    speaker = ChatModel(sampler, weights(), encoder, stops)
                    found.append(_graded(judged, speaker, values.batch_size, which, file, watch, generation))
                del speaker
                display.say(mt_bench.describe(found[-1][mt_bench.NAME]))
            if lead:
                by_step[step] = benchmarks.merged(found)
                for warning in benchmarks.warnings(by_step[step], positions):
                    display.say(f"warning: {warning}")

    # ------------------------------------------------------------------------------------ what is left of it
    if lead:
        newest = by_step[steps[-1]] | {"model_name": str(values.model), "model_source": "mice_jax"}
        if values.all_checkpoints:
            assert source.workdir is not None
            lines, newest["checkpoints"] = _curve(source.workdir, by_step)
            console.print("\n".join(lines))
        write_atomically(output, _text(newest))
        console.print(_table(newest))
        console.print(f"results in {output}")


def _settings(values: command.Values) -> Settings:
    multiturn = values.fewshot_as_multiturn
    return Settings(
        num_fewshot=values.num_fewshot,
        limit=values.limit,
        apply_chat_template=values.apply_chat_template,
        fewshot_as_multiturn=values.apply_chat_template if multiturn is None else multiturn,
        system_instruction=values.system_instruction,
        log_samples=values.log_samples,
    )


def _judged(values: command.Values, generation: GenerationDefaults) -> mt_bench.Settings | None:
    """What MT-Bench asks and who judges it, where it is among the tasks."""
    if mt_bench.NAME not in values.tasks:
        return None
    if jax.process_count() > 1:
        raise UserError(f"{mt_bench.NAME} runs in one process; this is one of {jax.process_count()}.")
    if values.tasks == [mt_bench.NAME]:
        for name in ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "log_samples"):
            if values[name].present:
                raise UserError(
                    f"--{name} is for the harness's tasks; {mt_bench.NAME} asks its questions without examples, in the "
                    "chat template, and keeps every answer. Leave it out."
                )
    limit, system = values.limit, values.system_instruction
    return mt_bench.settings_of(values, limit=limit, system=system, generation=generation)


def _graded(
    judged: mt_bench.Settings,
    speaker: ChatModel,
    batch_size: int,
    model: str,
    file: Path,
    watch: mt_bench.Watch,
    generation: GenerationDefaults,
) -> Results:
    """MT-Bench's scores in the harness's form, with all that it found under its own name."""
    began = time.time()
    graded = mt_bench.run(judged, functools.partial(speaker.converse, batch_size=batch_size), model, file, watch)
    means = {key: graded[key] for key in ("score", *(f"turn_{t}" for t in mt_bench.TURNS))}
    return {
        "results": {mt_bench.NAME: {"alias": mt_bench.NAME} | {f"{key},none": mean for key, mean in means.items()}},
        "higher_is_better": {mt_bench.NAME: dict.fromkeys(means, True)},
        "n-shot": {mt_bench.NAME: 0},
        "shortened": {},
        "without_system": {},
        "not_followed": {mt_bench.NAME: list(generation.ignored_fields)},
        "date": began,
        "total_evaluation_time_seconds": str(time.time() - began),
        mt_bench.NAME: graded,
    }


def _output(values: command.Values) -> Path:
    output = Path(command.required(values, "output"))
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}.")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; give a file, F.json.")
    return output


def _steps(source: ModelSource, values: command.Values) -> Sequence[int | None]:
    """The checkpoints to score; None stands for a Hugging Face folder's weights."""
    if source.kind != "run":
        if values.all_checkpoints:
            raise UserError(
                f"--all_checkpoints is for a run's folder; --model={values.model} is a Hugging Face folder."
            )
        return [None]
    if values.all_checkpoints and (values.step is not None or source.step is not None):
        raise UserError("--all_checkpoints is for all steps of a run, but one of them is named too. Leave one out.")
    newest = resolve_step(source, values.step)
    if not values.all_checkpoints:
        return [newest]
    assert source.workdir is not None
    checkpoints = CheckpointReader(source.workdir)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


# ---------------------------------------------------------------------------------------- what was scored before
def _cached(model: str, benchmark: Benchmark, how: list[str]) -> Path:
    """Where the results of a benchmark are kept."""
    key = hashlib.sha256(json.dumps([model, benchmark.fingerprint, *how]).encode()).hexdigest()
    return cache_folder("") / "evals" / f"{key}.json"


def _text(results: Results) -> str:
    return json.dumps(results, indent=2, default=_plain, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """What is no JSON as the harness writes it, which may not be installed where only MT-Bench is asked."""
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, set) else str(value)


# ---------------------------------------------------------------------------------------- what is said
def _bars(display: Display) -> Callable[[str, int, int], None]:
    bars: dict[str, Any] = {}

    def watch(what: str, done: int, total: int) -> None:
        bar = bars.setdefault(what, display.watch(what, "requests"))
        bar(done / total, done)

    return watch


def _what(benchmark: Benchmark, step: int | None) -> str:
    return benchmark.name if step is None else f"{benchmark.name} at step {step}"


def _table(results: Results) -> Table:
    table = Table("task", "examples", "metric", "value", "stderr")
    for column in table.columns[1:2] + table.columns[3:]:
        column.justify = "right"
    for name, value in benchmarks.scores(results).items():
        task, _, metric = name.rpartition("/")
        error = results["results"][task].get(benchmarks.stderr_key(metric))
        shots, shown = results["n-shot"].get(task, ""), f"{error:.4f}" if isinstance(error, float) else ""
        table.add_row(
            escape(task), str(shots), escape(metric), "not finite" if value is None else f"{value:.4f}", shown
        )
    return table


def _curve(workdir: RunPath, by_step: Mapping[Any, Results]) -> tuple[list[str], list[dict[str, Any]]]:
    """Writes the scores of each checkpoint to the run's folder; returns what to say of the best, and the lines.

    Lines of earlier evaluations stay, as do their other metrics at the same step.
    """
    checkpoints = CheckpointReader(workdir)
    samples = {step: checkpoints.samples(step) for step in by_step}
    checkpoints.close()
    file = workdir / SCORES
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = {line["step"]: line for line in before}
    now = [{"step": s, "samples": samples[s]} | benchmarks.scores(r) for s, r in by_step.items()]
    for line in now:
        lines[line["step"]] = lines.get(line["step"], {}) | line
    write_atomically(file, "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
    better = {name: high for found in by_step.values() for name, high in benchmarks.higher_is_better(found).items()}
    file = workdir / DIRECTIONS
    known = json.loads(file.read_text()) if file.exists() else {}
    write_atomically(file, json.dumps(known | benchmarks.directions(better), indent=2) + "\n")
    return [_best(name, now, high) for name, high in better.items()], now


def _best(name: str, lines: list[dict[str, Any]], higher: bool) -> str:
    """The best score, and how soon it was reached, as far as the checkpoints can tell.

    A checkpoint may have none: no number, or no judgement by whoever judges.
    """
    sign = -1 if higher else 1
    scored = [line for line in lines if line.get(name) is not None]
    if not scored:
        return f"{name}: no finite score"
    at = min(range(len(scored)), key=lambda i: (sign * scored[i][name], i))
    after = scored[at - 1]["samples"] if at else 0
    return (
        f"{name}: best {scored[at][name]:.4f} at step {scored[at]['step']}, reached after {after:,} to "
        f"{scored[at]['samples']:,} samples (checkpoints tell no more)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(__doc__, define_evaluate, evaluate, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
