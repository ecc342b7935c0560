"""Loads benchmarks of lm-evaluation-harness by name and scores them with a model in memory.

The name of a benchmark stands for a task, a group or a tag of the harness, or for a task from the user's folder. Each
benchmark is scored separately, so that its results can be cached by its fingerprint.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mice_jax import __version__
from mice_jax.cli.flag_checks import check_scoring
from mice_jax.cli.task_names import check_harness, check_include_path, describe_unknown
from mice_jax.errors import UserError, did_you_mean, one_line, sentence
from mice_jax.inference.generation_config import FILE, GenerationDefaults
from mice_jax.models.transformer import Params

if TYPE_CHECKING:  # Modules that import this one must run without lm-eval, which is an optional dependency.
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from mice_jax.evals.harness import MiceLM

# The usual number of few-shot examples of benchmarks whose task files in the harness do not set one.
SHOTS = {"mmlu": 5}
# The number of bootstrap samples for standard errors that have no formula. It is the harness's default.
BOOTSTRAP = 100_000
# The harness's default seeds.
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
# The harness's name for the absence of a filter of answers.
NO_FILTER = "none"
# The version of how this package asks and scores tasks. A new number invalidates all cached results.
RULES = 2

Results = dict[str, Any]  # Results in the harness's own format.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are asked. A score depends on these settings besides the model and the task.

    Attributes:
      num_fewshot: The number of few-shot examples in a prompt; None takes the task's own number.
      limit: The number of documents of each task, or below 1 a fraction of them; None takes all.
      apply_chat_template: Whether prompts are rendered with the chat template.
      fewshot_as_multiturn: Whether few-shot examples are separate turns of the conversation.
      system_instruction: The system message; None sends none.
      log_samples: Whether the results contain every prompt and answer.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    log_samples: bool = False

    def __post_init__(self) -> None:
        check_scoring(self.num_fewshot, self.limit, self.apply_chat_template, self.fewshot_as_multiturn)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark with its documents.

    Attributes:
      name: The name that the user gave.
      tasks: All tasks that the name stands for, by name.
      groups: All groups that the name stands for, by name.
      fingerprint: A hash of the task files, the documents and the settings.
    """

    name: str
    tasks: "dict[str, Task]"
    groups: "dict[str, Group]"
    fingerprint: str

    def writes(self) -> bool:
        """Returns whether the model generates answers in any of the tasks."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())

    def metrics(self) -> dict[str, bool]:
        """Returns whether higher is better for each metric that `scores` may find in the results.

        It is true for a metric for which the harness does not specify it.
        """
        found = {}
        for task in self.tasks.values():
            better = task.higher_is_better() or {}
            for metric in task.aggregation() or ():
                found |= {_name(task.task_name, metric, f.name): better.get(metric) is not False for f in task._filters}
        for group in self.groups.values():
            members = group.get_all_tasks()
            filters = sorted({f.name for t in members for f in t._filters})
            for metric in (a.metric for a in group.aggregate_metric_list or ()):
                higher = all((t.higher_is_better() or {}).get(metric) is not False for t in members)
                found |= {_name(group.name, metric, f): higher for f in filters}
        return found


def load_benchmarks(
    names: Sequence[str],
    include_path: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationDefaults,
    positions: int,
) -> list[Benchmark]:
    """Loads benchmarks with their documents.

    Args:
      names: The names of the benchmarks.
      include_path: A folder with the YAML files of further tasks; "" adds none.
      settings: How the tasks are asked.
      tokenizer: The model's tokenizer.
      generation: The model's generation defaults.
      positions: The number of the model's positions.

    Returns:
      The benchmarks, in the order of the names.

    Raises:
      UserError: A benchmark cannot be loaded, or the model cannot be asked one of its tasks.
    """
    if not names:
        return []
    check_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # Its warnings concern its own task files.
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            "apply_chat_template is set, but the tokenizer has no chat template. Give one (chat_template), or leave it "
            "unset."
        )
    if len(set(names)) < len(names):
        raise UserError(f"tasks={','.join(names)} names a benchmark twice.")
    check_include_path(include_path)
    manager = _manager(names, include_path)
    unknown = [n for n in names if n not in manager.task_index]
    if unknown:
        raise UserError(_unknown(unknown[0], manager, include_path))
    asked = [_load(name, manager, include_path, settings) for name in names]
    for task in (t for benchmark in asked for t in benchmark.tasks.values()):
        _check_task(task, generation, positions)
    _check_apart(asked)
    return asked


def score(lm: "MiceLM", benchmark: Benchmark, settings: Settings, *, bootstrap_iters: int = BOOTSTRAP) -> Results:
    """Scores a benchmark in the same way as the harness's `simple_evaluate`.

    Args:
      lm: The model, with its parameters set.
      benchmark: The benchmark.
      settings: How the tasks are asked.
      bootstrap_iters: The number of bootstrap samples for standard errors without a formula; 0 computes none of these.

    Returns:
      The results in the harness's format, with added fields for the warnings.

    Raises:
      UserError: The code of a task raises an error.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    began = time.time()
    os.environ["DISABLE_MULTIPROC"] = "1"  # A process that is forked from a JAX process may hang.
    _seed()
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(SEEDS["fewshot_seed"])
    lm.cut, lm.without_system = [], 0
    try:
        results: Any = evaluate(
            lm,
            {"tasks": benchmark.tasks, "groups": benchmark.groups},
            limit=settings.limit,  # type: ignore[arg-type]  # The harness also accepts a fraction.
            bootstrap_iters=bootstrap_iters,
            log_samples=settings.log_samples,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
        )
    except Exception as e:  # A task's own code may raise anything. Errors of this package are raised again.
        reason = _why_not_scored(e, benchmark)
        if reason is None:
            raise
        raise UserError(reason) from e
    results["config"] = {
        "model": "mice_jax",
        "model_args": None,
        "batch_size": lm.batch_size,
        "limit": settings.limit,
        "bootstrap_iters": bootstrap_iters,
        "gen_kwargs": None,
        **SEEDS,
    }
    results |= {
        "date": began,
        "lm_eval_version": version("lm_eval"),
        "transformers_version": version("transformers"),
        "system_instruction": settings.system_instruction,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn,
        "chat_template": lm.chat_template(True) if settings.apply_chat_template else None,
        "total_evaluation_time_seconds": str(time.time() - began),
        # These three fields are not the harness's. Requests longer than the model's positions lose their first tokens.
        "shortened": {benchmark.name: {"requests": len(lm.cut), "tokens": sum(lm.cut)}},
        "without_system": {benchmark.name: lm.without_system},
        "not_followed": {benchmark.name: list(lm.generation.ignored_fields) if benchmark.writes() else []},
    }
    add_tokenizer_info(results, lm)
    return results


