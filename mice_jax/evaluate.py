"""Score a model on benchmarks, with lm-evaluation-harness.

  mice evaluate --model=hf_folder --tasks=mmlu,arc_challenge
  mice evaluate --model=runs/demo --tasks=gsm8k --apply_chat_template --log_samples --output=scores.json
  mice evaluate --model=runs/demo --tasks=mine --include_path=my_tasks --all_checkpoints --output=scores.json
  mice evaluate --model=hf_folder --tasks=mt_bench --judge_url=https://host/v1 --judge_model=NAME --output=scores.json

Tasks are named as the harness names them, or as the YAML files in --include_path do. Scores are printed; --output
writes them in the harness's own result format. With --all_checkpoints that holds the newest checkpoint, with the scores
of each under "checkpoints", and the run's eval_scores.jsonl gets a line for each. Results of the same weights and
settings are cached.
mt_bench is not a task of the harness: a judge grades answers, written next to the output (docs/mt_bench.md).
"""

from mice_jax.cli import command

if __name__ == "__main__":
    command.before_imports("evaluate")  # Handles --help and wrong flags before the imports below, which take seconds.

# isort: split
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mice_jax.checkpoint import CheckpointReader
from mice_jax.cli import flag_checks
from mice_jax.cli.flags import define_evaluate
from mice_jax.cli.progress_display import Display
from mice_jax.data.chat import ChatEncoder
from mice_jax.data.tokenizer import load_tokenizer
from mice_jax.errors import UserError
from mice_jax.evals import benchmarks, mt_bench
from mice_jax.evals.benchmarks import Benchmark, Results, Settings
from mice_jax.evals.judge import make_judge
from mice_jax.inference.chat import ChatModel
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.inference.sampler import Sampler
from mice_jax.model_source import (
    ModelSource,
    check_vocabulary,
    compute_dtype,
    fingerprint,
    generation_config_of,
    resolve_model,
    resolve_step,
)
from mice_jax.models.transformer import make_decoder
from mice_jax.runtime import compile_cache, distributed, precision, xla_flags
from mice_jax.sharding import make_mesh
from mice_jax.storage.cache import cache_folder
from mice_jax.storage.json_file import read_json
from mice_jax.storage.paths import RunPath, write_atomically
from mice_jax.storage.workdir import DIRECTIONS, SCORES
from mice_jax.training import build

if TYPE_CHECKING:
    from mice_jax.evals.harness import MiceLM


def evaluate(values: command.Values) -> None:
    """Scores the model on the tasks that the flags name, and writes the results.

    Args:
      values: The values of the command's flags.

    Raises:
      UserError: A flag is not valid, a task cannot be loaded or scored, or the model cannot be loaded.
    """
    # ------------------------------------------------------------------------------------ input
    xla_flags.set_flags(deterministic=False)
    compile_cache.enable(cache_folder(""))
    distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
    console = Console(quiet=not distributed.is_main_process(), highlight=False, soft_wrap=True)
    with distributed.raise_on_all_processes():
        job = _read_flags(values)
    distributed.assert_same_on_all_processes("tasks", " ".join(b.fingerprint for b in job.benchmarks))

    # ------------------------------------------------------------------------------------ scores
    with Display(console) as display:
        evaluator = _Evaluator(job, display)
        by_step = {step: evaluator.score_checkpoint(step) for step in job.steps}

    # ------------------------------------------------------------------------------------ output
    if distributed.is_main_process():
        newest = by_step[job.steps[-1]] | {"model_name": job.model, "model_source": "mice_jax"}
        if job.all_checkpoints:
            assert job.source.workdir is not None
            lines, newest["checkpoints"] = _curve(job.source.workdir, by_step)
            console.print("\n".join(lines))
        console.print(_table(newest))
        if job.output is not None:
            write_atomically(job.output, _text(newest))
            console.print(f"results in {job.output}")


