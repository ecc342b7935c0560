"""Benchmarks by the names that lm-evaluation-harness gives them: found, loaded, and scored with a model in memory.

A benchmark is whatever one name stands for: a task, a group or a tag of the harness, or a task of a folder of one's
own. Each is scored by itself, so that its results can be kept and found again by its fingerprint.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mice_jax import __version__
from mice_jax.errors import UserError, one_line
from mice_jax.models.transformer import Params

if TYPE_CHECKING:  # what of the package reads this file alone runs without the harness
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from mice_jax.evals.harness import MiceLM

# Examples in a prompt that a name means to its users, where the harness's own file says none.
SHOTS = {"mmlu": 5}
BOOTSTRAP = 100_000  # draws that a standard error is made of, where it has no formula; the harness's own default
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}  # the harness's own
NO_FILTER = "none"

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

    def metric_names(self) -> list[str]:
        """What `scores` may find in its results."""
        names = []
        for task in self.tasks.values():
            filters = [f.name for f in task._filters]
            names += [_name(task.task_name, m, f) for m in task.aggregation() or () for f in filters]
        for group in self.groups.values():
            filters = sorted({f.name for t in group.get_all_tasks() for f in t._filters})
            metrics = [a.metric for a in group.aggregate_metric_list or []]
            names += [_name(group.name, m, f) for m in metrics for f in filters]
        return names


def load_benchmarks(
    names: Sequence[str], include_path: str, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> list[Benchmark]:
    """The benchmarks of these names, with their documents; UserError where one cannot be had."""
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks need the package lm-eval: pip install 'mice_jax[eval]'.")
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
    return [_load(name, manager, include_path, settings) for name in names]


def score(lm: "MiceLM", benchmark: Benchmark, settings: Settings, *, bootstrap_iters: int = BOOTSTRAP) -> Results:
    """The harness's results of a benchmark, as its own `simple_evaluate` makes them."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    began = time.time()
    os.environ["DISABLE_MULTIPROC"] = "1"  # a process that is forked while JAX's threads run may hang
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(SEEDS["fewshot_seed"])
    lm.cut, lm.without_system = [], 0
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
    }
    add_tokenizer_info(results, lm)
    return results


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
    return said


def stderr_key(metric: str) -> str:
    """The harness's key of the standard error of a metric of `scores`."""
    name, _, by = metric.partition(",")
    return f"{name}_stderr,{by or NO_FILTER}"


def _name(task: str, metric: str, by: str) -> str:
    return f"{task}/{metric}" if by == NO_FILTER else f"{task}/{metric},{by}"


class InTraining:
    """The benchmarks of a run, for the model as it is in memory."""

    def __init__(self, asked: Sequence[Benchmark], settings: Settings, *model: Any):
        """`model` is what a MiceLM is made of."""
        self._asked, self._settings, self._lm = asked, settings, None
        self._told: set[str] = set()
        if asked:
            from mice_jax.evals.harness import MiceLM

            self._lm = MiceLM(*model)

    def measure(self, params: Params, say: Callable[[str], None]) -> dict[str, float | None]:
        """`eval/<task>/<metric>` of them all; what is to be said of them is said once."""
        found: dict[str, float | None] = {}
        if self._lm is None:
            return found
        self._lm.params = params
        for benchmark in self._asked:
            results = score(self._lm, benchmark, self._settings, bootstrap_iters=0)
            found |= {f"eval/{name}": value for name, value in scores(results).items()}
            for warning in warnings(results, self._lm.max_length):
                if warning not in self._told:
                    say(f"warning: {warning}")
                    self._told.add(warning)
        self._lm.params = None  # the next step gives their memory away
        return found


# ---------------------------------------------------------------------------------------- finding and loading
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
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"the task {task.task_name!r} runs code that the model writes, which is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {task.task_name!r} shows more than text, which no model here can see.")
    return Benchmark(name, tasks, groups, fingerprint)


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
    """What to install for a module: the harness's own extra, where it has one."""
    for requirement in requires("lm_eval") or []:
        found = re.match(r"([\w.-]+).*;\s*extra == [\"']([\w-]+)[\"']", requirement)
        if found and f"{found[1]}_".lower().replace("-", "_").startswith(f"{module}_".lower()):
            return f"lm-eval[{found[2]}]"
    return module


def _fingerprint(name: str, tasks: "dict[str, Task]", include_path: str, settings: Settings) -> str:
    """Of all that a benchmark's results depend on but the model: code, files, documents, settings."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=_described).encode())

    add([__version__, version("lm_eval"), name, dataclasses.asdict(settings)])
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


def _described(value: Any) -> str:
    if not isinstance(value, Callable):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__name__)