def _why_not_scored(error: Exception, benchmark: Benchmark) -> str | None:
    """Returns the message of an error that the harness raised, with the task that caused it.

    It is None for an error in the code of this package.
    """
    name, ours = benchmark.name, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        ours |= frame.f_globals.get("__name__", "").startswith("mice_jax.") and frame.f_code is not score.__code__
        name = next((t.task_name for t in benchmark.tasks.values() if t is frame.f_locals.get("self")), name)
    if isinstance(error, UserError):
        return f"the task {name!r}: {error}"
    if ours:
        return None
    return (
        f"the task {name!r} cannot be scored: its own code raises {type(error).__name__}, {one_line(error)}. Fix it, "
        "or leave the task out."
    )


def merged(results: Sequence[Results]) -> Results:
    """Merges the results of several benchmarks into those of one evaluation."""
    whole: Results = {}
    for one in results:
        for key, value in one.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = whole[key] | value if both else value
    seconds = sum(float(r["total_evaluation_time_seconds"]) for r in results)
    return whole | {"date": results[0]["date"], "total_evaluation_time_seconds": str(seconds)}


def scores(results: Results) -> dict[str, float | None]:
    """Returns each metric by `task/metric`, or by `task/metric,filter` if the harness filtered the answers.

    A value that is not finite, such as an infinite perplexity, is None.
    """
    found: dict[str, float | None] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, by = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                found[_name(task, metric, by)] = float(value) if math.isfinite(value) else None
    return found


def higher_is_better(results: Results) -> dict[str, bool]:
    """Returns whether higher is better for each of `scores`; true if the harness does not specify it."""
    kinds = results["higher_is_better"]
    found = {}
    for name in scores(results):
        task, _, metric = name.rpartition("/")
        found[name] = kinds.get(task, {}).get(metric.partition(",")[0]) is not False
    return found


def directions(higher: Mapping[str, bool]) -> dict[str, str]:
    """Returns the direction of each metric, "max" or "min", as a run's workdir stores them."""
    return {name: "max" if high else "min" for name, high in higher.items()}


def warnings(results: Results, positions: int) -> list[str]:
    """Returns warnings about prompts that differ from what the tasks specify.

    Args:
      results: The results of one or more benchmarks.
      positions: The number of the model's positions.
    """
    found = []
    for name, cut in results["shortened"].items():
        if cut["requests"]:
            found.append(
                f"{cut['requests']:,} requests of {name} were longer than the model's {positions} positions: they lost "
                f"their first tokens, {cut['tokens']:,} in all"
            )
    for name, count in results["without_system"].items():
        if count:
            found.append(
                f"the chat template takes no system message: {count:,} prompts of {name} were rendered without theirs"
            )
    for name, wishes in results["not_followed"].items():
        if wishes:
            found.append(
                f"the model's {FILE} has {', '.join(wishes)}, which is not supported: transformers applies it, so its "
                f"answers to {name} may differ"
            )
    return found