@dataclasses.dataclass(frozen=True)
class _Job:
    """The settings that the flags name, which are read and checked before any weights are loaded.

    Attributes:
      model: The model as the user gave it.
      source: The model's config.
      steps: The checkpoints to score; None stands for the weights of a Hugging Face folder.
      all_checkpoints: Whether the steps are all checkpoints of a run.
      tokenizer: The model's tokenizer, with the chat template to use.
      encoder: Renders chats; None if no task needs a chat template.
      defaults: How the model generates by default.
      dtype: The dtype to compute in.
      batch_size: The number of answers that are generated at once.
      benchmarks: The harness's tasks.
      settings: How the harness's tasks are asked.
      mt_bench: MT-Bench's questions and judge; None if it is not among the tasks.
      output: The file of results; None writes none.
    """

    model: str
    source: ModelSource
    steps: Sequence[int | None]
    all_checkpoints: bool
    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder | None
    defaults: GenerationDefaults
    dtype: Any
    batch_size: int
    benchmarks: list[Benchmark]
    settings: Settings
    mt_bench: mt_bench.Settings | None
    output: Path | None

    @property
    def template(self) -> str:
        """A hash of the chat template, and of the day if the template writes it; empty if none is used."""
        return self.encoder.fingerprint() if self.encoder else ""


def _read_flags(values: command.Values) -> _Job:
    """Reads the model's config, the tokenizer and the tasks that the flags name, and checks all of them."""
    flag_checks.check_evaluate(values)
    distributed.check_devices(values.expect_devices)
    settings = _settings(values)
    model = command.required(values, "model")
    source = resolve_model(model, values.step)
    steps = _steps(source, values)
    tokenizer = load_tokenizer(str(source.tokenizer_folder), values.chat_template)
    check_vocabulary(source, tokenizer.get_vocab())
    dtype = compute_dtype(values.compute_dtype)
    precision.set_float32_matmul_precision(dtype, jax.default_backend())
    names = [name for name in values.tasks if name != mt_bench.NAME]
    defaults = generation_config_of(source, tokenizer)
    positions = source.spec.max_positions
    loaded = benchmarks.load_benchmarks(names, values.include_path, settings, tokenizer, defaults, positions)
    judged = _mt_bench_settings(values, defaults)
    encoder = ChatEncoder(tokenizer) if judged or settings.apply_chat_template else None
    if judged and judged.system and encoder:
        # A chat template may not accept a system message, so the error is raised before any computation.
        encoder.prompt_ids([{"role": "system", "content": judged.system}, {"role": "user", "content": ""}])
    return _Job(
        model=model,
        source=source,
        steps=steps,
        all_checkpoints=values.all_checkpoints,
        tokenizer=tokenizer,
        encoder=encoder,
        defaults=defaults,
        dtype=dtype,
        batch_size=values.batch_size,
        benchmarks=loaded,
        settings=settings,
        mt_bench=judged,
        output=Path(values.output) if values.output is not None else None,
    )


