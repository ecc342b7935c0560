"""Benchmarks by the names that lm-evaluation-harness gives them: found, loaded, and scored with a model in memory.

A benchmark is whatever one name stands for: a task, a group or a tag of the harness, or a task of a folder of one's
own. Each is scored by itself, so that its results can be kept and found again by its fingerprint.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
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
from mice_jax.errors import UserError, one_line
from mice_jax.inference.generation_config import FILE, GenerationDefaults
from mice_jax.models.transformer import Params

if TYPE_CHECKING:  # what of the package reads this file alone runs without the harness
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from mice_jax.evals.harness import MiceLM

# Examples in a prompt that a name means to its users, where the harness's own file says none.
SHOTS = {"mmlu": 5}
BOOTSTRAP = 100_000  # draws that a standard error is made of, where it has no formula; the harness's own default
LEAST = (0, 4, 13)  # of the harness's versions: what is used of its inside came with this one
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}  # the harness's own
NO_FILTER = "none"
RULES = 2  # how tasks are asked and scored here; with another number, what was scored before is scored anew

Results = dict[str, Any]  # of the harness, as it would write them


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are asked: what a score depends on besides the model and the task."""

    num_fewshot: int | None = None  # None = as the task says
    limit: float | None = None  # so many documents of each task, or below 1 that fraction; None = all
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False  # examples as turns of the conversation
    system_instruction: str | None = None
    log_samples: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.num_fewshot is not None and self.num_fewshot < 0:
            wrong.append(f"num_fewshot={self.num_fewshot} must be at least 0")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            wrong.append(f"limit={self.limit} must be a number of documents, or a fraction between 0 and 1")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            wrong.append("fewshot_as_multiturn needs apply_chat_template")
        if wrong:
            raise UserError("; ".join(wrong) + ".")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    name: str
    tasks: "dict[str, Task]"  # every one that it comes down to
    groups: "dict[str, Group]"
    fingerprint: str  # of its files, its documents and the settings

    def writes(self) -> bool:
        """Whether any of its tasks has the model write answers."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())

    def metrics(self) -> dict[str, bool]:
        """What `scores` may find in its results, and whether higher is better; true where the harness does not say."""
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
    """The benchmarks of these names, with their documents; UserError where one cannot be had, or asked of the model.

    Args:
      generation, positions: the model's.
    """
    if not names:
        return []
    _check_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its remarks on its own task files are not the user's
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            "apply_chat_template is set, but the tokenizer has no chat template. Give one (chat_template), or leave it "
            "unset."
        )
    if len(set(names)) < len(names):
        raise UserError(f"tasks={','.join(names)} has one twice.")
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"include_path={include_path} is no folder; give one that holds the YAML files of tasks.")
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
    """The harness's results of a benchmark, as its own `simple_evaluate` makes them."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    began = time.time()
    os.environ["DISABLE_MULTIPROC"] = "1"  # a process that is forked while JAX's threads run may hang
    _seed()
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(SEEDS["fewshot_seed"])
    lm.cut, lm.without_system = [], 0
    try:
        results: Any = evaluate(
            lm,
            {"tasks": benchmark.tasks, "groups": benchmark.groups},
            limit=settings.limit,  # type: ignore[arg-type]  # a fraction is taken too
            bootstrap_iters=bootstrap_iters,
            log_samples=settings.log_samples,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
        )
    except Exception as e:  # a task's own code may raise anything; what is ours is raised on
        said = _why_not_scored(e, benchmark)
        if said is None:
            raise
        raise UserError(said) from e
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
        # Ours: how many requests were longer than the model's positions, and lost how many of their first tokens.
        "shortened": {benchmark.name: {"requests": len(lm.cut), "tokens": sum(lm.cut)}},
        "without_system": {benchmark.name: lm.without_system},  # prompts whose template takes no system message
        "not_followed": {benchmark.name: list(lm.generation.ignored_fields) if benchmark.writes() else []},
    }
    add_tokenizer_info(results, lm)
    return results


def _why_not_scored(error: Exception, benchmark: Benchmark) -> str | None:
    """What to say of an error out of the harness, with the task that made it; None where it is this package's own."""
    name, ours = benchmark.name, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        ours |= frame.f_globals.get("__name__", "").startswith("mice_jax.") and frame.f_code is not score.__code__
        name = next((t.task_name for t in benchmark.tasks.values() if t is frame.f_locals.get("self")), name)
    if isinstance(error, UserError):
        return f"the task {name!r}: {error}"
    if ours:
        return None
    return (
        f"the task {name!r} cannot be scored: its own code raises {type(error).__name__}, {one_line(error)}. Mend it, "
        "or leave the task out."
    )