def stderr_key(metric: str) -> str:
    """Returns the harness's key for the standard error of a metric of `scores`."""
    name, _, by = metric.partition(",")
    return f"{name}_stderr,{by or NO_FILTER}"


def _name(task: str, metric: str, by: str) -> str:
    return f"{task}/{metric}" if by == NO_FILTER else f"{task}/{metric},{by}"


class BenchmarkEvaluator:
    """Scores the benchmarks of a run with the model that is in memory."""

    def __init__(self, asked: Sequence[Benchmark], settings: Settings, *model: Any):
        """Makes the harness's model.

        Args:
          asked: The benchmarks.
          settings: How their tasks are asked.
          *model: The arguments of `MiceLM`.
        """
        self._asked, self._settings, self._lm = asked, settings, None
        self._told: set[str] = set()
        if asked:
            from mice_jax.evals.harness import MiceLM

            self._lm = MiceLM(*model)

    def measure(self, params: Params, log: Callable[[str], None]) -> Iterator[dict[str, float | None]]:
        """Yields the scores of one benchmark after the other, by `eval/<task>/<metric>`.

        Args:
          params: The parameters to score.
          log: Called with each warning, once in the lifetime of this object.
        """
        if self._lm is None:
            return
        self._lm.params = params
        try:
            for benchmark in self._asked:
                results = score(self._lm, benchmark, self._settings, bootstrap_iters=0)
                yield {f"eval/{name}": value for name, value in scores(results).items()}
                for warning in warnings(results, self._lm.max_length):
                    if warning not in self._told:
                        log(f"warning: {warning}")
                        self._told.add(warning)
        finally:
            self._lm.params = None  # The next step of training donates these arrays.


# ---------------------------------------------------------------------------------------- finding and loading
def _manager(names: Sequence[str], include_path: str) -> Any:
    """Returns the harness's index of tasks.

    It has only the user's folder if that has all names, because reading the harness's own tasks takes seconds.
    """
    from datasets import disable_progress_bars  # The harness depends on it.
    from lm_eval.tasks import TaskManager

    disable_progress_bars()  # Progress is shown by cli/progress_display.py.
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_whole(name, own.task_index) for name in names):
            return own
    return TaskManager(include_path=include_path or None)


def _is_whole(name: Any, index: dict[str, Any]) -> bool:
    """Returns whether an index has a name and all tasks that the name stands for."""
    if not isinstance(name, str) or name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return all(_is_whole(m, index) for m in members) if isinstance(members, list) else True


def _unknown(name: str, manager: Any, include_path: str) -> str:
    """Returns the error message for a name that is not in the index of tasks."""
    message = describe_unknown(name, manager.all_tasks)
    if include_path:
        known = {e.yaml_path for e in manager.task_index.values() if e.yaml_path}
        unread = [path for path in sorted(Path(include_path).glob("**/*.yaml")) if path not in known]
        if unread:
            files = ", ".join(map(str, unread))
            message += f" In include_path={include_path}, these files define no task or cannot be read: {files}."
    return message


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Keeps a logger from printing anything below a critical error."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _not_loaded(name: str, entry: Any, error: Exception) -> str:
    """Returns the error message for a task that the harness knows but cannot load.

    Args:
      name: The name of the task.
      entry: What the harness's index has about it.
      error: What the harness raised.
    """
    from jinja2 import UndefinedError
    from lm_eval.api.registry import metric_registry

    asked = [m.get("metric") for m in (entry.cfg or {}).get("metric_list") or () if isinstance(m, dict)]
    unknown = [metric for metric in asked if isinstance(metric, str) and metric not in metric_registry]
    if isinstance(error, UndefinedError):
        reason = f"{one_line(error)} in one of its templates. A template can use the columns of the task's documents."
    elif isinstance(error, FileNotFoundError):
        reason = f"{sentence(one_line(error))} Paths in data_files are relative to {Path.cwd()}."
    elif unknown:
        known = sorted(metric_registry)
        near = did_you_mean(unknown[0], known, f"; the harness has {', '.join(known)}.")
        reason = f"its metric {unknown[0]!r} is not known{near}"
    else:
        reason = _reason(error)
    of_file = f" of {entry.yaml_path}" if entry.yaml_path else ""
    return f"the task {name!r}{of_file} cannot be loaded: {reason}"