# ---------------------------------------------------------------------------------------- scores
class _Evaluator:
    """Scores checkpoints of one model; its functions are compiled once for all of them."""

    def __init__(self, job: _Job, display: Display):
        self._job, self._display, self._watch = job, display, _bars(display)
        self._mesh = make_mesh(1, -1, 1)
        decoder = make_decoder(job.source.spec, self._mesh.shape["tensor"])
        self._lm: MiceLM | None = None
        if job.benchmarks:
            from mice_jax.evals import harness  # It imports lm-eval, which load_benchmarks has found.

            self._lm = harness.MiceLM(
                decoder,
                self._mesh,
                job.dtype,
                job.tokenizer,
                job.defaults,
                batch_size=job.batch_size,
                watch=self._watch,
            )
        self._sampler = Sampler(decoder, job.dtype)

    def score_checkpoint(self, step: int | None) -> Results:
        """Scores one checkpoint on all tasks; results of the same weights and settings are read from the cache.

        Returns:
          The results in the harness's form on the main process; an empty dict on the others.
        """
        job = self._job
        if self._lm is not None:
            self._lm.params = None  # The weights of the step before must be freed before the next ones are loaded.
        weights = functools.cache(lambda: build.load_for_inference(job.source, self._mesh, step=step, dtype=job.dtype))
        model = fingerprint(job.source, step) if distributed.is_main_process() else ""
        results = [self._score_benchmark(benchmark, step, model, weights) for benchmark in job.benchmarks]
        if job.mt_bench is not None:
            results.append(self._grade(step, model, weights))
            self._display.log(mt_bench.describe(results[-1][mt_bench.NAME]))
        if not distributed.is_main_process():
            return {}
        merged = benchmarks.merged(results)
        for warning in benchmarks.warnings(merged, job.source.spec.max_positions):
            self._display.log(f"warning: {warning}")
        return merged

    def _score_benchmark(
        self, benchmark: Benchmark, step: int | None, model: str, weights: Callable[[], build.LoadedModel]
    ) -> Results:
        """Scores a benchmark, or reads its results if it was scored before."""
        file = _cached(model, benchmark, [str(self._job.dtype), self._job.template])
        is_cached = distributed.is_main_process() and file.exists()
        if distributed.is_true_on_any_process(is_cached):  # Only the main process looks for the file.
            self._display.log(f"{_what(benchmark, step)} was scored before: {file}")
            return json.loads(file.read_text()) if is_cached else {}
        assert self._lm is not None
        self._lm.params = weights().params
        results = benchmarks.score(self._lm, benchmark, self._job.settings)
        if distributed.is_main_process():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, _text(results))
        return results

    def _grade(self, step: int | None, model: str, weights: Callable[[], build.LoadedModel]) -> Results:
        """Runs MT-Bench; returns its scores in the harness's form, and all its results under its own name."""
        job = self._job
        assert job.mt_bench is not None and job.encoder is not None and job.output is not None
        began = time.time()
        file = job.output.with_suffix(f".{step}.mt_bench.jsonl" if job.all_checkpoints else ".mt_bench.jsonl")
        stop_ids = [*job.encoder.stop_ids(), *job.defaults.stop_ids]
        chat = ChatModel(self._sampler, weights().params, job.encoder, stop_ids)
        answerer = functools.partial(chat.chat_batch, batch_size=job.batch_size)
        with jax.set_mesh(self._mesh):
            graded = mt_bench.run(job.mt_bench, answerer, f"{model} {job.dtype} {job.template}", file, self._watch)
        means = {key: graded[key] for key in ("score", *(f"turn_{t}" for t in mt_bench.TURNS))}
        return {
            "results": {mt_bench.NAME: {"alias": mt_bench.NAME} | {f"{key},none": mean for key, mean in means.items()}},
            "higher_is_better": {mt_bench.NAME: dict.fromkeys(means, True)},
            "n-shot": {mt_bench.NAME: 0},
            "shortened": {},
            "without_system": {},
            "not_followed": {mt_bench.NAME: list(job.defaults.ignored_fields)},
            "date": began,
            "total_evaluation_time_seconds": str(time.time() - began),
            mt_bench.NAME: graded,
        }


# ---------------------------------------------------------------------------------------- flags
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


def _mt_bench_settings(values: command.Values, defaults: GenerationDefaults) -> mt_bench.Settings | None:
    """Returns MT-Bench's questions and judge, or None if it is not among the tasks."""
    if mt_bench.NAME not in values.tasks:
        return None
    if jax.process_count() > 1:
        raise UserError(f"{mt_bench.NAME} runs in one process; this is one of {jax.process_count()}.")
    judge = make_judge(values.judge_url, values.judge_model, values.judge_key_env)
    return mt_bench.load_settings(
        judge,
        values.questions,
        values.judge_prompts,
        repeats=values.repeats,
        limit=values.limit,
        system=values.system_instruction,
        defaults=defaults,
    )