def merged(results: Sequence[Results]) -> Results:
    """The results of several benchmarks as those of one evaluation."""
    whole: Results = {}
    for one in results:
        for key, value in one.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = whole[key] | value if both else value
    seconds = sum(float(r["total_evaluation_time_seconds"]) for r in results)
    return whole | {"date": results[0]["date"], "total_evaluation_time_seconds": str(seconds)}


def scores(results: Results) -> dict[str, float | None]:
    """Each metric by `task/metric`, or `task/metric,filter` where the harness filtered the answers first.

    None stands for what is no finite number, a perplexity beyond all bounds for one.
    """
    found: dict[str, float | None] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, by = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                found[_name(task, metric, by)] = float(value) if math.isfinite(value) else None
    return found


def higher_is_better(results: Results) -> dict[str, bool]:
    """For each of `scores`; true where the harness does not say."""
    kinds = results["higher_is_better"]
    found = {}
    for name in scores(results):
        task, _, metric = name.rpartition("/")
        found[name] = kinds.get(task, {}).get(metric.partition(",")[0]) is not False
    return found


def directions(higher: Mapping[str, bool]) -> dict[str, str]:
    """As a run's folder keeps them."""
    return {name: "max" if high else "min" for name, high in higher.items()}


def warnings(results: Results, positions: int) -> list[str]:
    """What was not asked as the tasks have it."""
    said = []
    for name, cut in results["shortened"].items():
        if cut["requests"]:
            said.append(
                f"{cut['requests']:,} requests of {name} were longer than the model's {positions} positions: they lost "
                f"their first tokens, {cut['tokens']:,} in all"
            )
    for name, count in results["without_system"].items():
        if count:
            said.append(f"the chat template takes no system message: {count:,} prompts of {name} went without theirs")
    for name, wishes in results["not_followed"].items():
        if wishes:
            said.append(
                f"the model's {FILE} has {', '.join(wishes)}, which is not done here: transformers would, and answer "
                f"{name} otherwise"
            )
    return said


def stderr_key(metric: str) -> str:
    """The harness's key of the standard error of a metric of `scores`."""
    name, _, by = metric.partition(",")
    return f"{name}_stderr,{by or NO_FILTER}"


def _name(task: str, metric: str, by: str) -> str:
    return f"{task}/{metric}" if by == NO_FILTER else f"{task}/{metric},{by}"


class BenchmarkEvaluator:
    """The benchmarks of a run, for the model as it is in memory."""

    def __init__(self, asked: Sequence[Benchmark], settings: Settings, *model: Any):
        """`model` is what a MiceLM is made of."""
        self._asked, self._settings, self._lm = asked, settings, None
        self._told: set[str] = set()
        if asked:
            from mice_jax.evals.harness import MiceLM

            self._lm = MiceLM(*model)

    def measure(self, params: Params, say: Callable[[str], None]) -> Iterator[dict[str, float | None]]:
        """`eval/<task>/<metric>` of each benchmark, one after the other; what is to be said of them is said once."""
        if self._lm is None:
            return
        self._lm.params = params
        try:
            for benchmark in self._asked:
                results = score(self._lm, benchmark, self._settings, bootstrap_iters=0)
                yield {f"eval/{name}": value for name, value in scores(results).items()}
                for warning in warnings(results, self._lm.max_length):
                    if warning not in self._told:
                        say(f"warning: {warning}")
                        self._told.add(warning)
        finally:
            self._lm.params = None  # the next step gives their memory away


# ---------------------------------------------------------------------------------------- finding and loading
def _check_harness() -> None:
    """UserError where lm-eval is missing or too old."""
    mend = "pip install 'mice_jax[eval]'"
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"benchmarks need the package lm-eval: {mend}.")
    there, least = version("lm_eval"), ".".join(map(str, LEAST))
    if tuple(int(n) for n in re.findall(r"\d+", there)[:3]) < LEAST:
        raise UserError(f"benchmarks need lm-eval {least} or newer, and {there} is installed: {mend}.")