def _load(name: str, manager: Any, include_path: str, settings: Settings) -> Benchmark:
    _seed()  # Some tasks draw random numbers when they load: GPQA shuffles its options.
    try:
        # The harness prints its own errors before it raises them.
        with _silent("lm_eval.api.registry"):
            loaded = manager.load([name])
        tasks, groups = loaded["tasks"], loaded["groups"]
        for task in tasks.values():
            _set_shots(task, settings.num_fewshot, SHOTS.get(name, 0))
        fingerprint = _fingerprint(name, tasks, include_path, settings)
    except Exception as e:  # The files of a task, its data and their download may raise anything.
        raise UserError(_not_loaded(name, manager.task_index[name], e)) from e
    if not tasks:
        raise UserError(f"the group {name!r} has no task.")
    return Benchmark(name, tasks, groups, fingerprint)


def _check_task(task: "Task", generation: GenerationDefaults, positions: int) -> None:
    """Raises UserError if a task needs a feature that is missing here, before anything is computed for it."""
    from mice_jax.evals.harness import parse_generation_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {task.task_name!r} runs code that the model writes, which is not supported.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {task.task_name!r} has inputs other than text, which are not supported.")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            parse_generation_kwargs(task.get_config("generation_kwargs") or {}, generation, positions)
        except UserError as e:
            raise UserError(f"the task {task.task_name!r}: {e}") from None
    if _counts_sentences(task) and not _has_punkt():
        raise UserError(
            f"the task {task.task_name!r} counts sentences with nltk's data punkt_tab, which is not installed and "
            "could not be downloaded. Run python -m nltk.downloader punkt_tab on a machine with network access, and "
            "set NLTK_DATA to the folder with the data."
        )


def _counts_sentences(task: "Task") -> bool:
    """Returns whether the scoring code of a task uses nltk's data punkt_tab.

    Such code, for example that of IFEval, continues silently if it cannot download the data.
    """
    scores_by = task.get_config("process_results")
    if not inspect.isfunction(scores_by):
        return False
    beside = Path(inspect.getfile(scores_by)).parent.glob("*.py")
    return any("punkt_tab" in file.read_text(errors="replace") for file in beside)


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _check_apart(asked: Sequence[Benchmark]) -> None:
    """Raises UserError if two benchmarks ask one task in two ways, because results are stored by the task's name."""
    for a, b in itertools.combinations(asked, 2):
        for name in sorted(a.tasks.keys() & b.tasks.keys()):
            if _text(a.tasks[name].dump_config()) != _text(b.tasks[name].dump_config()):
                shots = [x.tasks[name].get_config("num_fewshot") for x in (a, b)]
                raise UserError(
                    f"the tasks {a.name} and {b.name} both contain {name}, but with different settings: {shots[0]} and "
                    f"{shots[1]} examples in a prompt. Score them with two commands, or set num_fewshot."
                )


def _seed() -> None:
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])


def _set_shots(task: "Task", asked: int | None, usual: int) -> None:
    """Sets a task's number of few-shot examples as the harness does.

    Args:
      task: The task, which is changed.
      asked: The user's number, which a task that is zero-shot by its own config ignores; None keeps the task's number.
      usual: The number for a task that does not set one.
    """
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=usual)


def _reason(error: Exception) -> str:
    """Returns why loading failed, and how to install the package that is missing, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or not cause.name:
        return f"{one_line(cause or error)}."
    module = cause.name.partition(".")[0]
    return f"it needs the package {module}: pip install {_package_of(module)!r}."


def _package_of(module: str) -> str:
    """Returns the package to install for a module: an extra of the harness if one has it, else the module's name."""
    extras: dict[str, str] = {}
    for requirement in requires("lm_eval") or []:
        if found := re.match(r"([\w.-]+).*;\s*extra == [\"']([\w-]+)[\"']", requirement):
            extras.setdefault(found[1].lower().replace("-", "_"), found[2])
    wanted = module.lower()
    near = [extra for package, extra in extras.items() if package.startswith(f"{wanted}_")]
    extra = extras.get(wanted, near[0] if near else None)
    return f"lm-eval[{extra}]" if extra else module


def _fingerprint(name: str, tasks: "dict[str, Task]", include_path: str, settings: Settings) -> str:
    """Returns a hash of all that a benchmark's results depend on except the model: code, files, documents, settings."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(_text(value).encode())

    add([RULES, __version__, version("lm_eval"), name, dataclasses.asdict(settings)])
    for task in tasks.values():
        add(task.dump_config())
        for doc in task.eval_docs:
            add(doc)
        if task.get_config("num_fewshot"):
            for doc in task.fewshot_docs() or ():
                add(doc)
    for file in sorted(Path(include_path).rglob("*")) if include_path else ():
        if file.suffix in (".py", ".yaml"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_described)


def _described(value: Any) -> str:
    """Converts values that JSON does not have to strings: a function to its source code."""
    if not isinstance(value, Callable):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__name__)