def _steps(source: ModelSource, values: command.Values) -> Sequence[int | None]:
    """Returns the checkpoints to score; None stands for the weights of a Hugging Face folder."""
    if source.kind != "run":
        if values.all_checkpoints:
            raise UserError(
                f"--all_checkpoints is for a run's workdir; --model={values.model} is a Hugging Face folder."
            )
        return [None]
    if values.all_checkpoints and source.step is not None:
        raise flag_checks.one_step_and_all()
    newest = resolve_step(source, values.step)
    if not values.all_checkpoints:
        return [newest]
    assert source.workdir is not None
    checkpoints = CheckpointReader(source.workdir)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


# ---------------------------------------------------------------------------------------- cached results
def _cached(model: str, benchmark: Benchmark, how: list[str]) -> Path:
    """Returns the file in the cache for the results of a benchmark."""
    key = hashlib.sha256(json.dumps([model, benchmark.fingerprint, *how]).encode()).hexdigest()
    return cache_folder("") / "evals" / f"{key}.json"


def _text(results: Results) -> str:
    return json.dumps(results, indent=2, default=_plain, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Converts values that JSON does not have as lm-eval does, which may be missing if only MT-Bench is run."""
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, set) else str(value)


# ---------------------------------------------------------------------------------------- printed results
def _bars(display: Display) -> Callable[[str, int, int], None]:
    """Returns a callback that shows a progress bar for each kind of work."""
    bars: dict[str, Any] = {}

    def watch(what: str, done: int, total: int) -> None:
        bar = bars.setdefault(what, display.watch(what, "requests"))
        bar(done / total, done)

    return watch


def _what(benchmark: Benchmark, step: int | None) -> str:
    return benchmark.name if step is None else f"{benchmark.name} at step {step}"


def _table(results: Results) -> Table:
    table = Table("task", "documents", "shots", "metric", "value", "stderr")
    for column in table.columns[1:3] + table.columns[4:]:
        column.justify = "right"
    for name, value in benchmarks.scores(results).items():
        task, _, metric = name.rpartition("/")
        error = results["results"][task].get(benchmarks.stderr_key(metric))
        documents = results.get("n-samples", {}).get(task, {}).get("effective", "")
        table.add_row(
            escape(task),
            str(documents),
            str(results["n-shot"].get(task, "")),
            escape(metric),
            "not finite" if value is None else f"{value:.4f}",
            f"{error:.4f}" if isinstance(error, float) else "",
        )
    return table


def _curve(workdir: RunPath, by_step: Mapping[Any, Results]) -> tuple[list[str], list[dict[str, Any]]]:
    """Writes the scores of each checkpoint to the run's workdir.

    Lines of earlier evaluations stay, as do their other metrics at the same step.

    Returns:
      A sentence about the best checkpoint for each metric, and a line of scores for each checkpoint.
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
    known = read_json(file) or {}
    write_atomically(file, json.dumps(known | benchmarks.directions(better), indent=2) + "\n")
    return [_best(name, now, high) for name, high in better.items()], now


def _best(name: str, lines: list[dict[str, Any]], higher: bool) -> str:
    """Returns a sentence about the best score and after how many samples it was reached.

    Checkpoints without a finite score, or without a judgement, are left out.
    """
    sign = -1 if higher else 1
    scored = [line for line in lines if line.get(name) is not None]
    if not scored:
        return f"{name}: no finite score"
    at = min(range(len(scored)), key=lambda i: (sign * scored[i][name], i))
    after = scored[at - 1]["samples"] if at else 0
    return (
        f"{name}: best {scored[at][name]:.4f} at step {scored[at]['step']}, reached after {after:,} to "
        f"{scored[at]['samples']:,} samples (between these two checkpoints)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; `argv` is by default that of the process."""
    return command.run(__doc__, define_evaluate, evaluate, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