def _manager(names: Sequence[str], include_path: str) -> Any:
    """The harness's index of tasks: of the folder's alone where that is enough, since reading its own takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_whole(name, own.task_index) for name in names):
            return own
    return TaskManager(include_path=include_path or None)


def _is_whole(name: Any, index: dict[str, Any]) -> bool:
    """Whether an index holds a name with all that it stands for."""
    if not isinstance(name, str) or name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return all(_is_whole(m, index) for m in members) if isinstance(members, list) else True


def _unknown(name: str, manager: Any, include_path: str) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    near = f"; the nearest are {', '.join(close)}" if close else ""
    said = f"there is no task {name!r}{near}."
    if include_path:
        known = {e.yaml_path for e in manager.task_index.values() if e.yaml_path}
        unread = [str(p) for p in sorted(Path(include_path).glob("**/*.yaml")) if p not in known]
        if unread:
            said += f" Of include_path={include_path} these files name no task, or cannot be read: {', '.join(unread)}."
    return said


def _load(name: str, manager: Any, include_path: str, settings: Settings) -> Benchmark:
    _seed()  # tasks may shuffle as they load: GPQA does its options
    try:
        loaded = manager.load([name])
        tasks, groups = loaded["tasks"], loaded["groups"]
        for task in tasks.values():
            _set_shots(task, settings.num_fewshot, SHOTS.get(name, 0))
        fingerprint = _fingerprint(name, tasks, include_path, settings)
    except Exception as e:  # whatever a task's files, its data and what fetches it raise
        raise UserError(f"the task {name!r} cannot be loaded: {_reason(e)}") from e
    if not tasks:
        raise UserError(f"the group {name!r} has no task.")
    return Benchmark(name, tasks, groups, fingerprint)


def _check_task(task: "Task", generation: GenerationDefaults, positions: int) -> None:
    """UserError where a task wants what there is not, before anything is computed for it."""
    from mice_jax.evals.harness import parse_generation_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {task.task_name!r} runs code that the model writes, which is not done here.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {task.task_name!r} shows more than text, which no model here can see.")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            parse_generation_kwargs(task.get_config("generation_kwargs") or {}, generation, positions)
        except UserError as e:
            raise UserError(f"the task {task.task_name!r}: {e}") from None
    if _counts_sentences(task) and not _has_punkt():
        raise UserError(
            f"the task {task.task_name!r} counts sentences with nltk's data punkt_tab, which is not here and could not "
            "be fetched: python -m nltk.downloader punkt_tab (on a machine with network; NLTK_DATA says where it lies)."
        )


def _counts_sentences(task: "Task") -> bool:
    """Whether a task is scored by code, as IFEval's, that names nltk's data and goes on where it cannot fetch it."""
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
    """UserError where two benchmarks ask one task in two ways: results are kept by the task's name."""
    for a, b in itertools.combinations(asked, 2):
        for name in sorted(a.tasks.keys() & b.tasks.keys()):
            if _text(a.tasks[name].dump_config()) != _text(b.tasks[name].dump_config()):
                shots = [x.tasks[name].get_config("num_fewshot") for x in (a, b)]
                raise UserError(
                    f"the tasks {a.name} and {b.name} both ask {name}, but not alike: with {shots[0]} and {shots[1]} "
                    "examples in a prompt. Score them by two commands, or give num_fewshot."
                )


def _seed() -> None:
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])


def _set_shots(task: "Task", asked: int | None, usual: int) -> None:
    """As the harness does: what is asked for stands, but where a task has no examples on purpose."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=usual)


def _reason(error: Exception) -> str:
    """Why loading failed, with the mend where a package is missing."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or not cause.name:
        return f"{one_line(cause or error)}."
    module = cause.name.partition(".")[0]
    return f"it needs the package {module}: pip install {_package_of(module)!r}."


def _package_of(module: str) -> str:
    """What to install for a module: the harness's own extra, where it has one of that name, or that begins with it."""
    extras: dict[str, str] = {}
    for requirement in requires("lm_eval") or []:
        if found := re.match(r"([\w.-]+).*;\s*extra == [\"']([\w-]+)[\"']", requirement):
            extras.setdefault(found[1].lower().replace("-", "_"), found[2])
    wanted = module.lower()
    near = [extra for package, extra in extras.items() if package.startswith(f"{wanted}_")]
    extra = extras.get(wanted, near[0] if near else None)
    return f"lm-eval[{extra}]" if extra else module


def _fingerprint(name: str, tasks: "dict[str, Task]", include_path: str, settings: Settings) -> str:
    """Of all that a benchmark's results depend on but the model: code, files, documents, settings."""
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
    if not isinstance(value, Callable):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__name__)
